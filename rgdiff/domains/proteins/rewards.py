"""Learned brightness of a protein's variants as a reward; what is predicted dark is infeasible: NaN.

It is a small ensemble of bottleneck networks: additive effects of mutations through a narrow non-linear readout
("global epistasis").
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, rewards
from rgdiff.domains.sequences.oracle import fit_oracle
from rgdiff.typing import Array, Cond, Key, Reward, pytree


@pytree
class Brightness:
    """A learned measurement as a reward; NaN below `dark`."""

    learned: Reward
    dark: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        value = self.learned(x0, cond)
        return jnp.where(value < self.dark, jnp.nan, value)


def train_brightness(
    key: Key,
    x: Array | np.ndarray,
    y: Array | np.ndarray,
    *,
    heads: int = 3,
    steps: int = 1500,
    batch: int = 128,
    learning_rate: float = 3e-3,
    width: int = 16,
    readout: int = 32,
    weight_decay: float = 1e-2,
) -> Reward:
    """Train an ensemble, the mean of `heads` networks, on standardised measurements by least squares.

    A network is Dense(width) on the flattened sequence, then Dense(readout) and one number: mutations add up in a few
    latent numbers, and what they do together is a function of those.

    Args:
      key: PRNG key; the result is a function of it.
      x: one-hot sequences [N, L, 20].
      y: measurements [N].
      steps: optimiser steps (AdamW, cosine decay from `learning_rate`) of every head; the average of the weights is kept.
      batch: sequences a step.

    Raises:
      ValueError: as `fit_oracle`.
    """
    from rgdiff.nets import MLP

    network = MLP((width, readout), ())
    options: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }
    keys = jax.random.split(key, checks.at_least("heads", heads, 1))
    oracles = tuple(fit_oracle(head, network, x, y, **options) for head in keys)
    return rewards.ensemble(oracles, "mean")
