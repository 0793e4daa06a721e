"""Attention on a CPU: `rgdiff.nets.attention` beside `jax.nn.dot_product_attention` and PyTorch.

    python -m benchmarks.studies.cpu_attention            # needs torch; a minute on one core

Sides take turns in one process on one core; CPU time, medians of rounds, ratios within a round.
"""

from __future__ import annotations

import argparse
import datetime
import os

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.harness import ROOT, machine
from benchmarks.studies.cpu_convolutions import difference, ratio, rounds
from rgdiff.nets.attention import attention
from rgdiff.runtime.cpu import keep_memory

RESULTS = ROOT / "benchmarks" / "results" / "cpu-attention.md"
SHAPES = ((1, 4096, 8, 40), (1, 1024, 8, 80), (32, 200, 8, 32), (64, 50, 4, 32), (16, 64, 4, 16), (16, 16, 1, 64))


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11, help="rounds of every case")
    count = parser.parse_args().repeats
    keep_memory()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    lines = [
        "# Attention on a CPU", "",
        f"`python -m benchmarks.studies.cpu_attention --repeats {count}`, {datetime.date.today()}: one core, float32, CPU time; ratios are",
        "medians (minimum-maximum) of the other side's time over ours within a round", "",
        *(f"- {name}: {value}" for name, value in machine().items()),
        f"- jax {jax.__version__}, torch {torch.__version__}", "",
        "| batch | rows | heads | numbers a head | ours, CPU ms | jax.nn.dot_product_attention | PyTorch eager | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for batch, rows, heads, numbers in SHAPES:
        given = [jax.random.normal(jax.random.key(i), (batch, rows, heads, numbers)) for i in range(3)]
        programs = [jax.jit(f).lower(*given).compile() for f in (attention, jax.nn.dot_product_attention)]
        tensors = [torch.tensor(np.asarray(x)).transpose(1, 2) for x in given]
        again = max(1, int(2e8 / (batch * heads * rows**2 * numbers)))

        def ours(program=programs[0], given=given, again=again):
            for _ in range(again):
                jax.block_until_ready(program(*given))

        def jaxs(program=programs[1], given=given, again=again):
            for _ in range(again):
                jax.block_until_ready(program(*given))

        def theirs(tensors=tensors, again=again):
            for _ in range(again):
                torch.nn.functional.scaled_dot_product_attention(*tensors)

        took = rounds({"ours": ours, "jax": jaxs, "torch": theirs}, count)
        size = difference(programs[1](*given), jnp.asarray(programs[0](*given)))
        each = sorted(took["ours"])[count // 2] / again * 1e3
        lines.append(
            f"| {batch} | {rows} | {heads} | {numbers} | {each:.3g} | {ratio(took, 'jax')} | {ratio(took, 'torch')} | {size:.0e} |"
        )
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
