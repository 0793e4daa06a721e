"""How noisy a tuner's gradient is: its mean, its variance per example and its signal-to-noise ratio, by independent draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.rewards import failures
from rgdiff.typing import Array, Cond, Key, Params


class GradientStatistics(NamedTuple):
    """Statistics of one batch's gradient g.

    Args:
      squared_mean: |E g|^2, its noise taken off.
      variance: the trace of the covariance of g.
      variance_per_example: batch * variance, the number to compare tuners of different batches by.
      snr: |E g|^2 / variance.
    """

    squared_mean: Array
    variance: Array
    variance_per_example: Array
    snr: Array


def gradient_statistics(
    tuner: Any, key: Key, params: Params, draws: int = 64, cond: Cond = None, *, chunk: int = 8
) -> GradientStatistics:
    """Estimate a tuner's gradient noise from independent batches, `chunk` of them at a time.

    Args:
      tuner: with `gradients(params, key, cond)` and `batch`, e.g. of `reward_backprop` or `as_tuner`.
      key: a typed PRNG key.
      params: the parameters at which all gradients are taken.
      draws: n >= 2 batches. The relative standard error of the variance is about sqrt(2 / (n * effective dimension)).
      cond: conditions of one batch, the same in every draw.
      chunk: batches evaluated at once by `vmap`; with 1 there is none, and a tuner whose plan skips calls (`lax.cond`)
        does skip them, where `vmap` runs both branches.

    Returns:
      GradientStatistics: squared_mean, |E g|^2, unbiased, so that it may be negative where noise dominates; variance, the trace of
      the covariance of one batch's gradient; variance_per_example, batch times that; snr, squared_mean / variance.

    Raises:
      ValueError: for a key that is not typed, fewer than 2 draws.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # the gradient is 1 without noise
      >>> reward = lambda x0, cond=None: x0[:, 0]
      >>> tuner = rgdiff.tuners.draft_k(model, process, reward, process.times(2), optax.sgd(0.1), batch=2)
      >>> noise = rgdiff.tuners.gradient_statistics(tuner, jax.random.key(0), jnp.zeros(1), draws=2)
      >>> print(float(noise.squared_mean), float(noise.variance))
      1.0 0.0
    """
    checks.key(key)
    draws = checks.at_least("draws", draws, 2)
    with failures(tuner) as settle:
        moments = _moments(lambda p, k, c: tuner.gradients(p, k, c)[0], params, key, cond, draws, chunk)
        mean, variance = settle(moments)
    squared = mean - variance / draws
    return GradientStatistics(squared, variance, variance * tuner.batch, squared / variance)


def _moments(
    gradient: Callable[..., Params], params: Params, key: Key, cond: Cond, draws: int, chunk: int
) -> tuple[Array, Array]:
    """|mean|^2 of the draws and the trace of their covariance."""

    @jax.jit
    def all_draws(params: Params, key: Key, cond: Cond) -> tuple[Array, Array]:
        pilot = gradient(params, jax.random.fold_in(key, draws), cond)  # sums of differences from it do not cancel

        def one(key: Key) -> Params:
            return jax.tree.map(lambda g, p: (g - p).ravel(), gradient(params, key, cond), pilot)

        def add(total: Any, keys: Key) -> tuple[Any, None]:
            first, second = total
            flat = jax.vmap(one)(keys) if size > 1 else jax.tree.map(lambda g: g[None], one(keys[0]))
            first = jax.tree.map(lambda f, g: f + g.sum(0), first, flat)
            return (first, second + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(flat))), None

        size = next(c for c in range(min(chunk, draws), 0, -1) if draws % c == 0)
        keys = jax.random.split(key, draws).reshape(-1, size)
        zero = jax.tree.map(lambda p: jnp.zeros(p.size), pilot)
        (first, second), _ = jax.lax.scan(add, (zero, jnp.float32(0)), keys)
        mean = jax.tree.map(lambda f: f / draws, first)
        square = lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))  # noqa: E731
        variance = (second - draws * square(mean)) / (draws - 1)
        return jnp.asarray(square(jax.tree.map(lambda m, p: m + p.ravel(), mean, pilot))), jnp.asarray(variance)

    return all_draws(params, key, cond)
