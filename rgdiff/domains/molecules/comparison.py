"""Sets of molecules beside known ones: Fréchet distances of descriptors and of ChemNet's activations, NSPDK, and nearest known compounds."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rgdiff import metrics
from rgdiff.domains.molecules import chemistry, nspdk

DESCRIPTORS = (  # of rdkit.Chem.Descriptors
    "MolWt", "MolLogP", "TPSA", "NumHDonors", "NumHAcceptors", "NumRotatableBonds", "RingCount", "NumAromaticRings", "FractionCSP3",
    "HeavyAtomCount",
)  # fmt: skip
COMPARED = 2_000  # known molecules that distances are taken to, at most
CHEMNET = "fcd"  # a package


class Nearest(NamedTuple):
    """The known compound that is most like a molecule: its canonical SMILES, and the Tanimoto similarity of ECFP4 in [0, 1]."""

    smiles: str
    similarity: float


def descriptors(smiles: Sequence[str]) -> np.ndarray:
    """Return numbers of molecules: weight, logP, polar surface, donors, acceptors, rotatable bonds, rings, aromatic rings, sp3, atoms.

    Args:
      smiles: canonical.

    Returns:
      [N, 10], each in RDKit's unit.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import comparison
      >>> print(comparison.descriptors(["CCO"])[0, [3, 6, 9]])  # donors, rings, atoms
      [1. 0. 3.]
    """
    module = importlib.import_module("rdkit.Chem.Descriptors")
    makers = [getattr(module, name) for name in DESCRIPTORS]
    rows = [[make(mol) for make in makers] for mol in map(chemistry.read, smiles)]
    return np.array(rows, float).reshape(-1, len(makers))


def _some(known: frozenset[str]) -> list[str]:
    """Return at most `COMPARED` of the known molecules, evenly through their order."""
    order = sorted(known)
    return order[:: max(1, -(-len(order) // COMPARED))]


@functools.lru_cache(4)
def _reference(known: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return descriptors of known molecules, and their deviations, 1 where there is none."""
    numbers = descriptors(_some(known))
    deviations = numbers.std(0)
    return numbers, np.where(deviations > 0, deviations, 1.0)


def descriptor_distance(smiles: Sequence[str], known: frozenset[str]) -> float:
    """Return the squared Fréchet distance of descriptors, each in units of its deviation among the known; NaN below two molecules.

    It is biased upwards by few samples: compare only at equal numbers of them.

    Args:
      smiles: canonical, one a sample.
      known: canonical SMILES of data.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import comparison
      >>> some = ["CCO", "c1ccccc1", "CC(=O)N"]
      >>> print(f"{abs(comparison.descriptor_distance(some, frozenset(some))):.3f}")
      0.000
    """
    if len(smiles) < 2 or len(known) < 2:
        return float("nan")
    numbers, deviations = _reference(known)
    return metrics.frechet_distance(descriptors(smiles) / deviations, numbers / deviations)


@functools.lru_cache(4)
def _kernel_mean(known: frozenset[str]) -> dict[Any, float]:
    return nspdk.mean(_some(known))


def kernel_distance(smiles: Sequence[str], known: frozenset[str]) -> float:
    """Return the squared maximum mean discrepancy by the kernel NSPDK (`rgdiff.domains.molecules.nspdk`), NaN where there is no molecule.

    It is biased upwards by few samples: compare only at equal numbers of them.

    Args:
      smiles: canonical, one a sample.
      known: canonical SMILES of data.
    """
    return nspdk.discrepancy(nspdk.mean(smiles), _kernel_mean(known))


@functools.lru_cache(1)
def _chemnet() -> Any:
    return importlib.import_module(CHEMNET).load_ref_model()


@functools.lru_cache(4)
def _activations(known: frozenset[str]) -> np.ndarray:
    return importlib.import_module(CHEMNET).get_predictions(_chemnet(), _some(known))


def chemnet_distance(smiles: Sequence[str], known: frozenset[str]) -> float | None:
    """Return the Fréchet ChemNet distance (doi:10.1021/acs.jcim.8b00234), None without the package `fcd`, NaN below two molecules.

    Args:
      smiles: canonical, one a sample; published figures are of 10,000.
      known: canonical SMILES of data.
    """
    if importlib.util.find_spec(CHEMNET) is None:
        return None
    if len(smiles) < 2 or len(known) < 2:
        return float("nan")
    ours = importlib.import_module(CHEMNET).get_predictions(_chemnet(), list(smiles))
    return metrics.frechet_distance(ours, _activations(known))


@functools.lru_cache(4)
def _prints(known: frozenset[str]) -> tuple[list[str], list[Any]]:
    make = importlib.import_module("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2, fpSize=2048)
    order = sorted(known)
    return order, [make.GetFingerprint(chemistry.read(one)) for one in order]


def nearest(smiles: str, known: frozenset[str]) -> Nearest | None:
    """Return the known compound that is most like a molecule, None where there are none.

    Args:
      smiles: canonical.
      known: canonical SMILES.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import comparison
      >>> print(comparison.nearest("CCCO", frozenset({"CCO", "c1ccccc1"})).smiles)
      CCO
    """
    if not known:
        return None
    order, prints = _prints(known)
    make = importlib.import_module("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2, fpSize=2048)
    print_of = make.GetFingerprint(chemistry.read(smiles))
    alike = importlib.import_module("rdkit.DataStructs").BulkTanimotoSimilarity(print_of, prints)
    best = int(np.argmax(alike))
    return Nearest(order[best], float(alike[best]))
