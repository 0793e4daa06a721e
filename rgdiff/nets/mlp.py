"""A multilayer perceptron on states of any shape, for denoisers and for values.

It holds the perceptron and the value network made of it. It assumes examples small enough to flatten.
Structure in space or along a sequence is left to the other networks.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.nets.init import lecun_normal
from rgdiff.nets.time import Conditioning
from rgdiff.typing import Array, Cond


class MLP(nn.Module):
    """Map (x, t, cond) to an array per example: h <- SiLU(Dense(h) + Dense(emb)), then Dense, zero at first.

    Args:
      features: sizes of the hidden layers.
      out: shape of the output per example; the state's own when None, () for a scalar ([B]).
      classes: number N of classes, or None. Label N, or cond=None, means "no class".
      dtype: of the computation; input, output and parameters are float32.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.MLP(features=(8,), out=(5,))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((3, 2)), jnp.zeros(3))[0].shape
      (3, 5)
    """

    features: tuple[int, ...] = (256, 256)
    out: tuple[int, ...] | None = None
    classes: int | None = None
    dtype: Any = jnp.float32
    scalar_time = True  # a time [] is embedded once for all examples

    def __post_init__(self):
        if isinstance(self.out, int):
            raise ValueError(f"out is a shape per example; got {self.out}, give ({self.out},), or () for a scalar")
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "out", None if self.out is None else tuple(self.out))
        if not self.features or min(self.features) < 1:
            raise ValueError(f"features are the sizes of one or more hidden layers; got {self.features}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        batch, shape = x.shape[0], x.shape[1:] if self.out is None else self.out
        width = self.features[0]
        rows = 1 if jnp.ndim(t) == 0 and (cond is None or jnp.ndim(cond) == 0) else batch  # one embedding serves all
        emb = nn.silu(Conditioning(width, 64, self.classes, dtype=self.dtype, name="emb")(rows, t, cond))
        h = x.reshape(batch, -1)
        for i, size in enumerate(self.features):
            h = nn.Dense(size, kernel_init=lecun_normal, dtype=self.dtype, name=f"dense{i}")(h)
            h = nn.silu(
                h + nn.Dense(size, use_bias=False, kernel_init=lecun_normal, dtype=self.dtype, name=f"emb{i}")(emb)
            )
        zeros = nn.initializers.zeros
        h = nn.Dense(math.prod(shape), kernel_init=zeros, dtype=self.dtype, name="out")(h)
        return h.reshape(batch, *shape).astype(jnp.float32)


class ValueMLP(nn.Module):
    """Map (x, t, cond) to one number per example, [B]: an `MLP` with `out=()`.

    Args:
      features: sizes of the hidden layers.
      classes: number N of classes, or None. Label N, or cond=None, means "no class".
      dtype: of the computation; input, output and parameters are float32.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.ValueMLP(features=(8,))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((3, 2)), jnp.zeros(3))[0].shape
      (3,)
    """

    features: tuple[int, ...] = (256, 256)
    classes: int | None = None
    dtype: Any = jnp.float32
    scalar_time = True

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        return MLP(self.features, (), self.classes, self.dtype, name="mlp")(x, t, cond)
