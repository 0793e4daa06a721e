"""Properties of a SMILES as oracles: of a molecule alone, or beside a reference (similarity, substructure, scaffold).

They run in the processes of `rgdiff.oracles`, and import no JAX. Molecules of graphs are left to `chemistry`, rewards to `rewards`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

from rgdiff.domains.molecules import chemistry
from rgdiff.oracles import Infeasible, TextOracle, oracle

BESIDE = ("similarity", "substructure", "scaffold")  # those that have a reference
NAMES = (*chemistry.PROPERTIES, *BESIDE)


@functools.lru_cache(16)
def _reference(name: str, text: str) -> Callable[[Any, str], float]:
    """Return (molecule, its SMILES) -> number for a reference."""
    chem = chemistry.rdkit()
    if name == "substructure":
        pattern = chem.MolFromSmarts(text)
        return lambda mol, smiles: float(mol.HasSubstructMatch(pattern))
    if name == "scaffold":
        wanted = chemistry.scaffold(text)
        return lambda mol, smiles: float(chemistry.scaffold(smiles) == wanted)
    wanted = chemistry.fingerprints([text])
    return lambda mol, smiles: float(chemistry.similarities(chemistry.fingerprints([smiles]), wanted)[0, 0])


@dataclasses.dataclass(frozen=True)
class SmilesProperty:
    """A property of the molecule of a SMILES, by RDKit.

    Args:
      name: of `NAMES`.
      reference: SMILES of similarity and scaffold, SMARTS of substructure; empty for the others.
    """

    name: str
    reference: str = ""

    def __call__(self, smiles: str) -> float:
        """Return the property; raise `rgdiff.oracles.Infeasible` for a text that is no molecule."""
        mol = chemistry.read(smiles)
        if mol is None:
            raise Infeasible("unreadable")
        with chemistry.quiet():
            if self.name in BESIDE:
                return _reference(self.name, self.reference)(mol, smiles)
            return chemistry.PROPERTIES[self.name](mol)


def smiles_property(
    name: str,
    reference: str | None = None,
    *,
    workers: int | None = None,
    timeout: float = 60.0,
    retries: int = 1,
) -> TextOracle:
    """Make the oracle of a property of molecules: canonical SMILES -> values.

    Args:
      name: qed, sa ((10 - SA) / 9), logp, penalised_logp or weight (Da); or, beside a reference, similarity (Tanimoto, of ECFP4
        fingerprints, in [0, 1]), substructure (1 where the molecule has it, else 0) or scaffold (1 where the Bemis-Murcko scaffolds
        are the same, else 0).
      reference: a SMILES for similarity and scaffold, a SMARTS for substructure, None for the others.
      workers, timeout, retries: of the pool, see `rgdiff.oracles.oracle`.

    Returns:
      The oracle.

    Raises:
      ValueError: in one line, for an unknown name, a reference that is missing or unreadable, or without RDKit.

    Example:
      >>> import pytest
      >>> _ = pytest.importorskip("rdkit")
      >>> from rgdiff.domains.molecules import properties
      >>> print(properties.smiles_property("similarity", "CCO", workers=0)(["CCO", "CC(", "CCN"]).round(2))
      [1.    nan 0.33]
    """
    from rgdiff import checks

    chem = chemistry.rdkit()
    checks.one_of("the property", name, NAMES)
    if (name in BESIDE) != bool(reference):
        what = {"similarity": "a SMILES", "scaffold": "a SMILES", "substructure": "a SMARTS"}.get(name)
        raise ValueError(f"{name} takes {what or 'no'}{'' if what is None else ' as its'} reference, got {reference!r}")
    if reference:
        with chemistry.quiet():
            if (chem.MolFromSmarts(reference) if name == "substructure" else chemistry.read(reference)) is None:
                raise ValueError(f"the reference {reference!r} of {name} cannot be read by RDKit")
    version = importlib.import_module("rdkit").__version__
    label = f"{name} of {reference}" if reference else name
    settings: dict[str, Any] = {"workers": workers, "timeout": timeout, "retries": retries}
    return oracle(SmilesProperty(name, reference or ""), name=label, version=f"rdkit {version}", **settings)
