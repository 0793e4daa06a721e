"""How samples of RNA that folds are measured and shown."""

from __future__ import annotations

from typing import Any

import numpy as np

from rgdiff.domains.rna import folding
from rgdiff.domains.rna.data import RnaDomain
from rgdiff.domains.sequences.judge import SequenceJudge
from rgdiff.rewards import Task


class FoldingJudge(SequenceJudge):
    """Measures RNA by its fold: free energy, the share that folds into the target, G and C."""

    domain: RnaDomain

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of `SequenceJudge`, and those of the fold."""
        texts = self.domain.decode(outcome.x0)
        folds = [folding.fold(text) for text in texts]
        row = super().row(outcome, task, prior)
        row["folding_energy"] = float(np.mean([one.energy for one in folds]))
        if self.domain.structure:
            row["solved"] = float(np.mean([one.structure == self.domain.structure for one in folds]))
        row["gc"] = float(np.mean([sum(letter in "GC" for letter in text) / len(text) for text in texts]))
        return row

    def show_each(self, x0: np.ndarray) -> list[str]:
        """Return the letters, the structure of least free energy after them."""
        return [f"{text} {folding.fold(text).structure}" for text in self.domain.decode(x0)]

    def references(self, task: Task) -> dict[str, np.ndarray]:
        """Return sequences drawn uniformly."""
        return {"uniform sequences": self.domain.train_x}

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        said = "Structures and energies are ViennaRNA's of least free energy (37 C)."
        target = f" The target is {self.domain.structure}." if self.domain.structure else ""
        return [*super().notes(task), said + target]
