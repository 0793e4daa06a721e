"""Tasks on molecules: what `reward/*.yaml` name."""

from __future__ import annotations

from rgdiff import checks, rewards
from rgdiff.domains.molecules.chemistry import PROPERTIES
from rgdiff.domains.molecules.data import MoleculeDomain
from rgdiff.domains.molecules.rewards import MoleculeProperty
from rgdiff.rewards import Task


def molecule_property(domain: MoleculeDomain, name: str = "qed", correct: bool = True) -> Task:
    """Make the task: a property of the molecule, by RDKit on the host, evaluated on those alone that are valid as they came.

    Args:
      domain: of molecules.
      name: qed, sa ((10 - SA) / 9), logp, penalised_logp or weight (Da).
      correct: whether the guide sees graphs with impossible valences as corrected; else they are infeasible (NaN).

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain or property.
    """
    if not isinstance(domain, MoleculeDomain):
        raise ValueError("this reward is of molecules; choose domain=qm9 or domain=zinc250k")
    checks.one_of("reward.name", name, PROPERTIES)
    guide, judge = (rewards.from_host(MoleculeProperty(name, domain.elements, kind)) for kind in (bool(correct), False))
    return Task(guide, judge)
