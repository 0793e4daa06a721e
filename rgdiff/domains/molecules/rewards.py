"""Oracles of molecules as rewards on graphs: black boxes on the host, NaN where there is no molecule."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from rgdiff.domains.molecules import chemistry
from rgdiff.oracles import TextOracle
from rgdiff.typing import Cond


@dataclasses.dataclass(frozen=True)
class MoleculeReward:
    """An oracle asked about the molecules of graphs, for `rewards.from_host`; equal for equal settings, so that nothing recompiles.

    Args:
      oracle: canonical SMILES -> values [B], `properties.smiles_property`, `docking.docking` or one of your own function.
      elements: atomic numbers of the features.
      correct: whether graphs with impossible valences are corrected; else they are infeasible.
    """

    oracle: TextOracle
    elements: tuple[int, ...]
    correct: bool = True

    def __call__(self, x0: Any, cond: Cond = None) -> np.ndarray:
        """Return the oracle's values [B] of graphs [B, N, F + N + 1], NaN where there is no molecule."""
        found = chemistry.molecules(x0, self.elements)
        kept = np.array([one.smiles is not None and (one.valid or self.correct) for one in found], bool)
        values = np.full(len(found), np.nan, np.float32)
        values[kept] = self.oracle([one.smiles or "" for one, is_kept in zip(found, kept, strict=True) if is_kept])
        return values

    def reasons(self, x0: Any) -> dict[str, int]:
        """Return how many graphs are no valid molecule as they are, by kind."""
        found = chemistry.molecules(x0, self.elements)
        return dict(collections.Counter(one.reason for one in found if one.reason))
