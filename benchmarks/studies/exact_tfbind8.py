"""How far each sampler is from its exact target on TFBind8: `python -m benchmarks.studies.exact_tfbind8 --data-dir DIR`.

All 65,536 DNA 8-mers and their reward are known, so the law p(x) exp(r(x)/tau)/Z that a sampler aims at, its mean
reward and log Z are enumerated: for a uniform prior, a prior with independent letters, and a *trained* masked prior
whose own chain's law is enumerated. Every sampler is run with the exact soft value (what is missing is the sampler's
fault) and with plug-in and learned ones (the rest is the value's). Writes benchmarks/results/exact-tfbind8.md.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.harness import machine
from rgdiff import denoisers, guides, processes, samplers, schedules, tuners, values
from rgdiff.domains.sequences import data as sequences
from rgdiff.exact import enumeration
from rgdiff.nets import ConvNet1D, ValueMLP
from rgdiff.samplers.particles import Smc

RESULTS = Path(__file__).parents[1] / "results" / "exact-tfbind8.md"
BINS = 50
COUNTS = (2, 4, 8, 16, 32, 64)


class World(NamedTuple):
    """A prior and everything exact about it: the law of its chain of x0, and the reward of every sequence."""

    name: str
    process: Any
    denoiser: Any
    times: Any
    law: np.ndarray
    rewards: np.ndarray
    reward: Any
    samples: int
    particles: int
    candidates: tuple[int, ...]


class Row(NamedTuple):
    world: str
    temperature: float
    method: str
    mean: float
    error: float
    exact: float
    variation: float
    log_z: float | None
    exact_log_z: float
    calls: float
    seconds: float


def priors(data_dir: str | None, steps: int, quick: bool) -> list[World]:
    """The uniform, the factorised and the trained prior."""
    from rgdiff.domains.sequences.rewards import table

    domain = sequences.tfbind8(data_dir, visible=0.5)
    scores = domain.table
    reward = table(scores, 8, 4)
    process = processes.masked(schedules.log_linear_mask(), 8, 4)
    times = process.times(steps)
    out = []
    skewed = np.random.default_rng(0).dirichlet(np.full(4, 3.0), 8)
    for name, p in (("uniform", np.full((8, 4), 0.25)), ("factorised", skewed)):
        denoiser = enumeration.Factorised(jnp.log(jnp.asarray(p, jnp.float32)))
        law = enumeration.product_law(p)
        out.append(World(name, process, denoiser, times, law, scores, reward, 2048, 4096, (16, 64)))
    net = ConvNet1D(4, width=48, dilations=(1, 1, 1), kernel=5)
    model = lambda params: denoisers.from_linen(net, params)  # noqa: E731
    tuner = tuners.pretraining(model, process, tuners.adamw(3e-3, warmup=50, decay_steps=1500), ema_decay=0.995)
    key = jax.random.key(1)
    params = net.init(key, jnp.zeros((1, 8, 5)), jnp.ones(1))["params"]
    data = {"x0": jnp.asarray(domain.train_x, jnp.float32)}
    state = tuners.fit(tuner, key, tuner.init(params), 300 if quick else 1500, data=data, batch=256)
    trained = model(state.best)
    law = enumeration.chain_law(process, trained, times)
    out.append(World("trained on the weaker half", process, trained, times, law, scores, reward, 1024, 1024, (16,)))
    return out


def learned_value(world: World, temperature: float | None, quick: bool) -> Any:
    """A small value network trained on noised samples of the prior."""
    net = ValueMLP(features=(256, 256))
    model = lambda params: values.learned(denoisers.from_linen(net, params), world.reward, world.process)  # noqa: E731
    optimizer = tuners.adamw(2e-3, warmup=50, decay_steps=2000)
    tuner = tuners.value_regression(model, world.process, optimizer, temperature=temperature, ema_decay=0.995)
    x0 = samplers.sample(samplers.ancestral(world.process, world.denoiser), jax.random.key(5), 20_000, world.times).x0
    key = jax.random.key(6)
    params = net.init(key, jnp.zeros((1, 8, 5)), jnp.ones(1))["params"]
    data = {"x0": x0, "reward": world.reward(x0)}
    state = tuners.fit(tuner, key, tuner.init(params), 200 if quick else 2000, data=data, batch=256)
    return model(state.best)


def measure(world: World, temperature: float, method: str, sampler: Any, repeats: int = 1) -> Row:
    """Run a sampler, from compiled code, and compare with the enumeration."""
    exact = enumeration.tilted(world.law, world.rewards, temperature)
    size = world.particles if isinstance(sampler, Smc) else world.samples
    run = lambda seed: jax.block_until_ready(  # noqa: E731
        samplers.sample(sampler, jax.random.key(seed), size, world.times)[::2]
    )
    run(0)  # compile
    means, log_zs, histogram = [], [], 0.0
    edges = np.linspace(world.rewards.min(), world.rewards.max() + 1e-6, BINS + 1)
    start = time.perf_counter()
    for seed in range(repeats):
        x0, info = run(seed + 1)
        rewards = world.rewards[np.asarray(enumeration.codes(x0))]
        weights = np.full(len(rewards), 1 / len(rewards))
        if "log_weights" in info:
            weights = np.exp(np.asarray(info["log_weights"], float))
            log_zs.append(float(info["log_z"]))
        means.append(float(weights @ rewards))
        histogram = histogram + np.histogram(rewards, edges, weights=weights)[0] / repeats
        spread = float(np.sqrt(weights @ (rewards - means[-1]) ** 2 / len(rewards)))
    seconds = (time.perf_counter() - start) / repeats
    error = float(np.std(means) / np.sqrt(repeats)) if repeats > 2 else spread
    target = np.histogram(world.rewards, edges, weights=exact.probabilities)[0]
    variation = 0.5 * float(np.abs(histogram - target).sum())
    calls = sampler.network_calls(len(world.times) - 1)
    log_z = float(np.logaddexp.reduce(log_zs) - np.log(len(log_zs))) if log_zs else None
    print(f"{world.name}, {temperature}, {method}: {np.mean(means):.4f} of {exact.reward_mean:.4f}", flush=True)
    return Row(
        world.name, temperature, method, float(np.mean(means)), error, exact.reward_mean, variation, log_z, exact.log_z,
        calls, seconds,
    )  # fmt: skip


def rows_of(world: World, temperature: float, learnt: Any, repeats: int, only: str = "") -> list[Row]:
    """Every method on one prior at one temperature, or those whose name has `only` in it; learnt() trains the two values."""
    process, denoiser = world.process, world.denoiser
    exact = enumeration.chain_value(process, denoiser, world.times, world.rewards, temperature)
    mean = values.posterior_mean(world.reward, process, denoiser)
    mode = values.posterior_mean(world.reward, process, denoiser, plug_in="mode")
    plain = samplers.ancestral(process, denoiser)
    out: list[Row] = []

    def add(method: str, sampler: Any, repeats: int = 1) -> None:
        if only in method:
            out.append(measure(world, temperature, method, sampler() if callable(sampler) else sampler, repeats))

    add("prior", plain)
    few, most = world.candidates[0], world.candidates[-1]
    add(f"best of {most}", samplers.best_of_n(plain, world.reward, most))
    options: dict[str, Any] = {"temperature": temperature}
    svdd = functools.partial(samplers.svdd, process, denoiser, **options)
    for m in world.candidates:
        add(f"svdd, exact value, M = {m}", svdd(exact, candidates=m), repeats)
        add(f"svdd, plug-in mean value, M = {m}", svdd(mean, candidates=m))
        if m == few:
            add(f"svdd, plug-in mode value, M = {m}", svdd(mode, candidates=m))
            for name in ("mean", "soft"):
                add(f"svdd, learned {name} value, M = {m}", lambda: svdd(learnt()[name], candidates=few))  # noqa: B023
    add(f"svdd as released (argmax), M = {few}", svdd(mean, candidates=few, selection="argmax"))
    add(f"svdd-r 4 %, plug-in mean, M = {few}", svdd(mean, candidates=few, replace=0.04))
    for name, tilts in (("token", "token"), ("token and rate", "token_and_rate")):
        guide = guides.gradient_guide(mean, 1 / temperature, tilts=tilts)
        add(f"discrete guidance, {name}", samplers.ancestral(process, denoiser, guide=guide))
    particles = {
        "smc, exact value": samplers.smc(process, denoiser, exact, reward=world.reward, **options),
        "smc (fk difference), plug-in mean": samplers.smc(process, denoiser, mean, **options),
        "fk steering (max), plug-in mean": samplers.fk_steering(process, denoiser, mean, **options),
        "fk sum, plug-in mean": samplers.smc(process, denoiser, mean, potential="sum", **options),
        "smc, terminal (importance sampling)": samplers.smc(process, denoiser, mean, potential="terminal", **options),
        "tds, plug-in mean": samplers.tds(process, denoiser, mean, **options),
        "das, plug-in mean": samplers.das(process, denoiser, mean, world.times, gamma=0.05, **options),
        "adaptive tempering, plug-in mean": samplers.smc(process, denoiser, mean, adaptive=0.5, twist=1.0, **options),
    }
    for name, sampler in particles.items():
        add(name, sampler, repeats)
    return out


def bias(world: World, temperature: float, samples: int) -> tuple[list[tuple[int, float, float]], float]:
    """SVDD's bias with the exact value against M, its standard errors, and the fitted slope of the points above noise."""
    exact = enumeration.tilted(world.law, world.rewards, temperature).reward_mean
    value = enumeration.chain_value(world.process, world.denoiser, world.times, world.rewards, temperature)
    points = []
    for m in COUNTS:
        sampler = samplers.svdd(world.process, world.denoiser, value, temperature=temperature, candidates=m)
        rewards = []
        for seed in range(max(1, samples // world.samples)):
            x0 = samplers.sample(sampler, jax.random.key(100 + seed), world.samples, world.times).x0
            rewards.append(world.rewards[np.asarray(enumeration.codes(x0))])
        flat = np.concatenate(rewards)
        points.append((m, exact - float(flat.mean()), float(flat.std() / np.sqrt(flat.size))))
    clear = [(m, b) for m, b, e in points if b > 4 * e]
    slope = float(np.polyfit(*np.log(np.asarray(clear, float).T), 1)[0]) if len(clear) > 1 else float("nan")
    return points, slope


def picture(path: Path, points: list[tuple[int, float, float]], slope: float) -> None:
    """Draw the bias against M on logarithmic axes, with the fitted line."""
    from matplotlib.figure import Figure

    m, b, e = np.asarray(points, float).T
    page = Figure(figsize=(4.5, 3.2), dpi=120, layout="constrained")
    axes = page.subplots()
    axes.errorbar(m, b, 2 * e, fmt="o", capsize=2, label="bias of E[r], 2 standard errors")
    clear = b > 4 * e
    height = np.exp(np.mean(np.log(b[clear]) - slope * np.log(m[clear])))
    axes.plot(m, height * m**slope, label=f"slope {slope:.2f} (points above 4 standard errors)")
    axes.set(xscale="log", yscale="log", xlabel="M, candidates", ylabel="exact E[r] minus SVDD's")
    axes.set_xticks(m, [f"{count:.0f}" for count in m], minor=False)
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, fontsize=7)
    page.savefig(path)


def lines(rows: list[Row]) -> list[str]:
    head = "| prior | tau | method | E[r] (se) | exact | gap | TV | log Z - exact | calls | seconds |"
    out = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        log_z = "" if r.log_z is None else f"{r.log_z - r.exact_log_z:+.3f}"
        out.append(
            f"| {r.world} | {r.temperature} | {r.method} | {r.mean:.4f} ({r.error:.4f}) | {r.exact:.4f} | "
            f"{r.exact - r.mean:+.4f} | {r.variation:.3f} | {log_z} | {r.calls:.0f} | {r.seconds:.2f} |"
        )
    return out


def parts(rows: list[Row]) -> list[str]:
    """How much of a gap is the value's and how much the sampler's: the exact value's gap at the same M is the sampler's."""
    gap = {(r.world, r.temperature, r.method): r.exact - r.mean for r in rows}
    out = ["| prior | tau | M | value | gap | sampler's part | value's part |", "|---|---|---|---|---|---|---|"]
    for (world, tau, method), total in gap.items():
        if method.startswith("svdd, ") and "exact" not in method:
            name, m = method.removeprefix("svdd, ").split(" value, M = ")
            own = gap[world, tau, f"svdd, exact value, M = {m}"]
            out.append(f"| {world} | {tau} | {m} | {name} | {total:+.4f} | {own:+.4f} | {total - own:+.4f} |")
    return out


def parsed(line: str) -> Row | None:
    """Read a row of an earlier table; its log Z becomes the difference from the exact one."""
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    if len(cells) != 10 or not cells[1].startswith("0."):
        return None
    world, tau, method, mean, exact, _, variation, log_z, calls, seconds = cells
    value, error = mean.rstrip(")").split(" (")
    known = float(log_z) if log_z else None
    return Row(
        world, float(tau), method, float(value), float(error), float(exact), float(variation), known, 0.0, float(calls), float(seconds)
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.exact_tfbind8", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data-dir", default=os.environ.get("RGDIFF_DATA"))
    parser.add_argument("--steps", type=int, default=16, help="moves of a chain")
    parser.add_argument("--temperatures", default="0.2,0.1,0.05")
    parser.add_argument("--priors", default="", help="only priors whose name has this in it")
    parser.add_argument("--methods", default="", help="only methods whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="smaller, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[Row] = []
    text: list[str] = []
    for world in priors(options.data_dir, options.steps, options.quick):
        if options.priors not in world.name:
            continue
        learnt_mean = functools.cache(functools.partial(learned_value, world, None, options.quick))
        for temperature in map(float, options.temperatures.split(",")):

            @functools.cache
            def learnt(
                world: World = world, temperature: float = temperature, mean: Any = learnt_mean
            ) -> dict[str, Any]:
                return {"mean": mean(), "soft": learned_value(world, temperature, options.quick)}

            rows += rows_of(world, temperature, learnt, 2 if options.quick else 8, options.methods)
        write(options, rows, text)
        if world.name == "uniform" and not options.methods:
            points, slope = bias(world, 0.1, 4096 if options.quick else 16_384)
            text += ["", f"## SVDD's bias against M (uniform prior, tau 0.1, exact value): slope {slope:.2f}", ""]
            text += ["| M | bias of E[r] | standard error |", "|---|---|---|"]
            text += [f"| {m} | {b:+.5f} | {e:.5f} |" for m, b, e in points]
            drawn = options.out.with_name("exact-tfbind8-bias.png")
            picture(drawn, points, slope)
            text += ["", f"The slope is of the points above 4 standard errors. ![bias against M]({drawn.name})"]
            write(options, rows, text)


def write(options: argparse.Namespace, rows: list[Row], text: list[str]) -> None:
    """Write what has been measured so far, in place of the same rows of earlier runs."""
    old = options.out.read_text() if options.out.exists() else ""
    key = lambda row: (row.world, row.temperature, row.method)  # noqa: E731
    again = {key(row): row for row in rows}
    earlier = [again.pop(key(row), row) for row in map(parsed, old.splitlines()) if row]
    rows = list(again.values())
    bias_section = old.partition("\n## SVDD's bias")[2].partition("\n## ")[0]
    if not text and bias_section:
        text = ["", "## SVDD's bias" + bias_section.rstrip()]
    facts = machine()
    about = {
        "machine": facts.pop("machine"),
        "python, jax": f"{facts.pop('python')}, {jax.__version__} on {jax.devices()[0].device_kind}",
        "samples": "2,048 (1,024 of the trained prior); SVDD with the exact value 8 such runs; particle methods 4,096 particles (1,024), 8 runs: "
        "E[r] is the runs' mean, log Z that of their mean Z, TV that of all their draws together",
        "gap": "exact minus sampled E[r]; TV: total variation between 50-bin histograms of rewards; calls: of the "
        "denoiser per sample; seconds: compiled",
    }
    command = f"--steps {options.steps} --temperatures {options.temperatures} --priors '{options.priors}' --methods '{options.methods}'"
    run = f"{command}{' --quick' if options.quick else ''}: commit {facts['commit']}, {datetime.date.today()}, load"
    runs = [line for line in old.splitlines() if line.startswith("- run ") and not line.startswith(f"- run {run}")]
    report = ["# TFBind8: samplers against the exact tilted law", "", *(f"- {k}: {v}" for k, v in about.items())]
    report += [*runs, f"- run {run} {facts['load at the start']}", "", *lines(earlier + rows), *text]
    report += ["", "## Whose gap it is (SVDD)", "", *parts(earlier + rows)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(report) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
