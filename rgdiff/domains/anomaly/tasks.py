"""The task of runs that detect anomalies, which have no reward of their own."""

from __future__ import annotations

import jax.numpy as jnp

from rgdiff.rewards import Task
from rgdiff.typing import Array, Cond, pytree


@pytree
class Typicality:
    """r(x) = -|x|^2 / 2: near the mean of the scaled data is better."""

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return -0.5 * jnp.sum(x0.reshape(x0.shape[0], -1) ** 2, -1)


def typicality() -> Task:
    """Make the task of a run that has no reward: minus half the squared distance from the mean.

    Returns:
      The task.
    """
    return Task(Typicality(), Typicality())
