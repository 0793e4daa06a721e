"""The judge of anomaly detection: detectors measure themselves, and their figures are AUROCs."""

from __future__ import annotations

from typing import Any

import numpy as np

from rgdiff.domains.judging import BaseJudge
from rgdiff.rewards import Task


class AnomalyJudge(BaseJudge):
    """Hands on what detectors measured of themselves: their figures are AUROCs."""

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        return self.costs(outcome)

    def histograms(self, outcomes: Any, task: Task, prior: Any) -> list[tuple[str, np.ndarray, Any]]:
        return []

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            "auroc: how often an anomalous example scores above a normal one, both unseen in training; mean and standard deviation "
            "over seeds, and for tables over as many splits; auroc_mean: over problems and seeds. prior: the distance from the mean.",
        ]
