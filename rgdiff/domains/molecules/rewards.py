"""Properties of molecules as rewards: black boxes on the host, NaN where there is no molecule."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from rgdiff.domains.molecules import chemistry
from rgdiff.typing import Cond


@dataclasses.dataclass(frozen=True)
class MoleculeProperty:
    """A property of the molecules of graphs, for `rewards.from_host`; equal for equal settings, so that nothing recompiles.

    Args:
      name: of `chemistry.PROPERTIES`.
      elements: atomic numbers of the features.
      correct: whether graphs with impossible valences are corrected; else they are infeasible.
    """

    name: str
    elements: tuple[int, ...]
    correct: bool = True

    def __call__(self, x0: Any, cond: Cond = None) -> np.ndarray:
        """Return the property [B] of graphs [B, N, F + N + 1], NaN where there is no molecule."""
        found = chemistry.molecules(x0, self.elements)
        return np.array([self._value(one) for one in found], np.float32)

    def _value(self, found: chemistry.Molecule) -> float:
        if found.smiles is None or not (found.valid or self.correct):
            return float("nan")
        return chemistry.measured(self.name, found.smiles)

    def reasons(self, x0: Any) -> dict[str, int]:
        """Return how many graphs are no valid molecule as they are, by kind."""
        found = chemistry.molecules(x0, self.elements)
        return dict(collections.Counter(one.reason for one in found if one.reason))
