"""How a run ends: its report.html and its table for the terminal, of every method's outcome and row of figures.

A domain's judge says how its samples are drawn; what stands where, and which of them, is decided here, the same for every domain.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from rgdiff.runtime import tables
from rgdiff.runtime.report import (
    INK,
    Boxes,
    Card,
    Comparison,
    Grid,
    Histogram,
    Plot,
    Report,
    Series,
    Whole,
    plot_rows,
    write_report,
)
from rgdiff.runtime.run import Run
from rgdiff.runtime.tables import sweep_table, table  # noqa: F401  what the command line prints

FIGURES = 4  # on the page; others are folded
OVERLAID = 4  # histograms in one figure, at most; of more samples, a line each
TILES = {3: 24, 8: 16}  # samples of a method that are shown where there are so many methods, or fewer; else `FEW`
FEW = 8
FOLDED = 24  # samples of another set, folded
PROMPTS, ACROSS = 12, 15  # conditions in a table of samples, and samples across it, 2 to 4 a cell, at most
NAMED = ("best", "median", "worst")
NATURAL = (
    "kl",
    "frechet",
    "sliced_w2",
    "off_support",
    "distance",
    "histogram_distance",
    "diversity",
)  # of a trade-off, the first known
HEADED = ("heldout_accuracy", "heldout_reward_mean", "reward_mean", "energy_auc")
STEPS = "denoising move, from noise to sample"
AXES = {  # of curves whose title does not say them: title -> (label of x, label of y)
    "value along the chain": (STEPS, "value of what is chosen, reward's unit"),
    "effective sample size": (STEPS, "effective sample size, particles"),
    "log Z": (STEPS, "log Z so far, nats"),
    "tempering": (STEPS, "share of the reward in force"),
    "held-out variance of the reward explained, by t": ("time t (1 noise, 0 sample)", "share of the variance explained"),
    "bias, by t": ("time t (1 noise, 0 sample)", "bias, reward's unit"),
    "reward against distance from the data's support": ("distance from the data's support", "reward"),
    "quadratic cost of a step per dimension (1/2 at rest)": ("training iteration", "cost per dimension"),
}  # fmt: skip


def write_pages(
    run: Run,
    config: dict,
    overrides: Sequence[str],
    name: str,
    judge: Any,
    task: Any,
    prior: Any,
    outcomes: dict,
    rows: dict,
    stopped: Sequence[str],
) -> None:
    """Write report.html: samples beside the prior's, a sentence for each method, figures, the table, the config, why methods stopped."""
    scores = {key: judge.scores(outcome.x0, task) for key, outcome in outcomes.items()}
    shown, more = figures(run, judge, task, prior, outcomes, rows, scores)
    reference = next(iter(rows.values()))
    report = Report(
        title=config.get("title", name),
        command=" ".join(["rgdiff run", name, *overrides]),
        versions=run.folder.versions,
        warnings=[f"Stopped: {reason}" for reason in stopped],
        cards=cards(judge, task, prior, outcomes, rows, scores),
        compared=compared(judge, task, prior, outcomes, scores),
        words=[(key, tables.sentence(key, row, reference)) for key, row in rows.items()],
        plots=shown,
        more=more,
        table=rows,
        notes=judge.notes(task),
        config=(run.folder.path / "config.yaml").read_text(encoding="utf-8"),
    )
    write_report(run.folder.path / "report.html", report)


def write_sweep(
    path: str | os.PathLike[str], title: str, runs: Sequence[Mapping[str, Any]], swept: Sequence[str], command: str = ""
) -> None:
    """Write the page of a sweep: a sentence for every run and method, the reward by what was swept, the table, links to the runs' pages.

    Args:
      path: of the page; `out` of a run is the folder of that run, beside the page.
      runs, swept: as `rgdiff.runtime.tables.sweep_table`.
    """
    rows = tables.sweep_rows(runs, swept)
    links = {
        tables.run_label(run, runs, swept) or f"run {place}": f"{os.path.basename(str(run['out']))}/report.html"
        for place, run in enumerate(runs)
        if "out" in run
    }
    prior = rows.get("prior", {})
    warnings = [f"Stopped: {run['stopped']}" for run in runs if "stopped" in run]
    words = [(key, tables.sentence(key, row, prior or row)) for key, row in rows.items()]
    plots = [*swept_figures(runs, swept), *trade_offs(rows, numbered({}, rows))][:FIGURES]
    write_report(path, Report(title, command, warnings=warnings, words=words, plots=plots, table=rows, links=links))


def swept_figures(runs: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> list[Plot]:
    """Return the reward, the held-out reward and the path KL of every method by a setting, where one alone is swept, and is a number."""
    keys = tables.changed(runs, swept)
    if len(keys) != 1:
        return []
    at = []
    for run in runs:
        try:
            at.append(float(run[keys[0]]))
        except (TypeError, ValueError):
            return []
    methods = dict.fromkeys(
        name.rpartition("/")[0] for run in runs for name in run if "/" in name and name not in swept
    )
    plots = []
    for figure in ("reward_mean", "heldout_reward_mean", "kl"):
        series = []
        for number, method in enumerate(method for method in methods if method and method != "prior"):
            values = [(x, run.get(f"{method}/{figure}")) for x, run in zip(at, runs, strict=True)]
            points = sorted((x, y) for x, y in values if tables.known(y))
            if points:
                series.append(Series(method, *zip(*points, strict=True), color=number))
        if series:
            label = _axis(figure)
            plots.append(Plot(f"{label}, by {keys[0]}", series, keys[0], label))
    return plots


def cards(
    judge: Any, task: Any, prior: Any, outcomes: dict[str, Any], rows: dict[str, Any], scores: dict[str, Any]
) -> list[Card]:
    """Return a card for the data and the prior, and one for every method with the prior beside it; none where nothing is drawn."""
    data, shown = judge.references(task), outcomes if judge.pictured else {}
    every = {("", title): x0 for title, x0 in data.items()}
    for key, outcome in shown.items():
        every |= {(key, ""): outcome.x0} | {(key, what): x0 for what, x0 in outcome.shown.items()}
    wholes = judge.show_all(every, task) if every else {}
    count = next((tiles for most, tiles in TILES.items() if len(shown) - 1 <= most), FEW)
    few = 3 * (count // 8)
    known = []
    for title, x0 in data.items():
        some = _take(x0, slice(0, None, max(1, _length(x0) // count)))
        some = _take(some, slice(few if shown else count))
        known.append(
            [*_whole(title, wholes.get(("", title))), *_each(judge, title, some, columns=3 if shown else None)]
        )
    out: list[Card] = []
    for place, (key, outcome) in enumerate(shown.items()):
        of = lambda k, n, c: _set(judge, k, outcomes[k], scores[k], wholes.get((k, "")), n, c)  # noqa: E731
        sets = [*(known if not place else [of(next(iter(shown)), few, 3)]), of(key, count, None)]
        sets += [[Whole(f"{key}: {what}", drawing)] for what, drawing in judge.show_exact(outcome, task, prior).items()]
        more: list[Any] = [[Whole(title, image)] for title, images in outcome.pictures.items() for image in images]
        for what, x0 in outcome.shown.items():
            title = f"{key}: {what}"
            more.append([*_whole(title, wholes.get((key, what))), *_each(judge, title, _take(x0, slice(FOLDED)))])
        sets, more = [one for one in sets if one], [one for one in more if one]
        if sets:
            out.append(Card(key, sets, more, rows[key].get("over_optimised", "")))
    return out or ([Card("The data", known)] if any(known) else [])


def compared(judge: Any, task: Any, prior: Any, outcomes: dict[str, Any], scores: dict[str, Any]) -> Comparison | None:
    """Return the table of samples by condition and method, with the mean reward of each cell; None without several conditions."""
    counts = {_length(outcome.x0) for outcome in outcomes.values()}
    of = judge.rows_of(min(counts), task, prior) if judge.pictured else {}
    of = {name: list(places) for name, places in list(of.items())[:PROMPTS] if len(places)}
    if not of:
        return None
    cell = max(2, min(4, ACROSS // len(outcomes)))
    drawn = [[judge.show_each(_take(o.x0, places[:cell])) for o in outcomes.values()] for places in of.values()]
    labels: list[list[str]] = []
    if all(values is not None for values in scores.values()):
        said = rounded(np.concatenate([np.asarray(values, np.float64) for values in scores.values()]))
        labels = [[said(np.mean(np.asarray(values)[places])) for values in scores.values()] for places in of.values()]
    title = "Prompts by methods" + (", with the mean reward of all samples of a cell" if labels else "")
    return Comparison(title, list(of), list(outcomes), drawn, labels)


def _take(x0: Any, places: Any) -> Any:
    """Return some of the samples, of every part of a state that has several."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[places], x0)


def _length(x0: Any) -> int:
    return len(jax.tree.leaves(x0)[0])


def _whole(title: str, drawing: Any, marks: Mapping[str, Any] | None = None, caption: str = "") -> list[Any]:
    return [] if drawing is None else [Whole(title, drawing, marks or {}, caption)]


def _each(judge: Any, title: str, x0: Any, labels: Sequence[str] = (), columns: int | None = None) -> list[Any]:
    drawn = judge.show_each(x0) if _length(x0) else None
    if drawn is not None and not labels and isinstance(drawn[0], str):
        drawn = drawn[:: max(1, len(drawn) // 3)][:3]
    return [] if drawn is None else [Grid(title, drawn, labels, columns=columns)]


def _set(
    judge: Any, key: str, outcome: Any, scores: Any, whole: Any, count: int, columns: int | None = None
) -> list[Any]:
    """Draw all samples of a method together, and the best, the median and the worst by themselves, then the first of the others."""
    order, said = best_median_worst(scores), rounded(scores)
    points = getattr(whole, "points", None)
    marks = {} if points is None else {name: points[place] for name, place in order.items()}
    others = [place for place in range(min(_length(outcome.x0), count + 3)) if place not in order.values()]
    places = [*order.values(), *others][:count]
    drawn = judge.show_each(_take(outcome.x0, places))
    named_only = whole is not None or (drawn is not None and isinstance(drawn[0], str) and drawn[0][:4] != "<svg")
    if drawn is not None and named_only:  # where all samples are in one drawing, and of lines of letters
        places, drawn = places[: len(order) or 3], drawn[: len(order) or 3]
    names = [*order, *[""] * len(places)]
    labels = [] if scores is None else [f"{n} {said(scores[p])}".strip() for n, p in zip(names, places, strict=False)]
    if drawn is None:
        return _whole(key, whole, marks, f"reward: {', '.join(labels[: len(order)])}" if marks else "")
    return [*_whole(key, whole, marks), Grid(key, drawn, labels, columns=columns)]


def best_median_worst(scores: Any) -> dict[str, int]:
    """Return the places of the best, the median and the worst reward; infeasible samples have none, and a place has one name."""
    if scores is None:
        return {}
    values = np.asarray(scores, np.float64)
    order = np.argsort(-values, kind="stable")
    order = order[np.isfinite(values[order])]
    if not len(order):
        return {}
    places = {"best": int(order[0]), "median": int(order[len(order) // 2]), "worst": int(order[-1])}
    if len(order) == 2:
        del places["median"]
    return places if len(order) > 1 else {"the only one": int(order[0])}


def rounded(scores: Any) -> Callable[[Any], str]:
    """Return how the rewards of a set are written: to a hundredth of what they span, infeasible ones as such."""
    values = np.asarray([] if scores is None else scores, np.float64)
    values = values[np.isfinite(values)]
    span = float(np.ptp(values)) if len(values) else 0.0
    digits = min(max(2 - math.floor(math.log10(span)), 0), 6) if span > 0 else 2

    def said(value: Any) -> str:
        if not np.isfinite(value):
            return "infeasible"
        return f"{round(float(value), digits) + 0.0:.{digits}f}".replace("-", "−")

    return said


def figures(
    run: Run, judge: Any, task: Any, prior: Any, outcomes: dict[str, Any], rows: dict[str, Any], scores: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    """Return the figures of the page, and those that are folded."""
    colors = numbered(outcomes, rows)
    first: list[Any] = []
    for histogram in (Histogram(*arguments) for arguments in judge.histograms(outcomes, task, prior)):
        names = histogram.values if isinstance(histogram.values, Mapping) else {}
        first.append(replace(histogram, colors=[colors.get(name, i) for i, name in enumerate(names)]))
    for title, (xlabel, ylabel, curves) in judge.curves(rows).items():
        first.append(Plot(title, [Series(key, *c, color=colors[key]) for key, c in curves.items()], xlabel, ylabel))
    if not first:
        first = rewards_of_samples(judge, task, prior, outcomes, scores, colors)
    curves = [Plot(title, series, *axes(title)) for title, series in shared(outcomes, colors).items()]
    curves.sort(key=lambda plot: (-len({s.color for s in plot.series}), "reward" not in plot.title))
    trade = trade_offs(rows, colors)
    main, rest = [*first[:2], *trade[:1]], [*first[2:], *trade[1:]]
    room = max(FIGURES - len(main), 0)
    rest = [*curves[room:], *rest]
    if any(row["phase"] == "prior" for row in run.log.rows):
        loss = plot_rows(run.log.rows, ["loss"], title="prior: training loss", phase="prior", ylabel="loss")
        rest.append(replace(loss, xlabel="training step"))
    return [*main, *curves[:room]], rest


def rewards_of_samples(
    judge: Any, task: Any, prior: Any, outcomes: dict[str, Any], scores: dict[str, Any], colors: dict[str, int]
) -> list[Any]:
    """Return one figure of all samples' rewards, the exact laws beside them where they are known."""
    values = {key: np.asarray(of, np.float64) for key, of in scores.items() if of is not None}
    if not any(np.isfinite(of).any() for of in values.values()):
        return []
    laws = {key: judge.reward_law(outcomes[key], task, prior) for key in values}
    laws = {key: law for key, law in laws.items() if law is not None}
    title = "Rewards of the samples"
    if len(values) > OVERLAID:
        means = {key: float(np.nansum(np.where(p > 0, r, 0) * p) / np.sum(p)) for key, (r, p) in laws.items()}
        return [Boxes(title, values, "reward that guides", means)]
    distinct: dict[str, Any] = {}
    for key, law in laws.items():  # methods of one temperature aim at one law
        if not any(np.array_equal(law[1], other[1]) for other in distinct.values()):
            distinct[f"{key}: exact law"] = law
    return [Histogram(title, values, distinct, "reward that guides", colors=[colors[key] for key in values])]


def numbered(outcomes: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of every method's color, the same in all figures: the text's for the prior; first those that have curves."""
    drawn = [key for key, outcome in outcomes.items() if outcome.curves]
    order = [key for key in [*drawn, *(key for key in rows if key not in drawn)] if key != "prior"]
    return {"prior": INK} | {key: i for i, key in enumerate(order)}


def trade_offs(rows: Mapping[str, Mapping[str, Any]], colors: Mapping[str, int]) -> list[Any]:
    """Return what a reward costs in likeness to the prior: each method a point; and the held-out reward against the guiding one."""
    if tables.judged_by_itself(rows):
        rows = {key: {k: v for k, v in row.items() if k != "heldout_reward_mean"} for key, row in rows.items()}
    natural = next((n for n in NATURAL if sum(tables.known(row.get(n)) for row in rows.values()) > 1), None)
    reached = next((n for n in HEADED if sum(tables.known(row.get(n)) for row in rows.values()) > 1), None)
    pairs = [
        (natural, reached),
        ("reward_mean", "heldout_reward_mean"),
        ("reward_mean", "diversity"),
        ("seconds", reached),
    ]
    plots = []
    for x, y in dict.fromkeys(pairs):
        points = {
            key: (row[x], row[y])
            for key, row in rows.items()
            if x is not None and y is not None and tables.known(row.get(x)) and tables.known(row.get(y))
        }
        if len(points) > 1 and any(a != b for a, b in points.values()):
            series = [Series(key, [a], [b], color=colors[key]) for key, (a, b) in points.items()]
            labels = _axis(str(x)), _axis(str(y))
            plots.append(Plot(f"{tables.heading(str(y))} against {tables.column(str(x)).label}", series, *labels))
    return plots


def _axis(name: str) -> str:
    unit = tables.column(name).unit
    return f"{tables.heading(name)}, {unit}" if unit else tables.heading(name)


def axes(title: str) -> tuple[str, str]:
    """Return the labels of a curve's axes: its title says them as "y, by x" or "y by x", or they are listed."""
    if title in AXES:
        return AXES[title]
    y, by, x = title.rpartition(" by ")
    if not by and title.endswith(" while training"):
        y, x = title.removesuffix(" while training"), "training iteration"
    elif not by and title.endswith(" along the chain"):
        y, x = title.removesuffix(" along the chain"), STEPS
    elif not by:
        y, x = title, "step"
    y, x = y.rstrip(","), x.partition(",")[0]
    return f"{'reward ' if x == 'queries' else ''}{x}", y + (", nats" if "KL" in y else "")


def shared(outcomes: dict[str, Any], colors: dict[str, int]) -> dict[str, list[Series]]:
    """Return all curves by title: those of one title share axes. An outcome may have several of one title, by name."""
    curves: dict[str, list[Series]] = {}
    for key, outcome in outcomes.items():
        for title, curve in outcome.curves.items():
            several = curve if isinstance(curve, dict) else {"": curve}
            for dash, (name, part) in enumerate(several.items()):
                one = replace(Series(f"{key} {name}".strip(), *part), color=colors[key], dash=dash)
                curves.setdefault(title, []).append(one)
    return curves
