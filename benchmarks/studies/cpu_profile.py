"""Where a CPU's time goes in the U-Net of `benchmarks.speed`: shares of kinds of operations, by XLA's own profiler.

    python -m benchmarks.studies.cpu_profile       # one core, a minute; writes benchmarks/results/cpu-profile-<cpu>.md

Matrix products, those of Winograd's convolutions among them, are `ynn_fusion` where XLA's library of kernels computes them, and `dot`
or `dot_general` where it does not; `concatenate_bitcast_fusion` are Winograd's transforms.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

from benchmarks.speed.harness import machine
from benchmarks.studies.cpu_convolutions import BATCH, CALLS, RESULTS, case
from rgdiff.runtime.cpu import keep_memory

SHOWN, RUNS = 8, 5


def shares(events: list[dict[str, Any]], names: dict[str, str] | None = None) -> dict[str, float]:
    """Return the share of every kind of operation in the time of all, the largest first, loops as their bodies alone.

    Args:
      events: of a trace, durations in microseconds.
      names: of operations, by `named`; their kinds by default.
    """
    took: collections.Counter[str] = collections.Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and name and not name.startswith("while"):
            kind = re.sub(r"[.\d]+$", "", name)
            took[kind if names is None else names.get(name, kind)] += event["dur"]
    total = sum(took.values())
    return {kind: duration / total for kind, duration in took.most_common()}


def named(program: Any) -> dict[str, str]:
    """Return what a compiled program's operations are in the source: module and primitive, numbers of layers and branches left out."""
    found = re.findall(r"^\s*(?:ROOT )?%?(\S+) = .*op_name=\"([^\"]*)\"", program.as_text(), re.M)
    spare = r"\.\d+|jit\(|\)|cond/branch_\d+_fun/"
    return {name: re.sub(spare, "", source.split("closed_call/")[-1]) for name, source in found}


def profiled(function: Any, *args: Any, by_name: bool = False) -> dict[str, float]:
    """Compile and run a function under the profiler; return shares by kind of operation, or by name in the source."""
    program = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(program(*args))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(RUNS):
                jax.block_until_ready(program(*args))
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        return shares(events, named(program) if by_name else None)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=0)
    os.sched_setaffinity(0, {parser.parse_args().core})
    keep_memory()
    about = machine()
    x, params, chain, loss = case()
    found = {
        "forward": profiled(chain, params, x),
        "with the gradient in the weights": profiled(jax.grad(loss), params, x),
    }
    kinds = list(dict.fromkeys(kind for each in found.values() for kind in list(each)[:SHOWN]))
    lines = [
        "# Where a CPU's time goes in the U-Net",
        "",
        f"`python -m benchmarks.studies.cpu_profile`, {datetime.date.today()}",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", f"Shares of the time of all operations, {CALLS} calls in a scan, {BATCH} images, {RUNS} runs:", ""]
    lines += [f"| operation | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    lines += [f"| {kind} | {' | '.join(f'{each.get(kind, 0.0):.3f}' for each in found.values())} |" for kind in kinds]
    name = "amd" if "AMD" in about["machine"] else "intel"
    (RESULTS / f"cpu-profile-{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
