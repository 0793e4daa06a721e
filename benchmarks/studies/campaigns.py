"""Campaigns of queries over several seeds, from finished runs of one recipe: the model of every round, and the final samples.

    for seed in 0 1 2; do rgdiff run molecules_seiko data_dir=DIR seed=$seed out=runs/molecules-$seed; done
    python -m benchmarks.studies.campaigns molecules-seiko runs/molecules-*      # writes benchmarks/results/molecules-seiko.md

Text that was written by hand below the tables stays.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.harness import ROOT, machine

ROUND = {"reward": "reward", "infeasible": "infeasible", "kl": "path KL, nats", "best": "best answer"}
FINAL = {"reward_mean": "reward", "valid": "valid", "unique": "unique", "diversity": "diversity", "kl": "path KL, nats"}
BY_HAND = "\n## Notes"


def spread(values: Sequence[float | None]) -> str:
    """Write the mean of numbers of several seeds, and the lowest and the highest."""
    some = np.array([np.nan if value is None else value for value in values], float)
    if np.isnan(some).all():
        return ""
    low, mean, high = np.nanmin(some), np.nanmean(some), np.nanmax(some)
    return f"{mean:.3g} ({low:.3g}-{high:.3g})"


def rounds(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return a row for every method and round, of the rows of metrics of several runs."""
    lines = [f"| method | queries | {' | '.join(ROUND.values())} |", "|---" * (2 + len(ROUND)) + "|"]
    phases = dict.fromkeys(row["phase"] for row in runs[0] if row["phase"].endswith("_model"))
    for phase in phases:
        each = [[row for row in rows if row["phase"] == phase] for rows in runs]
        for same in zip(*each, strict=False):
            cells = [spread([row.get(name) for row in same]) for name in ROUND]
            lines.append(f"| {phase.removesuffix('_model')} | {same[0]['queries']} | {' | '.join(cells)} |")
    return lines


def finals(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row for every method of the summaries of several runs."""
    lines = [f"| method | {' | '.join(FINAL.values())} |", "|---" * (1 + len(FINAL)) + "|"]
    for method in dict.fromkeys(name.partition("/")[0] for name in runs[0]):
        cells = [spread([run.get(f"{method}/{name}") for run in runs]) for name in FINAL]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Read the folders that are named, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the file in benchmarks/results")
    parser.add_argument("folders", nargs="+", type=Path, help="of finished runs of one recipe, a seed each")
    given = parser.parse_args()
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in given.folders]
    summaries = [json.loads((f / "summary.json").read_text()) for f in given.folders]
    seeds = [
        next(line.split(":")[1].strip() for line in (f / "config.yaml").read_text().splitlines() if line.startswith("seed:"))
        for f in given.folders
    ]  # fmt: skip
    out = ROOT / "benchmarks" / "results" / f"{given.name}.md"
    before = out.read_text(encoding="utf-8") if out.exists() else ""
    kept = before[before.index(BY_HAND) :] if BY_HAND in before else "\n"
    title = given.name.replace("-", " ").capitalize()
    command = f"`python -m benchmarks.studies.campaigns {given.name} FOLDERS`, {datetime.date.today()}"
    about = [f"- {name}: {value}" for name, value in machine().items()]
    lines = [f"# {title}: campaigns over seeds {', '.join(seeds)}", "", command, "", *about, ""]
    lines += ["Means over seeds, lowest and highest in brackets.", "", "## The model of every round", "", *rounds(logs)]
    lines += ["", "## Final samples", "", *finals(summaries)]
    out.write_text("\n".join([*lines, ""]) + kept, encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
