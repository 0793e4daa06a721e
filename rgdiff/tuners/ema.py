"""Exponential moving averages of parameters.

It holds the one update. It assumes two pytrees of the same structure. Where the average is kept, and whether
samples are drawn from it, is left to the tuner.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rgdiff.typing import Array, Params


def ema_update(average: Params, params: Params, decay: Array | float, count: Array | int | None = None) -> Params:
    """Move an average towards parameters: d * average + (1 - d) * params.

    Args:
      average: the running average; start it as `params`.
      params: the new parameters, a pytree of the same structure.
      decay: d, in [0, 1].
      count: number n >= 0 of updates already made; when given, d = min(decay, (1 + n) / (10 + n)), so that
        the first parameters are soon forgotten.

    Returns:
      The new average, leaves of the old one's dtype.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(rgdiff.tuners.ema_update(jnp.zeros(1), jnp.ones(1), 0.75))
      [0.25]
    """
    d = decay if count is None else jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda a, p: (d * a + (1 - d) * p).astype(a.dtype), average, params)
