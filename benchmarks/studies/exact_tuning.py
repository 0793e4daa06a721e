"""How near tuning comes to exact optima: `python -m benchmarks.studies.exact_tuning --data-dir DIR`.

Tuning with a path KL to the prior aims at p(x0) exp(r(x0)/alpha)/Z. On TFBind8 (SIX6, uniform prior, alpha = 0.1) the policy
itself is evaluated over all 5^8 partly masked sequences, without sampling; Gaussian data and a mixture have closed
forms and quadrature (`benchmarks.studies.exact_initial`). Writes benchmarks/results/exact-tuning.md section by section.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.speed.harness import machine
from benchmarks.studies import exact_initial
from rgdiff import denoisers, processes, schedules, tuners
from rgdiff.domains.sequences import data as sequences
from rgdiff.domains.sequences.rewards import table
from rgdiff.exact import enumeration

RESULTS = Path(__file__).parents[1] / "results" / "exact-tuning.md"
ALPHA = 0.1
WIDTHS, WIDE = (256, 256), (512, 256)


class Stage(NamedTuple):
    """One run of a tuner: Adam, gradients clipped to 1, the rate decaying along a cosine to `floor` of it."""

    estimator: str
    steps: int
    batch: int
    rate: float
    floor: float = 0.0
    temperature: float = 1.0


class Figures(NamedTuple):
    """Exact figures of a policy, and what they cost. KL in nats; gap: E[r] on the exact frontier at this KL, less E[r]."""

    objective: float
    reward: float
    path_kl: float
    to_optimum: float
    variation: float
    gap: float
    trajectories: int
    seconds: float


class World:
    """SIX6: all rewards, the uniform prior, its chains of one event at a time, and everything exact about them."""

    def __init__(self, data_dir: str | None):
        self.rewards = np.asarray(sequences.tfbind8(data_dir).table, np.float64)
        self.reward = table(self.rewards, 8, 4)
        self.masked = processes.masked(schedules.log_linear_mask(), 8, 4)
        self.process = processes.first_hitting(self.masked)
        self.reference = enumeration.Factorised(jnp.zeros((8, 4)))
        self.prior = np.full(4**8, 4.0**-8)
        self.frontier = [enumeration.tilted(self.prior, self.rewards, a) for a in np.geomspace(0.01, 10, 400)]

    def figures(
        self,
        denoiser: Any,
        trajectories: int,
        seconds: float,
        process: Any = None,
        times: Any = None,
        alpha: float = ALPHA,
    ) -> Figures:
        process = self.process if process is None else process
        times = self.process.times() if times is None else times
        p, kl = enumeration.chain_law_and_kl(process, denoiser, times, self.reference, batch=16_384)
        target = enumeration.tilted(self.prior, self.rewards, alpha).probabilities
        some = p > 0
        mean = float(p @ self.rewards)
        best = float(np.interp(kl, [f.kl for f in self.frontier[::-1]], [f.reward_mean for f in self.frontier[::-1]]))
        return Figures(
            mean - alpha * kl,
            mean,
            kl,
            float(p[some] @ np.log(p[some] / target[some])),
            0.5 * float(np.abs(p - target).sum()),
            best - mean,
            trajectories,
            seconds,
        )


def network(params: Any, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
    """An MLP of the state alone: the number of masks is the time."""
    h = x.reshape(x.shape[0], -1)
    for layer in params[:-1]:
        h = jax.nn.silu(h @ layer["kernel"] + layer["bias"])
    return (h @ params[-1]["kernel"] + params[-1]["bias"]).reshape(-1, 8, 4)


def model(params: Any) -> Any:
    return denoisers.from_function(network, params)


def start(seed: int, widths: tuple[int, ...] = WIDTHS) -> Any:
    """Fan-in scaled weights and a last layer of zeros: the policy begins as the prior."""
    sizes = [40, *widths, 32]
    keys = jax.random.split(jax.random.key(1000 + seed), len(sizes) - 1)
    layers = []
    for i, (key, fan_in, out) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True)):
        scale = 0.0 if i == len(sizes) - 2 else fan_in**-0.5
        layers.append({"kernel": scale * jax.random.normal(key, (fan_in, out)), "bias": jnp.zeros(out)})
    return layers


def optimizer(rate: float, steps: int, floor: float) -> Any:
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, steps, floor), b2=0.99)
    )


def train(
    world: World,
    stages: tuple[Stage, ...],
    seed: int,
    *,
    alpha: float = ALPHA,
    ema: float | None = 0.999,
    widths: Any = WIDTHS,
) -> Iterator[tuple[Any, int, float]]:
    """Run the stages one after the other, each from the averaged parameters of the one before: parameters, trajectories, seconds."""
    params, trajectories, seconds = start(seed, widths), 0, 0.0
    for i, stage in enumerate(stages):
        begun = time.perf_counter()
        tuner = tuners.drakes(
            model, world.process, world.reward, world.process.times(), optimizer(stage.rate, stage.steps, stage.floor),
            batch=stage.batch, reference=world.reference, temperature=alpha, estimator=stage.estimator,
            gumbel_temperature=stage.temperature, ema_decay=ema, remat="none",
        )  # fmt: skip
        key = jax.random.fold_in(jax.random.key(seed), i)
        state = tuners.fit(tuner, key, tuner.init(params), stage.steps, chunk=500)
        params, trajectories = jax.block_until_ready(state.best), trajectories + stage.steps * stage.batch
        seconds += time.perf_counter() - begun
        yield params, trajectories, seconds


# ---------------------------------------------------------------- sections of the report

HEAD = [
    "| run | seed | J = E[r] - alpha KL | E[r] | path KL | KL(x0, p*) | TV(x0, p*) | gap | trajectories | seconds |",
    "|---|---|---|---|---|---|---|---|---|---|",
]
TO_OPTIMUM = (
    Stage("reinmax", 1000, 128, 3e-3, 1.0),
    Stage("log_variance", 4000, 256, 3e-3, 1.0),
    Stage("log_variance", 3600, 512, 3e-3),
)
ALONE = {
    "reinmax": Stage("reinmax", 2500, 128, 2e-3),
    "straight_through": Stage("straight_through", 2500, 128, 2e-3),
    "gumbel, temperature 0.5": Stage("gumbel", 2500, 128, 2e-3, temperature=0.5),
    "gumbel, temperature 1": Stage("gumbel", 2500, 128, 2e-3),
    "score_function": Stage("score_function", 2500, 128, 2e-3),
    "log_variance": Stage("log_variance", 2500, 128, 2e-3),
}


def line(name: str, seed: int | str, f: Figures) -> str:
    out = (
        f"| {name} | {seed} | {f.objective:.4f} | {f.reward:.4f} | {f.path_kl:.3f} | {f.to_optimum:.3f} | {f.variation:.3f} | "
        f"{f.gap:+.4f} | {f.trajectories:,} | {f.seconds:.0f} |"
    )
    print(out, flush=True)
    return out


def described(stages: tuple[Stage, ...]) -> str:
    return "; ".join(f"{s.estimator} {s.steps} x {s.batch}, rate {s.rate:g} to {s.rate * s.floor:g}" for s in stages)


def optimum(world: World, options: argparse.Namespace, write: Any) -> None:
    """DRAKES against alpha log Z."""
    exact = enumeration.tilted(world.prior, world.rewards, ALPHA)
    rows = [*HEAD, line("exact optimum", "", Figures(ALPHA * exact.log_z, exact.reward_mean, exact.kl, 0, 0, 0, 0, 0))]
    for seed in options.seeds:
        for i, (params, trajectories, seconds) in enumerate(train(world, TO_OPTIMUM, seed, ema=0.995, widths=WIDE)):
            name = "drakes" if i == len(TO_OPTIMUM) - 1 else f"after stage {i + 1}"
            rows.append(line(name, seed, world.figures(model(params), trajectories, seconds)))
            write([f"Settings: {described(TO_OPTIMUM)}; hidden layers {WIDE}; parameters averaged, 0.995.", "", *rows])


def alone(world: World, options: argparse.Namespace, write: Any) -> None:
    """Every estimator by itself, 320,000 trajectories."""
    rows = [*HEAD]
    for name, stage in ALONE.items():
        for seed in options.seeds:
            params, trajectories, seconds = next(train(world, (stage,), seed, ema=None))
            rows.append(line(name, seed, world.figures(model(params), trajectories, seconds)))
            write([f"Settings: 2,500 steps of 128, rate 0.002 to 0; hidden layers {WIDTHS}; no average.", "", *rows])


def published(world: World, options: argparse.Namespace, write: Any) -> None:
    """The released scheme's own end points, of its own chain and taken one event at a time."""
    rows = [*HEAD]
    for moves, live, steps in ((8, 8, 2500), (32, 12, 1000)):
        times, begun = world.masked.times(moves), time.perf_counter()
        tuner = tuners.drakes_published(
            model, world.masked, world.reward, times, optimizer(2e-3, steps, 0.0), batch=128,
            reference=world.reference, temperature=ALPHA, truncation=live, remat="none",
        )  # fmt: skip
        state = tuners.fit(tuner, jax.random.key(0), tuner.init(start(0)), steps, chunk=500)
        policy, cost = model(jax.block_until_ready(state.params)), (steps * 128, time.perf_counter() - begun)
        name = f"published, T = {moves}, K = {live}"
        rows.append(line(f"{name}, its own chain", 0, world.figures(policy, *cost, world.masked, times)))
        rows.append(line(f"{name}, one event at a time", 0, world.figures(policy, *cost)))
        write(rows)


def front(world: World, options: argparse.Namespace, write: Any) -> None:
    """E[r] against path KL: alpha from weak to strong, each beside the exact frontier (gap 0 is on it)."""
    rows = [
        "| alpha | exact E[r] | exact KL | " + HEAD[0].removeprefix("| run | seed | "),
        "|---|---|---" + HEAD[1].removeprefix("|---|---"),
    ]
    for alpha in (0.3, 0.2, 0.1, 0.07, 0.05):
        exact = enumeration.tilted(world.prior, world.rewards, alpha)
        stages = (Stage("reinmax", 2500, 128, 2e-3, 0.3), Stage("log_variance", 1250, 256, 1e-3))
        *_, (params, trajectories, seconds) = train(world, stages, 0, alpha=alpha)
        figures = world.figures(model(params), trajectories, seconds, alpha=alpha)
        rows.append(
            f"| {alpha} | {exact.reward_mean:.4f} | {exact.kl:.3f} |" + line("", "", figures).removeprefix("|  |  |")
        )
        write([f"Settings: {described(stages)}; seed 0.", "", *rows])


def linear(world: Any, options: argparse.Namespace, write: Any) -> None:
    exact_initial.gaussian_rows(len(options.seeds), write)


def mixture(world: Any, options: argparse.Namespace, write: Any) -> None:
    exact_initial.mixture_rows(len(options.seeds), write)


def policies(world: Any, options: argparse.Namespace, write: Any) -> None:
    """DDPO, DPOK and DRaFT with alpha path KL from the frozen start: what they reach beside the best that can be reached."""
    exact_initial.policy_gradient_rows(len(options.seeds), write)


SECTIONS = {
    "SIX6: to the exact optimum": optimum,
    "SIX6: each estimator alone": alone,
    "SIX6: the published scheme": published,
    "SIX6: Pareto front": front,
    "Gaussian data: ELEGANT": linear,
    "Gaussian data: policy gradients": policies,
    "A mixture of two: ELEGANT": mixture,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.exact_tuning", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data-dir", default=os.environ.get("RGDIFF_DATA"))
    parser.add_argument("--only", default="", help="a section whose title has this in it")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = {title: run for title, run in SECTIONS.items() if options.only.lower() in title.lower()}
    world = World(options.data_dir) if any("SIX6" in title for title in chosen) else None
    for title, run in chosen.items():
        run(world, options, lambda rows, title=title, run=run: write(options.out, title, run.__doc__, rows))


def write(path: Path, title: str, about: str | None, rows: list[str]) -> None:
    """Put a section into the report, in place of the one of an earlier run."""
    facts = machine() | {
        "command": f"python {shlex.join(['-m', 'benchmarks.studies.exact_tuning', *sys.argv[1:]])}",
        "date": datetime.date.today().isoformat(),
        "jax": f"{jax.__version__} on {jax.devices()[0].device_kind}",
    }
    parts = dict(part.split("\n", 1) for part in path.read_text().split("\n## ")[1:]) if path.exists() else {}
    body = [
        *([about, ""] if about else []),
        *(f"- {k}: {v}" for k, v in facts.items()),
        "",
        *kept(parts.get(title, ""), rows),
    ]
    parts[title] = "\n" + "\n".join(body) + "\n"
    report = ["# Exact optima of tuning with a path KL", "", *INTRODUCTION]
    report += [f"\n## {name}\n{parts[name].rstrip()}" for name in SECTIONS if name in parts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(report) + "\n")


def kept(old: str, rows: list[str]) -> list[str]:
    """The rows, and those of an earlier run with the same settings that have another name or seed."""
    name = lambda row: row.split("|")[1:3]  # noqa: E731
    settings = [row for row in rows if row.startswith("Settings")]
    if not settings or settings[0] not in old.splitlines():
        return rows
    ours = [name(row) for row in rows]
    return rows + [row for row in old.splitlines() if row.startswith("|") and name(row) not in ours]


INTRODUCTION = [
    "SIX6: exact figures of a policy by dynamic programming over all 5^8 partly masked sequences (no sampling); uniform",
    "prior, alpha 0.1, reward multilinear in the letters; J = E[r] - alpha * path KL, KL in nats; gap: E[r] on the exact",
    "frontier at the same path KL, less E[r]. Seconds are of training, compilation included, on a shared machine.",
]


if __name__ == "__main__":
    main()
