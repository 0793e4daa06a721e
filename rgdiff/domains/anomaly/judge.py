"""The judge of anomaly detection: detectors measure themselves, and their figures are AUROCs."""

from __future__ import annotations

from typing import Any

import numpy as np

from rgdiff.domains import drawing
from rgdiff.domains.anomaly.data import AnomalyDomain
from rgdiff.domains.judging import BaseJudge
from rgdiff.rewards import Task


class AnomalyJudge(BaseJudge):
    """Hands on what detectors measured of themselves: their figures are AUROCs."""

    pictured = False  # detectors have no samples

    domain: AnomalyDomain

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        return self.costs(outcome)

    def scores(self, x0: np.ndarray, task: Task) -> None:
        return None

    def show_each(self, x0: np.ndarray) -> Any:
        """Return digits as pictures of their differences from the mean digit, and rows of a table as bars."""
        if self.domain.source != "digits":
            return drawing.bars(x0, 3.0)
        return np.rint(np.clip(127.5 + 127.5 * x0 / 3, 0, 255)).astype(np.uint8).reshape(-1, 8, 8, 1)

    def references(self, task: Task) -> dict[str, np.ndarray]:
        """Return normal and anomalous examples of the first problem."""
        problem = self.domain.problems(0)[0]
        name, seen = problem.name.replace("_", " "), "as differences from the mean"
        if self.domain.source == "digits":
            normal, anomalous = f"normal: every other than {name}, {seen}", f"anomalous: {name}, held out, {seen}"
        else:
            normal, anomalous = f"normal examples of {name}, {seen}", f"anomalous examples of {name}, {seen}"
        return {normal: problem.normal, anomalous: problem.anomalous}

    def curves(self, rows: Any) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """Return the AUROC of every digit held out."""
        if self.domain.source != "digits" or len(self.domain.digits) < 2:
            return {}
        digits = list(self.domain.digits)
        of = {k: [row.get(f"auroc_digit_{d}") for d in digits] for k, row in rows.items()}
        return {"AUROC, by the digit held out": ("digit held out", "AUROC (1/2 is chance)", {
            key: (digits, values) for key, values in of.items() if None not in values
        })}  # fmt: skip

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            "auroc: how often an anomalous example scores above a normal one, both unseen in training; mean and standard deviation "
            "over seeds, and for tables over as many splits; auroc_mean: over problems and seeds. prior: the distance from the mean.",
        ]
