"""Secondary structure of RNA on the host, by ViennaRNA (doi:10.1186/1748-7188-6-26): energies, and how near a target a sequence folds.

ViennaRNA is imported when it is asked for (`pip install 'rgdiff[rna]'`). The functions take one sequence, for `rgdiff.oracles`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

KEPT = 2**16  # folds


class Fold(NamedTuple):
    """The structure of least free energy, in dots and brackets, and that energy in kcal/mol (37 C, 1 M NaCl)."""

    structure: str
    energy: float


@functools.cache
def vienna() -> Any:
    """Return ViennaRNA's module `RNA`.

    Raises:
      ValueError: in one line, where it is not installed.
    """
    try:
        return importlib.import_module("RNA")
    except ImportError:
        raise ValueError("folding needs ViennaRNA, which is not installed: pip install 'rgdiff[rna]'") from None


@functools.lru_cache(KEPT)
def fold(sequence: str) -> Fold:
    """Return the structure of least free energy of a sequence.

    Args:
      sequence: letters A, C, G, U.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("RNA")
      >>> from rgdiff.domains.rna import folding
      >>> print(folding.fold("GGGGAAAACCCC").structure)
      ((((....))))
    """
    structure, energy = vienna().fold(sequence)
    return Fold(structure, float(energy))


def stability(sequence: str) -> float:
    """Return minus the least free energy, kcal/mol: 0 where nothing pairs."""
    return -fold(sequence).energy + 0.0


@dataclasses.dataclass(frozen=True)
class Distance:
    """Minus the base-pair distance of a sequence's structure to a target: pairs of one of the two alone; 0 where they are equal.

    Args:
      target: in dots and brackets.
    """

    target: str

    def __call__(self, sequence: str) -> float:
        """Return the number, at most 0."""
        return -float(vienna().bp_distance(fold(sequence).structure, self.target))


@dataclasses.dataclass(frozen=True)
class Defect:
    """Minus the normalised ensemble defect (doi:10.1093/nar/gkh291): the share of positions that pair otherwise than in a target,
    expected over the Boltzmann ensemble; 0 where all of the ensemble has the target's pairs.

    Args:
      target: in dots and brackets.
    """

    target: str

    def __call__(self, sequence: str) -> float:
        """Return the number, in [-1, 0]."""
        ensemble = vienna().fold_compound(sequence)
        ensemble.pf()
        return -float(ensemble.ensemble_defect(self.target))


MEASURES: dict[str, Callable[[str], Callable[[str], float]]] = {"distance": Distance, "defect": Defect}


def pairs(structure: str) -> dict[int, int]:
    """Return the partner of every paired position, both ways, from 0.

    Args:
      structure: dots and brackets.

    Raises:
      ValueError: for another sign, or brackets that do not match, with the place.

    Example:
      >>> from rgdiff.domains.rna import folding
      >>> print(folding.pairs("((.))"))
      {1: 3, 3: 1, 0: 4, 4: 0}
    """
    out: dict[int, int] = {}
    opened: list[int] = []
    for place, sign in enumerate(structure):
        if sign == "(":
            opened.append(place)
        elif sign == ")" and opened:
            other = opened.pop()
            out |= {other: place, place: other}
        elif sign != ".":
            what = "an unmatched )" if sign == ")" else repr(sign)
            raise ValueError(f"the structure has {what} at position {place}; expected dots and matched brackets")
    if opened:
        raise ValueError(
            f"the structure has an unmatched ( at position {opened[-1]}; expected dots and matched brackets"
        )
    return out
