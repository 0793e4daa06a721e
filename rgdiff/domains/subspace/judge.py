"""The judge of samples in the gradient-guidance paper's worlds: where in space they lie, and how they are drawn."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import metrics
from rgdiff.domains import drawing
from rgdiff.domains.judging import BaseJudge
from rgdiff.domains.subspace.data import VectorDomain
from rgdiff.rewards import Task


class VectorJudge(BaseJudge):
    """Measures samples of a vector domain; every reward judges itself, the data's support is the held-out criterion."""

    domain: VectorDomain

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method: rewards, where in space its samples lie, cost."""
        row = metrics.summarize_rewards(self.rewards(task.reward, outcome.x0), outcome.lineages)
        if task.measure is not None:
            row |= {name: float(value) for name, value in task.measure(jnp.asarray(outcome.x0)).items()}
        return row | {name: cost for name, cost in self.costs(outcome).items() if name != "kl"}

    def show_each(self, x0: np.ndarray) -> list[str]:
        """Return vectors as bars; the edge is at three root mean squares of the data's coordinates."""
        return drawing.bars(x0, 3 * self._scale)

    def show_all(self, samples: Mapping[Any, np.ndarray], task: Task) -> dict[Any, drawing.Plane]:
        """Return each sample's reward against its distance from the data's support, on a common scale."""
        of = {name: self._places(x0, task) for name, x0 in samples.items()}
        every = np.concatenate([*of.values()])
        low, high = (np.quantile(every[np.isfinite(every).all(-1)], q, axis=0) for q in (0.005, 0.995))
        margin = 0.1 * np.maximum(high - low, 1e-3)
        extent = tuple(float(v) for pair in zip(low - margin, high + margin, strict=True) for v in pair)
        labels = ("distance from the data's support", "reward")
        return {name: drawing.Plane(drawing.cloud(x, extent), extent, x, *labels) for name, x in of.items()}  # type: ignore[arg-type]

    def _places(self, x0: np.ndarray, task: Task) -> np.ndarray:
        """Return (distance from the data's support, reward), [N, 2]."""
        away = np.linalg.norm(x0, axis=-1) - 1
        if self.domain.basis is not None:
            basis = np.asarray(self.domain.basis)
            away = np.linalg.norm(x0 - (x0 @ basis.T) @ basis, axis=-1)
        return np.stack([away, self.rewards(task.reward, x0)], -1)

    @functools.cached_property
    def _scale(self) -> float:
        """Root mean square of the data's coordinates."""
        return float(jnp.sqrt(jnp.mean(self.domain.data(jax.random.key(0), 1024) ** 2)))

    def references(self, task: Task) -> dict[str, np.ndarray]:
        """Return fresh data."""
        return {"data": np.asarray(self.domain.data(jax.random.key(1), 1024))}

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            "theta_x: mean of theta . x; theta_x_inside: its part inside the data's support (on the sphere: of x / |x|), "
            "the only part that the data can honour. off_support: mean of |x outside| / |x inside| the subspace; on the "
            "sphere the signed mean of |x| - 1. Bands: from the lowest to the highest seed. published: the authors' "
            "own loop, run with the same score (its source is in the recipe).",
        ]
