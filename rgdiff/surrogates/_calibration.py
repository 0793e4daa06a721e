"""Calibration of a belief's deviations: the share of held-out answers within its intervals, beside the nominal one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff.typing import Array, Cond, State


class Coverage(NamedTuple):
    """Coverage of a central interval.

    Args:
      fraction: share of held-out answers within it.
      width: its mean width, reward's unit.
    """

    fraction: Array
    width: Array


def coverage(
    belief: Any, x0: State, y: Array, level: float = 0.95, *, noise: float | Array = 0.0, cond: Cond = None
) -> Coverage:
    """Return the share of held-out answers within mean +- z sqrt(deviation^2 + noise^2), z the normal quantile of the level.

    Args:
      belief: of any surrogate.
      x0: held-out samples [B, ...].
      y: their answers [B], reward's unit; NaN (infeasible) is left out.
      level: nominal share in (0, 1).
      noise: standard deviation of an answer given x0. 0 where y are noiseless: a belief's deviation is that of the reward.
      cond: conditions [B, ...], or None.

    Returns:
      Coverage: fraction, and width, the interval's mean width in the reward's unit; both NaN without an answer.

    Raises:
      ValueError: for a level outside (0, 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [0.0], [1.0]]), jnp.array([-2.0, 0.0, 2.0])  # y = 2 x
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> belief = surrogates.ridge(surrogates.flatten).fit(jax.random.key(0), observations)
      >>> print(surrogates.coverage(belief, x0, y).fraction)
      1.0
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be a share in (0, 1), got {level!r}")
    return _coverage(belief, x0, jnp.asarray(y, jnp.float32), jnp.float32(level), jnp.float32(noise), cond)


@jax.jit
def _coverage(belief: Any, x0: State, y: Array, level: Array, noise: Array, cond: Cond) -> Coverage:
    known = jnp.isfinite(y)
    half = jax.scipy.stats.norm.ppf(0.5 + level / 2) * jnp.sqrt(belief.std(x0, cond) ** 2 + noise**2)
    inside = jnp.abs(y - belief.mean(x0, cond)) <= half
    mean = lambda values: jnp.sum(jnp.where(known, values, 0.0)) / jnp.sum(known)  # noqa: E731
    return Coverage(mean(inside), mean(2 * half))


def calibration(
    belief: Any,
    x0: State,
    y: Array,
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
    *,
    noise: float | Array = 0.0,
    cond: Cond = None,
) -> list[dict[str, float]]:
    """Return the coverage at several nominal levels.

    Args:
      belief: of any surrogate.
      x0: held-out samples [B, ...].
      y: their answers [B], reward's unit; NaN (infeasible) is left out.
      levels: nominal shares in (0, 1).
      noise: standard deviation of an answer given x0, reward's unit.
      cond: conditions [B, ...], or None.

    Returns:
      A row {"level", "fraction", "width"} for every level; see `coverage`.

    Raises:
      ValueError: for a level outside (0, 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [0.0], [1.0]]), jnp.array([-2.0, 0.0, 2.0])  # y = 2 x
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> belief = surrogates.ridge(surrogates.flatten).fit(jax.random.key(0), observations)
      >>> print([row["level"] for row in surrogates.calibration(belief, x0, y, [0.5, 0.9])])
      [0.5, 0.9]
    """
    rows = [(level, coverage(belief, x0, y, level, noise=noise, cond=cond)) for level in levels]
    return [{"level": float(level), "fraction": float(c.fraction), "width": float(c.width)} for level, c in rows]
