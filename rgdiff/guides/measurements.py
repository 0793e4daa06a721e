"""Measurements of x0: `linear` (y = A x0 + noise) and `inpainting` (some coordinates, with noise).

A measurement is a reward, its log-likelihood log p(y | x0) in nats with the normalising constant, so that every method
of the library takes it. It also computes log p(y | x_t) where x0 | x_t is N(m, v I), for any v without another
factorisation, and provides the residual, A, A^T and the rows of A for covariance-aware guides.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import jax.numpy as jnp

from rgdiff import checks
from rgdiff.typing import Array, Cond, Numbers, pytree, static

_dot = partial(jnp.matmul, precision="highest")


class Measurement(Protocol):
    """y = A x0 + sigma * noise; residuals [B, M] are flat, `shape` is that of one x0, y is [M] or one row per example.

    `gain` is the largest singular value of A.
    """

    @property
    def sigma(self) -> Array: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def gain(self) -> Array: ...

    def __call__(self, x0: Array, cond: Cond = None) -> Array: ...

    def log_prob(self, x0: Array, variance: Array | float) -> Array: ...

    def residual(self, x0: Array) -> Array: ...

    def forward(self, x0: Array) -> Array: ...

    def transpose(self, r: Array) -> Array: ...

    def rows(self) -> Array: ...


def is_measurement(reward: Any) -> bool:
    """Return whether a reward has a residual, and a likelihood for an x0 that has a variance.

    Args:
      reward: any reward or value.

    Returns:
      bool.
    """
    return hasattr(reward, "residual") and hasattr(reward, "log_prob")


def measured(measurement: Any, method: str) -> Measurement:
    """Refuse another reward where a measurement is needed.

    Args:
      measurement: a measurement, or another reward.
      method: name of the method that needs its residual and its noise.

    Returns:
      The measurement.

    Raises:
      ValueError: for another reward.
    """
    if not is_measurement(measurement):
        raise ValueError(
            f"{method} needs a measurement, guides.linear(...) or guides.inpainting(...), got {type(measurement).__name__}; "
            "for another reward see guides.reward_guidance"
        )
    return measurement


@pytree
class LinearMeasurement:
    """y = A x0 + sigma * noise. Build it with `linear`."""

    matrix: Array
    y: Array
    sigma: Array
    values: Array
    vectors: Array
    shape: tuple[int, ...] = static()

    @property
    def gain(self) -> Array:
        """The largest singular value of A."""
        return jnp.sqrt(jnp.max(self.values))

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        """log N(y; A x0, sigma^2 I), nats [B]."""
        return self.log_prob(x0, 0.0)

    def log_prob(self, x0: Array, variance: Array | float) -> Array:
        """log N(y; A x0, variance A A^T + sigma^2 I) for a variance that is a scalar or [B], nats [B]."""
        total = jnp.reshape(variance, (-1, 1)) * self.values + self.sigma**2
        return jnp.sum(_log_normal(_dot(self.residual(x0), self.vectors), total), -1)

    def residual(self, x0: Array) -> Array:
        """y - A x0, [B, M]."""
        return _for(self.y, x0, 1) - self.forward(x0)

    def forward(self, x0: Array) -> Array:
        """A x0, [B, M]."""
        return _dot(x0.reshape(x0.shape[0], -1), self.matrix.T)

    def transpose(self, r: Array) -> Array:
        """A^T r, [B, ...]."""
        return _dot(r, self.matrix).reshape(r.shape[0], *self.shape)

    def rows(self) -> Array:
        """The rows of A as states, [M, ...]."""
        return self.matrix.reshape(-1, *self.shape)


@pytree
class Inpainting:
    """y = x0 + sigma * noise where the mask is 1. Build it with `inpainting`. M is all coordinates; unseen ones have residual 0."""

    mask: Array
    y: Array
    sigma: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape

    @property
    def gain(self) -> Array:
        """The largest singular value of A."""
        return jnp.max(jnp.abs(self.mask))

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        """log N(y; x0, sigma^2) over the coordinates seen, nats [B]."""
        return self.log_prob(x0, 0.0)

    def log_prob(self, x0: Array, variance: Array | float) -> Array:
        """log N(y; x0, variance + sigma^2) over the coordinates seen, for a variance that is a scalar or [B], nats [B]."""
        total = jnp.reshape(variance, (-1, 1)) + self.sigma**2
        return jnp.sum(self.mask.reshape(-1) * _log_normal(self.residual(x0), total), -1)

    def residual(self, x0: Array) -> Array:
        """mask (y - x0), [B, M]."""
        return (self.mask * (_for(self.y, x0, len(self.shape)) - x0)).reshape(x0.shape[0], -1)

    def forward(self, x0: Array) -> Array:
        """mask x0, [B, M]."""
        return (self.mask * x0).reshape(x0.shape[0], -1)

    def transpose(self, r: Array) -> Array:
        """mask r, [B, ...]."""
        return self.mask * r.reshape(r.shape[0], *self.shape)

    def rows(self) -> Array:
        """The rows of the mask's diagonal matrix as states, [M, ...]."""
        return jnp.diag(self.mask.reshape(-1)).reshape(-1, *self.shape)


def _for(y: Array, x0: Array, axes: int) -> Array:
    """y, of one measurement (`axes` axes) or with a row for every state."""
    if y.ndim > axes and y.shape[0] not in (1, x0.shape[0]):
        raise ValueError(
            f"y has a row for each of {y.shape[0]} examples, got {x0.shape[0]} states: give one y for all to what evaluates "
            "several states per example (svdd, best_of_n)"
        )
    return y


def _log_normal(r: Array, variance: Array) -> Array:
    return -0.5 * (r**2 / variance + jnp.log(2 * jnp.pi * variance))


def linear(matrix: Numbers, y: Numbers, sigma: float, *, shape: tuple[int, ...] | None = None) -> LinearMeasurement:
    """Make the measurement y = A x0 + sigma * noise, a reward: its value is log N(y; A x0, sigma^2 I), nats.

    Args:
      matrix: A [M, D], acting on x0 flattened.
      y: [M], or [B, M] for one measurement per example.
      sigma: standard deviation of the noise, in the unit of y.
      shape: of one x0, with product D; (D,) by default.

    Returns:
      The measurement, a reward (x0, cond) -> [B].

    Raises:
      ValueError: where the shapes of A, y and x0 do not fit, or sigma is not positive.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> measurement = rgdiff.guides.linear(jnp.array([[1.0, 2.0]]), jnp.array([4.0]), sigma=0.5)
      >>> print(measurement.residual(jnp.array([[1.0, 1.0]])))  # 4 - (1 + 2)
      [[1.]]
    """
    a, seen = jnp.asarray(matrix, jnp.float32), jnp.asarray(y, jnp.float32)
    checks.shape("matrix", a, (None, None))
    shape = (a.shape[1],) if shape is None else tuple(int(d) for d in shape)
    if jnp.zeros(shape).size != a.shape[1]:
        raise ValueError(f"matrix has {a.shape[1]} columns, but states have shape {list(shape)}; pass shape=")
    checks.shape("y", seen, (a.shape[0],) if seen.ndim < 2 else (None, a.shape[0]))
    values, vectors = jnp.linalg.eigh(_dot(a, a.T))
    return LinearMeasurement(a, seen, checks.positive("sigma", sigma), jnp.maximum(values, 0.0), vectors, shape)


def inpainting(mask: Numbers, y: Numbers, sigma: float) -> Inpainting:
    """Make the measurement of the coordinates of x0 where the mask is 1, with noise: y = x0 + sigma * noise there.

    Args:
      mask: zeros and ones in the shape of one x0.
      y: in that shape, or [B, ...] for one measurement per example; not read where the mask is 0.
      sigma: standard deviation of the noise, in the unit of x0.

    Returns:
      The measurement, a reward (x0, cond) -> [B], nats.

    Raises:
      ValueError: where y does not have the mask's shape, or sigma is not positive.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> measurement = rgdiff.guides.inpainting(jnp.array([1.0, 0.0]), jnp.array([3.0, 5.0]), sigma=0.5)
      >>> print(measurement.residual(jnp.array([[1.0, -1.0]])))  # 3 - 1; not measured
      [[2. 0.]]
    """
    ones, seen = jnp.asarray(mask, jnp.float32), jnp.asarray(y, jnp.float32)
    checks.shape("y", seen, ones.shape if seen.ndim <= ones.ndim else (None, *ones.shape))
    return Inpainting(ones, jnp.where(ones > 0, seen, 0.0), checks.positive("sigma", sigma))
