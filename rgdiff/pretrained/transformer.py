"""Blocks that the diffusion transformers (DiT, SD3, Flux) share, named as in their state dicts.

Tokens are [B, L, D] and conditioning vectors [B, D]. Layer norms here have no parameters: shift, scale and gate come from
the conditioning, each a linear map of its SiLU. Linear maps and attention compute in `dtype`; norms, time embeddings and
rotations compute in float32.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rgdiff.pretrained.layers import ACTIVATIONS, TimestepEmbedding, attend, conv, dense, plain_norm, sinusoids
from rgdiff.typing import Array


def rematerialised(block: Any, remat: str | None) -> Any:
    """Return a block's class, computed again in the backward pass for `remat="block"`.

    Raises:
      ValueError: for another value than None and "block".
    """
    if remat not in (None, "block"):
        raise ValueError(f"remat is {remat!r}, expected None or 'block'")
    return nn.remat(block) if remat else block


def wide(x: Array) -> Array:
    """Return an output in float32; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Return x (1 + scale) + shift, for x [B, L, D] and vectors [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """`linear` of the SiLU of a conditioning vector: [B, D] -> `parts` vectors [B, width]."""

    parts: int
    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, emb: Array) -> tuple[Array, ...]:
        out = dense(self.parts * self.width, name="linear", dtype=self.dtype)(nn.silu(emb))
        return tuple(jnp.split(out, self.parts, -1))


class FeedForward(nn.Module):
    """net.0.proj to four times the width, GELU in its tanh form, net.2."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = ACTIVATIONS["gelu_new"](dense(4 * self.width, name="net.0.proj", dtype=self.dtype)(x))
        return dense(self.width, name="net.2", dtype=self.dtype)(h)


def grid_sinusoids(width: int, rows: int, columns: int, base: int) -> Array:
    """Return sines and cosines of a grid's positions, first of the column and then of the row.

    Args:
      width: D, a multiple of 4.
      rows: H, in patches.
      columns: W, in patches.
      base: side of the grid that the network was trained on; other grids are stretched to it.

    Returns:
      [H W, D], float32, computed in float64.
    """
    frequencies = 1.0 / 10_000 ** (np.arange(width // 4) / (width / 4))

    def waves(count: int) -> Array:
        at = np.arange(count, dtype=np.float32) / np.float32(count / base)
        angles = np.outer(at.astype(np.float64), frequencies)
        return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], 1), jnp.float32)

    shape = (rows, columns, width // 2)
    parts = (jnp.broadcast_to(waves(columns), shape), jnp.broadcast_to(waves(rows)[:, None], shape))
    return jnp.concatenate(parts, -1).reshape(-1, width)


class PatchEmbed(nn.Module):
    """proj, a convolution of patches without overlap, plus positions: [B, H, W, C] -> [B, H W / patch^2, width].

    With `table` = m, positions are the centre of a stored table `pos_embed` [1, m^2, width], through which no gradient flows: it
    is a buffer in PyTorch. Otherwise they are `grid_sinusoids`.
    """

    width: int
    patch: int
    base: int
    table: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = conv(self.width, self.patch, self.patch, (0, 0), name="proj", dtype=self.dtype)(x)
        rows, columns = h.shape[1:3]
        if self.table is None:
            positions = grid_sinusoids(self.width, rows, columns, self.base)
        else:
            side = self.table
            if max(rows, columns) > side:
                raise ValueError(
                    f"{rows} x {columns} patches do not fit pos_embed_max_size = {side}; use a smaller image"
                )
            stored = self.param("pos_embed", _grid_init(self.width, side, self.base), (1, side * side, self.width))
            top, left = (side - rows) // 2, (side - columns) // 2
            stored = jax.lax.stop_gradient(stored).reshape(side, side, self.width)
            positions = stored[top : top + rows, left : left + columns].reshape(-1, self.width)
        return h.reshape(h.shape[0], -1, self.width) + positions.astype(h.dtype)


def _grid_init(width: int, side: int, base: int) -> Any:
    return lambda key, shape: grid_sinusoids(width, side, side, base).reshape(shape)


def unpatch(tokens: Array, rows: int, columns: int, patch: int) -> Array:
    """Return the image of tokens: [B, rows columns, patch^2 C] -> [B, rows patch, columns patch, C]."""
    h = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(h.shape[0], rows * patch, columns * patch, -1)


def times(t: Array, shift: float = 0.0) -> Array:
    """Return 256 sinusoids of times, computed in float32 whatever their dtype is, as in PyTorch: [B] -> [B, 256]."""
    return sinusoids(t.astype(jnp.float32), 256, shift=shift)


class TimeTextEmbedding(nn.Module):
    """Sum of timestep_embedder, text_embedder and, with a guidance, guidance_embedder, in float32.

    Args of a call:
      t: [B], steps 0 ... 1000.
      pooled: [B, P], the text as one vector.
      guidance: [B], 1000 times the guidance scale, or None.
    """

    width: int

    @nn.compact
    def __call__(self, t: Array, pooled: Array, guidance: Array | None = None) -> Array:
        out = TimestepEmbedding(self.width, name="timestep_embedder")(times(t))
        if guidance is not None:
            out = out + TimestepEmbedding(self.width, name="guidance_embedder")(times(guidance))
        return out + TimestepEmbedding(self.width, name="text_embedder")(wide(pooled))


def rotate(x: Array, rotation: tuple[Array, Array], heads: int) -> Array:
    """Turn each pair of neighbouring features of each head by its position's angle (RoPE, arXiv:2104.09864).

    Args:
      x: [B, L, D].
      rotation: cosines and sines, each [L, D / heads / 2], float32.
      heads: by which D is divided.

    Returns:
      [B, L, D].
    """
    pairs = wide(x).reshape(*x.shape[:2], heads, -1, 2)
    cosine, sine = (part[:, None] for part in rotation)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cosine - b * sine, b * cosine + a * sine], -1).reshape(x.shape).astype(x.dtype)


class JointAttention(nn.Module):
    """Attention among x and a context together, each with maps of its own (MMDiT, arXiv:2403.03206).

    x has to_q, to_k, to_v, the context add_q_proj, add_k_proj, add_v_proj. With `qk_norm`, queries and keys of each head are
    divided by their root mean square and scaled. Without a context it is self-attention.

    Args:
      heads: by which the width is divided.
      width: D.
      qk_norm: whether queries and keys are normalised.
      outputs: names of the last linear maps, of x and of the context; one name leaves the context's output out, none
        returns x's heads as they are.
      dtype: of the computation.
    """

    heads: int
    width: int
    qk_norm: bool = False
    outputs: tuple[str, ...] = ("to_out.0", "to_add_out")
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None = None, rotation: tuple[Array, Array] | None = None
    ) -> tuple[Array, ...]:
        streams = [(x, "to_{}", "norm_{}")]
        if context is not None:
            streams.insert(0, (context, "add_{}_proj", "norm_added_{}"))

        def joined(part: str) -> Array:
            out = []
            for rows, name, norm in streams:
                h = dense(self.width, name=name.format(part), dtype=self.dtype)(rows)
                if self.qk_norm and part != "v":
                    split = h.reshape(*h.shape[:2], self.heads, -1)
                    split = nn.RMSNorm(epsilon=1e-6, name=norm.format(part))(split)
                    h = split.reshape(h.shape).astype(h.dtype)
                out.append(h)
            h = jnp.concatenate(out, 1)
            return h if rotation is None or part == "v" else rotate(h, rotation, self.heads)

        h = attend(joined("q"), joined("k"), joined("v"), self.heads)
        before = h.shape[1] - x.shape[1]
        if not self.outputs:
            return (h[:, before:],)
        parts = (h[:, before:], h[:, :before])
        return tuple(
            dense(self.width, name=name, dtype=self.dtype)(part)
            for name, part in zip(self.outputs, parts, strict=False)
        )


class JointTransformerBlock(nn.Module):
    """A block of SD3 and a double block of Flux: joint attention and a feed-forward network for each stream.

    Args:
      heads: of the attention.
      width: D.
      qk_norm: whether queries and keys are normalised.
      dual: whether x has a second attention, to itself (SD3.5-M).
      last: whether the context is read only, and returned as it is (SD3's last block).
      dtype: of the computation.
    """

    heads: int
    width: int
    qk_norm: bool = False
    dual: bool = False
    last: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Array, context: Array, emb: Array, rotation: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        def attention(outputs: tuple[str, ...], name: str) -> JointAttention:
            return JointAttention(self.heads, self.width, self.qk_norm, outputs, self.dtype, name=name)

        def fed(rows: Array, shift: Array, scale: Array, gate: Array, name: str) -> Array:
            h = FeedForward(self.width, self.dtype, name=name)(modulate(plain_norm(rows), shift, scale))
            return rows + gate[:, None] * h

        normed = plain_norm(x)
        vectors = Modulation(9 if self.dual else 6, self.width, self.dtype, name="norm1")(emb)
        shift, scale, gate = vectors[:3]
        of_context = Modulation(2 if self.last else 6, self.width, self.dtype, name="norm1_context")(emb)
        first = of_context[::-1] if self.last else of_context[:2]  # the read-only one is (scale, shift)
        outputs = ("to_out.0",) if self.last else ("to_out.0", "to_add_out")
        h = attention(outputs, "attn")(modulate(normed, shift, scale), modulate(plain_norm(context), *first), rotation)
        x = x + gate[:, None] * h[0]
        if self.dual:
            shift, scale, gate = vectors[6:]
            x = x + gate[:, None] * attention(("to_out.0",), "attn2")(modulate(normed, shift, scale))[0]
        x = fed(x, *vectors[3:6], name="ff")
        if self.last:
            return x, context
        context = context + of_context[2][:, None] * h[1]
        return x, fed(context, *of_context[3:], name="ff_context")
