"""The figures of a run in readable words: what each is called, its unit, what it means; tables and sentences made of them.

Assumes flat rows, method -> figure -> number, the first row the prior's. A figure that is not listed here is shown under its own name.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Column:
    """What a figure is called, its unit, what it means in a sentence, and the heading that it stands under."""

    label: str
    unit: str = ""
    meaning: str = ""
    group: str = "Other"


REWARD, NATURAL, EXACT = "Reward", "How natural the samples stayed", "Beside the exact law"
COST, OTHER = "Cost", "Other"
COLUMNS: dict[str, Column] = {
    name: Column(label, unit, meaning, group)
    for group, columns in {
        REWARD: {
            "reward_mean": ("reward", "", "Mean over samples of the reward that guides; infeasible samples are left out."),
            "reward_se": ("standard error", "", "Standard error of the mean reward."),
            "reward_median": ("median reward", "", "Median over samples of the reward that guides."),
            "reward_top_decile": ("best tenth", "", "Mean reward of the best tenth of the samples."),
            "reward_top": ("best ten", "", "Mean reward of the ten best different molecules."),
            "infeasible": ("infeasible", "samples", "Samples for which the reward has no value."),
            "heldout_reward_mean": ("held-out reward", "", "Mean of a reward that no method has seen: it judges, and never guides."),
            "heldout_reward_median": ("median held-out reward", "", "Median over samples of the held-out reward."),
            "heldout_reward_top_decile": ("best tenth, held-out", "", "Mean held-out reward of the tenth that it likes best."),
            "heldout_accuracy": ("held-out accuracy", "share", "Samples that a classifier which never guides takes for the class asked for."),
            "qed_median": ("median QED", "", "Median drug-likeness of the molecules, 0 to 1."),
            "sa_median": ("median SA", "", "Median of (10 - SA score) / 9, 0 to 1; higher is easier to synthesise."),
            "logp_median": ("median logP", "", "Median octanol-water partition coefficient."),
            "folding_energy": ("folding energy", "kcal/mol", "Least free energy of folding, mean over samples; lower is more stable."),
            "solved": ("solved", "share", "Samples whose structure of least free energy is the target."),
            "measured": ("measured", "share", "Samples that are in the file of measurements."),
            "measured_mean": ("measured value", "", "Mean over those samples of what was measured."),
            "second_reward": ("second reward", "", "Mean of the other reward of a mixture."),
            "theta_x": ("θ·x", "", "Mean of theta . x."),
            "theta_x_inside": ("θ·x inside", "", "Its part inside the data's support, the only part that data can honour."),
            "auroc_mean": ("AUROC", "", "How often an anomalous example scores above a normal one, mean over problems and seeds; 1/2 is chance."),
        },
        NATURAL: {
            "over_optimised": ("verdict", "", "Whether the samples left the prior's neighbourhood for the sake of the reward, and in what."),
            "frechet": ("Fréchet distance", "", "Squared Fréchet distance to real data in the features of a classifier; 0 is best."),
            "precision": ("precision", "share", "Samples that lie among the real data."),
            "recall": ("recall", "share", "Real data that lie among the samples."),
            "diversity": ("diversity", "", "Mean distance between two samples; of sequences, the share of positions in which two differ."),
            "kl": ("path KL", "nats", "Kullback–Leibler divergence of the chain from the prior's, per sample; of particles and SVDD, an estimate."),
            "start_kl": ("path KL of the start", "nats", "The part of the path KL that the law of x_T pays."),
            "log_likelihood": ("log-likelihood", "nats", "Bound on log p of the samples under the prior, mean over samples."),
            "kmer_correlation": ("k-mer correlation", "", "Correlation of the samples' k-mer counts with the training sequences'."),
            "kmer_correlation_best": ("k-mer correlation, best", "", "The same with the best measured tenth."),
            "unique": ("unique", "share", "Different samples over samples."),
            "valid": ("valid", "share", "Samples that are molecules as they came, before any correction."),
            "corrected": ("valid, corrected", "share", "Graphs that are molecules once impossible bonds are lowered."),
            "novel": ("novel molecules", "share", "Different molecules that are not among the known ones."),
            "scaffolds": ("scaffolds", "share", "Different ring systems with their linkers (Bemis-Murcko) over molecules."),
            "descriptor_frechet": ("descriptors' distance", "", "Squared Fréchet distance to known molecules in ten standardised descriptors; 0 is best."),
            "nspdk": ("NSPDK", "", "Squared maximum mean discrepancy to known molecules by the NSPDK kernel; 0 is best, more samples lower it."),
            "fcd": ("FCD", "", "Fréchet ChemNet distance to known molecules; 0 is best."),
            "novelty": ("novel", "share", "Samples that are not among the training sequences."),
            "mutations": ("mutations", "letters", "Letters that differ from the wild type, mean over samples."),
            "blosum_distance": ("BLOSUM62 distance", "half-bits", "Similarity that the mutations lose to the wild type's with itself, mean over samples."),
            "gc": ("G and C", "share", "Letters that are G or C, mean over samples."),
            "not_finite": ("not finite", "samples", "Samples that are NaN or infinite."),
            "sliced_w2": ("sliced W2", "", "Sliced 2-Wasserstein distance to as many fresh points of the data."),
            "log_density": ("log density", "nats", "log p of the samples under the data's law, mean over samples."),
            "in_support": ("in support", "share", "Samples where the data's density is not zero."),
            "off_curve": ("distance from the curve", "", "Mean distance of the samples from the curve that the data lie on."),
            "inside": ("|x| inside", "", "Mean length of the samples' part inside the data's support."),
            "off_support": ("distance off the support", "", "Mean of |x outside| / |x inside| the data's subspace; on the sphere the mean of |x| - 1."),
            "mean": ("mean of x0", "", "Mean of the samples."),
            "std": ("std of x0", "", "Standard deviation of the samples."),
        },
        EXACT: {
            "exact_reward_mean": ("exact reward", "", "Mean reward under the exact law that the method aims at."),
            "log_z": ("log Z", "nats", "The method's estimate of log E exp(r / temperature) under the prior."),
            "exact_log_z": ("exact log Z", "nats", "log E exp(r / temperature) under the prior's own chain."),
            "exact_kl": ("exact KL", "nats", "KL of the exact law from the prior's."),
            "histogram_distance": ("reward histogram off by", "", "Total variation between the rewards of samples and of the exact law."),
            "distance": ("total variation", "", "Between the samples and the exact law."),
            "frozen_distance": ("predicted if x_T is frozen", "", "The same for the law predicted if x_T keeps the prior's law."),
            "exact_mean": ("exact mean", "", "Mean of x0 under the exact law."),
            "exact_std": ("exact std", "", "Standard deviation of x0 under the exact law."),
            "energy_auc": ("AUC of the energy", "", "How often uniform noise has a higher energy than fresh data."),
            "energy_log_z": ("log Z of the energy", "nats", "By particles."),
            "energy_log_z_quadrature": ("the same by quadrature", "nats", "log Z of the energy, by quadrature."),
            "energy_log_likelihood": ("log-likelihood of data", "nats", "Mean log-likelihood of data under the energy."),
        },
        COST: {
            "network_calls": ("network calls", "per sample", "Calls of the network that one sample took."),
            "tuning_network_calls": ("network calls to tune", "in all", "Calls of the network on one example that training took."),
            "reward_queries": ("reward queries", "in all", "Samples whose reward was asked for while tuning."),
            "seconds": ("time", "s", "Wall time, compiling left out."),
            "compile_seconds": ("time to compile", "s", "Wall time that compiling took; none for programs from the cache."),
            "tuning_steps": ("steps", "", "Steps of tuning that were made."),
            "ess": ("effective samples", "particles", "Effective sample size at the end."),
            "skipped": ("skipped updates", "", "Updates that were not finite, and were left out."),
            "gradient_snr": ("gradient SNR", "", "Signal-to-noise ratio of the first gradient."),
        },
        OTHER: {
            "prior_eps_error": ("prior's eps error", "", "Mean squared error of the prior's noise prediction on fresh data."),
            "exact_eps_error": ("exact eps error", "", "The same of the exact denoiser: no network has less."),
            "stopped": ("stopped", "", "Why the method was stopped."),
        },
    }.items()
    for name, (label, unit, meaning) in columns.items()
}  # fmt: skip
SHOWN = (  # in the terminal, the more important ones first
    "reward_mean", "heldout_reward_mean", "heldout_accuracy", "auroc_mean", "infeasible", "valid", "frechet", "kl", "diversity", "exact_reward_mean",
    "sliced_w2", "off_support", "log_z", "exact_log_z", "network_calls", "seconds", "reward_queries", "log_likelihood", "histogram_distance",
    "energy_auc", "energy_log_likelihood", "theta_x", "theta_x_inside",
)  # fmt: skip
REASONS = 8  # of over-optimised methods, below the terminal's table
PRIMARY = ("reward_mean", "auroc_mean", "energy_auc", "sliced_w2")  # what a sentence begins with


def column(name: str) -> Column:
    """Return how a figure is shown; one that is not listed is called by its name, and `_se` and `_sd` by what they belong to."""
    if name in COLUMNS:
        return COLUMNS[name]
    for suffix, what in (("_se", "standard error"), ("_sd", "standard deviation")):
        if name.endswith(suffix):
            of = column(name.removesuffix(suffix))
            return Column(f"{of.label}: {what}", of.unit, f"{what.capitalize()} of “{of.label}”.", of.group)
    if name.startswith("auroc_"):
        problem = name.removeprefix("auroc_").replace("_", " ")
        return Column(
            f"AUROC, {problem}", "", f"AUROC of the problem “{problem}”, mean over seeds; 1/2 is chance.", REWARD
        )
    return Column(name.replace("_", " "))


def heading(name: str) -> str:
    """Return what a figure is called, with a capital."""
    label = column(name).label
    return label[:1].upper() + label[1:]


def number(value: Any, digits: int = 4) -> str:
    """Write a figure: so many significant digits, but all before the point; thousands apart; a dash for what is missing."""
    if value is None or isinstance(value, str):
        return value or "–"
    value = np.asarray(value).item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if math.isnan(value):
        return "–"
    if 10.0**digits <= abs(value) < 1e7:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def grouped(rows: Rows) -> dict[str, list[str]]:
    """Return the names of the rows' figures under their headings, in the order of `COLUMNS`."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    order = list(COLUMNS)
    names.sort(key=lambda name: order.index(name) if name in COLUMNS else len(order))  # stable: others as they come
    groups: dict[str, list[str]] = {}
    for heading in (REWARD, NATURAL, EXACT, COST, OTHER):
        if of := [name for name in names if column(name).group == heading]:
            groups[heading] = of
    return groups


def judged_by_itself(rows: Rows) -> bool:
    """Return whether the held-out reward of every row is the one that guides."""
    pairs = [(row.get("heldout_reward_mean"), row.get("reward_mean")) for row in rows.values()]
    return all((_nan(a) and _nan(b)) or a == b for a, b in pairs)


def table(rows: Rows, width: int | None = None) -> str:
    """Return the rows as a table for the terminal, as many columns as fit, and below it which methods are over-optimised, and why."""
    width = max(60, width or shutil.get_terminal_size((120, 24)).columns)
    flagged = {key: row["over_optimised"] for key, row in rows.items() if row.get("over_optimised")}
    longest = max(12, min(max(map(len, rows), default=0), width // 3))
    lines = [[shorten(key, longest)] for key in rows]
    head, left = [("", "")], width - longest - 2
    if flagged:
        left -= len("over-optimised") + 2
    for name in SHOWN:
        if not any(known(row.get(name)) and row[name] for row in rows.values()):  # missing or 0 throughout
            continue
        if name == "heldout_reward_mean" and judged_by_itself(rows):
            continue
        cells = [_cell(name, row) for row in rows.values()]
        label, unit = column(name).label, column(name).unit
        room = max(len(part) for part in (*cells, *_folded(label), unit))
        if room + 2 > left:
            break
        left -= room + 2
        head.append((label, unit))
        for line, cell in zip(lines, cells, strict=True):
            line.append(cell)
    if flagged:
        head.append(("verdict", ""))
        for line, key in zip(lines, rows, strict=True):
            line.append("over-optimised" if key in flagged else "")
    text = _laid_out(head, lines)
    reasons = [f"{shorten(key, longest)} is over-optimised: {why}." for key, why in flagged.items()]
    more = [f"…and {len(reasons) - REASONS} more; the page says why."] if len(reasons) > REASONS else []
    return "\n".join([text, *reasons[:REASONS], *more])


def sweep_table(runs: Sequence[Mapping[str, Any]], swept: Sequence[str], width: int | None = None) -> str:
    """Return a sweep's table for the terminal: a line for every run and method, the prior's of the first run alone.

    Args:
      runs: of every run what was swept, key -> value, and its summary, "method/figure" -> number.
      swept: the keys that were swept; those that never change are left out.
    """
    rows = sweep_rows(runs, swept)
    return table(rows, width)


def sweep_rows(runs: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return rows as of one run, named by method and by what was swept, from those of several; arguments as `sweep_table`."""
    rows: dict[str, dict[str, Any]] = {}
    for place, run in enumerate(runs):
        label = run_label(run, runs, swept) or f"run {place}"
        methods: dict[str, dict[str, Any]] = {}
        for name, value in run.items():
            method, slash, figure = name.rpartition("/")
            if slash and method and name not in swept:
                methods.setdefault(method, {})[figure] = value
        if not methods and "stopped" in run:
            methods = {"(stopped)": {}}
        several = len([m for m in methods if m != "prior"]) > 1
        for method, row in methods.items():
            if method == "prior":
                rows.setdefault("prior", row)
            else:
                rows[f"{label}: {method}" if several or method == "(stopped)" else label] = row
    return rows


def run_label(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> str:
    """Name a run of a sweep by the settings that change in it, by their last words where those are told apart."""
    keys = changed(runs, swept)
    lasts = [key.rpartition(".")[2] for key in keys]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}
    return ", ".join(f"{short[key]}={run.get(key)}" for key in keys if key in run)


def changed(runs: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> list[str]:
    """Return the swept keys whose values differ between runs; the folder is none of them."""
    return [key for key in swept if key != "out" and len({str(run[key]) for run in runs if key in run}) > 1]


def shorten(text: str, most: int) -> str:
    """Leave out the middle of a text of more than `most` characters."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}"


def sentence(key: str, row: Mapping[str, Any], prior: Mapping[str, Any]) -> str:
    """Return one sentence in plain words: what a method reached, at what cost, and how natural its samples stayed."""
    if not row:
        return f"{key} has no samples."
    if row is prior and _primary(row) is None:
        return f"{key} has no reward to compare with."
    if row is prior:
        return f"{key}, which nothing guides, {_reached(row, prior)}; the others are compared with it."
    parts = [f"{key} {_reached(row, prior)}"]
    costs = [
        _amount(row, "network_calls", "network call{s} a sample"),
        _amount(row, "tuning_network_calls", "network calls to tune it"),
        _amount(row, "reward_queries", "reward quer{ies}"),
        _amount(row, "seconds", "second{s}", digits=2),
    ]
    if costs := [cost for cost in costs if cost]:
        parts.append(f"at the cost of {_joined(costs)}")
    stayed = []
    for name, what in (
        ("kl", "a path KL of {} nats"), ("frechet", "a Fréchet distance of {}"), ("sliced_w2", "a sliced W2 of {} to the data"),
        ("off_support", "a distance off the support of {}"), ("distance", "a total variation of {} to its exact law"),
        ("diversity", "a diversity of {}"),
    ):  # fmt: skip
        if known(value := row.get(name)) and name != _primary(prior):
            beside = "" if name == "kl" or _nan(prior.get(name)) else f" (prior {number(prior[name], 2)})"
            stayed.append(what.format(number(value, 2)) + beside)
    if stayed:
        parts.append(f"with {_joined(stayed)}")
    end = f"; it is over-optimised: {row['over_optimised']}" if row.get("over_optimised") else ""
    return ", ".join(parts) + end + "."


def _reached(row: Mapping[str, Any], prior: Mapping[str, Any]) -> str:
    """What became of the reward, beside the prior's."""
    name = _primary(row)
    if name != "reward_mean" and known(prior.get("reward_mean")):
        return f"has no feasible sample (prior: a mean reward of {number(prior['reward_mean'], 3)})"
    if name is None:
        return "has samples without a reward"
    what, value, before = column(name).label, row[name], prior.get(name)
    what = f"mean {what}" if name == "reward_mean" else what
    about = number(value, 3)
    if name == "reward_mean" and known(row.get("reward_se")):
        about += f" ± {number(row['reward_se'], 2)}"
    if row is prior or _nan(before):
        said = f"has {'an' if what[0] in 'Aa' else 'a'} {what} of {about}"
    else:
        errors = [of["reward_se"] for of in (row, prior) if name == "reward_mean" and known(of.get("reward_se"))]
        change = float(value) - float(before)  # type: ignore[arg-type]
        said = f"{'raised' if change > 0 else 'lowered'} the {what} from {number(before, 3)} to {about}"
        if abs(change) <= 2 * math.hypot(*errors):
            said = f"left the {what} at {about} (prior {number(before, 3)})"
    held = []
    if known(row.get("heldout_accuracy")):
        beside = (
            "" if row is prior or _nan(prior.get("heldout_accuracy")) else f" against {_percent(prior)} of the prior's"
        )
        held.append(f"a classifier that never guided recognises {_percent(row)} of its samples{beside}")
    elif known(other := row.get("heldout_reward_mean")) and not math.isclose(float(other or 0), value, rel_tol=1e-6):
        beside = "" if row is prior or _nan(prior.get("heldout_reward_mean")) else f" against {number(prior['heldout_reward_mean'], 3)}"  # fmt: skip
        held.append(f"the held-out reward is {number(other, 3)}{beside}")
    if known(row.get("exact_reward_mean")):
        held.append(f"its exact law has {number(row['exact_reward_mean'], 3)}")
    if row.get("infeasible"):
        held.append(f"{number(row['infeasible'])} of its samples are infeasible")
    return said + (f" ({'; '.join(held)})" if held else "")


def _primary(row: Mapping[str, Any]) -> str | None:
    return next((name for name in PRIMARY if not _nan(row.get(name))), None)


def _percent(row: Mapping[str, Any]) -> str:
    return f"{100 * row['heldout_accuracy']:.0f} %"


def _amount(row: Mapping[str, Any], name: str, words: str, digits: int = 4) -> str:
    value = row.get(name)
    if not known(value) or not value:
        return ""
    one = value == 1
    return f"{number(value, digits)} {words.format(s='' if one else 's', ies='y' if one else 'ies') if '{' in words else words}"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _nan(value: Any) -> bool:
    return value is None or isinstance(value, str) or math.isnan(float(value))


def known(value: Any) -> bool:
    """Return whether a figure is a number."""
    return not _nan(value)


def _cell(name: str, row: Mapping[str, Any]) -> str:
    text = number(row.get(name), 3)
    error = row.get("reward_se") if name == "reward_mean" else None
    return text if _nan(error) or text == "–" else f"{text} ± {number(error, 2)}"


def _folded(label: str, most: int = 12) -> list[str]:
    """Break a heading at blanks into lines of `most` characters, where it can be."""
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _laid_out(head: Sequence[tuple[str, str]], lines: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="", expand=False)
    for place, (label, unit) in enumerate(head):
        words = "\n".join([*_folded(label), *([unit] if unit else [])])
        grid.add_column(words, justify="left" if place == 0 or label == "verdict" else "right", no_wrap=True)
    for line in lines:
        grid.add_row(*(cell.replace("[", "\\[") for cell in line))
    buffer = io.StringIO()
    Console(file=buffer, width=400, highlight=False, color_system=None).print(grid)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())
