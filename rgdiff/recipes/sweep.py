"""Sweeps: all combinations of comma-separated values, checked before the first one runs, and a table and a page of all."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rgdiff.recipes.run import prepare, run_recipe
from rgdiff.runtime.progress import say


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Expand comma-separated values into all combinations; each gets a numbered folder below `out`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from rgdiff.runtime.folder import next_free

    choices, out = [], None
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "out":
            out = value
            continue
        several = [override]
        with contextlib.suppress(HydraException):  # what the grammar does not take is one value
            parsed = OverridesParser.create().parse_override(override)
            if parsed.is_sweep_override():
                several = [f"{key}={value}" for value in parsed.sweep_string_iterator()]
        choices.append(several)
    out = next_free("runs/sweep", "resume=true" in overrides) if out is None else out
    return [[*combination, f"out={out}/{i}"] for i, combination in enumerate(itertools.product(*choices))]


def sweep(name: str, overrides: Sequence[str], dry: bool = False) -> None:
    """Run all combinations, one after the other, and write sweep.csv above their folders: what was swept, and every figure.

    All are checked before the first one runs.
    """
    import csv

    from rgdiff.recipes.pages import write_sweep
    from rgdiff.runtime.folder import write_atomic
    from rgdiff.runtime.run import Diverged
    from rgdiff.runtime.tables import sweep_table

    combinations = expand(overrides)
    given = [{o.partition("=")[0]: o.partition("=")[2] for o in combination} for combination in combinations]
    swept = [key for key in given[0] if key != "out" and len({settings.get(key) for settings in given}) > 1]
    labels = [", ".join(f"{key}={settings[key]}" for key in swept) or "as it is" for settings in given]
    page = Path(given[0]["out"]).expanduser().parent / "sweep.csv"
    if page.exists() and "resume=true" not in overrides:
        raise ValueError(f"{page.parent} already holds a sweep; give resume=true to go on with it, or another out")
    for label, combination in zip(labels, combinations, strict=True):
        try:
            prepare(name, combination, dry=True)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    rows: list[dict[str, Any]] = []
    for number, (label, combination) in enumerate(zip(labels, combinations, strict=True), 1):
        say(f"{number} of {len(combinations)}: {label}")
        settings: dict[str, Any] = dict(given[number - 1])
        try:
            rows.append(settings | run_recipe(name, combination, dry))
        except Diverged as failure:  # the other combinations are worth having
            rows.append(settings | failure.summary | {"stopped": str(failure)})
        if dry:
            continue
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(page, buffer.getvalue().encode())
        write_sweep(
            page.with_name("report.html"),
            f"{name}: a sweep",
            rows,
            swept,
            " ".join(["rgdiff run", name, "--multirun", *overrides]),
        )
    if dry:
        return
    say(sweep_table(rows, swept))
    say(f"table: {page}; report: {page.with_name('report.html')}")
    if stopped := [row for row in rows if "stopped" in row]:
        raise ValueError(
            f"{len(stopped)} of {len(rows)} runs stopped, the first: {stopped[0]['stopped']}; see sweep.csv"
        )
