"""How samples of molecules are measured and drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from rgdiff import metrics
from rgdiff.domains.judging import BaseJudge
from rgdiff.domains.molecules import chemistry
from rgdiff.domains.molecules.data import MoleculeDomain
from rgdiff.rewards import Task

REPORTED = ("qed", "sa", "logp")  # medians of these are in the table


class MoleculeJudge(BaseJudge):
    """Measures graphs as molecules: validity before and after correction, uniqueness, novelty, diversity and properties."""

    domain: MoleculeDomain

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method, flat."""
        found = chemistry.molecules(outcome.x0, self.domain.elements)
        row: dict[str, Any] = chemistry.figures(found, self.domain.known)
        smiles = [one.smiles for one in found if one.smiles is not None]
        for name in REPORTED:
            values = [chemistry.measured(name, one) for one in smiles]
            row[f"{name}_median"] = float(np.nanmedian(values)) if values else float("nan")
        return row | self.reward_figures(outcome.x0, task, outcome.lineages) | self.costs(outcome)

    def spread(self, outcome: Any, task: Task) -> dict[str, float]:
        """Return the standard errors of the prior's validity; a fall of it calls a method over-optimised."""
        found = chemistry.molecules(outcome.x0, self.domain.elements)
        valid = np.mean([one.valid for one in found])
        return {"kl": 0.0, "valid": metrics.share_error(float(valid), len(found))}

    def show_each(self, x0: np.ndarray) -> list[str]:
        """Return drawings as SVG texts."""
        return [chemistry.drawn(one.smiles) for one in chemistry.molecules(x0, self.domain.elements)]

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            "Valid: the share of graphs whose valences are possible as they came; corrected: the share that are molecules once bonds "
            "are lowered until they are. Rewards are of corrected molecules (the largest fragment), held-out rewards of "
            "those alone that were valid. SA is (10 - SA) / 9, higher is easier. Diversity: 1 - mean Tanimoto similarity (ECFP4)."
        ]
