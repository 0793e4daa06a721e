"""Guides on the prediction: a score changed by g(x_t) changes the prediction of x0 by (sigma_t^2 / alpha_t) g(x_t).

Every guide maps a denoiser to a denoiser, so any sampler and any tuner takes it. With the exact conditional score the
samples are exact up to the steps' size. g is per example and costs one forward and one backward pass of the network. Guides
for measurements are in `guides.inverse`; guides that tilt the kernel, masked ones too, in `guides.tilt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.denoisers import says_enough
from rgdiff.guides.tilt import value_gradient
from rgdiff.processes import GaussianProcess, along
from rgdiff.rewards import differentiable, evaluate
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    DenoiserLike,
    Key,
    Process,
    Reward,
    RewardLike,
    Value,
    ValueLike,
    callable_pytree,
    pytree,
    same_callable,
    static,
)
from rgdiff.values import PosteriorMean, posterior_mean


class Point(NamedTuple):
    """The denoiser at x_t: its prediction, and `pull`: u -> J^T u with J the prediction's Jacobian at x_t, per example."""

    x: Array
    t: Array
    cond: Cond
    prediction: Array
    pull: Callable[[Array], Array]


@pytree
class Guided:
    """E[x0 | x_t] + (sigma_t^2 / alpha_t) scale g(x_t), g = term(point). Build it with a guide of this module.

    An example whose g is not finite (an infeasible reward) is not guided at this step. No example is guided where alpha_t = 0
    (the flow schedule at t = 1), where x_t does not depend on x0, nor where x_t says too little of it
    (`rgdiff.denoisers.says_enough`).
    """

    denoiser: Denoiser
    process: GaussianProcess
    term: Callable[[Point], Array]
    scale: Array

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        prediction, pull = jax.vjp(lambda x: checks.prediction(self.denoiser(x, t, cond), x), x)
        g = self.term(Point(x, t, cond, prediction, lambda u: pull(u.astype(x.dtype))[0]))
        finite = jnp.all(jnp.isfinite(g), axis=tuple(range(1, g.ndim)), keepdims=True)
        told = says_enough((self.denoiser, self.term), self.process, t)
        weight = jnp.where(told, self.scale * score_weight(self.process, t), 0.0)
        return prediction + along(weight, x) * jnp.where(finite, g, 0.0)


def score_weight(process: GaussianProcess, t: Array) -> Array:
    """Return sigma_t^2 / alpha_t, the change of the prediction of x0 per unit of score; 0 where alpha_t is 0.

    Args:
      process: Gaussian.
      t: [] or [B].

    Returns:
      The shape of t.
    """
    alpha = process.schedule.alpha(t)
    return jnp.where(alpha > 0, process.schedule.sigma(t) ** 2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)


def posterior_variance(process: GaussianProcess, t: Array, prior_variance: Array) -> Array:
    """Return Var[x0 | x_t] of N(m, v I) data: v s^2 / (v + s^2) with s = sigma_t / alpha_t.

    Args:
      process: Gaussian.
      t: [] or [B].
      prior_variance: v, of one coordinate of the data, in its unit squared.

    Returns:
      The shape of t.
    """
    alpha, variance = process.schedule.alpha(t), process.schedule.sigma(t) ** 2
    return prior_variance * variance / (alpha**2 * prior_variance + variance)


def gaussian_only(process: Process, method: str) -> GaussianProcess:
    """Refuse a process that has no score."""
    checks.noising_process(process, method)
    if not isinstance(process, GaussianProcess):
        raise ValueError(
            f"{method} moves the score of a Gaussian process, got {type(process).__name__}; "
            "use a guide on the kernel, rgdiff.guides.gradient_guide"
        )
    return process


def guided(denoiser: DenoiserLike, process: Process, term: Callable[[Point], Array], scale: float = 1.0) -> Guided:
    """Change the score by scale * term(point), for any term.

    Args:
      denoiser: of the prior.
      process: Gaussian.
      term: a function or callable pytree, Point -> [B, ...]. A point has x, t, cond, the prediction E[x0 | x_t], and
        `pull`: u -> J^T u with J the prediction's Jacobian at x_t.
      scale: multiplies the term, >= 0; may change without a recompilation.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a process that is not Gaussian, or a black box in the term.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> guided = rgdiff.guides.guided(lambda x, t, cond: x, process, lambda point: jnp.ones_like(point.x), scale=2.0)
      >>> print(guided(jnp.zeros((1, 1)), jnp.float32(0.5)))  # (0.5^2 / 0.5) * 2
      [[1.]]
    """
    differentiable("a guide on the prediction", term)
    return Guided(
        callable_pytree(denoiser, "a denoiser"),
        gaussian_only(process, "a guide on the prediction"),
        callable_pytree(term, "the term of a guide"),
        checks.positive("scale", scale, zero=True),
    )


# ---------------------------------------------------------------- values and rewards


@pytree
class ValueGradient:
    """g = gradient of v(x_t, t); through the prediction at hand where `shared`."""

    value: Value
    shared: bool = static()

    def __call__(self, at: Point) -> Array:
        if not self.shared:
            return value_gradient(self.value, at.x, at.t, at.cond)[1]
        given = self.value.given  # type: ignore[attr-defined]
        of_prediction = lambda prediction, t, cond: given(at.x, t, prediction, cond)  # noqa: E731
        return at.pull(value_gradient(of_prediction, at.prediction, at.t, at.cond)[1])


def classifier_guidance(denoiser: DenoiserLike, process: Process, value: ValueLike, scale: float = 1.0) -> Guided:
    """Change the score by scale * gradient of v(x_t, t) (arXiv 2105.05233, algorithm 2: eps - s sigma_t grad log p(c | x_t)).

    With v = log p(c | x_t) and scale 1 it is the conditional score; with a soft value of temperature tau and scale
    1 / tau it samples p(x) exp(r(x) / tau) / Z.

    Args:
      denoiser: of the prior.
      process: Gaussian, with any eta.
      value: (x_t, t, cond) -> [B], differentiable in x_t. Where it is `values.posterior_mean` of this same denoiser, the
        network runs forward once.
      scale: per unit of the value; may change without a recompilation.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a process that is not Gaussian, or a value that contains a black box.

    Note:
      Algorithm 1 of the paper shifts the kernel's mean instead: `rgdiff.guides.gradient_guide`.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> value = lambda x, t, cond: 3 * x[:, 0]
      >>> guided = rgdiff.guides.classifier_guidance(lambda x, t, cond: x, process, value, scale=2.0)
      >>> print(guided(jnp.zeros((1, 1)), jnp.float32(0.5)))  # (0.5^2 / 0.5) * 2 * 3
      [[3.]]
    """
    process = gaussian_only(process, "classifier_guidance")
    denoiser, value = callable_pytree(denoiser, "a denoiser"), callable_pytree(value, "a value")
    differentiable("classifier_guidance", value)
    shared = isinstance(value, PosteriorMean) and same_callable(value.denoiser, denoiser)
    return guided(denoiser, process, ValueGradient(value, shared), scale)


def reward_guidance(denoiser: DenoiserLike, process: Process, reward: RewardLike, scale: float = 1.0) -> Guided:
    """Change the score by scale * gradient of r(E[x0 | x_t]) with respect to x_t, for any differentiable reward.

    A reward of curvature c in x0 diverges where `dps` does with scale / sigma^2 = scale * c: see there.

    Args:
      denoiser, process: the prior, Gaussian.
      reward: (x0, cond) -> [B]; a loss is a reward with the other sign.
      scale: 1 / temperature, per unit of the reward; may change without a recompilation.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a process that is not Gaussian, or a black-box reward.

    References: universal guidance (arXiv 2302.07121), FreeDoM (2303.09833); DPS (2209.14687) for a likelihood.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> guided = rgdiff.guides.reward_guidance(lambda x, t, cond: 2 * x, process, lambda x0, cond: x0[:, 0], scale=3.0)
      >>> print(guided(jnp.zeros((1, 1)), jnp.float32(0.5)))  # (0.5^2 / 0.5) * 3 * J, J = 2
      [[3.]]
    """
    process, denoiser = gaussian_only(process, "reward_guidance"), callable_pytree(denoiser, "a denoiser")
    differentiable("reward_guidance", reward)
    value = posterior_mean(reward, process, denoiser)
    return guided(denoiser, process, ValueGradient(value, True), scale)


@pytree
class SmoothedReward:
    """g = gradient of log (1/n) sum_i exp(scale r(E[x0 | x_t] + r_t e_i)); infeasible draws have weight 0."""

    reward: Reward
    process: GaussianProcess
    key: Key
    scale: Array
    prior_variance: Array
    draws: int = static()

    def __call__(self, at: Point) -> Array:
        batch, shape = at.x.shape[0], at.x.shape[1:]
        t = jnp.broadcast_to(jnp.asarray(at.t, jnp.float32), (batch,))
        std = along(jnp.sqrt(posterior_variance(self.process, t, self.prior_variance)), at.prediction)

        def noise(row: Array, t: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(self.key, row), jax.lax.bitcast_convert_type(t, jnp.uint32))
            return jax.random.normal(key, (self.draws, *shape))

        draws = at.prediction[:, None] + std[:, None] * jax.vmap(noise)(jnp.arange(batch), t)  # [B, n, ...]
        reward = lambda x0, t, cond: self.scale * evaluate(self.reward, x0, cond)  # noqa: E731
        each = jax.vmap(lambda x0: value_gradient(reward, x0, at.t, at.cond), in_axes=1, out_axes=1)
        log_weights, gradients = each(draws)
        log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
        weights = along(jax.nn.softmax(log_weights, axis=1), gradients)
        return at.pull(jnp.sum(jnp.where(weights > 0, weights * gradients, 0.0), axis=1))


def lgd_mc(
    denoiser: DenoiserLike,
    process: Process,
    reward: RewardLike,
    key: Key,
    *,
    draws: int,
    scale: float = 1.0,
    prior_variance: float = 1.0,
) -> Guided:
    """Guide by a loss averaged over draws around the posterior mean (LGD-MC, Song et al., ICML 2023).

    g = gradient of log (1/n) sum_i exp(scale r(E[x0 | x_t] + r_t e_i)) with respect to x_t, e_i standard normal. Its
    error against the smoothed reward falls as 1 / sqrt(n); for a linear measurement the limit is `pigdm`.

    Args:
      denoiser, process: the prior, Gaussian.
      reward: (x0, cond) -> [B], a differentiable reward or a measurement.
      key: a typed PRNG key. The noise depends on it, the time and the row of the batch, and on nothing else.
      draws: n.
      scale: 1 / temperature, inside the exponential.
      prior_variance: v, of the data; r_t^2 = v s^2 / (v + s^2), s = sigma_t / alpha_t. With 1 it is the published r_t.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a process that is not Gaussian, a black-box reward, or fewer than one draw.

    Note:
      The draws' weights sum to one. Some released code divides by n once more, which makes the guide n times weaker.
      A denoiser is a function, so that runs that differ by the sampler's key alone share this noise.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> prior, reward = lambda x, t, cond: x, lambda x0, cond: 3 * x0[:, 0]
      >>> guided = rgdiff.guides.lgd_mc(prior, process, reward, jax.random.key(0), draws=4)
      >>> print(f"{guided(jnp.zeros((1, 1)), jnp.float32(0.5))[0, 0]:.4f}")  # (0.5^2 / 0.5) * 3: exact for a linear reward
      1.5000
    """
    checks.key(key)
    differentiable("lgd_mc", reward)
    term = SmoothedReward(
        callable_pytree(reward, "a reward"),
        gaussian_only(process, "lgd_mc"),
        key,
        checks.positive("scale", scale, zero=True),
        checks.positive("prior_variance", prior_variance),
        checks.at_least("draws", draws, 1),
    )
    return guided(denoiser, process, term)
