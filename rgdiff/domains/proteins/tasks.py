"""The task on a protein's variants: learned brightness, in two copies that share no measurement."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rgdiff.domains.proteins.data import ProteinDomain
from rgdiff.domains.proteins.judge import ProteinJudge
from rgdiff.domains.proteins.rewards import Brightness, train_brightness
from rgdiff.rewards import Task
from rgdiff.typing import Key


def brightness(
    domain: ProteinDomain,
    judge: ProteinJudge,
    key: Key,
    heads: int = 3,
    steps: int = 1500,
    batch: int = 128,
    learning_rate: float = 3e-3,
    width: int = 16,
    readout: int = 32,
    weight_decay: float = 1e-2,
    infeasible: bool = True,
) -> Task:
    """Make the task: learned brightness of one half of the measurements, evaluated by that of the other half.

    Args:
      domain: from `gfp` or `landscape`.
      judge: the domain's judge, which trains the held-out reward.
      key: of the guiding reward's training.
      heads, steps, batch, learning_rate, width, readout, weight_decay: of both, see `train_brightness`.
      infeasible: whether a variant predicted dark, below `domain.dark`, is NaN; else it has its predicted brightness.

    Returns:
      The task; the rewards are in the measurements' unit, log fluorescence of GFP.

    Raises:
      ValueError: for another domain.
    """
    if not isinstance(domain, ProteinDomain):
        raise ValueError("reward=brightness is for measured variants of a protein; use domain=gfp, aav or gb1")
    settings: dict[str, Any] = {
        "heads": heads,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "width": width,
        "readout": readout,
        "weight_decay": weight_decay,
    }
    dark = jnp.float32(domain.dark if infeasible else -jnp.inf)
    guide = train_brightness(key, domain.guide_x, domain.guide_y, **settings)
    return Task(Brightness(guide, dark), Brightness(judge.brightness(**settings), dark))
