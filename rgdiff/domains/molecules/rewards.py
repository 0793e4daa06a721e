"""Oracles of molecules as rewards on graphs or strings: black boxes on the host, NaN where there is no molecule."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from rgdiff.oracles import TextOracle
from rgdiff.typing import Cond


@dataclasses.dataclass(frozen=True)
class MoleculeReward:
    """An oracle asked about the molecules of states, for `rewards.from_host`; equal for equal settings, so that nothing recompiles.

    Args:
      oracle: canonical SMILES -> values [B], `properties.smiles_property`, `docking.docking` or one of your own function.
      form: what makes molecules of states: the domain's `form`, of graphs or strings.
      correct: whether graphs with impossible valences are corrected; else they are infeasible.
    """

    oracle: TextOracle
    form: Any
    correct: bool = True

    def __call__(self, x0: Any, cond: Cond = None) -> np.ndarray:
        """Return the oracle's values [B] of states, leaves [B, ...], NaN where there is no molecule."""
        found = self.form.molecules(x0)
        kept = np.array([one.smiles is not None and (one.valid or self.correct) for one in found], bool)
        values = np.full(len(found), np.nan, np.float32)
        values[kept] = self.oracle([one.smiles or "" for one, is_kept in zip(found, kept, strict=True) if is_kept])
        return values

    def reasons(self, x0: Any) -> dict[str, int]:
        """Return how many states are no valid molecule as they are, by kind."""
        found = self.form.molecules(x0)
        return dict(collections.Counter(one.reason for one in found if one.reason))
