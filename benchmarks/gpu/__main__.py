"""Measure rgdiff against PyTorch on one GPU, start to end under ten minutes: `python -m benchmarks.gpu [--small] [--seconds 170]`.

Three processes, one after another, each alone on the card: ours in bfloat16, PyTorch eager, PyTorch compiled with CUDA graphs; the
latter two under bfloat16 autocast in channels_last with scaled_dot_product_attention. LoRA of rank 8 on every kernel is tuned. Wall
time leads: on a GPU CPU time counts spinning. What a side's time does not reach is said. `--small` tests all of it on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.work import SMALL, WORK, calls_of, middle, timed
from benchmarks.speed.harness import ROOT, machine

SIDES = ("ours", "eager", "compile")
STEPS = 20  # runs of a training step in a round


def side(name: str, small: bool, seconds: float, coefficients: Path) -> None:
    """Run one side in this process: a line of JSON a row."""
    out = lambda **told: print("ROW " + json.dumps(told), flush=True)  # noqa: E731
    began = time.monotonic()
    made: Any
    if name == "ours":
        from benchmarks.gpu import ours as one

        out(about=f"jax {one.jax.__version__} on {one.device()}", peak=one.peak(256 if small else 8192))
    else:
        import torch

        from benchmarks.gpu import theirs as one

        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        out(about=f"torch {torch.__version__} on {one.name()}")
    work = SMALL if small else WORK
    for index, item in enumerate(work):
        left = seconds - (time.monotonic() - began)
        share = left / (len(work) - index)  # each network may use its part of what is left
        until = time.monotonic() + share
        if name == "ours":
            made = one.Side(item)
            np.savez(coefficients.with_name(f"{index}.npz"), **made.coefficients())
            out(work=item.name, flops=made.flops())
        else:
            with np.load(coefficients.with_name(f"{index}.npz")) as given:
                made = one.Side(item, dict(given), name == "compile")
        for row in item.rows:
            if time.monotonic() > until:
                out(work=item.name, row=row, problem="not reached in its time")
                continue
            start = time.monotonic()
            try:
                made.run(row)  # compiles
                made.wait()
                compiled = time.monotonic() - start
                spare = max(min(until - time.monotonic(), 8.0), 1.0)
                least = 1 if row in ("ancestral", "svdd") else STEPS
                times = timed(functools.partial(made.run, row), made.wait, least, spare)
                out(work=item.name, row=row, seconds=times, compiled=compiled, memory=one.memory())
            except Exception as error:  # noqa: BLE001 - out of memory, or what torch.compile cannot: the others are worth having
                out(work=item.name, row=row, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            made.drop(row)


def gather(name: str, small: bool, seconds: float, coefficients: Path) -> list[dict[str, Any]]:
    """Run one side in a process of its own, and return its lines."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--side",
        name,
        "--seconds",
        str(seconds),
        "--given",
        str(coefficients),
    ]
    command += ["--small"] if small else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 60, check=False)
        text, failed = done.stdout, "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        failed = f"stopped after {seconds + 60:.0f} s"
    lines = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]
    return [*lines, {"problem": f"{name}: {failed}"}] if failed else lines


def table(found: dict[str, list[dict[str, Any]]], small: bool) -> list[str]:
    """Return the rows of the table, and what was not measured."""
    by = {(name, line["work"], line["row"]): line for name, lines in found.items() for line in lines if "row" in line}
    flops = {line["work"]: line["flops"] for line in found["ours"] if "flops" in line}
    peak = next((line["peak"] for line in found["ours"] if "peak" in line), float("nan"))
    out = [
        "| network | work | side | wall s (min-max) | ratio to ours | share of the peak | memory MB | compiling s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    problems = []
    for item in SMALL if small else WORK:
        for row in item.rows:
            ours = by.get(("ours", item.name, row), {}).get("seconds")
            for name in found:
                line = by.get((name, item.name, row), {"problem": "not reached"})
                label = "rgdiff" if name == "ours" else f"PyTorch {name}"
                if "problem" in line:
                    problems.append(f"- not measured: {item.name}, {row}, {label}: {line['problem']}")
                    continue
                times, one = line["seconds"], middle(line["seconds"])
                forward, live = calls_of(row, item.calls)
                work = (forward + live * (2 + item.remat)) * flops.get(item.name, float("nan"))
                ratio = f"{one / middle(ours):.2f}" if ours else ""
                memory = "" if line["memory"] is None else f"{line['memory'] / 1e6:,.0f}"
                share = f"{work / one / peak:.0%}"
                out.append(
                    f"| {item.name} | {row} | {label} | {one:.4g} ({min(times):.3g}-{max(times):.3g}) | {ratio} | {share} | {memory} "
                    f"| {line['compiled']:.1f} |"
                )
    problems += [
        f"- {line['problem']}" for lines in found.values() for line in lines if "row" not in line and "problem" in line
    ]
    return [*out, "", *problems] if problems else out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test the script on a CPU")
    parser.add_argument("--seconds", type=float, default=170.0, help="for each of the three sides (default 170)")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {','.join(SIDES)}; ours runs always")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--given", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options.side, options.small, options.seconds, options.given)
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given"
        names = ["ours", *(name for name in options.sides.split(",") if name != "ours")]
        found = {name: gather(name, options.small, options.seconds, given) for name in names}
    about = [line["about"] for lines in found.values() for line in lines if "about" in line]
    body = table(found, options.small)
    device = about[0].partition(" on ")[2] if about else "unknown"
    text = [f"# On {device}", "", "Ours in bfloat16; PyTorch under bfloat16 autocast in channels_last, compiled with CUDA graphs where there is CUDA.",
            "Ratios above 1: ours is faster. The share of the peak counts operations of the algorithm, of the best bfloat16 product of 8192 x 8192.", "",
            *(f"- {name}: {value}" for name, value in machine().items()), *(f"- {one}" for one in about),
            f"- date: {datetime.date.today().isoformat()}; {time.monotonic() - began:.0f} s in all",
            f"- command: python -m benchmarks.gpu{' --small' if options.small else ''} --seconds {options.seconds:g}", "", *body]  # fmt: skip
    print("\n".join(text))
    file = (
        options.out
        / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}{'-small' if options.small else ''}.md"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
