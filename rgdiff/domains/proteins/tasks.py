"""Tasks on proteins: a learned measurement, in two copies that share no measurement, and the likelihood for a backbone."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rgdiff import checks, rewards
from rgdiff.domains.proteins import backbone
from rgdiff.domains.proteins.data import ProteinDomain
from rgdiff.domains.proteins.judge import ProteinJudge
from rgdiff.domains.proteins.rewards import Brightness, train_brightness
from rgdiff.domains.sequences.data import SequenceDomain
from rgdiff.domains.sequences.files import located
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


def likelihood(
    domain: SequenceDomain,
    pdb: str,
    chain: str = "A",
    first: int = 1,
    weights: str = "v_48_020",
    orders: int = 1,
    data_dir: str | None = None,
) -> Task:
    """Make the task: log-likelihood of a sequence for a backbone by ProteinMPNN, nats a residue; evaluated by itself.

    Args:
      domain: of protein sequences. The positions of a protein's variants are those of its numbering, of others from `first` on.
      pdb: a .pdb file, relative to `data_dir`.
      chain: letter of the chain.
      first: the number, in the domain's numbering, of the chain's first residue in the file.
      weights: of the package, v_48_002 to v_48_030, by the noise of their training.
      orders: decoding orders that the mean is over, drawn once.
      data_dir: folder of the file; the environment variable RGDIFF_DATA when None.

    Returns:
      The task; its reward has no gradient.

    Raises:
      ValueError: for another domain, a file without the chain, positions that it does not have, or without ProteinMPNN.
    """
    if not isinstance(domain, SequenceDomain) or domain.alphabet.name != "protein":
        raise ValueError("the likelihood for a backbone is of proteins; choose domain=gfp, aav, gb1 or sequences")
    backbone.package()
    path = located(pdb, data_dir)
    if not path.is_file():
        raise ValueError(f"no structure at {path}; give reward.pdb=FILE")
    places = getattr(domain, "places", None) or range(first, first + domain.shape[0])
    at = tuple(int(place) - first for place in places)
    count = len(backbone.backbone(str(path), chain)[1])
    if min(at) < 0 or max(at) >= count:
        raise ValueError(
            f"chain {chain} of {pdb} has residues {first} to {first + count - 1}, and the domain positions {min(places)} to "
            f"{max(places)}; give reward.first="
        )
    backbone.network(weights)
    score = backbone.BackboneLikelihood(str(path), chain, at, weights, checks.at_least("reward.orders", orders, 1))
    reward = rewards.from_host(score)
    return Task(reward, reward)
