"""Resampling of weighted particles: four schemes and the effective sample size.

All take unnormalised log-weights [N] of one problem (many problems are `vmap`) and return N ancestor indices. The
expected number of copies of particle i is N w_i for every scheme; they differ in its variance. Weights that are all
zero (or NaN) count as equal. The sampler decides when to resample and which arrays are permuted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rgdiff.typing import Array, Key


def log_normalize(log_weights: Array) -> Array:
    """Return log-weights whose weights sum to one.

    Args:
      log_weights: [N], unnormalised, nats; NaN counts as -inf.

    Returns:
      [N], nats; all equal where no weight is positive.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(jnp.exp(rgdiff.resampling.log_normalize(jnp.log(jnp.array([1.0, 3.0])))))
      [0.25 0.75]
    """
    log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    alive = jnp.max(log_weights) > -jnp.inf
    return jax.nn.log_softmax(jnp.where(alive, log_weights, 0.0))


def log_mean_exp(log_weights: Array) -> Array:
    """Return the log of the mean weight.

    Args:
      log_weights: [N], unnormalised, nats; NaN counts as -inf.

    Returns:
      A scalar, nats.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(f"{rgdiff.resampling.log_mean_exp(jnp.log(jnp.array([1.0, 3.0]))):.4f}")  # log 2
      0.6931
    """
    log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    return jax.nn.logsumexp(log_weights) - math.log(log_weights.shape[0])


def ess(log_weights: Array) -> Array:
    """Return the effective sample size (sum w)^2 / sum w^2, between 1 and N.

    Args:
      log_weights: [N], unnormalised, nats.

    Returns:
      A scalar, a number of particles.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(f"{rgdiff.resampling.ess(jnp.log(jnp.array([1.0, 3.0]))):.4f}")  # 16 / 10
      1.6000
    """
    return jnp.exp(-jax.nn.logsumexp(2 * log_normalize(log_weights)))


def share_gains(log_weights: Array, lineages: Array) -> Array:
    """Return, by initial particle, the gain of its descendants' share of the weights since all were equal.

    Added up over the periods between resamplings, the squares of the gains sum to an estimate of the relative variance of Z
    (Chan and Lai, arXiv 1312.5114). The changes that resampling makes to a share are left out, since they do not change the total.

    Args:
      log_weights: [N], unnormalised, nats.
      lineages: [N], integers in 0 ... N - 1, the initial particle that each descends from.

    Returns:
      [N], by initial particle; they sum to 0.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(rgdiff.resampling.share_gains(jnp.log(jnp.array([1.0, 3.0])), jnp.array([0, 1])).round(4))
      [-0.25  0.25]
    """
    count = log_weights.shape[0]
    return jax.ops.segment_sum(jnp.exp(log_normalize(log_weights)) - 1 / count, lineages, count)


def standard_error(values: Array, lineages: Array, log_weights: Array | None = None) -> Array:
    """Return the standard error of the weighted mean of particles' values, from the spread over their lineages.

    Particles of one initial ancestor are not independent; lineages nearly are. With normalised weights w and v the mean,

        se^2 = sum_k (sum_{i in k} w_i (v_i - v))^2 / (1 - sum_k (sum_{i in k} w_i)^2)

    over lineages k. Of independent particles of equal weight this is the ordinary standard error. It is the more accurate the
    more lineages are left; of a single one it is NaN.

    Args:
      values: [N], in any unit; NaN (infeasible) is left out.
      lineages: [N], integers that name the initial ancestor, as in the `info` of particle samplers.
      log_weights: [N], unnormalised; equal without them.

    Returns:
      A scalar in the unit of the values.

    References: Chan and Lai (arXiv 1312.5114); Lee and Whiteley (arXiv 1509.00394), whose factor for multinomial resampling,
    (N / (N - 1))^(resamplings + 1), is what 1 over the denominator is near when weights are equal.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(f"{rgdiff.resampling.standard_error(jnp.array([0.0, 2.0]), jnp.array([0, 1])):.4f}")  # sqrt(2) / sqrt(2)
      1.0000
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
    """Draw independent ancestors in proportion to the weights.

    Args:
      key: a typed PRNG key.
      log_weights: [N], unnormalised, nats.
      count: number of draws, N by default.

    Returns:
      Ancestors [count], int32 in 0 ... N - 1.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> print(rgdiff.resampling.multinomial(jax.random.key(0), jnp.log(jnp.array([0.0, 1.0, 0.0]))))
      [1 1 1]
    """
    draws = jax.random.uniform(key, (log_weights.shape[0] if count is None else count,))
    return _invert(log_weights, draws)


def stratified(key: Key, log_weights: Array) -> Array:
    """Draw one ancestor in each of N equal strata of the cumulated weights.

    Args:
      key: a typed PRNG key.
      log_weights: [N], unnormalised, nats.

    Returns:
      Ancestors [N], int32, sorted.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> print(rgdiff.resampling.stratified(jax.random.key(0), jnp.zeros(4)))  # equal weights: each once
      [0 1 2 3]
    """
    count = log_weights.shape[0]
    return _invert(log_weights, (jnp.arange(count) + jax.random.uniform(key, (count,))) / count)


def systematic(key: Key, log_weights: Array) -> Array:
    """Draw one ancestor in each of N equal strata of the cumulated weights, all at the same place in their stratum.

    Args:
      key: a typed PRNG key.
      log_weights: [N], unnormalised, nats.

    Returns:
      Ancestors [N], int32, sorted.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> print(rgdiff.resampling.systematic(jax.random.key(0), jnp.log(jnp.array([3.0, 1.0, 0.0, 0.0]))))
      [0 0 0 1]
    """
    count = log_weights.shape[0]
    return _invert(log_weights, (jnp.arange(count) + jax.random.uniform(key)) / count)


def residual(key: Key, log_weights: Array) -> Array:
    """Copy particle i floor(N w_i) times, and draw the rest in proportion to the remainders.

    Args:
      key: a typed PRNG key.
      log_weights: [N], unnormalised, nats.

    Returns:
      Ancestors [N], int32.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> print(rgdiff.resampling.residual(jax.random.key(0), jnp.log(jnp.array([3.0, 1.0, 0.0, 0.0]))))
      [0 0 0 1]
    """
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
