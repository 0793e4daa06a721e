"""Noise schedules over t in [0, 1] (0 data, 1 noise): alpha and sigma of Gaussian processes, and mask rates.

Gaussian schedules define x_t = alpha(t) x0 + sigma(t) eps through `alpha`, `sigma`, `log_snr` (log alpha^2/sigma^2,
computed without cancellation, since reverse kernels need differences of it), `times(steps)` and the standard
deviation of the prior; everything is float32. Mask schedules define `rate(t)`, the probability of being masked, and
`hazard(t)` = rate'(t) / rate(t), the weight of the continuous-time bound.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.typing import Array, pytree, static


class GaussianSchedule(Protocol):
    """x_t = alpha(t) x0 + sigma(t) eps."""

    @property
    def prior_std(self) -> Array: ...

    def alpha(self, t: Array) -> Array: ...

    def sigma(self, t: Array) -> Array: ...

    def log_snr(self, t: Array) -> Array: ...

    def times(self, steps: int) -> Array: ...


class MaskSchedule(Protocol):
    """A token is masked at time t with probability rate(t); rate(0) = 0, rate(1) = 1."""

    def rate(self, t: Array) -> Array: ...

    def hazard(self, t: Array) -> Array: ...


def _trailing(first: float, steps: int) -> Array:
    """`steps` times, first ... first / steps: uniform, so that the projection spans one ordinary step (arXiv 2305.08891)."""
    steps = checks.at_least("steps", steps, 1)
    return jnp.linspace(first, first / steps, steps)


@pytree
class LinearVP:
    """Variance preserving with beta(t) linear: log alpha = -(beta_min t + (beta_max - beta_min) t^2 / 2) / 2 (arXiv 2011.13456)."""

    beta_min: Array
    beta_max: Array

    @property
    def prior_std(self) -> Array:
        return jnp.float32(1)

    def _log_alpha(self, t: Array) -> Array:
        return -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2)

    def alpha(self, t: Array) -> Array:
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(2 * self._log_alpha(t)))

    def log_snr(self, t: Array) -> Array:
        log_alpha = self._log_alpha(t)
        return 2 * log_alpha - jnp.log(-jnp.expm1(2 * log_alpha))

    def times(self, steps: int) -> Array:
        return _trailing(1.0, steps)


@pytree
class CosineVP:
    """Variance preserving with alpha = cos(pi/2 t) (arXiv 2102.09672 without its offset; grids begin at t = 0.992).

    At t = 1 nothing of the data is left and a prediction of eps cannot be turned into one of x0, hence the first time.
    """

    @property
    def prior_std(self) -> Array:
        return jnp.float32(1)

    def alpha(self, t: Array) -> Array:
        return jnp.sin(0.5 * jnp.pi * (1 - jnp.asarray(t, jnp.float32)))  # the cosine, exact where it is 0

    def sigma(self, t: Array) -> Array:
        return jnp.sin(0.5 * jnp.pi * jnp.asarray(t, jnp.float32))

    def log_snr(self, t: Array) -> Array:
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def times(self, steps: int) -> Array:
        return _trailing(0.992, steps)


@pytree
class KarrasVE:
    """Variance exploding, alpha = 1, with EDM's grid built in: sigma(t)^(1/rho) is linear in t (arXiv 2206.00364, eq. 5)."""

    sigma_min: Array
    sigma_max: Array
    rho: Array

    @property
    def prior_std(self) -> Array:
        return self.sigma_max

    def alpha(self, t: Array) -> Array:
        return jnp.ones_like(jnp.asarray(t, jnp.float32))

    def sigma(self, t: Array) -> Array:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + jnp.asarray(t, jnp.float32) * (high - low)) ** self.rho

    def log_snr(self, t: Array) -> Array:
        return -2 * jnp.log(self.sigma(t))

    def times(self, steps: int) -> Array:
        return jnp.linspace(1.0, 0.0, checks.at_least("steps", steps, 2))


@pytree
class GeometricVE:
    """Variance exploding, alpha = 1, with log sigma linear in t (arXiv 2011.13456). Build it with `geometric_ve`."""

    sigma_min: Array
    sigma_max: Array

    @property
    def prior_std(self) -> Array:
        return self.sigma_max

    def alpha(self, t: Array) -> Array:
        return jnp.ones_like(jnp.asarray(t, jnp.float32))

    def sigma(self, t: Array) -> Array:
        return jnp.exp(-0.5 * self.log_snr(t))

    def log_snr(self, t: Array) -> Array:
        low, high = jnp.log(self.sigma_min), jnp.log(self.sigma_max)
        return -2 * (low + jnp.asarray(t, jnp.float32) * (high - low))

    def times(self, steps: int) -> Array:
        return jnp.linspace(1.0, 0.0, checks.at_least("steps", steps, 2))


@pytree
class Flow:
    """Rectified flow, x_t = (1 - t) x0 + t eps (arXiv 2209.03003, 2210.02747). Build it with `flow`."""

    shift: float = static(default=1.0)
    last: float | None = static(default=None)

    @property
    def prior_std(self) -> Array:
        return jnp.float32(1)

    def alpha(self, t: Array) -> Array:
        return 1 - jnp.asarray(t, jnp.float32)

    def sigma(self, t: Array) -> Array:
        return jnp.asarray(t, jnp.float32)

    def log_snr(self, t: Array) -> Array:
        t = jnp.asarray(t, jnp.float32)
        return 2 * (jnp.log1p(-t) - jnp.log(t))

    def times(self, steps: int) -> Array:
        if self.shift == 1.0 and self.last is None:
            return _trailing(1.0, steps)
        steps = checks.at_least("steps", steps, 1)
        even = np.linspace(1.0, 1 / steps if self.last is None else self.last, steps)
        return jnp.asarray(shifted(even, self.shift), jnp.float32)


def level(t: Array, levels: int) -> Array:
    """Return the noise level of t in a discrete chain: the i in 0 ... T - 1 whose (i + 1) / T is nearest to t.

    Args:
      t: times in [0, 1], any shape.
      levels: T, number of noise levels.

    Returns:
      int32, the shape of t.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(rgdiff.schedules.level(jnp.array([0.001, 0.5, 1.0]), 1000))
      [  0 499 999]
    """
    index = jnp.round(jnp.asarray(t, jnp.float32) * levels).astype(jnp.int32) - 1
    return jnp.clip(index, 0, levels - 1)


@pytree
class Tabulated:
    """The T noise levels of a discrete chain, at t = 1/T, 2/T, ..., 1; between two, log_snr is linear in t. Build it with `tabulated`."""

    levels: Array  # log_snr, [T], decreasing
    spacing: str = static(default="trailing")
    offset: int = static(default=0)

    @property
    def prior_std(self) -> Array:
        return jnp.float32(1)

    def log_snr(self, t: Array) -> Array:
        steps = self.levels.shape[0]
        place = jnp.clip(jnp.asarray(t, jnp.float32) * steps - 1, 0, steps - 1)
        nearest = jnp.round(place)
        place = jnp.where(jnp.abs(place - nearest) < steps * 2.0**-22, nearest, place)  # a level's own time, as rounded
        index = place.astype(jnp.int32)
        share, here = place - index, self.levels[index]
        above = self.levels[jnp.minimum(index + 1, steps - 1)]
        return jnp.where(share > 0, here + share * (above - here), here)

    def alpha(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(self.log_snr(t)))

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(-self.log_snr(t)))

    def times(self, steps: int) -> Array:
        levels = self.levels.shape[0]
        if checks.at_least("steps", steps, 1) > levels:
            raise ValueError(f"this schedule has {levels} noise levels; steps must be at most that, got {steps}")
        if self.spacing == "leading":
            return leading_times(steps, levels, offset=self.offset)
        return (trailing_times if self.spacing == "trailing" else linspace_times)(steps, levels)


def linear_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> LinearVP:
    """Build the linear variance-preserving schedule, beta(t) = beta_min + (beta_max - beta_min) t (arXiv 2011.13456).

    log alpha(t) = -(beta_min t + (beta_max - beta_min) t^2 / 2) / 2,  sigma^2 = 1 - alpha^2.

    Args:
      beta_min, beta_max: rates at t = 0 and t = 1, positive, per unit of time. The defaults are DDPM's 1,000 steps in
        continuous time.

    Returns:
      The schedule.

    Raises:
      ValueError: for a rate that is not positive.

    Example:
      >>> import rgdiff
      >>> round(float(rgdiff.schedules.linear_vp().alpha(1.0)), 4)  # exp(-5.025)
      0.0066
    """
    return LinearVP(checks.positive("beta_min", beta_min), checks.positive("beta_max", beta_max))


def cosine_vp() -> CosineVP:
    """Build the cosine variance-preserving schedule, alpha(t) = cos(pi/2 t) (arXiv 2102.09672 without its offset).

    Returns:
      The schedule. Its grids begin at t = 0.992, since alpha(1) = 0.

    Example:
      >>> import rgdiff
      >>> schedule = rgdiff.schedules.cosine_vp()
      >>> print(f"{schedule.alpha(0.5):.4f} {schedule.sigma(0.5):.4f}")
      0.7071 0.7071
    """
    return CosineVP()


def karras_ve(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> KarrasVE:
    """Build EDM's variance-exploding schedule: alpha = 1 and sigma(t)^(1/rho) linear in t (arXiv 2206.00364, eq. 5).

    Args:
      sigma_min, sigma_max: sigma at t = 0 and t = 1, in data units, 0 < sigma_min < sigma_max.
      rho: exponent, positive; a larger one puts more of the grid near the data.

    Returns:
      The schedule.

    Raises:
      ValueError: for a number that is not positive, or sigma_min >= sigma_max.

    Example:
      >>> import rgdiff
      >>> schedule = rgdiff.schedules.karras_ve()
      >>> print(f"{schedule.sigma(0.0):.3f} {schedule.sigma(1.0):.3f}")
      0.002 80.000
    """
    return KarrasVE(*_rising(sigma_min, sigma_max), checks.positive("rho", rho))


def geometric_ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> GeometricVE:
    """Build the geometric variance-exploding schedule: alpha = 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t (arXiv 2011.13456).

    It is the limit of `karras_ve` as rho grows. The score-based models of Song et al. are trained on it, and GDSS's graphs.

    Args:
      sigma_min, sigma_max: sigma at t = 0 and t = 1, in data units, 0 < sigma_min < sigma_max.

    Returns:
      The schedule.

    Raises:
      ValueError: for a number that is not positive, or sigma_min >= sigma_max.

    Example:
      >>> import rgdiff
      >>> schedule = rgdiff.schedules.geometric_ve(0.25, 1.0)
      >>> print(f"{schedule.sigma(0.0):.3f} {schedule.sigma(0.5):.3f} {schedule.sigma(1.0):.3f}")
      0.250 0.500 1.000
    """
    return GeometricVE(*_rising(sigma_min, sigma_max))


def _rising(sigma_min: float, sigma_max: float) -> tuple[Array, Array]:
    low, high = checks.positive("sigma_min", sigma_min), checks.positive("sigma_max", sigma_max)
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")
    return low, high


def flow(shift: float = 1.0, *, last: float | None = None) -> Flow:
    """Build the rectified-flow schedule, x_t = (1 - t) x0 + t eps (arXiv 2209.03003, 2210.02747).

    Args:
      shift: of its grids towards noise, s -> shift s / (1 + (shift - 1) s) (Stable Diffusion 3, arXiv 2403.03206, eq. 23); 1 for none.
      last: the last of a grid's even times before the shift; 1/n for n times by default.

    Returns:
      The schedule.

    Raises:
      ValueError: for a shift that is not positive, or a last time outside (0, 1).

    Example:
      >>> import rgdiff
      >>> schedule = rgdiff.schedules.flow()
      >>> print(schedule.alpha(0.25), schedule.sigma(0.25))
      0.75 0.25
      >>> print(rgdiff.schedules.flow(shift=3.0).times(4).round(4))
      [1.   0.9  0.75 0.5 ]
    """
    checks.positive("shift", shift)
    if last is not None and not 0 < last < 1:
        raise ValueError(f"last is a time in (0, 1), got {last!r}")
    return Flow(float(shift), None if last is None else float(last))


def shifted(sigma: Any, shift: float) -> Any:
    """Return flow times moved towards noise: shift s / (1 + (shift - 1) s) (Stable Diffusion 3, arXiv 2403.03206, eq. 23).

    Args:
      sigma: times in [0, 1], any shape.
      shift: positive; 1 changes nothing. Dynamic shifting by mu is shift = exp(mu).

    Example:
      >>> import rgdiff
      >>> rgdiff.schedules.shifted(0.5, 3.0)
      0.75
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


SPACINGS = ("trailing", "leading", "linspace")


def tabulated(alpha_bar: Any, *, spacing: str = "trailing", offset: int = 0) -> Tabulated:
    """Build the variance-preserving schedule of a discrete chain from its cumulative products alpha_bar.

    x_t = sqrt(alpha_bar_i) x0 + sqrt(1 - alpha_bar_i) eps at t = (i + 1) / T. With eta = 1 the reverse kernels on its
    whole grid, `times(T)`, are DDPM's with the posterior variance, and the projection is its last, noiseless step.

    Args:
      alpha_bar: [T], strictly decreasing in (0, 1); the last may be 0 (zero terminal SNR, arXiv 2305.08891). There a prediction
        of x0 or v determines x0, and one of eps does not.
      spacing: of its grids, `times(n)`: trailing, leading or linspace (see the functions of these names).
      offset: of leading grids, in levels.

    Returns:
      The schedule; between two levels log_snr is linear in t.

    Raises:
      ValueError: for anything else.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> schedule = rgdiff.schedules.tabulated([0.9, 0.5, 0.1])
      >>> [round(float(a) ** 2, 3) for a in schedule.alpha(jnp.array([1, 2, 3]) / 3)]
      [0.9, 0.5, 0.1]
    """
    table = np.asarray(alpha_bar, np.float64)
    if table.ndim != 1 or not len(table) or not (np.diff(table, prepend=1.0) < 0).all() or table[-1] < 0:
        raise ValueError("alpha_bar must be a vector that decreases strictly below 1 to no less than 0, noise last")
    checks.one_of("spacing", spacing, SPACINGS)
    with np.errstate(divide="ignore"):
        levels = jnp.asarray(np.log(table) - np.log1p(-table), jnp.float32)
    return Tabulated(levels, spacing, checks.at_least("offset", offset, 0))


def zero_terminal_snr(alpha_bar: Any) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that its last entry is 0 and its first is unchanged (arXiv 2305.08891, algorithm 1).

    Args:
      alpha_bar: [T], cumulative products, decreasing.

    Returns:
      The new alpha_bar [T], for `tabulated`.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.schedules.zero_terminal_snr([0.81, 0.36, 0.09]).round(4))
      [0.81   0.2025 0.    ]
    """
    root = np.sqrt(np.asarray(alpha_bar, np.float64))
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def cosine_ddpm(steps: int = 1000, *, offset: float = 0.008, largest: float = 0.999) -> Tabulated:
    """Build the cosine schedule of improved DDPM, discrete: alpha_bar_i = prod (1 - min(beta, largest)) (arXiv 2102.09672, eq. 17).

    Args:
      steps: T, number of noise levels.
      offset: s of alpha_bar(u) = cos^2((u + s) / (1 + s) pi/2), up to a constant.
      largest: the largest beta.

    Returns:
      The schedule.

    Raises:
      ValueError: for fewer than one level.

    Example:
      >>> import rgdiff
      >>> print(f"{rgdiff.schedules.cosine_ddpm().alpha(0.5) ** 2:.3f}")  # cos^2(0.7916) / cos^2(0.0125)
      0.494
    """
    u = np.arange(checks.at_least("steps", steps, 1) + 1) / steps
    curve = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return tabulated(np.cumprod(1 - np.minimum(1 - curve[1:] / curve[:-1], largest)))


# ---------------------------------------------------------------- grids


def trailing_times(steps: int, levels: int = 1000) -> Array:
    """Return evenly spaced times from the last level on: T, T - T/n, ..., T/n over T, rounded (arXiv 2305.08891, table 2).

    `tabulated(...).times(steps)` is this grid. The projection spans one ordinary step.

    Args:
      steps: n, network calls; all but the last are moves.
      levels: T of the discrete chain that the network was trained on; level i = 1 ... T is at t = i/T.

    Returns:
      Times [n], decreasing.

    Raises:
      ValueError: for n outside 1 ... T.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.schedules.trailing_times(4))
      [1.   0.75 0.5  0.25]
    """
    return _at(np.linspace(levels, levels / _calls(steps, levels), steps), levels)


def leading_times(steps: int, levels: int = 1000, *, offset: int = 0) -> Array:
    """Return DDIM's and PNDM's spacing: 1 + (n - 1) k, ..., 1 + k, 1 over T with k = floor(T/n) (arXiv 2305.08891, table 2).

    The last level is left out, as in the released code: chains begin where part of the data is left, and are begun with noise.

    Args:
      steps: n, network calls; all but the last are moves.
      levels: T of the discrete chain that the network was trained on; level i = 1 ... T is at t = i/T.
      offset: added to every level; 1 in Stable Diffusion (diffusers' `steps_offset`).

    Returns:
      Times [n], decreasing.

    Raises:
      ValueError: for n outside 1 ... T, or an offset that leads beyond the last level.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.schedules.leading_times(4))
      [0.751 0.501 0.251 0.001]
    """
    first = 1 + (_calls(steps, levels) - 1) * (levels // steps) + checks.at_least("offset", offset, 0)
    if first > levels:
        raise ValueError(f"offset must leave the first of the steps among the {levels} levels, got {offset}")
    return _at(first - np.arange(steps) * (levels // steps), levels)


def linspace_times(steps: int, levels: int = 1000) -> Array:
    """Return improved DDPM's spacing: n levels from T to 1, even and rounded, over T (arXiv 2305.08891, table 2).

    DPM-Solver takes n + 1 of them without the last: `linspace_times(n + 1)[:-1]`.

    Args:
      steps: n, network calls; all but the last are moves.
      levels: T of the discrete chain that the network was trained on; level i = 1 ... T is at t = i/T.

    Returns:
      Times [n], decreasing.

    Raises:
      ValueError: for n outside 1 ... T.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.schedules.linspace_times(4))
      [1.    0.667 0.334 0.001]
    """
    return _at(1 + np.rint(np.linspace(levels - 1, 0, _calls(steps, levels))), levels)


def karras_times(
    schedule: GaussianSchedule,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Return the times at which (sigma / alpha)^(1/rho) decreases evenly: EDM's grid on any schedule (arXiv 2206.00364, eq. 5).

    Args:
      schedule: a Gaussian schedule; the times are those at which sigma(t) / alpha(t) has the wanted values.
      steps: n, number of times, at least 2.
      rho: exponent, positive; 7 in the paper.
      sigma_min, sigma_max: sigma / alpha at the last and the first time. By default those of t = 0 and t = 1; of 0.001 where no
        noise is left at 0, of 0.999 where no data is left at 1.

    Returns:
      Times [n], decreasing.

    Raises:
      ValueError: for levels that the schedule does not reach.

    Note:
      With `tabulated` the times lie between its levels, where log_snr is linear in t.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.schedules.karras_times(rgdiff.schedules.karras_ve(), 3).round(3))  # linear in t by construction
      [1.  0.5 0. ]
    """
    checks.schedule(schedule, "karras_times")
    checks.positive("rho", rho)
    level = lambda t: np.asarray(checks.log_snr(schedule, jnp.asarray(t, jnp.float32)), np.float64)  # noqa: E731
    noise, data = level(1.0), level(0.0)
    least = np.exp(-0.5 * (data if np.isfinite(data) else level(1e-3))) if sigma_min is None else sigma_min
    most = np.exp(-0.5 * (noise if np.isfinite(noise) else level(0.999))) if sigma_max is None else sigma_max
    low, high = np.exp(-0.5 * data), np.exp(-0.5 * noise)
    if not (0 < least < most < np.inf and low * (1 - 1e-5) <= least and most <= high * (1 + 1e-5)):
        raise ValueError(
            f"sigma_min < sigma_max must lie within the schedule's sigma / alpha, {low:.4g} to {high:.4g}, got {least:.4g} and {most:.4g}"
        )
    share = np.linspace(0.0, 1.0, checks.at_least("steps", steps, 2))
    sigma = (most ** (1 / rho) + share * (least ** (1 / rho) - most ** (1 / rho))) ** rho
    wanted = np.clip(np.float32(-2 * np.log(sigma)), noise, data)
    early, late = np.zeros(steps), np.ones(steps)  # the largest time with as little noise, by bisection
    for _ in range(40):
        middle = 0.5 * (early + late)
        below = level(middle) >= wanted
        early, late = np.where(below, middle, early), np.where(below, late, middle)
    return jnp.asarray(np.where(noise >= wanted, 1.0, early), jnp.float32)


def _calls(steps: int, levels: int) -> int:
    if checks.at_least("steps", steps, 1) > checks.at_least("levels", levels, 1):
        raise ValueError(f"a chain of {levels} noise levels has at most that many steps, got {steps}")
    return steps


def _at(places: np.ndarray, levels: int) -> Array:
    return jnp.asarray(np.rint(places) / levels, jnp.float32)


@pytree
class LogLinearMask:
    """A token is masked with probability t (MDLM's log-linear schedule, arXiv 2406.07524, without its 1e-3 offset)."""

    def rate(self, t: Array) -> Array:
        return jnp.asarray(t, jnp.float32)

    def hazard(self, t: Array) -> Array:
        return 1 / jnp.asarray(t, jnp.float32)


@pytree
class CosineMask:
    """A token is masked with probability 1 - cos(pi/2 t): late steps unmask fewer tokens (arXiv 2406.04329)."""

    def rate(self, t: Array) -> Array:
        return 2 * jnp.sin(0.25 * math.pi * jnp.asarray(t, jnp.float32)) ** 2

    def hazard(self, t: Array) -> Array:
        return 0.5 * math.pi / jnp.tan(0.25 * math.pi * jnp.asarray(t, jnp.float32))


def log_linear_mask() -> LogLinearMask:
    """Build the log-linear mask schedule, rate(t) = t (MDLM, arXiv 2406.07524, without its 1e-3 offset).

    Returns:
      The schedule.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.schedules.log_linear_mask().rate(0.25))
      0.25
    """
    return LogLinearMask()


def cosine_mask() -> CosineMask:
    """Build the cosine mask schedule, rate(t) = 1 - cos(pi/2 t): late steps unmask fewer tokens (arXiv 2406.04329).

    Returns:
      The schedule.

    Example:
      >>> import rgdiff
      >>> print(f"{rgdiff.schedules.cosine_mask().rate(0.5):.4f}")  # 1 - cos(pi/4)
      0.2929
    """
    return CosineMask()
