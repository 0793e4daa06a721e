"""The optimiser that recipes name: AdamW with warm-up, cosine decay and clipping, assembled from Optax.

Tuners take any Optax transformation; this one exists so that a YAML file can describe the usual choice in one line.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.typing import Params


@functools.cache
def adamw(
    learning_rate: float = 1e-3,
    *,
    warmup: int = 0,
    decay_steps: int | None = None,
    clip: float | None = 1.0,
    weight_decay: float = 0.0,
    b2: float = 0.999,
    flat: bool = False,
) -> Any:
    """Build AdamW with warm-up, cosine decay and clipping; the same arguments give the same object, which does not recompile.

    Args:
      learning_rate: at its peak.
      warmup: steps of linear warm-up from 0.
      decay_steps: total steps of a cosine decay to 0, warm-up included; constant after the warm-up where None.
      clip: largest global norm of the gradient, or None.
      weight_decay: decoupled, per step and unit of learning rate; the DRaFT paper uses 0.1.
      b2: decay of the second moment.
      flat: keep each moment of all parameters as one vector (`optax.flatten`). The numbers are the same. A U-Net's update is then a
        few kernels in place of some for every parameter, which a CPU compiles in less time. Parameters must be of one dtype; those that lie
        on several devices are gathered.

    Returns:
      An optax gradient transformation. Its moments have the parameters' dtype: see `float32_master` for bfloat16.

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
    adam = adam if clip is None else optax.chain(optax.clip_by_global_norm(clip), adam)
    return optax.flatten(adam) if flat else adam


class MasterState(NamedTuple):
    """The parameters in float32, and the state of the optimiser on them."""

    params: Params
    inner: Any


@functools.cache
def float32_master(optimizer: Any) -> Any:
    """Run an optimiser on a float32 copy of parameters in half precision, with float32 gradients and moments.

    bfloat16 has 8 bits: an update below 1/256 of a parameter is lost in it, and so are most of a decay of .999. The parameters that
    networks see are the copy's, rounded. It costs 4 bytes a parameter; float32 parameters of a network that computes in bfloat16
    (`dtype=` of `rgdiff.nets`) need none of it.

    Args:
      optimizer: an optax gradient transformation.

    Returns:
      An optax gradient transformation; the same argument gives the same object.

    Raises:
      ValueError: for an argument that is none.

    Example:
      >>> import jax.numpy as jnp, optax, rgdiff
      >>> optimizer = rgdiff.tuners.float32_master(optax.sgd(1e-3))
      >>> state = rgdiff.tuners.start(jnp.ones(1, jnp.bfloat16), optimizer)
      >>> for _ in range(4):  # 1 - .001 is 1 in bfloat16
      ...     state, _ = rgdiff.tuners.update(state, jnp.ones(1, jnp.bfloat16), optimizer)
      >>> print(state.params.dtype, state.params)
      bfloat16 [0.996094]
    """
    import optax

    optimizer = checks.optimizer(optimizer)
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)  # noqa: E731

    def init(params: Params) -> MasterState:
        copy = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True), params)
        return MasterState(copy, optimizer.init(copy))

    def update(gradients: Params, state: MasterState, params: Params | None = None) -> tuple[Params, MasterState]:
        if params is None:
            raise ValueError("float32_master needs the parameters: optimizer.update(gradients, state, params)")
        updates, inner = optimizer.update(wide(gradients), state.inner, state.params)
        master = optax.apply_updates(state.params, updates)
        rounded = jax.tree.map(lambda m, p: m.astype(p.dtype).astype(m.dtype) - p.astype(m.dtype), master, params)
        return rounded, MasterState(master, inner)  # differences in float32: added to the parameters they are exact

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
