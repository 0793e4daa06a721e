"""Tasks on RNA: what `reward/*.yaml` name. Rewards are black boxes on the host, answered by a pool of processes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rgdiff import checks, oracles, rewards
from rgdiff.domains.rna import folding
from rgdiff.domains.sequences.data import Alphabet, SequenceDomain
from rgdiff.rewards import Task
from rgdiff.typing import Cond


@dataclasses.dataclass(frozen=True)
class OfLetters:
    """An oracle of sequences as a function of states, for `rewards.from_host`; equal for equal settings.

    On points of the simplex, as a posterior mean is, it estimates the expectation over independent letters, from draws that are
    the same for all states, so that candidates of a move differ by their letters alone.

    Args:
      oracle: texts -> values [B].
      alphabet: of the states.
      draws: of each state that is no sequence; 0 takes its most probable letters.
    """

    oracle: Any
    alphabet: Alphabet
    draws: int = 4

    def __call__(self, x0: Any, cond: Cond = None) -> np.ndarray:
        """Return the values [B] of states [B, L, K]."""
        x0 = np.asarray(x0, np.float64)
        soft = self.draws * bool((x0.max(-1) < 1 - 1e-6).any())
        if not soft:
            return self.oracle(self.alphabet.decode(x0)).astype(np.float32)
        levels = np.random.RandomState(0).random_sample((soft, 1, x0.shape[1], 1))
        below = np.cumsum(x0, -1)
        drawn = (below > levels * below[..., -1:]).argmax(-1).reshape(-1, x0.shape[1])
        texts = self.alphabet.decode(np.eye(x0.shape[-1])[drawn])
        return self.oracle(texts).reshape(soft, -1).mean(0).astype(np.float32)


def energy(domain: SequenceDomain, draws: int = 4, workers: int | None = None) -> Task:
    """Make the task: minus the least free energy of folding, kcal/mol, by ViennaRNA; evaluated by itself.

    Args:
      domain: RNA sequences, of any domain.
      draws: of each state that is no sequence, from whose letters its value is estimated; 0 takes the most probable ones.
      workers: processes that fold, as many as cores by default; 0 for none.

    Returns:
      The task; its reward has no gradient.

    Raises:
      ValueError: for another domain, or without ViennaRNA.
    """
    return _task(domain, folding.stability, "rna_energy", draws, workers)


def structure(
    domain: SequenceDomain,
    target: str | None = None,
    measure: str = "defect",
    draws: int = 4,
    workers: int | None = None,
) -> Task:
    """Make the task: how near a target structure a sequence folds, 0 at best, by ViennaRNA; judged by the base-pair distance.

    Args:
      domain: RNA sequences, of any domain.
      target: in dots and brackets; the domain's own by default.
      measure: of the guide: `defect`, minus the normalised ensemble defect, in [-1, 0]; or `distance`, minus the base-pair distance of the
        structure of least free energy.
      draws: as in `energy`.
      workers: processes that fold, as many as cores by default; 0 for none.

    Returns:
      The task; its rewards have no gradient.

    Raises:
      ValueError: for another domain, no target, one of another length, or without ViennaRNA.
    """
    target = getattr(domain, "structure", "") if target is None else target
    if not target:
        raise ValueError("reward=structure needs a target; give domain.structure='((((....))))' or reward.target=")
    folding.pairs(target)
    if isinstance(domain, SequenceDomain) and len(target) != domain.shape[0]:
        raise ValueError(f"the target has {len(target)} positions, and the domain's sequences {domain.shape[0]}")
    kind = folding.MEASURES[checks.one_of("reward.measure", measure, folding.MEASURES)]
    guide = _task(domain, kind(target), f"rna_{measure} {target}", draws, workers)
    return guide._replace(
        heldout=_task(domain, folding.Distance(target), f"rna_distance {target}", draws, workers).reward
    )


def _task(domain: Any, function: Any, name: str, draws: int, workers: int | None) -> Task:
    if not isinstance(domain, SequenceDomain) or domain.alphabet.name != "rna":
        raise ValueError("folding is of RNA; choose domain=rna, domain=utr, or domain=sequences domain.alphabet=rna")
    folding.vienna()
    asked = oracles.oracle(function, name=name, version=str(folding.vienna().__version__), workers=workers)
    reward = rewards.from_host(OfLetters(asked, domain.alphabet, checks.at_least("reward.draws", draws, 0)))
    return Task(reward, reward)
