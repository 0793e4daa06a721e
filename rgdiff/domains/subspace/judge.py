"""Tasks on the gradient-guidance paper's worlds, and their judge: what `reward/*.yaml` name, and how samples are measured.

A task carries the measure of how far samples lie off the data's support, which every method that reports per round
records beside the reward.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rgdiff import metrics
from rgdiff.domains.judging import BaseJudge
from rgdiff.rewards import Task


class VectorJudge(BaseJudge):
    """Measures samples of a vector domain; every reward judges itself, the data's support is the held-out criterion."""

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method: rewards, where in space its samples lie, cost."""
        row = metrics.summarize_rewards(self.rewards(task.reward, outcome.x0), outcome.lineages)
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
