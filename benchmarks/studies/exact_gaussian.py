"""How far every guide and particle method is from the exact posterior: `python -m benchmarks.studies.exact_gaussian`.

Five mixtures measured by y = A x0 + noise, with exact denoisers: what is left is the method's own error, and the
steps'. Prints plain text and writes benchmarks/results/exact-gaussian.md. The worlds are those of tests/mixtures.py.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

# Two hundred small programs: most of the time would go into optimising them. Read by XLA at the first computation.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

from benchmarks.speed.harness import machine  # noqa: E402
from rgdiff import guides, samplers, values  # noqa: E402
from tests.worlds.mixtures import (  # noqa: E402
    A23,
    Y2,
    Measured,
    MeasuredWorld,
    grid_of_nine,
    lattice,
    ring_of_eight,
    swiss_roll,
)

RESULTS = Path(__file__).parents[1] / "results"
WORLDS: dict[str, Callable[[], MeasuredWorld]] = {
    "grid of 9 (2-D)": grid_of_nine,
    "ring of 8 (2-D)": ring_of_eight,
    "swiss roll (3-D)": lambda: swiss_roll(200),
    "lattice (8-D)": lambda: lattice(8, 2),
    "lattice (80-D)": lambda: lattice(80, 4),
}
MOVES, MOVE, PIECE = (25, 50, 100), 100, 25  # pieces of one length: one program for every number of moves
PARTICLES, REPEATS = (64, 1024), 8
SAMPLES, CANDIDATES = 1000, 5


class Row(NamedTuple):
    """One setting: error of the posterior mean in units of the posterior's spread, sliced W1, log Z - exact (mean, sd), calls, seconds."""

    mean: float
    distance: float
    log_z: tuple[float, float] | None
    calls: int
    seconds: float


def guided(world: MeasuredWorld, times: jax.Array) -> dict[str, Any]:
    """Samplers of independent samples, one network call and at most one VJP a step."""
    prior, process, seen = world.denoiser, world.process, world.measurement
    v = world.prior_variance()
    key = jax.random.key(11)
    by = {
        "prior, unguided": prior,
        "exact conditional score": guides.classifier_guidance(prior, process, world.value),
        "DPS, likelihood": guides.dps(prior, process, seen),
        "DPS, norm step 0.3": guides.dps_step(prior, process, seen, times, step=0.3),
        "PiGDM, variance 1": guides.pigdm(prior, process, seen),
        "PiGDM, variance of the data": guides.pigdm(prior, process, seen, prior_variance=v),
        "TMPD": guides.tmpd(prior, process, seen),
        "DTMPD": guides.tmpd(prior, process, seen, diagonal=True),
        "LGD-MC, 16 draws": guides.lgd_mc(prior, process, seen, key, draws=16, prior_variance=v),
    }
    out = {name: samplers.ancestral(process, denoiser) for name, denoiser in by.items()}
    pigdm = by["PiGDM, variance of the data"]
    out["PiGDM + time travel x3"] = samplers.ancestral(process, pigdm, time_travel=3, window=(0.2, 0.6))
    likelihood = guides.likelihood(prior, process, seen, prior_variance=v)
    out["PiGDM at the kernel"] = samplers.ancestral(process, prior, guide=guides.gradient_guide(likelihood))
    return out


def selected(world: MeasuredWorld) -> dict[str, Any]:
    """Samplers of independent samples that draw candidates."""
    prior, process, seen = world.denoiser, world.process, world.measurement
    plug_in = values.posterior_mean(seen, process, prior)
    select = {"candidates": CANDIDATES, "select_initial": True}
    return {
        f"best of {CANDIDATES}": samplers.best_of_n(samplers.ancestral(process, prior), seen, CANDIDATES),
        f"SVDD-PM, {CANDIDATES} candidates": samplers.svdd(process, prior, plug_in, **select),
        f"SVDD, exact value, {CANDIDATES} candidates": samplers.svdd(process, prior, world.value, **select),
    }


def particles(world: MeasuredWorld, times: jax.Array) -> dict[str, Any]:
    """Particle samplers of one problem, all with the measurement as the last potential."""
    prior, process, seen = world.denoiser, world.process, world.measurement
    plug_in = values.posterior_mean(seen, process, prior)
    matched = guides.likelihood(prior, process, seen, prior_variance=world.prior_variance())
    unit = guides.likelihood(prior, process, seen)
    build = lambda make, value, *rest, **options: make(process, prior, value, *rest, reward=seen, **options)  # noqa: E731
    return {
        "importance weights": build(samplers.smc, plug_in, potential="terminal", ess_threshold=0.0),
        "FK steering, max": build(samplers.fk_steering, plug_in),
        "SMC, plug-in value": build(samplers.smc, plug_in),
        "SMC, exact value": build(samplers.smc, world.value),
        "TDS, variance 1": build(samplers.tds, unit),
        "TDS, variance of the data": build(samplers.tds, matched),
        "DAS, plug-in value": build(samplers.das, plug_in, times, gamma=0.02),
    }


def sliced(x: np.ndarray, y: np.ndarray) -> float:
    """Sliced Wasserstein-1 distance of two sets of as many points, over 100 directions."""
    directions = np.random.default_rng(0).normal(size=(x.shape[1], 100))
    directions /= np.linalg.norm(directions, axis=0)
    return float(np.abs(np.sort(x @ directions, 0) - np.sort(y @ directions, 0)).mean())


def resampled(x: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """As many points of equal weight (systematic)."""
    edges = np.cumsum(np.exp(log_weights - log_weights.max()))
    where = (np.arange(len(x)) + 0.5) / len(x) * edges[-1]
    return x[np.searchsorted(edges, where).clip(max=len(x) - 1)]


class Judge:
    """Measures samples of one world against draws of its exact posterior."""

    def __init__(self, world: MeasuredWorld):
        self.world, rng = world, np.random.default_rng(1)
        self.mean = world.mean()
        self.draws = world.sample(rng, max(PARTICLES))
        self.spread = np.sqrt(np.trace(np.cov(self.draws.T)))

    def __call__(self, x0: np.ndarray, log_weights: np.ndarray | None) -> tuple[float, float]:
        weights = None if log_weights is None else np.exp(log_weights - log_weights.max())
        error = np.linalg.norm(np.average(x0, axis=0, weights=weights) - self.mean) / self.spread
        equal = x0 if log_weights is None else resampled(x0, log_weights)
        return float(error), sliced(equal, self.draws[: len(equal)])

    def floor(self, count: int, repeats: int) -> Row:
        """What as many exact draws would show."""
        rng = np.random.default_rng(2)
        found = np.array([self(self.world.sample(rng, count), None) for _ in range(repeats)])
        return Row(*np.sqrt((found**2).mean(0)), None, 0, 0.0)

    def independent(self, sampler: Any, moves: int) -> Row:
        """SAMPLES samples of one run; a run of no moves before it has compiled the program."""
        grid = self.world.process.times(moves + 1)
        times = np.pad(grid, (0, max(MOVES) - moves))
        run = lambda pieces: jax.block_until_ready(whole(sampler, jax.random.key(1), times, pieces))  # noqa: E731
        run(0)
        begin = time.perf_counter()
        x0 = np.asarray(run(moves // PIECE), float)
        seconds = time.perf_counter() - begin
        return Row(*self(x0, None), None, sampler.network_calls(moves), seconds)

    def problems(self, sampler: Any, times: jax.Array, count: int) -> Row:
        """REPEATS problems of `count` particles, in one program."""
        keys = jax.random.split(jax.random.key(1), REPEATS)
        program = jax.jit(jax.vmap(lambda key: samplers.sample(sampler, key, count, times)[::2])).lower(keys).compile()
        begin = time.perf_counter()
        x0, info = jax.block_until_ready(program(keys))
        seconds = (time.perf_counter() - begin) / REPEATS
        pairs = zip(np.asarray(x0, float), np.asarray(info["log_weights"], float), strict=True)
        found = np.array([self(x, w) for x, w in pairs])
        errors = np.asarray(info["log_z"], float) - self.world.log_evidence
        log_z = float(errors.mean()), float(errors.std(ddof=1))
        return Row(*np.sqrt((found**2).mean(0)), log_z, sampler.network_calls(len(times) - 1), seconds)


@jax.jit
def whole(sampler: Any, key: jax.Array, times: jax.Array, pieces: int) -> jax.Array:
    """x0 of SAMPLES chains of pieces * PIECE moves, their number decided while running; times are padded at the end."""

    def piece(i: jax.Array, carry: Any) -> Any:
        part = jax.lax.dynamic_slice_in_dim(times, i * PIECE, PIECE + 1)
        return samplers.roll(sampler, key, carry, part, first=i * PIECE)[0]

    carry = sampler.init(jax.random.fold_in(key, 0), SAMPLES, times[0])
    carry = jax.lax.fori_loop(0, pieces, piece, carry)
    return sampler.final(carry, times[pieces * PIECE])[0]


def slope(x: Any, y: Any) -> str:
    y = np.asarray(y, float)
    return f"{np.polyfit(np.log(x), np.log(y), 1)[0]:+.2f}" if np.all(np.isfinite(y) & (y > 0)) else "-"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is plain text as well: columns are padded."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def recursion_table() -> str:
    """Gaussian data: the law of every guided chain by exact recursion, no sampling."""
    steps, rows = (64, 128, 256, 512, 1024), []
    for guide, v in (("dps", 1.0), ("pigdm", 1.0), ("pigdm", 0.7), ("dtmpd", 1.0), ("tmpd", 1.0)):
        for eta in (0.0, 1.0):
            errors = []
            for n in steps:
                world = Measured(A23, Y2, 0.5, guide=guide, v=v, steps=n, eta=eta)
                errors.append(np.abs(world.law()[1] - world.posterior()[1]).max())
            name = f"{guide}, variance {v}" if guide == "pigdm" else guide
            rows.append([name, f"{eta:g}", *[f"{e:.5f}" for e in errors], slope(steps, errors)])
    head = ["guide", "eta", *[f"{n} steps" for n in steps], "slope"]
    return "## Gaussian (3-D), largest error of the posterior covariance, by recursion\n\n" + table(head, rows)


def guides_table(world: MeasuredWorld, judge: Judge) -> str:
    found: dict[str, dict[int, Row]] = {}
    for moves in MOVES:
        for name, sampler in guided(world, world.process.times(moves + 1)).items():
            if "norm" not in name or moves == MOVE:  # its program holds the grid
                found.setdefault(name, {})[moves] = judge.independent(sampler, moves)
    for name, sampler in selected(world).items():
        found[name] = {MOVE: judge.independent(sampler, MOVE)}
    floor = judge.floor(SAMPLES, 20)
    rows = [["exact draws", f"{floor.mean:.3f}", f"{floor.distance:.3f}", *[""] * 5]]
    for name, by in found.items():
        one = by[MOVE]
        sweep = [f"{by[n].distance:.3f}" if n in by else "" for n in MOVES if n != MOVE]
        visible = min(row.distance for row in by.values()) > 1.5 * floor.distance
        rate = "" if len(by) == 1 else slope(MOVES, [by[n].distance for n in MOVES]) if visible else "at the floor"
        rows.append(
            [name, f"{one.mean:.3f}", f"{one.distance:.3f}", *sweep, rate, str(one.calls), f"{one.seconds:.2f}"]
        )
    others = [f"SW, {n} moves" for n in MOVES if n != MOVE]
    return table(["guide", "mean error", "SW", *others, "slope of SW", "calls", "s"], rows)


def particles_table(world: MeasuredWorld, judge: Judge) -> str:
    times, rows = world.process.times(MOVE + 1), []
    floors = [judge.floor(n, REPEATS) for n in PARTICLES]
    last = [f"{floors[-1].distance:.3f}", *[""] * 5]
    rows.append(["exact draws", *[f"{f.mean:.3f}" for f in floors], slope(PARTICLES, [f.mean for f in floors]), *last])
    for name, sampler in particles(world, times).items():
        by = [judge.problems(sampler, times, n) for n in PARTICLES]
        log_z = [row.log_z for row in by if row.log_z]
        cells = [
            *[f"{row.mean:.3f}" for row in by],
            slope(PARTICLES, [row.mean for row in by]),
            f"{by[-1].distance:.3f}",
        ]
        cells += [f"{log_z[-1][0]:+.3f}", f"{log_z[-1][1]:.3f}", slope(PARTICLES, [z[1] for z in log_z])]
        rows.append([name, *cells, str(by[-1].calls), f"{by[-1].seconds:.2f}"])
    counts = [f"mean error, N={n}" for n in PARTICLES]
    head = ["particles", *counts, "slope", "SW", "log Z error", "log Z sd", "slope of sd", "calls", "s"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.exact_gaussian", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--worlds", default="", help="only worlds whose name contains this text")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path, facts = options.out / "exact-gaussian.md", machine()
    sections = earlier(path)
    if "recursion" not in sections:
        sections["recursion"] = recursion_table()
    for name, build in WORLDS.items():
        if options.worlds not in name:
            continue
        begin, world = time.perf_counter(), build()
        judge = Judge(world)
        head = f"## {name}: log p(y) = {world.log_evidence:.5f}, log Z of the reward = {world.log_z:.5f}"
        tables = [guides_table(world, judge), particles_table(world, judge)]
        run = (
            f"{datetime.date.today()}, commit {facts['commit']}, load {facts['load at the start']}; {MOVE} moves; guides: {SAMPLES} samples; "
            f"particles: {REPEATS} runs; {time.perf_counter() - begin:.0f} s, compilation included"
        )
        sections[name] = "\n\n".join([head, run, *tables])
        print(sections[name], flush=True)
        order = [key for key in ("recursion", *WORLDS) if key in sections]
        about = [f"- {k}: {facts[k]}" for k in ("machine", "python")]
        text = ["# Exact Gaussian worlds", "\n".join(about), NOTE, *(sections[key] for key in order)]
        path.write_text("\n\n".join(text) + "\n")
    print(f"wrote {path}")


def earlier(path: Path) -> dict[str, str]:
    """Return the sections of an earlier report by world: those that are not run again are kept."""
    parts = path.read_text().split("\n## ")[1:] if path.exists() else []
    heads = {"Gaussian (3-D), largest error of the posterior covariance, by recursion": "recursion"}
    named = {part.partition(":")[0].partition("\n")[0]: "## " + part.rstrip() for part in parts}
    return {heads.get(name, name): text for name, text in named.items()}


NOTE = """Mean error: |E x0 - exact| over the square root of the exact covariance's trace. SW: sliced Wasserstein-1 to exact draws,
100 directions; a first row says what as many exact draws show, below which nothing can be told apart. Slopes are of
log error against log moves or log particles. The law of a chain of finitely many moves is not the data's: that part of the
error of log Z and of the mean does not fall with the particles. Chains are ancestral (eta 1), linear VP; means over particles are
root mean squares over runs, SW and log Z at the most particles. Calls: of the network, per sample or particle; s: seconds of one
run, compiled without XLA's costly optimisations."""


if __name__ == "__main__":
    main()
