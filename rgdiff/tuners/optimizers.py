"""The optimiser that recipes name: AdamW with warm-up, cosine decay and clipping, assembled from Optax.

Tuners take any Optax transformation; this one exists so that a YAML file can describe the usual choice in one line.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def adamw(
    learning_rate: float = 1e-3,
    *,
    warmup: int = 0,
    decay_steps: int | None = None,
    clip: float | None = 1.0,
    weight_decay: float = 0.0,
    b2: float = 0.999,
) -> Any:
    """Build AdamW with warm-up, cosine decay and clipping; the same arguments give the same object, which does not recompile.

    Args:
      learning_rate: at its peak.
      warmup: steps of linear warm-up from 0.
      decay_steps: total steps of a cosine decay to 0, warm-up included; constant after the warm-up where None.
      clip: largest global norm of the gradient, or None.
      weight_decay: decoupled, per step and unit of learning rate; the DRaFT paper uses 0.1.
      b2: decay of the second moment.

    Returns:
      An optax gradient transformation.

    Raises:
      ValueError: for a learning rate that is not positive, a decay that ends within the warm-up.

    Example:
      >>> import rgdiff
      >>> optimizer = rgdiff.tuners.adamw(1e-3, warmup=10, decay_steps=100)
      >>> print(optimizer is rgdiff.tuners.adamw(1e-3, warmup=10, decay_steps=100))
      True
    """
    import optax

    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, got {learning_rate!r}")
    if decay_steps is not None and decay_steps <= warmup:
        raise ValueError(f"decay_steps must exceed warmup ({warmup}), got {decay_steps}")
    rate: Any = learning_rate
    if decay_steps is not None:
        rate = optax.warmup_cosine_decay_schedule(0.0 if warmup else learning_rate, learning_rate, warmup, decay_steps)
    elif warmup:
        rate = optax.linear_schedule(0.0, learning_rate, warmup)
    adam = optax.adamw(rate, b2=b2, weight_decay=weight_decay)
    return adam if clip is None else optax.chain(optax.clip_by_global_norm(clip), adam)
