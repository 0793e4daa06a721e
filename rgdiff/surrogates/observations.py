"""Answers of an expensive oracle so far, in arrays of a fixed size, so that a refit is the same program in every round.

A slot is empty, answered or infeasible. Every fit of a model weighs the rows by `answered`: empty slots never count,
infeasible ones never enter a fit of the reward.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rgdiff import checks
from rgdiff.typing import Array, State

EMPTY, ANSWERED, INFEASIBLE = 0, 1, 2


class Observations(NamedTuple):
    """Queries x0 [N, ...], answers y [N] in the reward's unit, and the status of each slot [N], int32: 0 empty, 1 answered, 2 infeasible.

    Args:
      x0: queries, a pytree of leaves [N, ...].
      y: answers [N], reward's unit; 0 where there is none.
      status: [N] int32.
    """

    x0: State
    y: Array
    status: Array

    @property
    def answered(self) -> Array:
        """Where there is an answer, [N] bool."""
        return self.status == ANSWERED

    @property
    def infeasible(self) -> Array:
        """Where a query had no answer because it was infeasible, [N] bool."""
        return self.status == INFEASIBLE

    @property
    def values(self) -> Array:
        """The answers, 0 where there is none, [N]."""
        return jnp.where(self.answered, self.y, 0.0)

    @property
    def mean(self) -> Array:
        """Mean answer; 0 before the first."""
        return jnp.sum(self.values) / jnp.maximum(jnp.sum(self.answered), 1)

    @property
    def std(self) -> Array:
        """Standard deviation of the answers; 1 where they do not differ."""
        square = jnp.sum(jnp.where(self.answered, (self.y - self.mean) ** 2, 0.0))
        spread = jnp.sqrt(square / jnp.maximum(jnp.sum(self.answered), 1))
        return jnp.where(spread > 0, spread, 1.0)


def empty(like: State, capacity: int) -> Observations:
    """Return empty slots for states like these.

    Args:
      like: states, or their shapes, a pytree of leaves [B, ...] of any B.
      capacity: N, the number of slots.

    Returns:
      Observations with N empty slots.

    Raises:
      ValueError: for a capacity below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> print(surrogates.empty(jnp.zeros((1, 3)), 8).x0.shape)
      (8, 3)
    """
    capacity = checks.at_least("capacity", capacity, 1)
    slots = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), like)
    return Observations(slots, jnp.zeros(capacity, jnp.float32), jnp.zeros(capacity, jnp.int32))


def append(observations: Observations, count: Array | int, x0: State, values: Array) -> Observations:
    """Write B answers into the slots from `count` on; a value that is not finite marks an infeasible query.

    Args:
      observations: N slots.
      count: number of slots in use, an int or a traced integer.
      x0: queries [B, ...].
      values: answers [B] in the reward's unit.

    Returns:
      The new observations.

    Raises:
      ValueError: for answers that do not fit in; where `count` is traced, those beyond the last slot are dropped.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> slots = surrogates.empty(jnp.zeros((1, 1)), 4)
      >>> print(surrogates.append(slots, 0, jnp.ones((2, 1)), jnp.array([0.5, jnp.nan])).status)
      [1 2 0 0]
    """
    values = jnp.asarray(values, jnp.float32)
    checks.shape("values", values, (jax.tree.leaves(x0)[0].shape[0],))
    size, capacity = values.shape[0], observations.y.shape[0]
    if not isinstance(count, Tracer) and int(count) + size > capacity:
        raise ValueError(
            f"{int(count)} + {size} answers do not fit into {capacity} slots; make a larger capacity with empty()"
        )
    place = count + jnp.arange(size)
    write = lambda slots, new: slots.at[place].set(new.astype(slots.dtype), mode="drop")  # noqa: E731
    known = jnp.isfinite(values)
    return Observations(
        jax.tree.map(write, observations.x0, x0),
        write(observations.y, jnp.where(known, values, 0.0)),
        write(observations.status, jnp.where(known, ANSWERED, INFEASIBLE)),
    )
