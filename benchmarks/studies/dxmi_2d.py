"""DxMI on points in the plane: `python -m benchmarks.studies.dxmi_2d [--only main,tau,ablations,sets,robust] [--seeds 0,1,2,3,4]`.

Trains five-step samplers and energies from a DDPM-5 start and from scratch, and measures them at the end of training: sliced
Wasserstein distance (1,000 directions, 10,000 points against 10,000, mean of two draws), AUROC of the energy against
U[-4, 4]^2, samples within 3 standard deviations of a mode. Every run is one line of results/dxmi-2d.jsonl, and is not made
again while it stands there; results/dxmi-2d.md is written from the lines.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false"
)  # small matrices: threads cost more than they give

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.speed.harness import machine  # noqa: E402
from rgdiff import denoisers, metrics, policies, samplers, tuners  # noqa: E402
from rgdiff.domains import planar  # noqa: E402

RESULTS = Path(__file__).parents[1] / "results"
WIDTH, TIMES = 128, 128
COUNT, DRAWS, DATA = 10_000, 2, 65_536
PRETRAINING, PRETRAINING_BATCH = 3000, 512
DEFAULTS: dict[str, Any] = {"temperature": 0.05, "gamma": 1.0, "last_gamma": 0.5, "learning_rate": 1e-3, "batch": 256}
ITERATIONS = {"scratch": 5000, "ddpm": 4000}
SETS = ("eight_gaussians", "two_spirals", "rings", "checkerboard")

# ---------------------------------------------------------------- networks, as plain functions


def time_features(t: jax.Array) -> jax.Array:
    """[rows, TIMES]: cosines and sines of 1000 t at frequencies from 1 to 1/10,000; one row for one time."""
    angles = 1000.0 * jnp.atleast_1d(t)[:, None] * 10_000.0 ** (-jnp.arange(TIMES // 2) / (TIMES // 2))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def perceptron(params: Any, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
    """Three hidden layers of SiLU, each with a linear map of the time's features added."""
    h, e = x, time_features(t)
    for layer in params["hidden"]:
        h = jax.nn.silu(h @ layer["x"] + layer["b"] + e @ layer["t"])
    return h @ params["out"]["x"] + params["out"]["b"]


def scalar(params: Any, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
    return perceptron(params, x, t)[:, 0]


perceptron.scalar_time = scalar.scalar_time = True  # they embed one time once


def weights(key: jax.Array, out: int, last: float = 1.0) -> Any:
    """Normal weights of variance 1/fan-in, those of the output times `last`."""
    keys = iter(jax.random.split(key, 8))
    normal = lambda a, b: jax.random.normal(next(keys), (a, b)) / np.sqrt(a)  # noqa: E731
    hidden = [{"x": normal(a, WIDTH), "t": normal(TIMES, WIDTH), "b": jnp.zeros(WIDTH)} for a in (2, WIDTH, WIDTH)]
    return {"hidden": hidden, "out": {"x": last * normal(WIDTH, out), "b": jnp.zeros(out)}}


PROCESS = policies.few_step(policies.variances(), (2,))
POLICY = policies.policy(PROCESS, lambda params: denoisers.from_function(perceptron, params))


def VALUE(params: Any) -> Any:  # noqa: N802 - one object: another would compile again
    return denoisers.from_function(scalar, params)


# ---------------------------------------------------------------- one run


@functools.cache
def pretrained(name: str, seed: int) -> Any:
    """A five-step DDPM in the policy's own residual form, trained for the error of eps at its five times; five serve all runs."""
    optimizer = tuners.adamw(1e-3, decay_steps=PRETRAINING, clip=None)
    tuner = tuners.pretraining(POLICY.denoising, PROCESS.denoising, optimizer, grid=5)
    key_init, key = jax.random.split(jax.random.key(1000 + seed))
    data = {"x0": planar.LAWS[name]().sample(jax.random.key(seed), DATA)}
    state = tuner.init(weights(key_init, 2, 0.1))
    return tuners.fit(tuner, key, state, PRETRAINING, data=data, batch=PRETRAINING_BATCH, chunk=500).best


def build(start: str, iterations: int, **options: Any) -> Any:
    """The tuner of a run: DEFAULTS, the decay of its length, and the warm-up that a trained start needs."""
    chosen: dict[str, Any] = DEFAULTS | {"decay_steps": iterations, "warmup": 300 if start == "ddpm" else 0} | options
    separate = {"energy": VALUE} if chosen.pop("separate", False) else {}
    return tuners.dxmi(POLICY, PROCESS, VALUE, **separate, **chosen)


def run(name: str, seed: int, start: str, iterations: int, **options: Any) -> dict[str, Any]:
    """Train and measure; `options` are those of `dxmi`."""
    law = planar.LAWS[name]()
    key_policy, key_value, key_fit = jax.random.split(jax.random.key(seed), 3)
    network = pretrained(name, seed % 5) if start == "ddpm" else weights(key_policy, 2, 0.1)
    tuner = build(start, iterations, **options)
    params = {"policy": POLICY.init(network), "value": weights(key_value, 1)}
    if tuner.energy_model is not None:
        params["energy"] = weights(jax.random.fold_in(key_value, 1), 1)
    before = measured(tuner, params, law, seed)["SW2"]
    state, data = tuner.init(params), {"x0": law.sample(jax.random.key(seed), DATA)}
    worst: dict[str, float] = {"skipped": 0}
    seconds, cpu = time.perf_counter(), time.process_time()

    def on_chunk(state: Any, infos: Any) -> None:
        worst["skipped"] = int(infos["skipped"][-1])

    state = tuners.fit(tuner, key_fit, state, iterations, data=data, batch=tuner.batch, chunk=500, on_chunk=on_chunk)
    seconds, cpu = time.perf_counter() - seconds, time.process_time() - cpu
    raw, averaged = (measured(tuner, p, law, seed) for p in (state.params, state.best))
    sigma = np.asarray(POLICY.sigma(state.params["policy"]), float).round(3).tolist()
    speed = np.sqrt(np.asarray(state.extra.speed, float)).round(3).tolist()
    return {
        "start SW2": before, "raw": raw, "best": averaged, "skipped": worst["skipped"], "sigma": sigma, "s": speed,
        "CPU ms an iteration": 1e3 * cpu / iterations, "seconds": seconds,
    }  # fmt: skip


def measured(tuner: Any, params: Any, law: Any, seed: int) -> dict[str, float]:
    """The figures of parameters on fresh data."""
    sampler = samplers.ancestral(PROCESS, POLICY(params["policy"]))
    key = jax.random.key(7000 + seed)
    out, x, y = [], None, None
    for draw in range(DRAWS):
        key_x, key_y, key_u = jax.random.split(jax.random.fold_in(key, draw), 3)
        x = np.asarray(samplers.sample(sampler, key_x, COUNT, PROCESS.times()).x0)
        y = np.asarray(law.sample(key_y, COUNT))
        if not np.isfinite(x).all():
            return {"SW2": float("nan"), "AUC": float("nan"), "in mode": 0.0}
        noise = jax.random.uniform(key_u, (COUNT, 2), minval=-4.0, maxval=4.0)
        energy = [np.asarray(_energy(tuner.energy(params), z)) for z in (y, noise)]
        near = float("nan")
        if hasattr(law, "centres"):
            apart = np.linalg.norm(x[:, None] - np.asarray(law.centres), axis=-1).min(1)
            near = float((apart < 3 * float(law.std)).mean())
        out.append((metrics.sliced_wasserstein(x, y, seed=draw), metrics.auroc(-energy[0], -energy[1]), near))
    return dict(zip(("SW2", "AUC", "in mode"), np.mean(out, 0).tolist(), strict=True))


_energy = jax.jit(lambda energy, x: energy(x))

# ---------------------------------------------------------------- what is run


def plan(section: str, seeds: list[int]) -> list[dict[str, Any]]:
    """The runs of a section, in order: what `run` is called with."""
    line = lambda label, seed, start="ddpm", name="eight_gaussians", iterations=None, **options: {  # noqa: E731
        "section": section, "label": label, "name": name, "seed": seed, "start": start,
        "iterations": ITERATIONS[start] if iterations is None else iterations, "options": options,
    }  # fmt: skip
    if section == "main":
        return [line(f"from {start}", seed, start) for seed in seeds for start in ("scratch", "ddpm")]
    if section == "temperature":
        return [line(f"tau {tau:g}", seed, temperature=tau) for tau in (0.0, 0.01, 0.05, 0.1, 1.0) for seed in seeds]
    if section == "sets":
        return [line(name, seed, name=name) for name in SETS[1:] for seed in seeds]
    if section == "ablations":
        return [line(label, seed, **options) for label, options in ABLATIONS.items() for seed in seeds]
    random = np.random.default_rng(0)
    grid = {
        "temperature": (0.02, 0.05, 0.1),
        "gamma": (0.5, 1.0, 2.0),
        "learning_rate": (3e-4, 1e-3),
        "batch": (128, 256),
    }
    runs = []
    for seed in range(50):
        options = {name: random.choice(choices).item() for name, choices in grid.items()}
        runs.append(line("random", 100 + seed, str(random.choice(["scratch", "ddpm"])), iterations=1000, **options))
    return runs


ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "gamma 1 to the end": {"last_gamma": 1.0},
    "gamma falls to 0.3": {"last_gamma": 0.3},
    "gamma 0.3": {"gamma": 0.3, "last_gamma": 0.3},
    "gamma 0": {"gamma": 0.0, "last_gamma": 0.0},
    "speeds not followed": {"velocity_decay": 1.0},
    "sigmoid time cost": {"time_cost": 0.05 * tuners.sigmoid_time_cost(5)},
    "constant time cost": {"time_cost": 0.01},
    "target network 0.99": {"target_decay": 0.99},
    "no decay": {"decay_steps": float("inf")},
    "no warm-up": {"warmup": 0},
    "rate of values 3e-4": {"value_learning_rate": 3e-4},
    "rate of values 3e-3": {"value_learning_rate": 3e-3},
    "rate of policy 3e-4": {"learning_rate": 3e-4, "value_learning_rate": 1e-3},
    "batch 128": {"batch": 128},
    "batch 512": {"batch": 512},
    "Jacobi": {"ablation": {"sweep": "jacobi"}},
    "Jacobi, 5 sweeps": {"ablation": {"sweep": "jacobi", "sweeps": 5}},
    "every move": {"ablation": {"every_move": True}},
    "noise as drawn": {"ablation": {"expectation": "sampled"}},
    "next states as drawn": {"ablation": {"resample": False}},
    "values without costs": {"ablation": {"regularized_values": False}},
    "separate energy": {"separate": True},
    "separate energy, 5 steps": {"separate": True, "energy_steps": 5},
}


def key_of(line: dict[str, Any]) -> str:
    options = {k: np.asarray(v).tolist() for k, v in (DEFAULTS | line["options"]).items()}
    return json.dumps([line["name"], line["seed"], line["start"], line["iterations"], sorted(options.items())])


def table(lines: list[dict[str, Any]]) -> list[str]:
    """One row per section and label: mean, spread and worst over its seeds."""
    out = []
    for section in dict.fromkeys(line["section"] for line in lines):
        out += ["", f"## {section}", "", *HEAD]
        mine = [line for line in lines if line["section"] == section]
        for label in dict.fromkeys(line["label"] for line in mine):
            rows = [line for line in mine if line["label"] == label]
            raw, best = ({k: np.array([r[w][k] for r in rows]) for k in rows[0][w]} for w in ("raw", "best"))
            spread = lambda a, d=3: f"{a.mean():.{d}f} ± {a.std(ddof=1) if len(a) > 1 else float('nan'):.{d}f}"  # noqa: E731
            start = np.array([r["start SW2"] for r in rows])
            cells = [
                label, str(len(rows)), f"{start.mean():.3f}", spread(best["SW2"]), f"{best['SW2'].max():.3f}", spread(raw["SW2"]),
                spread(best["AUC"]), spread(raw["AUC"]), f"{best['in mode'].mean():.3f}",
                f"{(best['SW2'] < start).sum()}/{len(rows)}", str(sum(r["skipped"] for r in rows)),
                f"{np.median([r['CPU ms an iteration'] for r in rows]):.1f}",
            ]  # fmt: skip
            out.append("| " + " | ".join(cells) + " |")
    return out


HEAD = (
    "| run | seeds | SW2 at the start | SW2 | worst seed | SW2, not averaged | AUC | AUC, not averaged | in a mode | better than its start | undone iterations | CPU ms |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def main() -> None:
    sections = ("main", "tau", "ablations", "sets", "robust")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.dxmi_2d", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", default="main", help=f"of {','.join(sections)}")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := sorted({*options.only.split(",")} - {*sections}):
        parser.error(f"unknown {', '.join(unknown)}; sections are {','.join(sections)}")
    began, about = time.monotonic(), machine()
    file = options.out / "dxmi-2d.jsonl"
    done = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for line in [line for section in options.only.split(",") for line in plan(section, seeds)]:
        if any(one["key"] == key_of(line) and one["section"] == line["section"] for one in done):
            continue
        if time.monotonic() - began > 60 * options.minutes:
            break
        figures = run(line["name"], line["seed"], line["start"], line["iterations"], **line["options"])
        one = (
            {k: line[k] for k in ("section", "label", "seed", "start", "iterations")} | {"key": key_of(line)} | figures
        )
        one |= {
            "commit": about["commit"],
            "command": shlex.join(["python", "-m", "benchmarks.studies.dxmi_2d", *sys.argv[1:]]),
        }
        done.append(one)
        print(line["section"], line["label"], line["seed"], json.dumps(figures), flush=True)
        with file.open("a") as lines:
            lines.write(json.dumps(one) + "\n")
        facts = about | {"date": datetime.date.today().isoformat(), "lines": "dxmi-2d.jsonl: seeds, commits, commands"}
        text = ["# DxMI in the plane", "", *(f"- {name}: {value}" for name, value in facts.items()), *table(done)]
        (options.out / "dxmi-2d.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
