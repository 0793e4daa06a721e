"""Initial weights without a compilation per shape.

Drawing each kernel with `jax.random` compiles one program per shape, which on a CPU took longer than everything else in
a small network's start; here every kernel is cut from blocks of one fixed size. It assumes keys of JAX and leaves which
layers start at zero to the networks.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rgdiff.typing import Array, Key

BLOCK = 1 << 16


@jax.jit
def _block(key: Key, index: Array) -> Array:
    return jax.random.normal(jax.random.fold_in(key, index), (BLOCK,))


def normal(key: Key, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    """Draw float32 normals of standard deviation `scale`, of any shape, with one compiled program for all shapes.

    Args:
      key: a typed PRNG key.
      shape: of the result.
      scale: standard deviation.

    Returns:
      float32 of that shape.
    """
    count = math.prod(shape)
    blocks: list[Any] = [_block(key, index) for index in range(-(-count // BLOCK))]
    xp: Any = jnp if any(isinstance(block, Tracer) for block in blocks) else np
    drawn = xp.concatenate([xp.asarray(block) for block in blocks]) if blocks else xp.zeros(0, np.float32)
    return jnp.asarray(drawn[:count].reshape(shape) * np.float32(scale))


def lecun_normal(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Draw a kernel [..., fan_in parts, out] with variance 1 / fan_in (not truncated).

    Args:
      key: a typed PRNG key.
      shape: of the kernel, the output features last.
      dtype: of the result.

    Returns:
      An array of that shape.
    """
    return normal(key, shape, 1 / math.sqrt(math.prod(shape[:-1]))).astype(dtype)
