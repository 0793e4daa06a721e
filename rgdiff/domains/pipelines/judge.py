"""How samples of a released pipeline are measured and shown: under both rewards, by the diversity of their pictures, prompt by prompt."""

from __future__ import annotations

from typing import Any

import numpy as np

from rgdiff import metrics
from rgdiff.domains.judging import BaseJudge
from rgdiff.rewards import Task


class PipelineJudge(BaseJudge):
    """Measures samples of a pipeline domain by their pictures."""

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method: rewards under both rewards, diversity of pictures, path KL, cost."""
        pictures = self.domain.pixels(outcome.x0)
        row = self.reward_figures(outcome.x0, task, outcome.lineages)
        if names := names_of(prior):
            held = self.rewards(task.heldout, outcome.x0)
            for number, name in enumerate(names):
                row[f"heldout_reward, {name}"] = float(np.nanmean(held[number :: len(names)]))
        return row | {"diversity": metrics.diversity(pictures)} | self.costs(outcome)

    def spread(self, outcome: Any, task: Task) -> dict[str, float]:
        """Return the standard errors of the prior's figures."""
        pictures = self.domain.pixels(outcome.x0)
        if len(pictures) < 8:  # nobody is called by so few
            return {"kl": 0.0}
        return {"kl": 0.0, "diversity": metrics.jackknife(metrics.diversity, pictures)}

    def show_each(self, x0: np.ndarray) -> np.ndarray:
        """Return 8-bit pictures."""
        return self.domain.decode(x0)

    def rows_of(self, count: int, task: Task, prior: Any) -> dict[str, range]:
        """Return the places of each prompt's samples."""
        names = names_of(prior)
        return {name: range(number, count, len(names)) for number, name in enumerate(names)}

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            "Diversity: mean distance between two samples' pictures. Path KL of tuned models: that of their ancestral chain."
        ]


def names_of(prior: Any) -> list[str]:
    """Return the prompts or labels that samples take in turn, where they are several."""
    names = getattr(getattr(prior, "settings", None), "names", [])
    return names if len(names) > 1 else []
