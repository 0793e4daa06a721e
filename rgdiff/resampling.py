"""Resampling of weighted particles: four schemes and the effective sample size.

All take unnormalised log-weights [N] of one problem (many problems are `vmap`) and return N ancestor indices; the
expected number of copies of particle i is N w_i for every scheme, they differ in its variance. Weights that are all
zero (or NaN) count as equal. When to resample, and what rides with a particle, is the sampler's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rgdiff.typing import Array, Key


def log_normalize(log_weights: Array) -> Array:
    """Return log-weights that sum to one, [N]; NaN counts as -inf, and weights without a positive one are equal."""
    log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    alive = jnp.max(log_weights) > -jnp.inf
    return jax.nn.log_softmax(jnp.where(alive, log_weights, 0.0))


def log_mean_exp(log_weights: Array) -> Array:
    """Return log of the mean weight; NaN counts as -inf."""
    log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    return jax.nn.logsumexp(log_weights) - math.log(log_weights.shape[0])


def ess(log_weights: Array) -> Array:
    """Return the effective sample size (sum w)^2 / sum w^2, between 1 and N."""
    return jnp.exp(-jax.nn.logsumexp(2 * log_normalize(log_weights)))


def share_gains(log_weights: Array, lineages: Array) -> Array:
    """Return, by initial particle, what its descendants' share of the weights has gained since all were equal, [N].

    Added up over the periods between resamplings, their squares sum to an estimate of the relative variance of Z (Chan
    and Lai, arXiv 1312.5114): what a resampling changes in a share is left out, since it does not change the total.
    """
    count = log_weights.shape[0]
    return jax.ops.segment_sum(jnp.exp(log_normalize(log_weights)) - 1 / count, lineages, count)


def standard_error(values: Array, lineages: Array, log_weights: Array | None = None) -> Array:
    """Return the standard error of the weighted mean of particles' values, from the spread over their lineages.

    Particles of one initial ancestor are not independent; lineages nearly are. With normalised weights w and v the mean,

        se^2 = sum_k (sum_{i in k} w_i (v_i - v))^2 / (1 - sum_k (sum_{i in k} w_i)^2)

    over lineages k. Of independent particles of equal weight this is the ordinary standard error. It is as sure as the
    number of lineages left is large; of a single one it is NaN.

    Args:
      values: [N], in any unit; NaN (infeasible) is left out.
      lineages: [N], integers that name the initial ancestor, as in the `info` of particle samplers.
      log_weights: [N], unnormalised; equal without them.

    Returns:
      A scalar in the unit of the values.

    References: Chan and Lai (arXiv 1312.5114); Lee and Whiteley (arXiv 1509.00394), whose factor for multinomial resampling,
    (N / (N - 1))^(resamplings + 1), is what 1 over the denominator is near when weights are equal.
    """
    feasible = ~jnp.isnan(values)
    log_weights = jnp.zeros_like(values) if log_weights is None else log_weights
    weights = jnp.where(feasible, jnp.exp(log_normalize(jnp.where(feasible, log_weights, -jnp.inf))), 0.0)
    values = jnp.where(feasible, values, 0.0)
    count = values.shape[0]
    _, index = jnp.unique(lineages, return_inverse=True, size=count)
    total = lambda of_particles: jax.ops.segment_sum(of_particles, index, count)  # noqa: E731
    deviations = total(weights * (values - jnp.sum(weights * values)))
    rest = 1 - jnp.sum(total(weights) ** 2)
    return jnp.where(rest > 1e-5, jnp.sqrt(jnp.sum(deviations**2) / jnp.where(rest > 1e-5, rest, 1.0)), jnp.nan)


def multinomial(key: Key, log_weights: Array, count: int | None = None) -> Array:
    """Draw `count` independent ancestors, N by default."""
    draws = jax.random.uniform(key, (log_weights.shape[0] if count is None else count,))
    return _invert(log_weights, draws)


def stratified(key: Key, log_weights: Array) -> Array:
    """Draw one ancestor in each of N equal strata of the cumulated weights."""
    count = log_weights.shape[0]
    return _invert(log_weights, (jnp.arange(count) + jax.random.uniform(key, (count,))) / count)


def systematic(key: Key, log_weights: Array) -> Array:
    """Draw one ancestor in each of N equal strata, all at the same place in theirs."""
    count = log_weights.shape[0]
    return _invert(log_weights, (jnp.arange(count) + jax.random.uniform(key)) / count)


def residual(key: Key, log_weights: Array) -> Array:
    """Copy particle i floor(N w_i) times, and draw the rest from what is left of the weights."""
    count = log_weights.shape[0]
    expected = count * jnp.exp(log_normalize(log_weights))
    copies = jnp.floor(expected + 1e-6 * count**0.5)  # a whole number that rounding left just below itself is whole
    rest = multinomial(key, jnp.log(jnp.maximum(expected - copies, 0.0)))
    slots = jnp.arange(count)
    ends = jnp.cumsum(copies)
    return jnp.where(slots < ends[-1], jnp.searchsorted(ends, slots, side="right"), rest)


def _invert(log_weights: Array, points: Array) -> Array:
    """Invert the cumulated weights at points in [0, 1). Rounding at the upper end never reaches past the last positive weight."""
    weights = jnp.exp(log_normalize(log_weights))
    cumulated = jnp.cumsum(weights)
    last = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
    return jnp.minimum(jnp.searchsorted(cumulated, points * cumulated[-1], side="right"), last)


SCHEMES: dict[str, Callable[[Key, Array], Array]] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
}
