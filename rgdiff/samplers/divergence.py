"""Samples that have left every scale: a guide whose step is too large amplifies them from move to move until float32 ends."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.processes import ProductProcess
from rgdiff.typing import Array, Process, State

LIMIT = 1e3  # standard deviations of the prior at t = 1


def divergent(process: Process, x0: State, *, limit: float = LIMIT) -> Array:
    """Say which samples diverged: a coordinate is not finite, or further from 0 than `limit` standard deviations of the prior.

    The prior is N(0, prior_std^2) at t = 1, of the data's own order or above it (VP and flow: 1, for data of order 1). A chain
    that diverges grows exponentially, so that the limit may be wide: see `guides.dps` for when one does. Tokens do not diverge.

    Args:
      process: of the chain.
      x0: [B, ...], as `sample` returns it.
      limit: in standard deviations of the prior.

    Returns:
      bool [B].

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (2,))
      >>> rgdiff.samplers.divergent(process, jnp.array([[0.3, -1.0], [2e6, 0.1], [jnp.nan, 0.0]])).tolist()
      [False, True, True]
    """
    checks.noising_process(process, "divergent")
    if isinstance(process, ProductProcess):
        every = [divergent(part, x0[name], limit=limit) for name, part in process.parts.items()]
        return jnp.any(jnp.stack(every), 0)
    leaf = jnp.asarray(x0).reshape(jax.tree.leaves(x0)[0].shape[0], -1)
    noise: Any = getattr(process, "levels", getattr(process, "schedule", None))
    largest = checks.positive("limit", limit) * getattr(noise, "prior_std", 1.0)
    return ~jnp.all(jnp.abs(leaf) <= largest, -1)
