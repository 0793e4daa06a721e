"""Numbers from a Gaussian mixture, with an exact denoiser: a world on the line where every law of interest can be drawn.

States are [B, 1]. The judge compares samples with the tilted law of the prior's own chain, by quadrature, and with the
law that tuning reaches while x_T stays the prior's. What is tuned, and how, is left to the methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, denoisers
from rgdiff.domains import quadrature
from rgdiff.domains.judging import Judge
from rgdiff.processes import along
from rgdiff.rewards import Task
from rgdiff.schedules import GaussianSchedule
from rgdiff.tuners.elegant import Shifted
from rgdiff.typing import Array, Cond, Key, pytree

BINS = 60  # of the compared histograms, over the prior's and the tilted law's range


@pytree
class MixtureDenoiser:
    """E[x0 | x_t] of x0 ~ sum_k w_k N(m_k, std^2), exact: the mean of the components' posteriors m_k + gain (x_t - alpha m_k)."""

    schedule: GaussianSchedule
    log_weights: Array
    centres: Array
    std: Array

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        alpha, sigma = along(self.schedule.alpha(t), x), along(self.schedule.sigma(t), x)
        variance = alpha**2 * self.std**2 + sigma**2
        away = x - alpha * self.centres  # [B, K]
        weights = jax.nn.softmax(self.log_weights - 0.5 * away**2 / variance)
        means = self.centres + alpha * self.std**2 / variance * away
        return jnp.sum(weights * means, -1, keepdims=True)


class MixtureDomain:
    """x0 ~ sum_k w_k N(m_k, std^2). Build it with `mixture`."""

    value_range = None
    shape = (1,)

    def __init__(self, weights: np.ndarray, centres: np.ndarray, std: float, network: Any):
        self.weights, self.centres, self.std, self.network = weights, centres, std, network

    def data(self, key: Key, count: int) -> Array:
        """Draw examples [count, 1]."""
        key_part, key_noise = jax.random.split(key)
        part = jax.random.categorical(key_part, jnp.log(jnp.asarray(self.weights, jnp.float32)), shape=(count, 1))
        return jnp.asarray(self.centres, jnp.float32)[part] + self.std * jax.random.normal(key_noise, (count, 1))

    def family(self, schedule: GaussianSchedule, steps: int) -> tuple[Any, Any]:
        """Return a model, the exact denoiser plus a network's output, and parameters at which the latter is zero."""
        log_weights = jnp.log(jnp.asarray(self.weights, jnp.float32))
        exact = MixtureDenoiser(schedule, log_weights, jnp.asarray(self.centres, jnp.float32), jnp.float32(self.std))
        params = self.network.init(jax.random.key(0), jnp.zeros((1, 1)), jnp.ones(1))["params"]
        return Shifted(denoisers.LinenModel(self.network), exact), params

    def evaluator(self, key: Key) -> MixtureJudge:
        """Return what measures samples of this domain."""
        return MixtureJudge(self.shape)


class MixtureJudge(Judge):
    """Measures samples on the line beside the exact laws of the prior's own chain, its tilt, and the tilt with a frozen start."""

    def laws(self, temperature: float | None, task: Task, prior: Any) -> quadrature.Laws:
        """Return the exact laws at a method's temperature; the tilt is the prior itself for a method without one."""
        chain = quadrature.line(prior.process, prior.denoiser, prior.times, points=1601)
        return quadrature.laws(chain, task.reward, 1e9 if temperature is None else temperature)

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method: rewards, moments, total variation to the exact law, costs."""
        laws, x = self.laws(outcome.temperature, task, prior), outcome.x0[:, 0]
        edges = _edges(laws)
        apart = lambda p: 0.5 * float(np.abs(p - np.histogram(laws.x0, edges, weights=laws.tilted)[0]).sum())  # noqa: E731
        mean = float(laws.tilted @ laws.x0)
        figures = self.reward_figures(outcome.x0, task, outcome.lineages)
        return (
            {k: v for k, v in figures.items() if not k.startswith("heldout")}
            | {"mean": float(x.mean()), "exact_mean": mean, "std": float(x.std())}
            | {"exact_std": float(laws.tilted @ (laws.x0 - mean) ** 2) ** 0.5}
            | {"distance": apart(np.histogram(x, edges)[0] / len(x))}
            | {"frozen_distance": apart(np.histogram(laws.x0, edges, weights=laws.frozen)[0])}
            | self.costs(outcome)
        )

    def histograms(self, outcomes: Mapping[str, Any], task: Task, prior: Any) -> list[tuple[Any, ...]]:
        """Return one picture for each temperature: all samples, the exact law, and the one predicted for a frozen start."""
        out = []
        for temperature in dict.fromkeys(o.temperature for o in outcomes.values() if o.temperature is not None):
            laws = self.laws(temperature, task, prior)
            shown = {k: o.x0[:, 0] for k, o in outcomes.items() if o.temperature in (None, temperature)}
            exact = {"exact: p(x) exp(r/α)/Z": laws.tilted, "predicted: frozen start": laws.frozen}
            lines = {name: (laws.x0, p) for name, p in exact.items()}
            out.append((f"Laws of x0 at temperature {temperature:g}", shown, lines, "x0", _edges(laws)))
        return out

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            f"distance: total variation, over {BINS} bins, between samples and the exact law at the method's temperature, p(x) "
            "exp(r(x)/temperature)/Z with p the law of the prior's own chain, by quadrature (the prior's row: p itself). "
            "frozen_distance: the same for the law that is predicted if every kernel is tilted but x_T stays the prior's.",
            "kl: path KL to the prior in nats, that of the chain that draws x_T included. seconds: without compilation.",
        ]


def _edges(laws: quadrature.Laws) -> np.ndarray:
    """Bins over all but a thousandth of the prior's and the tilted law."""
    order = np.argsort(laws.x0)
    total = np.cumsum(0.5 * (laws.prior + laws.tilted)[order])
    low, high = (float(laws.x0[order][np.searchsorted(total, q)]) for q in (5e-4, 1 - 5e-4))
    return np.linspace(low, high, BINS + 1)


def mixture(weights: Sequence[float], centres: Sequence[float], std: float, network: Any) -> MixtureDomain:
    """Make a mixture of Gaussians on the line.

    Args:
      weights: w_k > 0; they need not sum to 1.
      centres: m_k, one for each weight, in the unit of x0.
      std: of every component.
      network: a Linen module called as (x, t, cond) that is zero at first, e.g. `nets.MLP`: what tuning adds to the exact denoiser.

    Raises:
      ValueError: for weights that are not positive, another number of centres, or std <= 0.
    """
    w, m = np.asarray(weights, float), np.asarray(centres, float)
    if w.ndim != 1 or w.shape != m.shape or not (w > 0).all():
        raise ValueError(f"mixture expects positive weights and as many centres, got {weights!r} and {centres!r}")
    return MixtureDomain(w / w.sum(), m, float(checks.positive("std", std)), network)


@pytree
class QuadraticReward:
    """r(x) = slope x - curvature x^2 / 2, of states [B, 1]."""

    slope: Array
    curvature: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.slope * x0[:, 0] - 0.5 * self.curvature * x0[:, 0] ** 2


def quadratic(slope: float = -0.6, curvature: float = 0.3) -> Task:
    """Make the task slope x - curvature x^2 / 2, judged by itself."""
    reward = QuadraticReward(jnp.float32(slope), checks.positive("curvature", curvature, zero=True))
    return Task(reward, reward)
