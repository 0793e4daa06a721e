"""The conditioning of a network: the time and the class, as one vector per example.

It holds the sinusoidal features of t and the small embedding network that all reference nets share. It assumes
times in [0, 1] and integer labels in 0..N-1, with N for "no class". Each network decides where the vector enters.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.nets.init import lecun_normal
from rgdiff.typing import Array, Cond


def time_features(t: Array, features: int) -> Array:
    """Compute [cos(1000 t w_i), sin(1000 t w_i)] with w_i = 10000^(-i / (features / 2)).

    Args:
      t: times in [0, 1], any shape.
      features: number of features, even.

    Returns:
      [*t.shape, features], float32.

    Raises:
      ValueError: for an odd number of features, or fewer than 2.

    References:
      Transformer positions (arXiv:1706.03762) at 1000 t, as in DDPM (arXiv:2006.11239).

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(rgdiff.nets.time_features(jnp.zeros(1), 4))  # cos 0, sin 0
      [[1. 1. 0. 0.]]
    """
    if features < 2 or features % 2:
        raise ValueError(f"time features come in (cos, sin) pairs; got {features}, give an even number >= 2")
    half = features // 2
    angles = 1000.0 * jnp.asarray(t, jnp.float32)[..., None] * 10000.0 ** (-jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Conditioning(nn.Module):
    """Embed (t, cond) as one vector per example: Dense(SiLU(Dense(time_features(t)))) + class row.

    Args:
      features: size of the vector.
      time_size: number of sinusoidal features, even.
      classes: number N of classes, or None for a network without classes. Row N means "no class".
      deep: whether SiLU and a second Dense follow the first.
      dtype: of the computation and of the result.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.Conditioning(features=8, time_size=4, classes=10)
      >>> t, labels = jnp.zeros(3), jnp.array([0, 9, 10])
      >>> jax.eval_shape(lambda key: net.init_with_output(key, 3, t, labels), jax.random.key(0))[0].shape
      (3, 8)
    """

    features: int
    time_size: int = 64
    classes: int | None = None
    deep: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch: int, t: Array, cond: Cond = None) -> Array:
        t = jnp.asarray(t, jnp.float32)
        if t.shape not in ((), (batch,)):
            raise ValueError(f"t is one number or one per example ({batch}); got shape {t.shape}")
        if self.classes is None and cond is not None:
            raise ValueError("this network has no classes but got a cond; build it with classes=N or pass cond=None")
        h = time_features(jnp.broadcast_to(t, (batch,)), self.time_size).astype(self.dtype)
        h = nn.Dense(self.features, kernel_init=lecun_normal, dtype=self.dtype, name="dense0")(h)
        if self.deep:
            h = nn.Dense(self.features, kernel_init=lecun_normal, dtype=self.dtype, name="dense1")(nn.silu(h))
        if self.classes is None:
            return h
        labels = jnp.asarray(self.classes if cond is None else cond)
        if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape not in ((), (batch,)):
            raise ValueError(
                f"cond is one integer label, or one per example ({batch}); got {labels.dtype} {labels.shape}"
            )
        table = nn.Embed(self.classes + 1, self.features, dtype=self.dtype, name="classes")
        return h + table(jnp.broadcast_to(labels, (batch,)))
