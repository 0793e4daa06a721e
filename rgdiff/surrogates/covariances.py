"""Covariance functions of Gaussian processes: callable pytrees (a [A, ...], b [B, ...]) -> [A, B], and features that average to them.

Both act on `features` of the states, all their numbers by default. `random_features` returns a map phi with
E phi(a).phi(b) = k(a, b), from which functions of the prior are drawn.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.surrogates.features import flatten
from rgdiff.typing import Array, Key, State, callable_pytree, pytree

HIGHEST = jax.lax.Precision.HIGHEST


def _inner(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b.T, precision=HIGHEST)


@pytree
class Waves:
    """phi_j(x) = scale cos(<frequency_j, x> + phase_j), and where there are slopes times <slope_j, x> exp(-decay_j (|x|^2 - level) / 2)."""

    features: Any
    frequencies: Array  # [m, D]
    phases: Array  # [m]
    scale: Array
    slopes: Array | None = None  # [m, D]
    decays: Array | float = 0.0  # [m]
    level: Array | float = 0.0

    def __call__(self, x0: State) -> Array:
        x = self.features(x0)
        out = self.scale * jnp.cos(_inner(x, self.frequencies) + self.phases)
        if self.slopes is None:
            return out
        size = jnp.sum(x**2, -1, keepdims=True) - self.level
        return out * _inner(x, self.slopes) * jnp.exp(-self.decays * size / 2)


@pytree
class RBF:
    """variance * exp(-|a - b|^2 / 2 lengthscale^2). Build it with `rbf`."""

    features: Any
    lengthscale: Array
    variance: Array

    def __call__(self, a: State, b: State) -> Array:
        a, b = self.features(a), self.features(b)
        square = jnp.sum(a**2, -1)[:, None] + jnp.sum(b**2, -1) - 2 * _inner(a, b)
        return self.variance * jnp.exp(-jnp.maximum(square, 0.0) / (2 * self.lengthscale**2))

    def random_features(self, key: Key, x0: State, count: int) -> Waves:
        """Random Fourier features (Rahimi and Recht 2007); x0 [N, ...] gives the shape of states."""
        key_frequency, key_phase = jax.random.split(key)
        dims = jax.eval_shape(self.features, x0).shape[-1]
        frequencies = jax.random.normal(key_frequency, (count, dims)) / self.lengthscale
        phases = 2 * math.pi * jax.random.uniform(key_phase, (count,))
        scale = jnp.sqrt(2 * self.variance / count)
        return Waves(self.features, frequencies, phases, scale)


@pytree
class Tanimoto:
    """variance * <a, b> / (|a|^2 + |b|^2 - <a, b>). Build it with `tanimoto`."""

    features: Any
    variance: Array

    def __call__(self, a: State, b: State) -> Array:
        a, b = self.features(a), self.features(b)
        inner = _inner(a, b)
        union = jnp.sum(a**2, -1)[:, None] + jnp.sum(b**2, -1) - inner
        nothing = union <= 0  # two zeros: alike
        return self.variance * jnp.where(nothing, 1.0, inner / jnp.where(nothing, 1.0, union))

    def random_features(self, key: Key, x0: State, count: int) -> Waves:
        """Unbiased features, by 1/z = int exp(-u z) du and z = |a - b|^2 / 2 + (|a|^2 + |b|^2) / 2 for the union z.

        Given u, exp(-u |a - b|^2 / 2) has Fourier features and <a, b> random signs; u is drawn from an exponential law of
        half the mean |x|^2 of x0 [N, ...], and weighted.
        """
        key_u, key_frequency, key_phase, key_slope = jax.random.split(key, 4)
        x = self.features(x0)
        size = jnp.sum(x**2, -1)
        level = jnp.sum(size) / jnp.maximum(jnp.sum(size > 0), 1) / 2
        level = jnp.where(level > 0, level, 1.0)
        u = jax.random.exponential(key_u, (count,)) / level
        frequencies = jnp.sqrt(u)[:, None] * jax.random.normal(key_frequency, (count, x.shape[-1]))
        phases = 2 * math.pi * jax.random.uniform(key_phase, (count,))
        slopes = jax.random.rademacher(key_slope, (count, x.shape[-1]), jnp.float32)
        scale = jnp.sqrt(2 * self.variance / (count * level))
        return Waves(self.features, frequencies, phases, scale, slopes, u, level)


def rbf(lengthscale: float = 1.0, variance: float = 1.0, features: Any = flatten) -> RBF:
    """Build the Gaussian covariance k(a, b) = variance exp(-|a - b|^2 / 2 lengthscale^2).

    Args:
      lengthscale: in the unit of the features, dynamic.
      variance: of the reward under the prior, reward's unit squared, dynamic.
      features: a callable pytree x0 [B, ...] -> [B, d]; all numbers of a state by default. On one-hot sequences |a - b|^2 is twice
        the number of positions that differ.

    Returns:
      A covariance (a [A, ...], b [B, ...]) -> [A, B], for `gaussian_process`.

    Raises:
      ValueError: for numbers that are not positive, features that cannot be called.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> print(f"{surrogates.rbf(1.0)(jnp.zeros((1, 1)), jnp.ones((1, 1)))[0, 0]:.3f}")  # exp(-1/2)
      0.607
    """
    return RBF(
        callable_pytree(features, "features (x0 -> [B, d])"),
        checks.positive("lengthscale", lengthscale),
        checks.positive("variance", variance),
    )


def tanimoto(variance: float = 1.0, features: Any = flatten) -> Tanimoto:
    """Build the Tanimoto covariance k(a, b) = variance <a, b> / (|a|^2 + |b|^2 - <a, b>).

    On sets as 0 and 1 it is their intersection over their union. On one-hot sequences of length L with m letters in common it is
    m / (2L - m). It is positive definite on all real vectors, hence on points of the simplex too.

    Args:
      variance: of the reward under the prior, reward's unit squared, dynamic.
      features: a callable pytree x0 [B, ...] -> [B, d], e.g. fingerprints; all numbers of a state by default.

    Returns:
      A covariance (a [A, ...], b [B, ...]) -> [A, B], for `gaussian_process`.

    Raises:
      ValueError: for a variance that is not positive, features that cannot be called.

    References: Ralaivola et al. 2005, "Graph kernels for chemical informatics".

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> print(surrogates.tanimoto()(jnp.array([[1.0, 1.0, 0.0]]), jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])))
      [[0.5 0. ]]
    """
    return Tanimoto(callable_pytree(features, "features (x0 -> [B, d])"), checks.positive("variance", variance))
