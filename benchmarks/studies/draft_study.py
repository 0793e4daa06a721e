"""The claims of the DRaFT paper (arXiv 2309.17400) at the scale of digits: `python -m benchmarks.studies.draft_study`.

One prior of 8x8 digits, 50 ancestral calls, the log-probability of a 3 as the reward and a classifier of other images as
the held-out one; every run over several seeds. Writes benchmarks/results/draft-study.md and the figure beside it,
section by section. The held-out reward is that of 128 fresh samples every few steps, not counted as queries or time.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.harness import machine
from rgdiff import metrics, nets, processes, rewards, samplers, schedules, tuners
from rgdiff.domains.images import data as images
from rgdiff.domains.images import rewards as image_rewards
from rgdiff.domains.images.classifier import train_classifier
from rgdiff.nets.lora import LoRAModel, lora_init, lora_sum
from rgdiff.recipes.priors import PriorModel

RESULTS = Path(__file__).parents[1] / "results" / "draft-study.md"
CALLS, BATCH = 50, 4  # small batches: with 32 chains all of these gradients are nearly free of noise
TARGET = -0.5  # held-out log-probability, nats
EVERY, FRESH = 2, 128  # steps between evaluations of the held-out reward, and its samples
RATES = (1e-4, 3e-4, 1e-3, 3e-3)


class World(NamedTuple):
    """The prior, the reward and its held-out twin."""

    process: Any
    times: jax.Array
    model: Any
    params: Any
    reward: Any
    heldout: Any


class Run(NamedTuple):
    """One tuning: gradient norms [N], the held-out reward [M] after so many steps [M], seconds of a step (median), parameters."""

    norm: np.ndarray
    at: np.ndarray
    heldout: np.ndarray
    seconds: float
    params: Any


def world(steps: int = 4000) -> World:
    """Train the prior, a multilayer perceptron that predicts v, and the two classifiers."""
    domain, schedule = images.digits(), schedules.cosine_vp()
    process = processes.gaussian(schedule, domain.shape, eta=1.0)
    network = nets.MLP((256, 256, 256))
    model = PriorModel(schedule, network, "v")
    params = network.init(jax.random.key(0), jnp.zeros((1, *domain.shape)), jnp.ones(1))["params"]
    adam = tuners.adamw(2e-3, warmup=100, decay_steps=steps)
    trainer = tuners.pretraining(model, process, adam, target="v", ema_decay=0.998)
    data = {"x0": jnp.asarray(domain.train_x)}
    params = tuners.fit(trainer, jax.random.key(1), trainer.init(params), steps, data=data, batch=128, chunk=1000).best
    guide = train_classifier(jax.random.key(2), domain.train_x, domain.train_y, 10)
    judge = train_classifier(jax.random.key(3), domain.heldout_x, domain.heldout_y, 10)
    reward, heldout = (image_rewards.classifier_reward(classifier, 3) for classifier in (guide, judge))
    clipped = PriorModel(schedule, network, "v", value_range=(-1.0, 1.0))
    return World(process, process.times(CALLS), clipped, params, reward, heldout)


@functools.cache
def optimizer() -> Any:
    """Build Adam, gradients clipped to norm 1, whose rate is a number of its state: another one compiles nothing."""
    import optax

    return optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=1e-3))


def gradient_tuner(w: World, name: str, model: Any = None, reward: Any = None, **options: Any) -> Any:
    """Build a setting of the reward gradient; no KL term, so that only the gradients differ."""
    build = getattr(tuners, name)
    return build(
        w.model if model is None else model, w.process, w.reward if reward is None else reward, w.times,
        optimizer(), batch=BATCH, remat="none", **options,
    )  # fmt: skip


def ddpo_tuner(w: World, batch: int = 64, minibatches: int = 2) -> Any:
    """Build DDPO-IS with the settings of configs/method/ddpo.yaml, at half its batch."""
    advantage = tuners.advantages.batch_normalised(clip=5.0)
    online = tuners.ddpo(
        w.model,
        w.process,
        w.times,
        optimizer(),
        batch=batch,
        clip=0.2,
        minibatches=minibatches,
        advantage=advantage,
    )
    return tuners.as_tuner(online, w.reward)


@jax.jit
def judged(w: World, params: Any, model: Any) -> jax.Array:
    """Held-out reward of fresh samples, the same random numbers for all parameters."""
    x0 = samplers.sample(samplers.ancestral(w.process, model(params)), jax.random.key(99), FRESH, w.times).x0
    return w.heldout(x0).mean()


def tune(w: World, tuner: Any, params: Any, rate: float, seed: int, steps: int, every: int = EVERY) -> Run:
    """Tune from the same parameters at a rate, with another seed; evaluate every so many steps."""
    begun = tuner.init(params)
    begun.opt_state[1].hyperparams["learning_rate"] = jnp.float32(rate)
    model = getattr(tuner, "online", tuner).model
    norms, heldout, seconds, stamp = [], [float(judged(w, params, model))], [], [time.perf_counter()]

    def on_chunk(state: Any, info: dict[str, np.ndarray]) -> None:
        norms.append(info["gradient_norm"])
        seconds.append((time.perf_counter() - stamp[0]) / every)
        heldout.append(float(judged(w, state.params, model)))
        stamp[0] = time.perf_counter()

    state = tuners.fit(tuner, jax.random.key(seed), begun, steps, chunk=every, on_chunk=on_chunk)
    at = np.arange(len(heldout)) * every
    return Run(np.concatenate(norms), at, np.array(heldout), float(np.median(seconds[1:] or seconds)), state.params)


def reached(run: Run, target: float = TARGET) -> float:
    """Steps until the held-out reward is at the target, interpolated between evaluations; infinite if it never is."""
    above = np.flatnonzero(run.heldout >= target)
    if not len(above) or above[0] == 0:
        return float("inf")
    i = above[0]
    share = (target - run.heldout[i - 1]) / (run.heldout[i] - run.heldout[i - 1])
    return float(run.at[i - 1] + share * (run.at[i] - run.at[i - 1]))


def steady(
    tuner: Any, w: World, rates: Sequence[float], seeds: Sequence[int], steps: int
) -> tuple[float, list[Run], np.ndarray]:
    """Return the first of these rates at which every seed reaches the target (or else the last), its runs and their steps."""
    for rate in rates:
        runs = [tune(w, tuner, w.params, rate, seed, steps) for seed in seeds]
        needed = np.array([reached(run) for run in runs])
        print(rate, needed, flush=True)
        if np.isfinite(needed).all():
            break
    return rate, runs, needed  # type: ignore[possibly-undefined]


def spread(values: Any, digits: int = 3) -> str:
    """Mean (lowest-highest) over seeds."""
    v = np.asarray(values, float)
    if not np.isfinite(v).all():
        return f"{int(np.isfinite(v).sum())} of {len(v)} reach it"
    return f"{v.mean():.{digits}g} ({v.min():.{digits}g}-{v.max():.{digits}g})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Geometric mean of all ratios theirs / ours, with the lowest and highest seed by seed."""
    r = np.asarray(theirs, float) / np.asarray(ours, float)
    return (
        "not reached" if not np.isfinite(r).all() else f"{np.exp(np.log(r).mean()):.2g} ({r.min():.2g}-{r.max():.2g})"
    )


# ---------------------------------------------------------------- sections: rows of a table, and curves of the figure


def against_each_other(w: World, seeds: Sequence[int], steps: int) -> tuple[list[str], list[Any]]:
    """DRaFT-LV against DRaFT-1, and both against DDPO."""
    makes = {
        "DRaFT-1": (gradient_tuner(w, "draft_k", k=1), steps, BATCH, 1),
        "DRaFT-LV, n = 2": (gradient_tuner(w, "draft_lv", n=2), steps, BATCH, 3),
        "DDPO": (ddpo_tuner(w), steps // 2, 64, 1),
    }
    rows = [
        f"Target: held-out log-probability {TARGET} nats; {BATCH} chains a step (DDPO: 64). Each method at the rate of {RATES} that is fastest with seed 1000, or the fastest at which all five seeds get there.",
        "",
        "| method | rate | steps | chains sampled | reward queries | seconds a step | seconds to the target | gradient SNR | variance a sample / squared mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    needed, curves, costs, by_rate = {}, [], {}, []
    for name, (tuner, count, batch, queries) in makes.items():
        tried = {rate: reached(tune(w, tuner, w.params, rate, 1000, count)) for rate in RATES}
        by_rate.append(f"{name}: " + ", ".join(f"{rate:g}: {steps:.1f}" for rate, steps in tried.items()))
        print(by_rate[-1], flush=True)
        rate, runs, n = steady(tuner, w, sorted(tried, key=lambda rate: tried[rate]), seeds, count)
        cost = float(np.median([run.seconds for run in runs]))
        noise = tuners.gradient_statistics(tuner, jax.random.key(7), w.params, 32, chunk=1)
        relative = float(noise.variance_per_example / noise.squared_mean)
        rows.append(
            f"| {name} | {rate:g} | {spread(n)} | {spread(n * batch)} | {spread(n * batch * queries)} | {cost:.3f} | {spread(n * cost)} | "
            f"{float(noise.snr):.2g} | {relative:.3g} |"
        )
        print(rows[-1], flush=True)
        needed[name], costs[name] = n * batch, cost
        x = batch * queries * runs[0].at
        curves.append((name, x, np.stack([run.heldout for run in runs])))
    one, lv, ddpo = needed.values()
    rows += [
        "",
        f"Steps to the target with seed 1000, by rate. {'; '.join(by_rate)}.",
        "",
        f"Chains of DRaFT-1 for each of DRaFT-LV: {ratios(lv, one)} (claimed: 2). Queries of DDPO for each of DRaFT-LV's: "
        f"{ratios(3 * lv, ddpo)}, for each of DRaFT-1's: {ratios(one, ddpo)} (asked: 100). Seconds of DDPO for each of DRaFT-LV's: "
        f"{ratios(lv / BATCH * costs['DRaFT-LV, n = 2'], ddpo / 64 * costs['DDPO'])}.",
    ]
    return rows, [("held-out reward, by reward queries", "log", curves)]


def truncations(w: World, seeds: Sequence[int], steps: int) -> tuple[list[str], list[Any]]:
    """DRaFT-K: what more of the chain brings, and costs."""
    rows = [
        f"All at the rate 0.0003, gradients clipped to norm 1; {steps} steps of {BATCH} chains.",
        "",
        "| K | seconds a step | steps to the target | seconds to the target | held-out at the end | gradient norm, first 10 steps | gradient SNR at the prior |",
        "|---|---|---|---|---|---|---|",
    ]
    curves, norms = [], []
    for k in (1, 5, 10, 25, 50):
        tuner = gradient_tuner(w, "draft_k", k=k)
        runs = [tune(w, tuner, w.params, 3e-4, seed, steps, 4) for seed in seeds]
        n, cost = np.array([reached(run) for run in runs]), float(np.median([run.seconds for run in runs]))
        snr = float(tuners.gradient_statistics(tuner, jax.random.key(7), w.params, 32, chunk=1).snr)
        ends, first = [run.heldout[-3:].mean() for run in runs], [run.norm[:10].mean() for run in runs]
        rows.append(
            f"| {k} | {cost:.3f} | {spread(n)} | {spread(n * cost)} | {spread(ends)} | {spread(first)} | {snr:.2g} |"
        )
        print(rows[-1], flush=True)
        curves.append((f"K = {k}", cost * runs[0].at, np.stack([run.heldout for run in runs])))
        norms.append((f"K = {k}", np.arange(1, steps + 1), np.stack([run.norm for run in runs])))
    return rows, [("held-out reward, by seconds", "linear", curves), ("gradient norm, by step", "norm", norms)]


def measured(w: World, denoiser: Any, seed: int, second: Any, count: int = 256) -> tuple[float, float, float]:
    """Held-out reward, second reward and diversity of samples."""
    sampler = samplers.ancestral(w.process, denoiser)
    x0 = samplers.sample(sampler, jax.random.key(500 + seed), count, w.times).x0
    return float(w.heldout(x0).mean()), float(second(x0).mean()), metrics.diversity(np.asarray(x0))


def adapters(w: World, seeds: Sequence[int], steps: int) -> tuple[list[str], list[Any]]:
    """LoRA adapters: the scale against diversity, and two of them mixed."""
    ink = image_rewards.ink()
    model = LoRAModel(w.params, w.model)
    held = {"k": 5, "reference": w.model(w.params), "temperature": 0.01}  # without it the one for ink ends all white
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in seeds:
        start = lora_init(jax.random.key(seed), w.params, 8)
        tuned = [
            tune(w, gradient_tuner(w, "draft_k", model=model, reward=r, **held), start, 3e-3, seed, steps, steps).params
            for r in (w.reward, rewards.weighted_sum([ink], [20.0]))
        ]
        for scale in (0.0, 0.25, 0.5, 0.75, 1.0):
            scaled = LoRAModel(w.params, w.model, scale)(tuned[0])
            found.setdefault(f"scale {scale:g} of the adapter for a 3", []).append(measured(w, scaled, seed, ink))
        for weight in (0.25, 0.5, 0.75, 1.0):
            mixed = model(lora_sum([(tuned[0], 1 - weight), (tuned[1], weight)]))
            found.setdefault(f"{1 - weight:g} of it + {weight:g} of the one for ink", []).append(
                measured(w, mixed, seed, ink)
            )
        both = model(lora_sum([(tuned[0], 1.0), (tuned[1], 1.0)]))
        found.setdefault("1 of it + 1 of the one for ink", []).append(measured(w, both, seed, ink))
        print(seed, {name: values[-1] for name, values in found.items()}, flush=True)
    rows = [
        f"Rank 8, DRaFT-5, {steps} steps, rate 0.003, path KL weighed 0.01; 256 samples a seed. The second reward is 20 times the mean ink.",
        "",
        "| adapters | held-out log-probability of a 3 | mean ink | diversity |",
        "|---|---|---|---|",
    ]
    rows += [f"| {name} | {' | '.join(spread(c) for c in np.array(values).T)} |" for name, values in found.items()]
    scales = {name: np.array(v) for name, v in found.items() if name.startswith("scale")}
    x = np.array([float(name.split()[1]) for name in scales])
    of = lambda i: np.stack([v[:, i] for v in scales.values()], 1)  # noqa: E731
    return rows, [("by the adapter's scale", "linear", [("held-out reward", x, of(0)), ("diversity", x, of(2))])]


# ---------------------------------------------------------------- the report


def figure(path: Path, panels: list[Any]) -> None:
    """Draw panels side by side: means over seeds, bands from the lowest to the highest."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained", dpi=90)
    for axes, (title, scale, curves) in zip(page.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (name, x, y) in enumerate(curves):
            axes.fill_between(x, y.min(0), y.max(0), color=f"C{i}", alpha=0.2, linewidth=0)
            axes.plot(x, y.mean(0), color=f"C{i}", label=name, linewidth=1.4)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log" if scale == "log" else "linear")
        axes.set_yscale("log" if scale == "norm" else "linear")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.2)
    page.savefig(path)


SECTIONS = {
    "DRaFT-LV, DRaFT-1 and DDPO": (against_each_other, "lv"),
    "DRaFT-K": (truncations, "k"),
    "Adapters": (adapters, "adapters"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.draft_study", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of every tuning")
    parser.add_argument("--only", default="", help="sections whose titles have one of these in them, a,b")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    w, facts = world(), machine()
    prior = measured(w, w.model(w.params), 0, image_rewards.ink(), 2048)
    known = f"Prior: held-out log-probability of a 3 {prior[0]:.2f} nats, mean ink {prior[1]:.3f}, diversity {prior[2]:.2f}."
    for title, (section, short) in SECTIONS.items():
        if not any(part in title.lower() for part in options.only.lower().split(",")):
            continue
        rows, panels = section(w, range(options.seeds), options.steps)
        picture = options.out.with_name(f"{options.out.stem}-{short}.png")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure(picture, panels)
        run = (
            f"{datetime.date.today()}, commit {facts['commit']}, load {facts['load at the start']}, "
            f"`python {shlex.join(['-m', 'benchmarks.studies.draft_study', *sys.argv[1:]])}`"
        )
        write(options.out, known, title, [run, "", *rows, "", f"![curves]({picture.name})"])


def write(path: Path, known: str, title: str, rows: list[str]) -> None:
    """Put a section into the report, in place of the one of an earlier run."""
    old = path.read_text().split("\n## ")[1:] if path.exists() else []
    parts = dict(part.split("\n", 1) for part in old) | {title: "\n" + "\n".join(rows)}
    text = [
        "# The DRaFT paper's claims on digits",
        "",
        f"- machine: {machine()['machine']}",
        "",
        *INTRODUCTION,
        "",
        known,
    ]
    text += [f"\n## {name}\n{parts[name].rstrip()}" for name in SECTIONS if name in parts]
    path.write_text("\n".join(text) + "\n")


INTRODUCTION = [
    "8x8 digits; the prior is a perceptron of three layers of 256 (a U-Net would take hours on two cores), 50 ancestral calls (eta = 1),",
    "predictions clipped to the data's range; the reward is log p(3 | x) of one classifier, the held-out reward that of another, trained on",
    "other images. All weights are tuned, without a KL term (but for the adapters). Figures are means over seeds (lowest-highest).",
    "",
    "What holds here, and what does not:",
    "",
    "- DRaFT-LV halves nothing: it needs as many steps as DRaFT-1, and three times the queries. Its gradient's variance is smaller by a",
    "  twelfth only, since what it draws anew is the noise of the last call, and most of the variance is between final samples, which it keeps.",
    "- More of the chain brings larger and noisier gradients (K = 1 to 50: norm x 18, signal-to-noise less than half). Up to K = 10 it saves steps;",
    "  K = 25 and 50 save none more, and cost two and four times the seconds of K = 5 (K = 1, at .011 s a step, was disturbed: .007 in the first table).",
    "- DDPO needs 21 times the queries of DRaFT-LV and 56 times those of DRaFT-1, not a hundred: the reward is met after some ten chains",
    "  of DRaFT, and no method has a hundredth of that to spare. In seconds it is 66 times DRaFT-LV's.",
    "- Under a KL diversity falls with the adapter's scale as the reward rises. Two adapters mix: their sum keeps nearly all of the one reward and more than",
    "  half of the other's gain (last row). Without a KL the adapter for ink turns every picture white, and then nothing mixes.",
]


if __name__ == "__main__":
    main()
