"""The transformer of Flux.1 (dev and schnell), as diffusers writes it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from rgdiff.pretrained._blocks import check_image
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.layers import ACTIVATIONS, dense, plain_norm
from rgdiff.pretrained.transformer import (
    JointAttention,
    JointTransformerBlock,
    Modulation,
    TimeTextEmbedding,
    modulate,
    rematerialised,
    wide,
)
from rgdiff.typing import Array

READ = {
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
INPUTS = ("joint_attention_dim", "pooled_projection_dim")  # widths of inputs, which the parameters have anyway
PERIOD = 10_000.0
PACK = 2  # latents on a token's side


def pack(x: Array) -> Array:
    """Make tokens of latents' 2 x 2 squares: [B, H, W, C] -> [B, H W / 4, 4 C]; a channel's four numbers are neighbours."""
    batch, height, width, channels = x.shape
    h = x.reshape(batch, height // PACK, PACK, width // PACK, PACK, channels).transpose(0, 1, 3, 5, 2, 4)
    return h.reshape(batch, -1, channels * PACK * PACK)


def unpack(tokens: Array, height: int, width: int) -> Array:
    """Invert `pack`: [B, H W / 4, 4 C] -> [B, H, W, C]."""
    h = tokens.reshape(tokens.shape[0], height // PACK, width // PACK, -1, PACK, PACK).transpose(0, 1, 4, 2, 5, 3)
    return h.reshape(h.shape[0], height, width, -1)


def rotation(text: int, rows: int, columns: int, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Return the rotary embedding's cosines and sines.

    A token's three coordinates are 0, its row and its column; all are 0 for text. Each turns a part of a head's features.

    Args:
      text: number of text tokens, which come first.
      rows: of image tokens.
      columns: of image tokens.
      axes: features of a head that each coordinate turns, even.

    Returns:
      Cosines and sines, each [text + rows columns, sum(axes) / 2], float32, computed in float64.
    """
    grid = np.stack([np.zeros(rows * columns), np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)])
    places = np.concatenate([np.zeros((3, text)), grid], 1)
    angles = [np.outer(at, PERIOD ** -(np.arange(0, n, 2) / n)) for at, n in zip(places, axes, strict=True)]
    turned = np.concatenate(angles, 1)
    return jnp.asarray(np.cos(turned), jnp.float32), jnp.asarray(np.sin(turned), jnp.float32)


class _SingleBlock(nn.Module):
    """Attention and a feed-forward network side by side, on text and image tokens as one sequence."""

    heads: int
    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, emb: Array, turned: tuple[Array, Array]) -> Array:
        shift, scale, gate = Modulation(3, self.width, self.dtype, name="norm")(emb)
        h = modulate(plain_norm(x), shift, scale)
        (mixed,) = JointAttention(self.heads, self.width, True, (), self.dtype, name="attn")(h, rotation=turned)
        fed = ACTIVATIONS["gelu_new"](dense(4 * self.width, name="proj_mlp", dtype=self.dtype)(h))
        both = jnp.concatenate([mixed, fed], -1)
        return x + gate[:, None] * dense(self.width, name="proj_out", dtype=self.dtype)(both)


class FluxTransformer2DModel(nn.Module):
    """Flux.1: latents, times, the text as tokens and as one vector -> velocity eps - x0.

    The first blocks have separate maps for text and image (as SD3's), the later ones are shared. Latents are packed and unpacked
    inside. Flux.1-dev was distilled with guidance: it takes a guidance scale (3.5 is usual) in place of a second call without
    text; Flux.1-schnell takes none. Networks with further input channels (Canny, Depth) take them as further channels of x.

    Args:
      config: of the file.
      dtype: of the computation; that of parameters and input by default. Norms, softmax, rotations, the conditioning and
        output are float32.
      remat: "block" computes each block again in the backward pass.

    Raises:
      ValueError: for a setting that is not known or not supported, a guidance where none is taken, or none where one is.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.config import Config
      >>> from rgdiff.pretrained.flux import FluxTransformer2DModel
      >>> tiny = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
      >>> net = FluxTransformer2DModel(Config({**tiny, "axes_dims_rope": [2, 2, 4], "guidance_embeds": True}))
      >>> x, t, tokens, pooled = jnp.zeros((2, 4, 6, 16)), jnp.zeros(2), jnp.zeros((2, 5, 7)), jnp.zeros((2, 3))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, tokens, pooled, jnp.full(2, 3.5))[0].shape
      (2, 4, 6, 16)
    """

    config: Config
    dtype: Any = None
    remat: str | None = None

    def __post_init__(self):
        self.settings()
        rematerialised(_SingleBlock, self.remat)
        super().__post_init__()

    def settings(self) -> Config:
        """Return the settings that are read, with those that the file leaves out."""
        c = self.config.settings("FluxTransformer2DModel", READ, {"patch_size": 1}, INPUTS)
        if len(c["axes_dims_rope"]) != 3 or sum(c["axes_dims_rope"]) != c["attention_head_dim"]:
            raise ValueError(
                f"axes_dims_rope is {list(c['axes_dims_rope'])}, expected three numbers of sum {c['attention_head_dim']}"
            )
        return c

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        encoder_hidden_states: Array,
        pooled_projections: Array,
        guidance: Array | None = None,
    ) -> Array:
        """Return the velocity.

        Args:
          x: [B, H, W, in_channels / 4], latents that are not packed.
          t: [B], 1000 sigma, as for SD3; diffusers' class takes sigma and multiplies it itself.
          encoder_hidden_states: [B, L, joint_attention_dim], the text.
          pooled_projections: [B, pooled_projection_dim], the text.
          guidance: [B], the guidance scale, exactly where the config has `guidance_embeds`.

        Returns:
          [B, H, W, out_channels / 4].
        """
        c = self.settings()
        if (guidance is not None) != c["guidance_embeds"]:
            raise ValueError(
                "this network is distilled with guidance: give guidance [B], such as 3.5"
                if c["guidance_embeds"]
                else "this network takes no guidance: leave it out"
            )
        check_image(type(self).__name__, x, c["in_channels"] // PACK**2, PACK)
        heads, (_, height, side, _) = c["num_attention_heads"], x.shape
        width, text = heads * c["attention_head_dim"], encoder_hidden_states.shape[1]
        h = dense(width, name="x_embedder", dtype=self.dtype)(pack(x))
        emb = TimeTextEmbedding(width, name="time_text_embed")(
            t, pooled_projections, None if guidance is None else 1000 * wide(guidance)
        )
        context = dense(width, name="context_embedder", dtype=self.dtype)(encoder_hidden_states)
        turned = rotation(text, height // PACK, side // PACK, c["axes_dims_rope"])
        double, single = (rematerialised(block, self.remat) for block in (JointTransformerBlock, _SingleBlock))
        for i in range(c["num_layers"]):
            block = double(heads, width, qk_norm=True, dtype=self.dtype, name=f"transformer_blocks.{i}")
            h, context = block(h, context, emb, turned)
        h = jnp.concatenate([context, h], 1)
        for i in range(c["num_single_layers"]):
            h = single(heads, width, self.dtype, name=f"single_transformer_blocks.{i}")(h, emb, turned)
        scale, shift = Modulation(2, width, self.dtype, name="norm_out")(emb)
        h = modulate(plain_norm(h[:, text:]), shift, scale)
        out = c.get("out_channels", c["in_channels"])
        return wide(unpack(dense(out, name="proj_out", dtype=self.dtype)(h), height, side))
