"""Runs the sides of a case in turn, A B C A B C ..., and turns their times into a table.

Every side is a process of its own (`benchmarks.speed.worker`) on the same pinned cores, asleep while another runs. A case is
measured only after its results have been compared; ratios are taken within each round, so that a slow minute of a
shared machine falls on both sides. What the sides do is `benchmarks.speed.rows`' business.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed.rows import Case

ROOT = Path(__file__).resolve().parents[2]


SUITE = ("--xla_force_host_platform_device_count", "--xla_backend_optimization_level", "--xla_cpu_use_fusion_emitters")
STEPS = 20  # of one training step, on an accelerator: fewer would time Python


def accelerated() -> bool:
    """Whether there is a GPU."""
    return (
        shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    )


class Failed(RuntimeError):
    """A side could not do what it was asked; its own traceback is in the log."""


class Worker:
    """A side of a case in another process."""

    def __init__(self, side: str, case: Case, given: Path, threads: int, mode: str | None, log: Path):
        options = {
            "side": side,
            "case": dataclasses.asdict(case),
            "given": str(given),
            "threads": threads,
            "mode": mode,
        }
        env = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": os.environ.get(
                "OMP_WAIT_POLICY", "PASSIVE"
            ),  # a spinning thread would bill the other side
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the two sides share an accelerator
        }
        # Of XLA's flags those of the test suite are dropped: its eight devices, its quick compilation.
        flags = [flag for flag in env.get("XLA_FLAGS", "").split() if not flag.startswith(SUITE)]
        env["XLA_FLAGS"] = " ".join(flags)
        # Beside an accelerator the host's cores only compile and dispatch: all of them.
        pinned = hasattr(os, "sched_setaffinity") and not accelerated()
        cores = sorted(os.sched_getaffinity(0))[:threads] if pinned else None
        self.side, self.log = side, log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.speed.worker", json.dumps(options)],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
            )

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise Failed(f"{self.side}: its process ended during {do!r}; see {self.log}") from None
        if "error" in answer:
            raise Failed(f"{self.side}: {do} failed: {answer['error']}; see {self.log}")
        return answer

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        self.process.wait()


@dataclasses.dataclass
class Measured:
    """Times in seconds, one entry a round, per side; relative errors and extra memory in bytes of the PyTorch sides."""

    case: Case
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    errors: dict[str, float]
    memory: dict[str, dict[str, float]]
    about: dict[str, dict[str, Any]]
    peak: float
    problems: list[str]


def measure(
    case: Case, *, repeats: int, threads: int, sides: tuple[str, ...], mode: str | None, log: Path, memory: bool = True
) -> Measured:
    """Compare the results of all sides of a case, then time `repeats` rounds of them in turn.

    Raises:
        Failed: when our side fails, or a PyTorch side's result differs by more than the case's tolerance.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given.npz"
        start = lambda side: Worker(side, case, given, threads, mode, log)  # noqa: E731
        workers = {"ours": start("ours")}
        about, errors, problems = {"ours": workers["ours"].ask("build")}, {}, []
        extra = {"ours": workers["ours"].ask("memory")}
        peak = workers["ours"].ask("peak")["flop/s"]
        workers["ours"].ask("export")
        try:
            for side in sides:
                worker = start(side)
                try:
                    about[side] = worker.ask("build")
                    errors[side] = worker.ask("check")["error size"]
                except Failed as failure:  # torch.compile may not work here: say so, and go on with the rest
                    worker.close()
                    problems.append(str(failure))
                    continue
                workers[side] = worker
                if not errors[side] < case.tolerance:
                    raise Failed(
                        f"{case.name}, {side}: results differ by {errors[side]:.1e}, more than {case.tolerance:.0e}"
                    )
                if memory:
                    fresh = start(side)
                    fresh.ask("build")
                    extra[side] = fresh.ask("memory")
                    fresh.close()
            inner = STEPS if case.live and accelerated() else 1
            wall = {side: [] for side in workers}
            cpu = {side: [] for side in workers}
            for turn in range(-1, repeats):  # the first round warms up and is thrown away
                for side, worker in workers.items():
                    times = worker.ask("block", seed=turn + 1, inner=inner)
                    if turn >= 0:
                        wall[side].append(times["wall"])
                        cpu[side].append(times["cpu"])
        finally:
            for worker in workers.values():
                worker.close()
    return Measured(case, wall, cpu, errors, extra, about, peak, problems)


def machine() -> dict[str, str]:
    """What the numbers belong to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "rgdiff", "benchmarks", ":!benchmarks/results"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "machine": f"{model}, {os.cpu_count()} cores",
        "load at the start": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "commit": (commit.stdout.strip() or "unknown") + (" with changes" if dirty.stdout.strip() else ""),
    }
