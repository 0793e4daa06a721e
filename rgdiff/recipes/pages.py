"""How a run ends: its report.html and its table for the terminal, of every method's outcome and row of figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rgdiff.runtime.report import Grid, Histogram, Logo, Plot, Report, Series, plot_rows, write_report
from rgdiff.runtime.run import Run


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
    """Write report.html: pictures or logos before and after, curves, histograms, the table, the config, and why methods stopped."""
    colors = numbered(outcomes, rows)
    plots: list[Any] = [Plot(title, series) for title, series in shared(outcomes, colors).items()]
    if any(row["phase"] == "prior" for row in run.log.rows):
        plots.append(plot_rows(run.log.rows, ["loss"], title="prior: training loss", phase="prior"))
    plots += trade_offs(rows, colors)
    samples = {key: outcome.x0 for key, outcome in outcomes.items()}
    samples |= {f"{key}: {what}": x0 for key, outcome in outcomes.items() for what, x0 in outcome.shown.items()}
    pictures = judge.pictures(samples, task)
    pictures += [(title, images, None) for one in outcomes.values() for title, images in one.pictures.items()]
    report = Report(
        title=config.get("title", name),
        command=" ".join(["rgdiff run", name, *overrides]),
        versions=run.folder.versions,
        table=rows,
        grids=[[Grid(title, images, rewards=rewards) for title, images, rewards in pictures]],
        logos=[Logo(*logo) for logo in judge.logos(outcomes, task, prior)],
        plots=plots + [Histogram(*histogram) for histogram in judge.histograms(outcomes, task, prior)],
        notes=[*(f"Stopped: {reason}" for reason in stopped), *judge.notes(task)],
        config=(run.folder.path / "config.yaml").read_text(),
    )
    write_report(run.folder.path / "report.html", report)


def numbered(outcomes: dict[str, Any], rows: dict[str, Any]) -> dict[str, int]:
    """Return the number of every method's color, the same in all plots: first those that have curves."""
    drawn = [key for key, outcome in outcomes.items() if outcome.curves]
    return {key: i for i, key in enumerate([*drawn, *(key for key in rows if key not in drawn)])}


def trade_offs(rows: dict[str, dict[str, Any]], colors: dict[str, int]) -> list[Any]:
    """Return what a higher guiding reward costs: each method a point, by its held-out reward and by its diversity."""
    plots = []
    for metric, name in (("heldout_reward_mean", "held-out reward"), ("diversity", "diversity")):
        points = {
            key: (row["reward_mean"], row[metric])
            for key, row in rows.items()
            if row.get("reward_mean") is not None and row.get(metric) is not None
        }
        if len(points) > 2 and any(guide != other for guide, other in points.values()):
            series = [Series(key, [guide], [other], color=colors[key]) for key, (guide, other) in points.items()]
            plots.append(Plot(f"{name} against the guiding reward, every method", series, "guiding reward", name))
    return plots


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


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as a table for the terminal."""
    from rich.console import Console
    from rich.table import Table

    shown = (
        "reward_mean",
        "reward_se",
        "infeasible",
        "divergent",
        "heldout_reward_mean",
        "heldout_accuracy",
        "exact_reward_mean",
        "log_z",
        "log_z_se",
        "exact_log_z",
        "histogram_distance",
        "frechet",
        "log_likelihood",
        "theta_x",
        "theta_x_inside",
        "off_support",
        "sliced_w2",
        "energy_auc",
        "energy_log_likelihood",
        "auroc_mean",
        "diversity",
        "kl",
        "network_calls",
        "seconds",
    )
    metrics = [m for m in shown if any(row.get(m) for row in rows.values())]  # neither missing nor 0 throughout
    grid = Table("", *metrics)
    for key, row in rows.items():
        grid.add_row(key, *(f"{row[m]:.3g}" if row.get(m) is not None else "–" for m in metrics))
    buffer = io.StringIO()
    Console(file=buffer, width=140).print(grid)
    return buffer.getvalue().rstrip()
