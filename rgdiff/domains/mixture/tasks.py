"""The reward and task on the line: what `reward/quadratic.yaml` names."""

from __future__ import annotations

import jax.numpy as jnp

from rgdiff import checks
from rgdiff.rewards import Task
from rgdiff.typing import Array, Cond, pytree


@pytree
class QuadraticReward:
    """r(x) = slope x - curvature x^2 / 2, of states [B, 1]."""

    slope: Array
    curvature: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.slope * x0[:, 0] - 0.5 * self.curvature * x0[:, 0] ** 2


def quadratic(slope: float = -0.6, curvature: float = 0.3) -> Task:
    """Make the task slope x - curvature x^2 / 2 on states [B, 1], evaluated by itself.

    Args:
      slope: reward per unit of x.
      curvature: reward per unit of x squared, >= 0.

    Returns:
      The task.

    Raises:
      ValueError: for a negative curvature.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.domains.mixture import tasks
      >>> print(tasks.quadratic(slope=1.0, curvature=2.0).reward(jnp.array([[3.0]])))  # 3 - 9
      [-6.]
    """
    reward = QuadraticReward(jnp.float32(slope), checks.positive("curvature", curvature, zero=True))
    return Task(reward, reward)
