"""Tasks on the plane, and their judge: what `reward/*.yaml` name, and how samples are measured and shown.

Samples stand beside fresh data of the domain: sliced Wasserstein-2 distance, mean log density, pictures as densities of
points. `field` draws functions on the plane, for methods that hand over pictures of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import metrics
from rgdiff.domains.drawing import PIXELS, Plane, cloud
from rgdiff.domains.judging import BaseJudge
from rgdiff.domains.planar.data import EXTENT, Curve, PlanarDomain
from rgdiff.rewards import Task
from rgdiff.typing import Array

DRAWS = 3  # of data that samples are compared with
MARGIN = 1.15  # of the square that a picture shows, over that which holds the set
HALF = MARGIN * EXTENT
COLORS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float64)  # viridis
_log_prob = jax.jit(lambda law, x: law.log_prob(x))


class PlanarJudge(BaseJudge):
    """Measures samples of a planar domain against as many fresh points of its law."""

    domain: PlanarDomain

    def fresh(self, count: int, again: int = 0) -> np.ndarray:
        """Draw data [count, 2] that nothing was trained on."""
        return np.asarray(self.domain.data(jax.random.fold_in(self._key, again), count))

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method: distance to the data, log density, rewards, cost."""
        x0 = np.asarray(outcome.x0)
        finite = x0[np.isfinite(x0).all(-1)]
        row: dict[str, Any] = {"not_finite": len(x0) - len(finite)}
        if len(finite):
            distances = [metrics.sliced_wasserstein(self.fresh(len(x0), i), finite) for i in range(DRAWS)]
            row["sliced_w2"] = float(np.mean(distances))
            density = np.asarray(_log_prob(self.domain.law, jnp.asarray(finite)))
            row["log_density"] = float(density.mean()) if np.isfinite(density).all() else float("nan")
            row["in_support"] = float(np.mean(np.isfinite(density)))
            if isinstance(self.domain.law, Curve):
                row["off_curve"] = float(jnp.mean(self.domain.law.distance(jnp.asarray(finite))))
        return row | self.reward_figures(x0, task, outcome.lineages) | self.costs(outcome)

    def spread(self, outcome: Any, task: Task) -> dict[str, float]:
        """Return the standard error of the prior's share of samples in the data's support."""
        x0 = np.asarray(outcome.x0)
        inside = np.isfinite(np.asarray(_log_prob(self.domain.law, jnp.asarray(x0))))
        return {"kl": 0.0, "in_support": metrics.share_error(float(inside.mean()), len(x0))}

    def show_all(self, samples: Mapping[Any, np.ndarray], task: Task) -> dict[Any, Plane]:
        """Return sets of samples as densities of points; how many lie outside the square is said."""
        shown, half = {}, MARGIN * self.domain.extent
        for name, x0 in samples.items():
            beyond = float(np.mean(~(np.abs(np.asarray(x0)) <= half).all(-1)))
            label = (
                f"first coordinate ({beyond:.1%} of the samples lie outside)" if beyond >= 5e-4 else "first coordinate"
            )
            shown[name] = Plane(dots(x0, half), (-half, half, -half, half), np.asarray(x0), label, "second coordinate")
        return shown

    def references(self, task: Task) -> dict[str, np.ndarray]:
        """Return fresh data."""
        return {f"data: {self.domain.name}": self.fresh(10_000)}

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        pairs = [(self.fresh(10_000, i), self.fresh(10_000, j)) for i, j in ((0, 1), (0, 2), (1, 2))]
        floor = np.mean([metrics.sliced_wasserstein(a, b) for a, b in pairs])
        return [
            f"sliced_w2: sliced 2-Wasserstein distance to as many fresh points of the data, mean of {DRAWS} draws, 1,000 projections; it "
            f"does not reach 0: sets of 10,000 points of the data themselves are {floor:.3f} apart. log_density: mean of log "
            "p(x) over samples, nats; in_support: share of samples where p(x) > 0.",
        ]


def dots(x: np.ndarray, half: float = HALF) -> np.ndarray:
    """Draw points [N, 2] of [-half, half]^2 as a gray picture [PIXELS, PIXELS, 1], darker where they are denser."""
    return cloud(x, (-half, half, -half, half))


def field(function: Callable[[Array], Array], low: float = 0.0, high: float = 0.9, half: float = HALF) -> np.ndarray:
    """Draw a function [N, 2] -> [N] on [-half, half]^2 as [PIXELS, PIXELS, 3]: its quantile `low` is dark, its quantile `high` yellow."""
    side = (np.arange(PIXELS) + 0.5) / PIXELS * 2 * half - half
    x, y = np.meshgrid(side, side[::-1])
    values = np.asarray(function(jnp.asarray(np.stack([x, y], -1).reshape(-1, 2), jnp.float32)), np.float64)
    finite = values[np.isfinite(values)]
    bottom, top = np.quantile(finite, [low, high]) if len(finite) else (0.0, 1.0)
    level = np.clip(
        (np.nan_to_num(values, nan=top, posinf=top, neginf=bottom) - bottom) / max(top - bottom, 1e-12), 0, 1
    )
    anchors = np.linspace(0, 1, len(COLORS))
    rgb = np.stack([np.interp(level, anchors, COLORS[:, c]) for c in range(3)], -1)
    return np.rint(rgb).astype(np.uint8).reshape(PIXELS, PIXELS, 3)
