"""Rewards and tasks on the plane: what `reward/*.yaml` name."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rgdiff import checks
from rgdiff.domains.planar.data import Curve, PlanarDomain, feasible
from rgdiff.rewards import Task
from rgdiff.typing import Array, Cond, pytree


@pytree
class LogDensity:
    """r(x) = log p(x), nats: with temperature 1 a sampler of exp(r) draws from p."""

    law: Any

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.law.log_prob(x0)


@pytree
class Direction:
    """r(x) = slope * u . x, u = (cos angle, sin angle)."""

    angle: Array
    slope: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.slope * (x0[..., 0] * jnp.cos(self.angle) + x0[..., 1] * jnp.sin(self.angle))


def _plane(domain: Any, name: str) -> PlanarDomain:
    if not isinstance(domain, PlanarDomain):
        raise ValueError(f"reward={name} is for points in the plane; choose domain=planar or domain=curve")
    return domain


def log_density(domain: PlanarDomain) -> Task:
    """Make the task log p(x) of the domain's own distribution, in nats: a sampler trained by it needs no data.

    Args:
      domain: from `planar` or `curve`.

    Returns:
      The task.

    Raises:
      ValueError: for another domain.
    """
    reward = LogDensity(_plane(domain, "log_density").law)
    return Task(reward, reward)


def direction(domain: PlanarDomain, angle: float = 0.0, slope: float = 1.0) -> Task:
    """Make the task slope * u . x, u = (cos angle, sin angle).

    Args:
      domain: from `planar` or `curve`.
      angle: of u, in radians.
      slope: reward per unit of length, positive.

    Returns:
      The task.

    Raises:
      ValueError: for another domain, or a slope that is not positive.
    """
    _plane(domain, "direction")
    reward = Direction(jnp.float32(angle), checks.positive("slope", slope))
    return Task(reward, reward)


def leaving(domain: PlanarDomain, angle: float = 0.0, slope: float = 1.0, limit: float = 0.3) -> Task:
    """Make the task slope * u . x of points within `limit` of a curve, infeasible (NaN) beyond; reported with the distance to it.

    Args:
      domain: from `curve`.
      angle: of u, in radians.
      slope: reward per unit of length, positive.
      limit: largest feasible distance to the curve, in the plane's unit.

    Returns:
      The task.

    Raises:
      ValueError: for another domain, or a number that is not positive.
    """
    law = _plane(domain, "leaving").law
    if not isinstance(law, Curve):
        raise ValueError("reward=leaving bounds a reward to the neighbourhood of a curve; choose domain=curve")
    reward = feasible(Direction(jnp.float32(angle), checks.positive("slope", slope)), law, limit)
    return Task(reward, reward, measure=lambda x0: {"off_curve": jnp.mean(law.distance(x0))})
