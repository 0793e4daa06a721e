"""Plans of recipes for a TPU pod, compiled by the TPU's own compiler on a CPU and never run: bytes a device, collectives, seconds.

    pip install 'rgdiff[tpu]'
    python -m benchmarks.studies.plans [--rows digits,sd] [--target v5e:4x4] [--cache DIR]

Every row is a program of a recipe at the size of its config, or of its paper. Figures are kept in the cache, so that a row costs its compilation once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.speed import harness
from rgdiff.recipes import programs
from rgdiff.recipes.run import prepare
from rgdiff.runtime import planning

RESULTS = Path(__file__).parents[1] / "results" / "plans.md"
SD = ("domain.folder=package:sd15_shapes",)


class Row(NamedTuple):
    """A recipe with overrides, and which of its programs are planned."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    programs: tuple[str, ...]


def steered(name: str, method: str, *more: str) -> Row:
    return Row(name, "steer", ("domain=mnist16", "prior=mnist16", f"method={method}", "samples=256", *more), (method,))


def tuned(name: str, method: str, *more: str) -> Row:
    return steered(name, method, "method.batch=64", *more)


ROWS = (
    steered("digits, SVDD-PM, M = 8", "svdd", "method.options.candidates=8"),
    steered("digits, SVDD-PM, M = 64 in chunks of 8", "svdd", "method.options.candidates=64", "+method.options.chunk=8"),
    steered("digits, SMC, 1,024 particles", "smc"),
    steered("digits, DPS", "dps"),
    tuned("digits, DRaFT-LV", "draft_lv"),
    tuned("digits, DRaFT-K", "draft_k"),
    tuned("digits, DDPO", "ddpo"),
    Row("8-mers, DRAKES", "tfbind8_drakes", (), ("drakes",)),
    Row("plane, DxMI", "dxmi_2d", (), ("dxmi_released",)),
    Row("plane, SEIKO", "seiko_toy", (), ("seiko",)),
    Row("R^64, gradient guidance", "ggdm_linear", (), ("g",)),
    Row("SD 1.5, a chain under guidance", "sd_draft", SD, ("prior",)),
    Row("SD 1.5, DRaFT-1, LoRA 8", "sd_draft", (*SD, "batch=16"), ("draft_1",)),
)  # fmt: skip


def line(row: Row, program: programs.Program, figures: planning.Figures, target: planning.Target) -> str:
    """Return a row of the table."""
    split = "split" if program.call(program.batch).spread else "on each"
    kinds = ", ".join(f"{kind} {out} + {inside}" for kind, (out, inside) in figures.collectives.items()) or "none"
    fits = figures.refused or {True: "yes", False: "no", None: "?"}[figures.fits(target.memory)]
    seconds = "" if figures.seconds is None else f"{figures.seconds:.2g}"
    mib = lambda size: f"{size / 2**20:,.1f}"  # noqa: E731
    cells = [row.name, program.unit, f"{program.batch:,} {split}", f"{program.parameters:,}", mib(figures.arguments)]
    cells += [mib(figures.temporaries), mib(figures.peak), fits, f"{figures.flops:.2g}"]
    cells += [f"{figures.bound(target) or 0:.2g}", seconds, kinds, f"{program.network_calls or ''}"]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| recipe | program | batch | parameters | arguments MiB | temporaries MiB | peak MiB | fits | operations | least s | compiler's s | collectives | calls a row |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only rows whose name has one of these words, by commas")
    parser.add_argument("--target", default="v5e:4x4")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/rgdiff").expanduser())
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    target = planning.target(given.target)
    words = given.rows.split(",")
    body, notes = [], []
    for row in ROWS:
        if not any(word in row.name for word in words):
            continue
        try:
            found, _ = programs.programs(prepare(row.recipe, row.overrides, dry=True))
        except (ValueError, OSError) as error:
            notes.append(f"- not planned: {row.name}: {error}")
            continue
        for program in found:
            if program.name in row.programs:
                began = time.monotonic()
                figures = planning.figures(program.call(program.batch), target, given.cache)
                body.append(line(row, program, figures, target))
                print(body[-1], f"({time.monotonic() - began:.0f} s)", flush=True)
        about = [f"- {name}: {value}" for name, value in harness.machine().items()]
        text = [f"# Plans for {target.kind} ({target.name}), {target.memory or 0:,} bytes each", "",
                "Compiled by libtpu on the machine below and never run; no TPU has been used. Bytes are of one device, operations in matrix products",
                "of all together, loops as often as they run; *least s* is them at the device's best rate in bfloat16; the compiler's own",
                "estimate is given for programs without a loop. Collectives: outside of loops + inside. Batches are split over the devices, or",
                "are those of each, which repeats all work. Rewards that a run trains first are a mean of the example here.", "",
                *about, f"- compiler: {', '.join(planning._versions())}", f"- command: python -m benchmarks.studies.plans --target {given.target}",
                "", *HEAD, *body, "", *notes]  # fmt: skip
        given.out.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
