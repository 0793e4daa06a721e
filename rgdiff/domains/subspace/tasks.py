"""Rewards and tasks on the gradient-guidance paper's worlds (arXiv 2404.14743): what `reward/*.yaml` name.

A task carries the measure of how far samples lie off the data's support.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from rgdiff import checks
from rgdiff.domains.subspace.data import VectorDomain
from rgdiff.rewards import Task
from rgdiff.typing import Array, Cond, Reward, pytree

if TYPE_CHECKING:
    pass


@pytree
class Parabola:
    """r(x) = peak - (theta . x - at)^2."""

    theta: Array
    peak: Array
    at: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.peak - (x0 @ self.theta - self.at) ** 2


@pytree
class Nearness:
    """r(x) = peak - |x - b| / 2."""

    centre: Array
    peak: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.peak - 0.5 * jnp.linalg.norm(x0 - self.centre, axis=-1)


@pytree
class Along:
    """r(x) = theta . x."""

    theta: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return x0 @ self.theta


def _constant(domain: VectorDomain, name: str) -> Any:
    if not hasattr(domain, "constants"):
        raise ValueError("this reward is of the gradient-guidance paper; choose domain=subspace or domain=sphere")
    return jnp.asarray(domain.constants[checks.one_of("reward", name, domain.constants)])


def _task(domain: VectorDomain, reward: Reward, theta: Any) -> Task:
    return Task(reward, reward, measure=domain.measure(theta))


def parabola(domain: VectorDomain, theta: str = "theta_2", peak: float = 10.0, at: float = 3.0) -> Task:
    """Make the task f1: peak - (theta . x - at)^2.

    Args:
      domain: from `linear` or `sphere`.
      theta: name of one of the domain's directions.
      peak: the largest reward.
      at: the best theta . x, in the unit of x.

    Returns:
      The task.

    Raises:
      ValueError: for a name that the domain does not have.
    """
    direction = _constant(domain, theta)
    return _task(domain, Parabola(direction, jnp.float32(peak), jnp.float32(at)), direction)


def nearness(domain: VectorDomain, centre: str = "b_1", peak: float = 5.0) -> Task:
    """Make the task f2: peak - |x - b| / 2; reported with theta the direction of b.

    Args:
      domain: from `linear`.
      centre: name of b, one of the domain's points.
      peak: the largest reward.

    Returns:
      The task.

    Raises:
      ValueError: for a name that the domain does not have.
    """
    b = _constant(domain, centre)
    return _task(domain, Nearness(b, jnp.float32(peak)), b / jnp.linalg.norm(b))


def along(domain: VectorDomain, theta: str = "theta_1") -> Task:
    """Make the task theta . x (the sphere's).

    Args:
      domain: from `linear` or `sphere`.
      theta: name of one of the domain's directions.

    Returns:
      The task.

    Raises:
      ValueError: for a name that the domain does not have.
    """
    direction = _constant(domain, theta)
    return _task(domain, Along(direction), direction)
