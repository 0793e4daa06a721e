"""The claims of the DRaFT paper (arXiv 2309.17400) at the scale of digits: `python -m benchmarks.draft_study`.

One prior of 8x8 digits, 50 ancestral calls, the log-probability of a 3 as the reward and a classifier of other images as
the held-out one; every run over several seeds. Writes benchmarks/results/draft-study.md and the figure beside it,
section by section. Held-out rewards are of the samples that a step draws anyway, so they cost nothing.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import machine
from rgdiff import metrics, nets, processes, rewards, samplers, schedules, tuners
from rgdiff.domains import image_rewards, images
from rgdiff.domains.classifier import train_classifier
from rgdiff.nets.lora import LoRAModel, lora_init, lora_sum
from rgdiff.runtime.priors import PriorModel

RESULTS = Path(__file__).parent / "results" / "draft-study.md"
CALLS, BATCH, TARGET = 50, 32, -0.5  # TARGET: held-out log-probability, nats
WINDOW = 5  # steps over which a held-out reward is averaged before it counts as reached
RATES = (3e-4, 1e-3, 3e-3)


class World(NamedTuple):
    """The prior, the reward and its held-out twin."""

    process: Any
    times: jax.Array
    model: Any
    params: Any
    reward: Any
    heldout: Any


class Run(NamedTuple):
    """One tuning: values per step [N], the seconds of a step (median over chunks, compilation left out), and the parameters."""

    reward: np.ndarray
    heldout: np.ndarray
    norm: np.ndarray
    seconds: float
    params: Any


def world(steps: int = 4000) -> World:
    """Train the prior, a multilayer perceptron that predicts v, and the two classifiers."""
    domain, schedule = images.digits(), schedules.cosine_vp()
    process = processes.gaussian(schedule, domain.shape, eta=1.0)
    network = nets.MLP((256, 256, 256))
    model = PriorModel(schedule, network, "v")
    params = network.init(jax.random.key(0), jnp.zeros((1, *domain.shape)), jnp.ones(1))["params"]
    optimizer = tuners.adamw(2e-3, warmup=100, decay_steps=steps)
    trainer = tuners.pretraining(model, process, optimizer, target="v", ema_decay=0.998)
    data = {"x0": jnp.asarray(domain.train_x)}
    params = tuners.fit(trainer, jax.random.key(1), trainer.init(params), steps, data=data, batch=128, chunk=1000).best
    guide = train_classifier(jax.random.key(2), domain.train_x, domain.train_y, 10)
    judge = train_classifier(jax.random.key(3), domain.heldout_x, domain.heldout_y, 10)
    reward, heldout = (image_rewards.classifier_reward(classifier, 3) for classifier in (guide, judge))
    clipped = PriorModel(schedule, network, "v", value_range=(-1.0, 1.0))
    return World(process, process.times(CALLS), clipped, params, reward, heldout)


def gradient_tuner(w: World, name: str, rate: float, model: Any = None, reward: Any = None, **options: Any) -> Any:
    """Build a setting of the reward gradient; no KL term, so that only the gradients differ."""
    build = getattr(tuners, name)
    return build(
        w.model if model is None else model, w.process, w.reward if reward is None else reward, w.times,
        tuners.adamw(rate), batch=BATCH, heldout=w.heldout, remat="none", **options,
    )  # fmt: skip


def ddpo_tuner(w: World, rate: float, batch: int = 128, minibatches: int = 4) -> Any:
    """Build DDPO-IS with the settings of configs/method/ddpo.yaml."""
    advantage = tuners.advantages.batch_normalised(clip=5.0)
    online = tuners.ddpo(
        w.model,
        w.process,
        w.times,
        tuners.adamw(rate),
        batch=batch,
        clip=0.2,
        minibatches=minibatches,
        advantage=advantage,
    )
    return tuners.as_tuner(online, w.reward, heldout=w.heldout)


def tune(tuner: Any, params: Any, seed: int, steps: int, chunk: int = 5) -> Run:
    """Tune from the same parameters with another seed."""
    infos, stamps = [], [time.perf_counter()]

    def on_chunk(_: Any, info: dict[str, np.ndarray]) -> None:
        infos.append(info)
        stamps.append(time.perf_counter())

    state = tuners.fit(tuner, jax.random.key(seed), tuner.init(params), steps, chunk=chunk, on_chunk=on_chunk)
    column = lambda name: np.concatenate([info[name] for info in infos])  # noqa: E731
    later = np.diff(stamps)[1:] if len(stamps) > 2 else np.diff(stamps)
    return Run(
        column("reward"), column("heldout"), column("gradient_norm"), float(np.median(later)) / chunk, state.best
    )


def reached(run: Run, target: float = TARGET) -> float:
    """Steps until the held-out reward, averaged over the last WINDOW steps, is at the target; infinite if it never is."""
    smooth = np.convolve(run.heldout, np.ones(WINDOW) / WINDOW, "valid")
    above = np.flatnonzero(smooth >= target)
    return float(above[0] + WINDOW) if len(above) else float("inf")


def best_rate(make: Callable[[float], Any], w: World, steps: int) -> tuple[float, dict[float, float]]:
    """Return the rate of RATES whose run with a seed of its own reaches the target first, and all of them."""
    needed = {rate: reached(tune(make(rate), w.params, 1000, steps)) for rate in RATES}
    return min(needed, key=lambda rate: needed[rate]), needed


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


def against_each_other(w: World, seeds: Sequence[int], steps: int, ddpo_steps: int) -> tuple[list[str], list[Any]]:
    """DRaFT-LV against DRaFT-1, and both against DDPO."""
    makes = {
        "DRaFT-1": (lambda rate: gradient_tuner(w, "draft_k", rate, k=1), steps, BATCH, 1),
        "DRaFT-LV, n = 2": (lambda rate: gradient_tuner(w, "draft_lv", rate, n=2), steps, BATCH, 3),
        "DDPO": (lambda rate: ddpo_tuner(w, rate), ddpo_steps, 128, 1),
    }
    rows = [
        f"Target: held-out log-probability {TARGET} nats, mean of {WINDOW} steps. Each method at its best rate of {RATES} (seed 1000, not among the seeds).",
        "",
        "| method | rate | steps | chains sampled | reward queries | seconds a step | seconds to the target | gradient SNR | variance a sample / squared mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    needed, curves, costs = {}, [], {}
    for name, (make, count, batch, queries) in makes.items():
        rate, tried = best_rate(make, w, count)
        print(name, tried, flush=True)
        runs = [tune(make(rate), w.params, seed, count) for seed in seeds]
        n = np.array([reached(run) for run in runs])
        cost = float(np.median([run.seconds for run in runs]))
        noise = tuners.gradient_statistics(make(rate), jax.random.key(7), w.params, 64, chunk=1)
        relative = float(noise.variance_per_example / noise.squared_mean)
        rows.append(
            f"| {name} | {rate:g} | {spread(n)} | {spread(n * batch)} | {spread(n * batch * queries)} | {cost:.3f} | {spread(n * cost)} | "
            f"{float(noise.snr):.2g} | {relative:.3g} |"
        )
        print(rows[-1], flush=True)
        needed[name], costs[name] = n * batch, cost
        x = batch * queries * np.arange(1, count + 1)
        curves.append((name, x, np.stack([run.heldout for run in runs])))
    one, lv, ddpo = needed.values()
    rows += [
        "",
        f"Chains of DRaFT-1 for each of DRaFT-LV: {ratios(lv, one)} (claimed: 2). Queries of DDPO for each of DRaFT-LV's: "
        f"{ratios(3 * lv, ddpo)}, for each of DRaFT-1's: {ratios(one, ddpo)} (asked: 100). Seconds of DDPO for each of DRaFT-LV's: "
        f"{ratios(lv / BATCH * costs['DRaFT-LV, n = 2'], ddpo / 128 * costs['DDPO'])}.",
    ]
    return rows, [("held-out reward, by reward queries", "log", curves)]


def truncations(w: World, seeds: Sequence[int], steps: int) -> tuple[list[str], list[Any]]:
    """DRaFT-K: what more of the chain brings, and costs."""
    rows = [
        f"All at the rate 0.001, gradients clipped to norm 1; {steps} steps of {BATCH} chains.",
        "",
        "| K | seconds a step | steps to the target | seconds to the target | held-out at the end | gradient norm, first 10 steps | gradient SNR at the prior |",
        "|---|---|---|---|---|---|---|",
    ]
    curves, norms = [], []
    for k in (1, 5, 10, 25, 50):
        tuner = gradient_tuner(w, "draft_k", 1e-3, k=k)
        runs = [tune(tuner, w.params, seed, steps) for seed in seeds]
        n, cost = np.array([reached(run) for run in runs]), float(np.median([run.seconds for run in runs]))
        snr = float(tuners.gradient_statistics(tuner, jax.random.key(7), w.params, 64, chunk=1).snr)
        ends, first = [run.heldout[-WINDOW:].mean() for run in runs], [run.norm[:10].mean() for run in runs]
        rows.append(
            f"| {k} | {cost:.3f} | {spread(n)} | {spread(n * cost)} | {spread(ends)} | {spread(first)} | {snr:.2g} |"
        )
        print(rows[-1], flush=True)
        curves.append((f"K = {k}", cost * np.arange(1, steps + 1), np.stack([run.heldout for run in runs])))
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
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in seeds:
        start = lora_init(jax.random.key(seed), w.params, 8)
        tuned = [
            tune(gradient_tuner(w, "draft_k", 3e-3, model=model, reward=r, k=1), start, seed, steps).params
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
        f"Rank 8, DRaFT-1, {steps} steps, rate 0.003, no KL; 256 samples a seed. The second reward is 20 times the mean ink.",
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
    """Draw every panel: means over seeds, bands from the lowest to the highest."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 6.4), layout="constrained", dpi=90)
    for axes, (title, scale, curves) in zip(page.subplots(2, 2).ravel(), panels, strict=False):
        for i, (name, x, y) in enumerate(curves):
            axes.fill_between(x, y.min(0), y.max(0), color=f"C{i}", alpha=0.2, linewidth=0)
            axes.plot(x, y.mean(0), color=f"C{i}", label=name, linewidth=1.4)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log" if scale == "log" else "linear")
        axes.set_yscale("log" if scale == "norm" else "linear")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.2)
    page.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.draft_study", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of every reward gradient")
    parser.add_argument("--ddpo-steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    w, seeds = world(), range(options.seeds)
    prior = measured(w, w.model(w.params), 0, image_rewards.ink(), 2048)
    facts = machine() | {
        "command": f"python {shlex.join(['-m', 'benchmarks.draft_study', *sys.argv[1:]])}",
        "date": datetime.date.today().isoformat(),
        "jax": f"{jax.__version__} on {jax.devices()[0].device_kind}",
    }
    text = ["# The DRaFT paper's claims on digits", "", *(f"- {k}: {v}" for k, v in facts.items()), "", *INTRODUCTION]
    text += [
        "",
        f"Prior: held-out log-probability of a 3 {prior[0]:.2f} nats, mean ink {prior[1]:.3f}, diversity {prior[2]:.2f}.",
    ]
    panels: list[Any] = []
    sections = {
        "DRaFT-LV, DRaFT-1 and DDPO": lambda: against_each_other(w, seeds, options.steps, options.ddpo_steps),
        "DRaFT-K": lambda: truncations(w, seeds, options.steps),
        "Adapters": lambda: adapters(w, seeds, options.steps),
    }
    for title, section in sections.items():
        rows, more = section()
        text, panels = [*text, "", f"## {title}", "", *rows], panels + more
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure(options.out.with_suffix(".png"), panels)
        options.out.write_text("\n".join([*text, "", f"![curves]({options.out.with_suffix('.png').name})"]) + "\n")


INTRODUCTION = [
    "8x8 digits; the prior is a perceptron of three layers of 256 (a U-Net would take hours on two cores), 50 ancestral calls (eta = 1),",
    "predictions clipped to the data's range; the reward is log p(3 | x) of one classifier, the held-out reward that of another, trained on",
    "other images. All weights are tuned, without a KL term. Figures are means over seeds (lowest-highest).",
]


if __name__ == "__main__":
    main()
