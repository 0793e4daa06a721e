"""How the memory of methods grows with M, B, T and K: temporaries of compiled programs, fitted as powers; nothing is run.

    python -m benchmarks.studies.memory_exponents [--cache DIR]

Programs are those of `rgdiff plan` on one CPU: the digits' network made small (channels 8, 16), 8 x 8 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.speed import harness
from rgdiff.recipes import programs
from rgdiff.recipes.run import prepare
from rgdiff.runtime import planning

RESULTS = Path(__file__).parents[1] / "results" / "memory-exponents.md"
BASE = (
    "domain=digits",
    "prior=unet",
    "prior.network.channels=[8,16]",
    "reward=symmetry",
    "prior.steps=9",
    "samples=16",
)


class Sweep(NamedTuple):
    """A method's program under overrides that a count is put into."""

    name: str
    letter: str
    counts: Sequence[int]
    method: str
    overrides: tuple[str, ...]


def tuned(*more: str) -> tuple[str, ...]:
    return ("method.batch=8", *more)


SWEEPS = (
    Sweep("SVDD, all candidates at once", "M", (4, 16, 64), "svdd", ("method.options.candidates={}",)),
    Sweep("SVDD, chunk 2", "M", (4, 16, 64), "svdd", ("method.options.candidates={}", "+method.options.chunk=2")),
    Sweep("SVDD, M = 8", "B", (8, 32, 128), "svdd", ("method.options.candidates=8", "samples={}")),
    Sweep("SVDD, M = 8", "T", (5, 17, 65), "svdd", ("method.options.candidates=8", "prior.steps={}")),
    Sweep("DDPO, path kept", "T", (5, 17, 65), "ddpo", tuned("prior.steps={}")),
    Sweep("DDPO, drawn again", "T", (5, 17, 65), "ddpo", tuned("prior.steps={}", "method.options.path=again")),
    Sweep("DDPO", "B", (8, 32, 128), "ddpo", ("method.batch={}",)),
    Sweep("DRaFT-K, nothing recomputed", "K", (2, 8, 32), "draft_k", tuned("prior.steps=33", "method.options.k={}")),
    Sweep("DRaFT-K, remat=everything", "K", (2, 8, 32), "draft_k",
          tuned("prior.steps=33", "method.options.k={}", "method.remat=everything")),
    Sweep("DRaFT-LV", "B", (8, 32, 128), "draft_lv", ("method.batch={}",)),
)  # fmt: skip


def measure(sweep: Sweep, cache: Path | None) -> tuple[list[int], float]:
    """Return the temporaries, bytes, by count, and the fitted exponent."""
    target, found = planning.target("cpu"), []
    for count in sweep.counts:
        overrides = [one.replace("{}", str(count)) for one in (*BASE, f"method={sweep.method}", *sweep.overrides)]
        every, _ = programs.programs(prepare("steer", overrides, dry=True))
        program = next(one for one in every if one.name == sweep.method)
        found.append(planning.figures(program.call(program.batch), target, cache).temporaries)
    return found, float(np.polyfit(np.log(sweep.counts), np.log(found), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/rgdiff").expanduser())
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    body = []
    for sweep in SWEEPS:
        found, exponent = measure(sweep, given.cache)
        sizes = ", ".join(f"{size / 1e6:.2f}" for size in found)
        body.append(
            f"| {sweep.name} | {sweep.letter} = {', '.join(map(str, sweep.counts))} | {sizes} | {exponent:.2f} |"
        )
        print(body[-1], flush=True)
        text = ["# How memory grows", "",
                "M candidates, B chains, T network calls, K of them differentiated. Temporaries of compiled programs, which are not run, MB, and the exponent",
                "fitted to them.",
                "", *(f"- {name}: {value}" for name, value in harness.machine().items()),
                "- command: python -m benchmarks.studies.memory_exponents", "",
                "| program | counts | temporaries, MB | exponent |", "|---|---|---|---|", *body]  # fmt: skip
        given.out.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
