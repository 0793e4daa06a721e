"""Tasks on molecules: what `reward/*.yaml` name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rgdiff import checks, oracles, rewards
from rgdiff._cache import cache_path
from rgdiff.domains.molecules.data import MoleculeDomain
from rgdiff.domains.molecules.docking import docking
from rgdiff.domains.molecules.properties import smiles_property
from rgdiff.domains.molecules.rewards import MoleculeReward
from rgdiff.domains.molecules.smiles import SmilesDomain
from rgdiff.domains.sequences.files import located
from rgdiff.oracles import TextOracle
from rgdiff.rewards import Task
from rgdiff.typing import Reward

PART = {"name", "reference", "weight", "low", "high"}


def _form(domain: Any) -> Any:
    """Return what makes molecules of the domain's states."""
    if not isinstance(domain, MoleculeDomain | SmilesDomain):
        raise ValueError("this reward is of molecules; choose domain=qm9, domain=zinc250k or domain=smiles")
    return domain.form


def molecule_oracle(
    domain: MoleculeDomain | SmilesDomain, oracle: TextOracle, correct: bool = True, infeasible: float | None = None
) -> Task:
    """Make the task of an oracle of canonical SMILES, evaluated on those molecules alone that are valid as they came.

    Args:
      domain: of molecules.
      oracle: from `rgdiff.oracles.oracle`, of your own function of a SMILES.
      correct: whether the guide sees graphs with impossible valences as corrected; else they are infeasible.
      infeasible: the guide's value of a sample that is infeasible, so that policies learn to avoid it; None for NaN.

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain.
    """
    form = _form(domain)
    guide, judge = (rewards.from_host(MoleculeReward(oracle, form, kind)) for kind in (bool(correct), False))
    return Task(_filled(guide, infeasible), judge)


def _filled(guide: Reward, infeasible: float | None) -> Reward:
    return guide if infeasible is None else rewards.where_infeasible(guide, infeasible)


def molecule_function(
    domain: MoleculeDomain | SmilesDomain,
    fn: Callable[[str], float],
    version: str | None = None,
    correct: bool = True,
    infeasible: float | None = None,
    cache_dir: str | None = None,
    workers: int | None = None,
    timeout: float = 60.0,
    retries: int = 1,
) -> Task:
    """Make the task of your own function of a SMILES, evaluated on those molecules alone that are valid as they came.

    Args:
      domain: of molecules.
      fn: canonical SMILES -> number; it raises where there is none, or returns NaN.
      version: of the function: with one, answers are kept on disk under it; None keeps them in memory alone.
      correct: whether the guide sees graphs with impossible valences as corrected; else they are infeasible.
      infeasible: the guide's value of a sample that is infeasible, so that policies learn to avoid it; None for NaN.
      cache_dir: where answers are kept, shared by runs; the run's cache when None.
      workers: processes that answer, as many as cores by default; 0 for none.
      timeout: seconds an answer may take.
      retries: of a molecule whose process hung or died.

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain, or a function that other processes cannot import.
    """
    _form(domain)
    kept = None if version is None else _folder(cache_dir)
    settings: dict[str, Any] = {"workers": workers, "timeout": timeout, "retries": retries, "folder": kept}
    return molecule_oracle(domain, oracles.oracle(fn, version=version or "", **settings), correct, infeasible)


def _folder(cache_dir: str | None) -> Path | None:
    kept = cache_path(cache_dir)
    return None if kept is None else kept / "oracles"


def molecule_property(
    domain: MoleculeDomain | SmilesDomain,
    name: str = "qed",
    reference: str | None = None,
    correct: bool = True,
    infeasible: float | None = None,
    workers: int | None = None,
    timeout: float = 60.0,
    retries: int = 1,
) -> Task:
    """Make the task: a property of the molecule, by RDKit on the host, evaluated on those alone that are valid as they came.

    Args:
      domain: of molecules.
      name: qed, sa ((10 - SA) / 9), logp, penalised_logp, weight (Da), similarity, substructure or scaffold.
      reference: of the last three, a SMILES or (substructure) a SMARTS.
      correct: whether the guide sees graphs with impossible valences as corrected; else they are infeasible.
      infeasible: the guide's value of a sample that is infeasible, so that policies learn to avoid it; None for NaN.
      workers: processes that answer, as many as cores by default; 0 for none.
      timeout: seconds an answer may take.
      retries: of a molecule whose process hung or died.

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain, property or reference.
    """
    _form(domain)
    oracle = smiles_property(name, reference, workers=workers, timeout=timeout, retries=retries)
    return molecule_oracle(domain, oracle, correct, infeasible)


def property_network(
    domain: MoleculeDomain,
    file: str = "mood_property_networks.npz",
    target: str = "parp1",
    correct: bool = True,
    data_dir: str | None = None,
    workers: int | None = None,
    timeout: float = 60.0,
    retries: int = 1,
) -> Task:
    """Make the task of a MOOD property network: a differentiable reward in [0, 1], evaluated by QED times SA of the molecules.

    The networks predict a docking score times QED times SA, scaled; what a guide gains that QED times SA has not is the docking's,
    or the network's error: dock the samples to know (`docking`).

    Args:
      domain: of ZINC250k's graphs.
      file: .npz, see `rgdiff.pretrained.mood.read`.
      target: name of the network in it.
      correct: whether the evaluation sees graphs with impossible valences as corrected; else they are infeasible (NaN).
      data_dir: folder of the file; the environment variable RGDIFF_DATA when None.
      workers, timeout, retries: of the evaluation, as `molecule_property`.

    Returns:
      The task. Its reward sees graphs as they are, not their molecules.

    Raises:
      ValueError: for another domain, a file that is missing or another, or a network of other graphs.
    """
    from rgdiff.pretrained import mood

    if not isinstance(domain, MoleculeDomain):
        raise ValueError("a property network is of graphs; choose domain=zinc250k")
    nodes, elements = domain.nodes, domain.elements
    reward = mood.read(located(file, data_dir), target)
    if reward.shape != (nodes, len(elements)):
        raise ValueError(
            f"the property network {target} is for graphs of {reward.shape[0]} nodes with {reward.shape[1]} features, and the "
            f"domain's have {nodes} with {len(elements)}; choose domain=zinc250k"
        )
    judged = molecule_objective(
        domain, [{"name": "qed"}, {"name": "sa"}], "product", correct, workers=workers, timeout=timeout, retries=retries
    )
    return Task(reward, judged.reward)


def molecule_docking(
    domain: MoleculeDomain | SmilesDomain,
    receptor: str,
    center: Sequence[float],
    size: Sequence[float],
    exhaustiveness: int = 1,
    docking_seed: int = 1,
    executable: str | None = None,
    correct: bool = True,
    infeasible: float | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    workers: int | None = None,
    timeout: float = 300.0,
    retries: int = 1,
) -> Task:
    """Make the task: minus the docking energy in kcal/mol by AutoDock Vina, evaluated on molecules alone that are valid as they came.

    Args:
      domain: of molecules.
      receptor: a .pdbqt file, relative to `data_dir` where there is one.
      center, size: of the box that is searched, x, y, z in Angstrom.
      exhaustiveness, docking_seed: of the search.
      executable: a program with Vina's options, or None for the package `vina`.
      correct: whether the guide sees graphs with impossible valences as corrected; else they are infeasible.
      infeasible: the guide's value of a sample that is infeasible, so that policies learn to avoid it; None for NaN.
      data_dir: folder of the receptor; the environment variable RGDIFF_DATA when None.
      cache_dir: where answers are kept, shared by runs; the run's cache when None.
      workers: processes that dock, as many as cores by default.
      timeout: seconds a docking may take.
      retries: of one that hung or died.

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain, and as `rgdiff.domains.molecules.docking.docking`.
    """
    _form(domain)
    oracle = docking(
        located(receptor, data_dir),
        center,
        size,
        exhaustiveness=exhaustiveness,
        seed=docking_seed,
        executable=executable,
        workers=workers,
        timeout=timeout,
        retries=retries,
        folder=_folder(cache_dir),
    )
    return molecule_oracle(domain, oracle, correct, infeasible)


def molecule_objective(
    domain: MoleculeDomain | SmilesDomain,
    parts: Sequence[Mapping[str, Any]],
    combine: str = "product",
    correct: bool = True,
    infeasible: float | None = None,
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
      correct, infeasible, workers, timeout, retries: as `molecule_property`; `infeasible` is of the whole.

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain, an unknown part or setting of one, or no part.
    """
    form = _form(domain)
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
            one = rewards.from_host(MoleculeReward(asked, form, corrects))
            limits = {limit: part[limit] for limit in ("low", "high") if part.get(limit) is not None}
            made.append(rewards.threshold(one, **limits) if limits else one)
        if combine == "product":
            return rewards.product(made)
        return rewards.weighted_sum(made, [float(part.get("weight", 1.0)) for part in parts])

    return Task(_filled(combined(bool(correct)), infeasible), combined(False))
