"""Points in the plane: 8 Gaussians, 2 spirals, a checkerboard, 3 rings, curves; each sampled by key, each with its log density.

A distribution here is a pytree with `sample(key, count)` [count, 2] and `log_prob(x)` [...], nats. It assumes states [B, 2] and
depends on no prior and no reward except `feasible`, which bounds a reward to the neighbourhood of a curve. `judge` holds
what reports show of samples.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.rewards import evaluate
from rgdiff.typing import Array, Cond, Key, Reward, callable_pytree, pytree, static

TRAINING = 65_536  # examples for training a network
EXTENT = 4.0  # half the side of the square that holds the sets at scale 1
NODES = 256  # of the quadrature along an arm of the spirals


class Law(Protocol):
    """A distribution on the plane."""

    def sample(self, key: Key, count: int) -> Array: ...

    def log_prob(self, x: Array) -> Array: ...


@pytree
class Mixture:
    """Equal Gaussians of standard deviation `std` at `centres` [M, 2]."""

    centres: Array
    std: Array

    def sample(self, key: Key, count: int) -> Array:
        key_centre, key_noise = jax.random.split(key)
        index = jax.random.randint(key_centre, (count,), 0, len(self.centres))
        return self.centres[index] + self.std * jax.random.normal(key_noise, (count, 2))

    def log_prob(self, x: Array) -> Array:
        squared = jnp.sum((x[..., None, :] - self.centres) ** 2, -1)
        scale = jnp.log(2 * jnp.pi * self.std**2 * len(self.centres))
        return jax.nn.logsumexp(-squared / (2 * self.std**2), -1) - scale


@pytree
class Spirals:
    """Two arms +-c(n), c(n) = (-n cos n, n sin n)/3, n = 3 pi sqrt(U), blurred by U[0, 1/6]^2 (towards +c) and by noise `std`.

    Arms and blur are `scale` times as large. The density is a quadrature over n; its relative error is below 1e-4 where the density exceeds 1e-6 of its peak.
    """

    std: Array
    scale: Array | float = 1.0

    def _arm(self, n: Array) -> Array:
        return jnp.stack([-n * jnp.cos(n), n * jnp.sin(n)], -1) / 3

    def sample(self, key: Key, count: int) -> Array:
        key_n, key_blur, key_arm, key_noise = jax.random.split(key, 4)
        n = 3 * jnp.pi * jnp.sqrt(jax.random.uniform(key_n, (count,)))
        sign = jax.random.rademacher(key_arm, (count, 1), jnp.float32)
        arm = sign * (self._arm(n) + jax.random.uniform(key_blur, (count, 2), maxval=1 / 6))
        return self.scale * arm + self.std * jax.random.normal(key_noise, (count, 2))

    def log_prob(self, x: Array) -> Array:
        x, std = x / self.scale, self.std / self.scale
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        n = jnp.asarray(1.5 * np.pi * (nodes + 1), jnp.float32)
        log_weight = jnp.asarray(np.log((nodes + 1) / 2 * weights * 36 / 2), jnp.float32)

        def arm(sign: float) -> Array:
            from_corner = (sign * x[..., None, :] - self._arm(n)) / std
            inside = log_probability(from_corner - 1 / (6 * std), from_corner)
            return jax.nn.logsumexp(log_weight + jnp.sum(inside, -1), -1)

        return jnp.logaddexp(arm(1.0), arm(-1.0)) - 2 * jnp.log(self.scale)


@pytree
class Checkerboard:
    """Uniform on the 8 black squares, of side 2, of [-4, 4]^2: floor(x/2) + floor(y/2) even. Density 1/32, or 0; `scale` times as large."""

    scale: Array | float = 1.0

    def sample(self, key: Key, count: int) -> Array:
        key_place, key_row = jax.random.split(key)
        place = jax.random.uniform(key_place, (count, 2)) * jnp.array([8.0, 2.0]) + jnp.array([-4.0, 0.0])
        row = 2 * jax.random.randint(key_row, (count,), -1, 1) + jnp.floor(place[:, 0] / 2) % 2
        return self.scale * place.at[:, 1].add(2 * row)

    def log_prob(self, x: Array) -> Array:
        x = x / self.scale
        black = jnp.sum(jnp.floor(x / 2), -1) % 2 == 0
        return jnp.where(black & jnp.all(jnp.abs(x) < 4, -1), -math.log(32.0) - 2 * jnp.log(self.scale), -jnp.inf)


@pytree
class Rings:
    """Equal parts on circles of `radii` [M] about 0, with Gaussian noise `std` in both coordinates.

    Each: p(x) = exp(-(|x| - R)^2 / 2 std^2) I0e(|x| R / std^2) / (2 pi std^2), I0e the scaled Bessel function.
    """

    radii: Array
    std: Array

    def sample(self, key: Key, count: int) -> Array:
        key_ring, key_angle, key_noise = jax.random.split(key, 3)
        radius = jax.random.choice(key_ring, self.radii, (count,))
        angle = jax.random.uniform(key_angle, (count,), maxval=2 * jnp.pi)
        point = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        return point + self.std * jax.random.normal(key_noise, (count, 2))

    def log_prob(self, x: Array) -> Array:
        length = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))
        bessel = jnp.log(jax.scipy.special.i0e(length * self.radii / self.std**2))
        each = -((length - self.radii) ** 2) / (2 * self.std**2) + bessel
        return jax.nn.logsumexp(each, -1) - jnp.log(2 * jnp.pi * self.std**2 * len(self.radii))


@pytree
class Curve:
    """Uniform along a polygonal line through `vertices` [V + 1, 2], with Gaussian noise `std` in both coordinates.

    The density is exact: along each segment an integral of normal densities, across it a normal density.
    """

    vertices: Array
    std: Array

    def _segments(self) -> tuple[Array, Array, Array]:
        """Beginnings [V, 2], unit directions [V, 2] and lengths [V]."""
        steps = jnp.diff(self.vertices, axis=0)
        lengths = jnp.linalg.norm(steps, axis=-1)
        return self.vertices[:-1], steps / lengths[:, None], lengths

    def _along_across(self, x: Array) -> tuple[Array, Array]:
        """Coordinates of x [...] along and across every segment, [..., V] each."""
        begin, unit, _ = self._segments()
        relative = x[..., None, :] - begin
        return jnp.sum(relative * unit, -1), relative[..., 1] * unit[:, 0] - relative[..., 0] * unit[:, 1]

    def sample(self, key: Key, count: int) -> Array:
        key_segment, key_place, key_noise = jax.random.split(key, 3)
        begin, unit, lengths = self._segments()
        index = jax.random.categorical(key_segment, jnp.log(lengths), shape=(count,))
        place = jax.random.uniform(key_place, (count, 1)) * lengths[index][:, None]
        return begin[index] + place * unit[index] + self.std * jax.random.normal(key_noise, (count, 2))

    def log_prob(self, x: Array) -> Array:
        along, across = self._along_across(x)
        lengths = self._segments()[2]
        within = log_probability((along - lengths) / self.std, along / self.std)
        each = within - 0.5 * (across / self.std) ** 2 - 0.5 * jnp.log(2 * jnp.pi * self.std**2)
        return jax.nn.logsumexp(each, -1) - jnp.log(jnp.sum(lengths))

    def distance(self, x: Array) -> Array:
        """Return the distance of x [..., 2] to the line, [...]."""
        along, across = self._along_across(x)
        beyond = along - jnp.clip(along, 0.0, self._segments()[2])
        squared = jnp.min(across**2 + beyond**2, -1)
        return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def log_probability(low: Array, high: Array) -> Array:
    """Compute log(Phi(high) - Phi(low)) without cancellation in either tail.

    Args:
      low, high: standard normal scores, low < high, of one shape.

    Returns:
      Nats, of that shape.
    """
    flip = low + high > 0  # take both from the lower tail
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    top = jax.scipy.special.log_ndtr(high)
    return top + jnp.log(-jnp.expm1(jnp.minimum(jax.scipy.special.log_ndtr(low) - top, -1e-30)))


def eight_gaussians(scale: float = 1.0, noise: float | None = None) -> Mixture:
    """Make the distribution of 8 equal Gaussians on a circle of radius 4/1.414, of standard deviation .5/1.414 (arXiv 2407.00626).

    Args:
      scale: of the circle.
      noise: the standard deviation; scale * .5/1.414 by default.

    Returns:
      The distribution, with `sample` and `log_prob`.

    Raises:
      ValueError: for a number that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.domains.planar import data
      >>> print(f"{jnp.linalg.norm(data.eight_gaussians().centres, axis=-1)[0]:.4f}")  # 4 / 1.414
      2.8289
    """
    angles = jnp.arange(8) * jnp.pi / 4
    radius, std = 4 / 1.414 * checks.positive("scale", scale), _noise(noise, 0.5 / 1.414, scale)
    return Mixture(jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1) * radius, std)


def two_spirals(scale: float = 1.0, noise: float | None = None) -> Spirals:
    """Make the distribution of two spirals of 1.5 turns.

    Args:
      scale: of the spirals.
      noise: standard deviation of the Gaussian noise about them; .1 * scale by default.

    Returns:
      The distribution, with `sample` and `log_prob`.

    Raises:
      ValueError: for a number that is not positive.
    """
    return Spirals(_noise(noise, 0.1, scale), checks.positive("scale", scale))


def checkerboard(scale: float = 1.0, noise: None = None) -> Checkerboard:
    """Make the uniform distribution on the black squares of a 4 x 4 board.

    Args:
      scale: of the board; at 1 its squares have side 2.
      noise: None; the board has sharp edges.

    Returns:
      The distribution, with `sample` and `log_prob`.

    Raises:
      ValueError: for a noise, or a scale that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.domains.planar import data
      >>> print(f"{jnp.exp(data.checkerboard().log_prob(jnp.array([[0.5, 0.5]])))[0]:.5f}")  # 1/32
      0.03125
    """
    if noise is not None:
        raise ValueError(f"the checkerboard has sharp edges and no noise; leave domain.noise=null, got {noise!r}")
    return Checkerboard(checks.positive("scale", scale))


def rings(radii: tuple[float, ...] = (1.0, 2.0, 3.0), noise: float | None = None, scale: float = 1.0) -> Rings:
    """Make the distribution of equal parts on circles about 0.

    Args:
      radii: of the circles, times `scale`.
      noise: standard deviation of the Gaussian noise about them; .1 * scale by default.
      scale: of the circles.

    Returns:
      The distribution, with `sample` and `log_prob`.

    Raises:
      ValueError: for a number that is not positive.
    """
    radius = jnp.asarray([checks.positive("a radius", r) for r in radii]) * checks.positive("scale", scale)
    return Rings(radius, _noise(noise, 0.1, scale))


def arc(thickness: float = 0.05, segments: int = 128, scale: float = 1.0) -> Curve:
    """Make the distribution on three quarters of a circle of radius 2, open at the lower right.

    Args:
      thickness: standard deviation of the Gaussian noise about the curve.
      segments: number of straight pieces that the curve is made of.
      scale: of the curve.

    Returns:
      The distribution, with `sample`, `log_prob` and `distance`.

    Raises:
      ValueError: for a number that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.domains.planar import data
      >>> print(f"{data.arc().distance(jnp.array([-2.5, 0.0])):.3f}")  # of a circle of radius 2
      0.500
    """
    angles = jnp.linspace(0.0, 1.5 * jnp.pi, checks.at_least("segments", segments, 1) + 1)
    circle = 2 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)
    return Curve(circle * checks.positive("scale", scale), checks.positive("thickness", thickness))


def figure_eight(thickness: float = 0.05, segments: int = 128, scale: float = 1.0) -> Curve:
    """Make the distribution on the closed curve (2 sin u, sin 2u), which crosses itself at 0.

    Args:
      thickness: standard deviation of the Gaussian noise about the curve.
      segments: number of straight pieces that the curve is made of.
      scale: of the curve.

    Returns:
      The distribution, with `sample`, `log_prob` and `distance`.

    Raises:
      ValueError: for a number that is not positive.
    """
    u = jnp.linspace(0.0, 2 * jnp.pi, checks.at_least("segments", segments, 1) + 1)
    eight = jnp.stack([2 * jnp.sin(u), jnp.sin(2 * u)], -1)
    return Curve(eight * checks.positive("scale", scale), checks.positive("thickness", thickness))


def _noise(noise: float | None, own: float, scale: float) -> Array:
    """Return a set's noise: as given, or its own at scale 1 times the scale."""
    return checks.positive("scale", scale) * own if noise is None else checks.positive("noise", noise)


CURVES = {"arc": arc, "figure_eight": figure_eight}
LAWS: dict[str, Any] = {
    "eight_gaussians": eight_gaussians,
    "two_spirals": two_spirals,
    "checkerboard": checkerboard,
    "rings": rings,
    **CURVES,
}


@pytree
class Feasible:
    """A reward within `limit` of a curve; NaN, infeasible, beyond. Build it with `feasible`."""

    reward: Reward
    curve: Curve
    limit: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return jnp.where(self.curve.distance(x0) <= self.limit, evaluate(self.reward, x0, cond), jnp.nan)


def feasible(reward: Reward, curve: Curve, limit: float) -> Feasible:
    """Bound a reward to the neighbourhood of a curve: NaN where `curve.distance(x0)` exceeds `limit`.

    Args:
      reward: (x0 [B, 2], cond) -> [B].
      curve: from `arc` or `figure_eight`.
      limit: largest feasible distance, in the plane's unit.

    Returns:
      The reward, (x0, cond) -> [B].

    Raises:
      ValueError: for something that is not a curve, or a limit that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.domains.planar import data
      >>> reward = data.feasible(lambda x0, cond: x0[:, 1], data.arc(), limit=0.3)
      >>> print(reward(jnp.array([[-2.1, 0.0], [-3.0, 0.0]])))
      [ 0. nan]
    """
    if not isinstance(curve, Curve):
        raise ValueError(
            f"feasible needs a curve, got {type(curve).__name__}; use planar.arc() or planar.figure_eight()"
        )
    return Feasible(callable_pytree(reward, "a reward"), curve, checks.positive("limit", limit))


@pytree
class PlanarDomain:
    """A distribution on the plane as a domain of recipes. Build it with `planar` or `curve`."""

    law: Any
    name: str = static()
    extent: float = static(default=EXTENT)  # half the side of the square that holds the set
    shape: tuple[int, ...] = static(default=(2,))
    value_range: None = static(default=None)

    @property
    def train_x(self) -> np.ndarray:
        """65,536 examples for training a network, the same on every machine."""
        return np.asarray(self.data(jax.random.key(0), TRAINING))

    def data(self, key: Key, count: int) -> Array:
        """Draw examples [count, 2]."""
        return self.law.sample(key, count)


def planar(name: str = "eight_gaussians", scale: float = 1.0, noise: float | None = None) -> PlanarDomain:
    """Make the domain of a distribution on the plane, by its name.

    Args:
      name: `eight_gaussians`, `two_spirals`, `checkerboard`, `rings`, or a curve, `arc` or `figure_eight` (see `curve`).
      scale: of the set about 0; at 1 it lies in [-4, 4]^2.
      noise: standard deviation of the Gaussian noise about it, in the plane's unit; the set's own, times scale, by default.

    Returns:
      The domain.

    Raises:
      ValueError: for an unknown name, a scale or a noise that is not positive, or noise for a checkerboard.

    Example:
      >>> import jax
      >>> from rgdiff.domains import planar
      >>> planar.planar("checkerboard").data(jax.random.key(0), 3).shape
      (3, 2)
    """
    checks.positive("scale", scale)
    if checks.one_of("domain.name", name, LAWS) in CURVES:
        return curve(name, 0.05 * scale if noise is None else noise, scale)
    return PlanarDomain(LAWS[name](scale=scale, noise=noise), name, EXTENT * scale)


def curve(name: str = "arc", thickness: float = 0.05, scale: float = 1.0) -> PlanarDomain:
    """Make the domain of a curve in the plane.

    Args:
      name: `arc` or `figure_eight`.
      thickness: standard deviation of the Gaussian noise about the curve, in the plane's unit.
      scale: of the curve about 0.

    Returns:
      The domain.

    Raises:
      ValueError: for an unknown name, or a number that is not positive.

    Example:
      >>> import jax
      >>> from rgdiff.domains import planar
      >>> planar.curve("arc").data(jax.random.key(0), 3).shape
      (3, 2)
    """
    law = CURVES[checks.one_of("domain.name", name, CURVES)](thickness, scale=scale)
    return PlanarDomain(law, name, EXTENT * scale)
