"""Features of samples for linear beliefs: callable pytrees x0 -> [B, d], float32.

Flattened states, one-hot letters with all their pairs, random Fourier features; `deep_features` learns its own. On points
of the simplex a pair's feature is its probability under independent letters.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.typing import Array, Key, State, pytree


def flatten(x0: State) -> Array:
    """Return all numbers of every example, [B, D].

    Args:
      x0: states, a pytree of leaves [B, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> print(surrogates.flatten({"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 1, 4))}).shape)
      (2, 7)
    """
    leaves = [leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in jax.tree.leaves(x0)]
    return jnp.concatenate(leaves, -1)


def with_constant(x0: State) -> Array:
    """Return a constant 1 and `flatten`, [B, 1 + D]: features of affine functions.

    Args:
      x0: states, a pytree of leaves [B, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> print(surrogates.with_constant(jnp.array([[2.0, 3.0]])))
      [[1. 2. 3.]]
    """
    x = flatten(x0)
    return jnp.concatenate([jnp.ones((x.shape[0], 1), jnp.float32), x], -1)


def pairs(x0: Array) -> Array:
    """Return a constant 1, one-hot letters and all pairs of letters at two positions, [B, 1 + LK + L(L - 1)/2 K^2].

    Args:
      x0: one-hot sequences [B, L, K], or points of the simplex.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> print(surrogates.pairs(jnp.ones((2, 3, 4))).shape)  # 1 + 3 * 4 + 3 * 16
      (2, 61)
    """
    batch, length, _ = x0.shape
    if length < 2:
        return with_constant(x0)
    x0 = x0.astype(jnp.float32)
    left, right = np.array(list(itertools.combinations(range(length), 2))).T
    both = x0[:, left, :, None] * x0[:, right, None, :]
    return jnp.concatenate([with_constant(x0), both.reshape(batch, -1)], -1)


@pytree
class Fourier:
    """Random Fourier features of a Gaussian kernel. Build it with `fourier`."""

    frequencies: Array  # [m, D]
    phases: Array  # [m]

    def __call__(self, x0: State) -> Array:
        angles = jnp.matmul(flatten(x0), self.frequencies.T, precision=jax.lax.Precision.HIGHEST) + self.phases
        return math.sqrt(2 / self.phases.shape[0]) * jnp.cos(angles)


def fourier(key: Key, dims: int, count: int, lengthscale: float) -> Fourier:
    """Draw random Fourier features of the Gaussian covariance.

        phi(x) = sqrt(2/m) cos(W x + b),  W ~ N(0, 1/l^2),  b ~ U[0, 2 pi]:   phi(a).phi(b) -> exp(-|a - b|^2 / 2 l^2) as m grows

    Args:
      key: a typed PRNG key.
      dims: D, the numbers of one example.
      count: m, the number of features.
      lengthscale: l, in the unit of x.

    Returns:
      Features x0 [B, ...] -> [B, m], a callable pytree.

    Raises:
      ValueError: for a key that is not typed, counts below 1, a lengthscale that is not positive.

    References: Rahimi and Recht, "Random features for large-scale kernel machines", 2007.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> phi = surrogates.fourier(jax.random.key(0), 1, 4096, 1.0)(jnp.array([[0.0], [1.0]]))
      >>> print(abs(phi[0] @ phi[1] - 0.607) < 0.05)  # exp(-1/2)
      True
    """
    checks.key(key)
    dims, count = checks.at_least("dims", dims, 1), checks.at_least("count", count, 1)
    key_frequency, key_phase = jax.random.split(key)
    frequencies = jax.random.normal(key_frequency, (count, dims)) / checks.positive("lengthscale", lengthscale)
    return Fourier(frequencies, 2 * math.pi * jax.random.uniform(key_phase, (count,)))
