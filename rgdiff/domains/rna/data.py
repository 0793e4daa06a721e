"""RNA sequences of one length, of which nothing is known but their letters, and the structure that they are to fold into."""

from __future__ import annotations

import numpy as np

from rgdiff import checks
from rgdiff.domains.rna import folding
from rgdiff.domains.sequences.data import ALPHABETS, SequenceDomain
from rgdiff.typing import pytree, static

DRAWN = 1024  # sequences that stand for the uniform law


@pytree
class RnaDomain(SequenceDomain):
    """Sequences over A, C, G and U, and a target `structure` in dots and brackets, empty where there is none. Build it with `rna`."""

    structure: str = static(default="")


def rna(structure: str | None = None, length: int | None = None) -> RnaDomain:
    """Make the domain of the RNA sequences of one length; its `train_x` are some drawn uniformly.

    Args:
      structure: target in dots and brackets, for `reward=structure`; None for none.
      length: letters; that of the structure by default.

    Returns:
      The domain.

    Raises:
      ValueError: without ViennaRNA, a structure or a length; for a structure that is none, a pair with fewer than three letters
        between, or another length than the structure's.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("RNA")
      >>> from rgdiff.domains.rna import data
      >>> print(data.rna("((((....))))").shape)
      (12, 4)
    """
    folding.vienna()
    if structure is None and length is None:
        raise ValueError("RNA needs a length; give domain.length=40, or domain.structure='((((....))))'")
    if structure is not None:
        close = [place for place, other in folding.pairs(structure).items() if 0 < other - place < 4]
        if close:
            raise ValueError(
                f"the structure pairs position {close[0]} with one fewer than four away, which cannot fold"
            )
        if length is not None and length != len(structure):
            raise ValueError(f"the structure has {len(structure)} positions, and domain.length={length}; leave it out")
    length = checks.at_least("domain.length", len(structure) if structure is not None else length, 1)
    codes = np.random.RandomState(0).randint(0, 4, (DRAWN, length))  # its stream is frozen
    x, nothing = np.eye(4, dtype=np.uint8)[codes], np.zeros(0, np.float32)
    return RnaDomain(
        x, x[:0], nothing, x[:0], nothing, name="rna", alphabet=ALPHABETS["rna"], structure=structure or ""
    )
