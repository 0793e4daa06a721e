"""Tasks on molecules: what `reward/*.yaml` name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rgdiff import checks, rewards
from rgdiff.domains.molecules.data import MoleculeDomain
from rgdiff.domains.molecules.properties import smiles_property
from rgdiff.domains.molecules.rewards import MoleculeReward
from rgdiff.oracles import TextOracle
from rgdiff.rewards import Task
from rgdiff.typing import Reward

PART = {"name", "reference", "weight", "low", "high"}


def _checked(domain: Any) -> MoleculeDomain:
    if not isinstance(domain, MoleculeDomain):
        raise ValueError("this reward is of molecules; choose domain=qm9 or domain=zinc250k")
    return domain


def molecule_oracle(domain: MoleculeDomain, oracle: TextOracle, correct: bool = True) -> Task:
    """Make the task of an oracle of canonical SMILES, evaluated on those molecules alone that are valid as they came.

    Args:
      domain: of molecules.
      oracle: from `rgdiff.oracles.oracle`, of your own function of a SMILES.
      correct: whether the guide sees graphs with impossible valences as corrected; else they are infeasible (NaN).

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain.
    """
    elements = _checked(domain).elements
    return Task(*(rewards.from_host(MoleculeReward(oracle, elements, kind)) for kind in (bool(correct), False)))


def molecule_property(
    domain: MoleculeDomain,
    name: str = "qed",
    reference: str | None = None,
    correct: bool = True,
    workers: int | None = None,
    timeout: float = 60.0,
    retries: int = 1,
) -> Task:
    """Make the task: a property of the molecule, by RDKit on the host, evaluated on those alone that are valid as they came.

    Args:
      domain: of molecules.
      name: qed, sa ((10 - SA) / 9), logp, penalised_logp, weight (Da), similarity, substructure or scaffold.
      reference: of the last three, a SMILES or (substructure) a SMARTS.
      correct: whether the guide sees graphs with impossible valences as corrected; else they are infeasible (NaN).
      workers: processes that answer, as many as cores by default; 0 for none.
      timeout: seconds an answer may take.
      retries: of a molecule whose process hung or died.

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain, property or reference.
    """
    _checked(domain)
    oracle = smiles_property(name, reference, workers=workers, timeout=timeout, retries=retries)
    return molecule_oracle(domain, oracle, correct)


def molecule_objective(
    domain: MoleculeDomain,
    parts: Sequence[Mapping[str, Any]],
    combine: str = "product",
    correct: bool = True,
    workers: int | None = None,
    timeout: float = 60.0,
    retries: int = 1,
) -> Task:
    """Make the task: the product or the weighted sum of properties, or of whether they are between limits.

    Args:
      domain: of molecules.
      parts: each with a `name`, and where it needs them `reference`, as `molecule_property` has them; `low`, `high` or both, for 1
        where the property is between them and 0 elsewhere; `weight` in a sum, 1 by default.
      combine: product or sum.
      correct, workers, timeout, retries: as `molecule_property`.

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain, an unknown part or setting of one, or no part.
    """
    elements = _checked(domain).elements
    checks.one_of("reward.combine", combine, ("product", "sum"))
    if not parts:
        raise ValueError("reward.parts is empty: name at least one property, e.g. {name: qed}")
    for part in parts:
        if strange := sorted(set(part) - PART):
            raise ValueError(f"reward.parts: unknown {strange[0]!r}; a part takes {', '.join(sorted(PART))}")
        if "weight" in part and combine == "product":
            raise ValueError("reward.parts: a weight belongs to combine=sum")

    def combined(corrects: bool) -> Reward:
        made = []
        for part in parts:
            asked = smiles_property(
                part.get("name", ""), part.get("reference"), workers=workers, timeout=timeout, retries=retries
            )
            one = rewards.from_host(MoleculeReward(asked, elements, corrects))
            limits = {limit: part[limit] for limit in ("low", "high") if part.get(limit) is not None}
            made.append(rewards.threshold(one, **limits) if limits else one)
        if combine == "product":
            return rewards.product(made)
        return rewards.weighted_sum(made, [float(part.get("weight", 1.0)) for part in parts])

    return Task(combined(bool(correct)), combined(False))
