"""Small transformers with adaptive layer norms, for token sequences and for images cut into patches.

It holds rotary positions, the adaLN-zero block and the two networks made of it. It assumes inputs small
enough for full attention. Text encoders and cross-attention are left out.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.nets.attention import attention
from rgdiff.nets.init import lecun_normal
from rgdiff.nets.time import Conditioning
from rgdiff.typing import Array, Cond


def rotary(x: Array, positions: Array) -> Array:
    """Rotate pairs of channels by angles proportional to position, an equal share of channels per axis.

    Args:
      x: [B, T, heads, D], D a multiple of 2 A.
      positions: [T, A], coordinates of each token on A axes.

    Returns:
      [B, T, heads, D]; inner products of rotated vectors depend on differences of positions only.

    References:
      RoFormer (arXiv:2104.09864).
    """
    axes, pairs = positions.shape[1], x.shape[-1] // (2 * positions.shape[1])
    angles = positions[:, :, None] * 10000.0 ** (-jnp.arange(pairs) / pairs)  # [T, A, pairs]
    cos, sin = (f(angles).astype(x.dtype)[:, None] for f in (jnp.cos, jnp.sin))  # [T, 1, A, pairs]
    a, b = jnp.moveaxis(x.reshape(*x.shape[:-1], axes, 2, pairs), -2, 0)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-2).reshape(x.shape)


def _modulation(emb: Array, parts: int, width: int, dtype: Any, name: str) -> list[Array]:
    """Return `parts` vectors [B, 1, width], zero at first."""
    out = nn.Dense(parts * width, kernel_init=nn.initializers.zeros, dtype=dtype, name=name)(nn.silu(emb))
    return jnp.split(out[:, None, :], parts, axis=-1)


def _norm(x: Array, scale: Array, shift: Array, dtype: Any) -> Array:
    x = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)(x).astype(dtype)
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Add gated self-attention, then a gated perceptron of 4 times the width; both gates zero at first."""

    width: int
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Array, emb: Array, positions: Array) -> Array:
        scale1, shift1, gate1, scale2, shift2, gate2 = _modulation(emb, 6, self.width, self.dtype, "mod")
        qkv = nn.Dense(3 * self.width, kernel_init=lecun_normal, dtype=self.dtype, name="qkv")(
            _norm(h, scale1, shift1, self.dtype)
        )
        q, k, v = (a.reshape(*h.shape[:2], self.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        mixed = attention(rotary(q, positions), rotary(k, positions), v).reshape(h.shape)
        h = h + gate1 * nn.Dense(self.width, kernel_init=lecun_normal, dtype=self.dtype, name="out")(mixed)
        up = nn.Dense(4 * self.width, kernel_init=lecun_normal, dtype=self.dtype, name="up")(
            _norm(h, scale2, shift2, self.dtype)
        )
        return h + gate2 * nn.Dense(self.width, kernel_init=lecun_normal, dtype=self.dtype, name="down")(nn.gelu(up))


class _Trunk(nn.Module):
    """Tokens [B, T, features] to [B, T, out]: Dense, blocks, adaptive norm, Dense that is zero at first."""

    out: int
    width: int
    depth: int
    heads: int
    classes: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, positions: Array, t: Array, cond: Cond) -> Array:
        emb = Conditioning(self.width, 64, self.classes, dtype=self.dtype, name="emb")(x.shape[0], t, cond)
        h = nn.Dense(self.width, kernel_init=lecun_normal, dtype=self.dtype, name="in")(x)
        for i in range(self.depth):
            h = Block(self.width, self.heads, self.dtype, name=f"block{i}")(h, emb, positions)
        scale, shift = _modulation(emb, 2, self.width, self.dtype, "mod")
        out = nn.Dense(self.out, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out")
        return out(_norm(h, scale, shift, self.dtype)).astype(jnp.float32)


def _check_heads(width: int, heads: int, axes: int) -> None:
    if heads < 1 or width % (2 * axes * heads):
        raise ValueError(f"width must be a multiple of {2 * axes} * heads; got width {width}, heads {heads}")


class Transformer(nn.Module):
    """Map one-hot sequences [B, L, K + 1] to logits [B, L, K].

    Args:
      out: number K of tokens, the mask not counted; None takes that of the input less one.
      width, depth, heads: channels, blocks, attention heads; width a multiple of 2 * heads.
      classes: number N of classes, or None. Label N, or cond=None, means "no class".
      dtype: of the computation; input, output and parameters are float32.

    Raises:
      ValueError: for a width that is not a multiple of 2 * heads.

    References:
      DiT (arXiv:2212.09748) with rotary positions, as in MDLM (arXiv:2406.07524).

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.Transformer(out=4, width=8, depth=1, heads=2)
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 6, 5)), jnp.zeros(2))[0].shape
      (2, 6, 4)
    """

    out: int | None = None
    width: int = 128
    depth: int = 4
    heads: int = 4
    classes: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        _check_heads(self.width, self.heads, 1)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        if x.ndim != 3:
            raise ValueError(f"Transformer takes one-hot sequences [B, L, K + 1]; got shape {x.shape}")
        out = x.shape[2] - 1 if self.out is None else self.out
        trunk = _Trunk(out, self.width, self.depth, self.heads, self.classes, self.dtype, name="trunk")
        return trunk(x, jnp.arange(x.shape[1], dtype=jnp.float32)[:, None], t, cond)


class DiT(nn.Module):
    """Map an image [B, H, W, C], a time and a class to an image, through tokens of patch x patch pixels.

    Args:
      patch: side of a patch; divides H and W.
      width, depth, heads: channels, blocks, attention heads; width a multiple of 4 * heads.
      classes: number N of classes, or None. Label N, or cond=None, means "no class".
      out_channels: channels of the output; those of the input when None.
      dtype: of the computation; input, output and parameters are float32.

    Raises:
      ValueError: for a width that is not a multiple of 4 * heads; at a call, for sides that patch does not divide.

    References:
      DiT (arXiv:2212.09748); positions are rotary on two axes.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.DiT(width=8, depth=1, heads=2)
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 4, 4, 1)), jnp.zeros(2))[0].shape
      (2, 4, 4, 1)
    """

    patch: int = 2
    width: int = 128
    depth: int = 4
    heads: int = 4
    classes: int | None = None
    out_channels: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        _check_heads(self.width, self.heads, 2)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        p = self.patch
        if x.ndim != 4 or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(f"DiT takes images [B, H, W, C], H and W multiples of patch = {p}; got {x.shape}")
        batch, rows, columns, channels = (
            x.shape[0],
            x.shape[1] // p,
            x.shape[2] // p,
            self.out_channels or x.shape[3],
        )
        tokens = x.reshape(batch, rows, p, columns, p, -1).swapaxes(2, 3).reshape(batch, rows * columns, -1)
        grid = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
        positions = jnp.stack(grid, axis=-1).reshape(-1, 2).astype(jnp.float32)
        trunk = _Trunk(p * p * channels, self.width, self.depth, self.heads, self.classes, self.dtype, name="trunk")
        out = trunk(tokens, positions, t, cond).reshape(batch, rows, columns, p, p, channels)
        return out.swapaxes(2, 3).reshape(batch, rows * p, columns * p, channels)
