"""Tasks on the gradient-guidance paper's worlds, and their judge: what `reward/*.yaml` name, and how samples are measured.

A task carries the measure of how far samples lie off the data's support, which every method that reports per round
records beside the reward.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rgdiff import checks, metrics
from rgdiff.domains.judging import Judge
from rgdiff.domains.subspace import Along, Nearness, Parabola, VectorDomain
from rgdiff.rewards import Task
from rgdiff.typing import Reward


class VectorJudge(Judge):
    """Measures samples of a vector domain; every reward judges itself, the data's support is the held-out criterion."""

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method: rewards, where in space its samples lie, cost."""
        row = metrics.summarize_rewards(self.rewards(task.reward, outcome.x0))
        if task.measure is not None:
            row |= {name: float(value) for name, value in task.measure(jnp.asarray(outcome.x0)).items()}
        return row | {name: cost for name, cost in self.costs(outcome).items() if name != "kl"}

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            "theta_x: mean of theta . x; theta_x_inside: its part inside the data's support (on the sphere: of x / |x|), "
            "the only part that the data can honour. off_support: mean of |x outside| / |x inside| the subspace; on the "
            "sphere the signed mean of |x| - 1. Bands: from the lowest to the highest seed. published: the authors' "
            "own loop, run with the same score (its source is in the recipe).",
        ]


def _constant(domain: VectorDomain, name: str) -> Any:
    if not hasattr(domain, "constants"):
        raise ValueError("this reward is of the gradient-guidance paper; choose domain=subspace or domain=sphere")
    return jnp.asarray(domain.constants[checks.one_of("reward", name, domain.constants)])


def _task(domain: VectorDomain, reward: Reward, theta: Any) -> Task:
    return Task(reward, reward, measure=domain.measure(theta))


def parabola(domain: VectorDomain, theta: str = "theta_2", peak: float = 10.0, at: float = 3.0) -> Task:
    """Make the task f1: peak - (theta . x - at)^2, theta one of the domain's."""
    direction = _constant(domain, theta)
    return _task(domain, Parabola(direction, jnp.float32(peak), jnp.float32(at)), direction)


def nearness(domain: VectorDomain, centre: str = "b_1", peak: float = 5.0) -> Task:
    """Make the task f2: peak - |x - b| / 2, b one of the domain's; reported as theta: the direction of b."""
    b = _constant(domain, centre)
    return _task(domain, Nearness(b, jnp.float32(peak)), b / jnp.linalg.norm(b))


def along(domain: VectorDomain, theta: str = "theta_1") -> Task:
    """Make the task theta . x (the sphere's)."""
    direction = _constant(domain, theta)
    return _task(domain, Along(direction), direction)
