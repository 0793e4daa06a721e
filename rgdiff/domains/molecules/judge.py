"""How samples of molecules are measured and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rgdiff import metrics, rewards
from rgdiff.domains.judging import BaseJudge
from rgdiff.domains.molecules import chemistry, comparison
from rgdiff.domains.molecules.data import MoleculeDomain
from rgdiff.domains.molecules.rewards import MoleculeReward
from rgdiff.domains.molecules.smiles import SmilesDomain
from rgdiff.oracles import TextOracle
from rgdiff.rewards import Task

REPORTED = ("qed", "sa", "logp")  # medians of these are in the table
SPREAD = {"qed": "QED", "sa": "SA, (10 - score) / 9", "logp": "logP", "weight": "molecular weight, Da"}  # histograms
TOP = 10  # different molecules of the highest reward
SETS = 4  # in one histogram, the data's among them
DATA = 1_000  # known molecules in a histogram, at most


class MoleculeJudge(BaseJudge):
    """Measures graphs as molecules: validity before and after correction, uniqueness, novelty, diversity and properties."""

    domain: MoleculeDomain

    def molecules(self, x0: np.ndarray) -> list[chemistry.Molecule]:
        """Return the molecules of samples."""
        return self.domain.form.molecules(x0)

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method, flat."""
        found = self.molecules(outcome.x0)
        row: dict[str, Any] = chemistry.figures(found, self.domain.known)
        smiles = [one.smiles for one in found if one.smiles is not None]
        if self.domain.known:
            row["descriptor_frechet"] = comparison.descriptor_distance(smiles, self.domain.known)
            row["nspdk"] = comparison.kernel_distance(smiles, self.domain.known)
            if (distance := comparison.chemnet_distance(smiles, self.domain.known)) is not None:
                row["fcd"] = distance
        for name in REPORTED:
            values = [chemistry.measured(name, one) for one in smiles]
            row[f"{name}_median"] = float(np.nanmedian(values)) if values else float("nan")
        scores = self.rewards(task.reward, outcome.x0)
        best = {one.smiles: score for one, score in zip(found, scores, strict=True) if np.isfinite(score)}
        row["reward_top"] = float(np.mean(sorted(best.values())[-TOP:])) if best else float("nan")
        return row | self.reward_figures(outcome.x0, task, outcome.lineages) | self.costs(outcome)

    def spread(self, outcome: Any, task: Task) -> dict[str, float]:
        """Return the standard errors of the prior's validity; a fall of it calls a method over-optimised."""
        found = self.molecules(outcome.x0)
        valid = np.mean([one.valid for one in found])
        return {"kl": 0.0, "valid": metrics.share_error(float(valid), len(found))}

    def show_each(self, x0: np.ndarray) -> list[str]:
        """Return drawings as SVG texts: each molecule with its properties, and that it is known or the known compound that is most like it."""
        return [self._drawn(one) for one in self.molecules(x0)]

    def _drawn(self, one: chemistry.Molecule) -> str:
        if one.smiles is None:
            return chemistry.drawn(None)
        values = {name: chemistry.measured(name, one.smiles) for name in REPORTED}
        lines = [f"QED {values['qed']:.2f}, SA {values['sa']:.2f}, logP {values['logp']:.1f}"]
        if not one.valid:
            lines.append("bonds corrected")
        if one.smiles in self.domain.known:
            return chemistry.drawn(one.smiles, lines=[*lines, "a known compound"])
        like = comparison.nearest(one.smiles, self.domain.known)
        if like is None:
            return chemistry.drawn(one.smiles, lines=lines)
        return chemistry.drawn(one.smiles, lines=[*lines, f"nearest known ({like.similarity:.2f}):"], below=like.smiles)

    def histograms(self, outcomes: Mapping[str, Any], task: Task, prior: Any) -> list[tuple[Any, ...]]:
        """Return histograms of the reward and of properties, of methods beside the prior and the known molecules."""
        shown = dict(list(outcomes.items())[: SETS - bool(self.domain.known)])
        smiles = {name: [one.smiles for one in self.molecules(o.x0) if one.smiles] for name, o in shown.items()}
        if self.domain.known:
            order = sorted(self.domain.known)
            smiles["data"] = order[:: max(1, -(-len(order) // DATA))]
        scores = {name: self.scores(o.x0, task) for name, o in shown.items()}
        out: list[tuple[Any, ...]] = [("Rewards of the samples", scores, None, "reward that guides")]
        for name, label in SPREAD.items():
            values = {key: np.array([chemistry.measured(name, one) for one in some]) for key, some in smiles.items()}
            out.append((label.partition(",")[0], {k: v for k, v in values.items() if len(v)}, None, label))
        return out

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            "Valid: the share of graphs whose valences are possible as they came; corrected: the share that are molecules once bonds "
            "are lowered until they are. Rewards are of corrected molecules (the largest fragment), held-out rewards of "
            "those alone that were valid. SA is (10 - SA) / 9, higher is easier. Diversity: 1 - mean Tanimoto similarity (ECFP4). "
            "Known compounds are those of domain.known.",
            *(f"Asked of {of.name}: {_counted(of.counts())}." for of in dict.fromkeys(oracles_of(task.reward))),
        ]


class SmilesJudge(MoleculeJudge):
    """Measures strings as molecules: validity, uniqueness, novelty, diversity and properties."""

    domain: SmilesDomain  # type: ignore[assignment]

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method, flat; strings are not corrected."""
        return {name: value for name, value in super().row(outcome, task, prior).items() if name != "corrected"}

    def references(self, task: Task) -> dict[str, np.ndarray]:
        """Return the training molecules."""
        return {"training molecules": self.domain.train_x}

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        domain = self.domain
        left_out = ", ".join(f"{count} {why}" for why, count in domain.left_out.items())
        return [
            f"Valid: the share of strings that RDKit reads. Novel: not among the {len(domain.known)} training molecules, by canonical "
            "SMILES; known compounds are those. SA is (10 - SA) / 9, higher is easier. Diversity: 1 - mean Tanimoto similarity (ECFP4).",
            *([f"Left out of the training data: {left_out}."] if left_out else []),
            *super().notes(task)[1:],
        ]


def oracles_of(reward: Any) -> list[TextOracle]:
    """Return the oracles in a reward.

    Args:
      reward: of a task.
    """
    asked = [host.function for host in rewards.host_rewards(reward)]
    return [one.oracle for one in asked if isinstance(one, MoleculeReward)]


def _counted(counts: Mapping[str, int]) -> str:
    plain = {"asked": "molecules", "known": "known already", "computed": "computed"}
    said = [f"{counts.get(name, 0):,} {word}" for name, word in plain.items()]
    return ", ".join(
        [*said, *(f"{number:,} without a value ({kind})" for kind, number in counts.items() if kind not in plain)]
    )
