"""Measure rgdiff against PyTorch: `python -m benchmarks.speed [--rows ancestral,svdd,draft,tuners,drakes] [--repeats N] [--threads 2]`.

Prints a table and writes it to benchmarks/results/<row>-<device>.md. See benchmarks/README.md for what is compared.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.speed import harness, rows

RESULTS = Path(__file__).parents[1] / "results"


def spread(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
    middle, low, high = (f"{scale * v:.{digits}g}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low}-{high})"


def ratio(theirs: list[float], ours: list[float]) -> str:
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def megabytes(memory: dict[str, float]) -> str:
    return ", ".join(f"{value / 1e6:.1f} {name}" for name, value in memory.items()) or "-"


def lines(measured: harness.Measured) -> list[str]:
    case, ours = measured.case, measured.cpu["ours"]
    about = measured.about["ours"]
    rate = about["flops"] / statistics.median(measured.wall["ours"])
    speed = f"{rate / 1e9:.0f} of {measured.peak / 1e9:.0f} GFLOP/s ({rate / measured.peak:.0%}){about['note']}"
    out = []
    for side in measured.wall:
        cpu, wall = measured.cpu[side], measured.wall[side]
        pair = lambda of: of if on_cpu(measured) else of[::-1]  # noqa: E731
        cells = [case.name, "rgdiff" if side == "ours" else f"PyTorch {side}", *pair([spread(cpu), spread(wall)])]
        if side == "ours":
            cells += ["", "", speed, ""]
        else:
            cells += [*pair([ratio(cpu, ours), ratio(wall, measured.wall["ours"])]), "", f"{measured.errors[side]:.0e}"]
        cells.append(megabytes(measured.memory.get(side, {})))
        out.append("| " + " | ".join(cells) + " |")
    return out


HEAD = (
    "| case | side | CPU s (min-max) | wall s | CPU ratio | wall ratio | our rate | difference | extra MB |",
    "|---|---|---|---|---|---|---|---|---|",
)
WALL_FIRST = (
    HEAD[0].replace(
        "CPU s (min-max) | wall s | CPU ratio | wall ratio", "wall s (min-max) | CPU s | wall ratio | CPU ratio"
    ),
    HEAD[1],
)


def head(measured: harness.Measured) -> tuple[str, ...]:
    """The table's head: CPU time leads on a CPU, wall time beside an accelerator, where CPU time counts spinning."""
    return HEAD if on_cpu(measured) else WALL_FIRST


def on_cpu(measured: harness.Measured) -> bool:
    return measured.about["ours"]["device"].lower() == "cpu"


def facts(measured: harness.Measured, options: argparse.Namespace) -> dict[str, str]:
    """What a table's numbers depend on besides the machine."""
    return {side: f"{about['version']} on {about['device']}" for side, about in measured.about.items()} | {
        "command": shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "rounds": f"{options.repeats} after one to warm up; {options.threads} threads on {options.threads} cores",
        "seeds": f"weights {rows.SEED}; comparison {rows.SEED + 2}; rounds 1, 2, ...",
    }


def file_name(row: str, measured: harness.Measured, threads: int) -> str:
    device = re.sub("[^a-z0-9]+", "-", measured.about["ours"]["device"].lower()).strip("-")
    return f"{row}-{device}-{threads}threads.md"


def table(row: str, about: dict[str, str], first: tuple[str, ...], body: list[str], problems: list[str]) -> str:
    text = [f"# {row}", "", *(f"- {name}: {value}" for name, value in about.items()), "", *first, *body]
    text += ["", *(f"- not measured: {problem}" for problem in problems)] if problems else []
    return "\n".join(text) + "\n"


def main() -> None:
    names = list(dict.fromkeys(case.row for case in rows.CASES))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=",".join(names), help=f"of {','.join(names)}")
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument("--repeats", type=int, default=5, help="rounds A B C (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of each side (default 2)")
    parser.add_argument("--sides", default="eager,compile", help="of eager,compile")
    parser.add_argument("--compile-mode", default=None, help="mode of torch.compile, e.g. reduce-overhead")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args()
    chosen, sides = options.rows.split(","), tuple(options.sides.split(","))
    if unknown := sorted({*chosen} - {*names}) + sorted({*sides} - {"eager", "compile"}):
        parser.error(f"unknown {', '.join(unknown)}; rows are {','.join(names)}, sides eager,compile")
    options.out.mkdir(parents=True, exist_ok=True)
    log = Path(tempfile.gettempdir()) / f"rgdiff-benchmarks-{os.getpid()}.log"
    log.write_text("")
    about = harness.machine()
    failed = False
    for row in chosen:
        body: list[str] = []
        problems: list[str] = []
        last = None
        for case in rows.CASES:
            if case.row != row or options.cases not in case.name:
                continue
            try:
                last = harness.measure(
                    case,
                    repeats=options.repeats,
                    threads=options.threads,
                    sides=sides,
                    mode=options.compile_mode,
                    log=log,
                    memory=not options.no_memory,
                )
            except harness.Failed as failure:
                failed = True
                problems.append(f"{case.name}: {failure}")
                print(problems[-1], file=sys.stderr, flush=True)
            else:
                problems += [f"{case.name}: {problem}" for problem in last.problems]
                body += lines(last)
                print("\n".join([*head(last), *lines(last)]), flush=True)
            if last is not None:  # after every case: a row can take an hour
                where = options.out / file_name(row, last, options.threads)
                where.write_text(table(row, about | facts(last, options), head(last), body, problems))
        if last is not None:
            print(f"wrote {options.out / file_name(row, last, options.threads)}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
