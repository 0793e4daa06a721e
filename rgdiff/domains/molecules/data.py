"""Molecules as graphs: which elements and sizes the states of a data set have, and its known molecules by path."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from rgdiff import checks
from rgdiff.domains.molecules import chemistry
from rgdiff.domains.sequences import files
from rgdiff.typing import Array

DATASETS = {"qm9": ((6, 7, 8, 9), 9), "zinc250k": ((6, 7, 8, 9, 15, 16, 17, 35, 53), 38)}


@dataclasses.dataclass(frozen=True)
class Graphs:
    """Graphs [N, F + N + 1] as a form of molecules, of these elements' features; impossible valences are corrected.

    Args:
      elements: atomic numbers of the F features.
    """

    elements: tuple[int, ...]

    def molecules(self, x: Array | np.ndarray) -> list[chemistry.Molecule]:
        """Return the molecules of states [B, N, F + N + 1]."""
        return chemistry.molecules(np.asarray(x), self.elements)


@dataclasses.dataclass(frozen=True)
class MoleculeDomain:
    """Molecules of one data set, as graphs [N, F + N + 1] (`rgdiff.graphs`). Build it with `molecules`.

    elements: atomic numbers of the F features. nodes: N. known: canonical SMILES of data, for novelty.
    """

    name: str
    elements: tuple[int, ...]
    nodes: int
    known: frozenset[str] = frozenset()
    value_range: tuple[float, float] | None = None

    @property
    def form(self) -> Graphs:
        """What makes molecules of states."""
        return Graphs(self.elements)

    @property
    def shape(self) -> tuple[int, int]:
        return self.nodes, len(self.elements) + self.nodes + 1


def molecules(
    dataset: str = "qm9", known: str | os.PathLike | None = None, data_dir: str | os.PathLike | None = None
) -> MoleculeDomain:
    """Make the domain of the molecules of QM9 (C, N, O, F; up to 9 atoms) or ZINC250k (nine elements; up to 38).

    Args:
      dataset: qm9 or zinc250k.
      known: a file of SMILES, one a line, against which samples are called new; None reports no novelty.
      data_dir: folder of that file; the environment variable RGDIFF_DATA when None.

    Returns:
      The domain.

    Raises:
      FileNotFoundError: for a missing file.
      ValueError: for another data set, a file without a molecule, or without RDKit.
    """
    elements, nodes = DATASETS[checks.one_of("domain.dataset", dataset, DATASETS)]
    chemistry.rdkit()
    smiles: frozenset[str] = frozenset()
    if known is not None:
        lines = files.read_bytes(known, data_dir=data_dir, sha256=None, hint="SMILES, one a line").decode().split()
        smiles = frozenset(one for line in lines if (one := chemistry.canonical(line)) is not None)
        if not smiles:
            raise ValueError(f"{known} holds no molecule: expected SMILES, one a line")
    return MoleculeDomain(dataset, elements, nodes, smiles)
