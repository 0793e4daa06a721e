"""The transformer of Stable Diffusion 3 and 3.5 (MMDiT, arXiv:2403.03206), as diffusers writes it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from rgdiff.pretrained._blocks import check_image
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.layers import dense, plain_norm
from rgdiff.pretrained.transformer import (
    JointTransformerBlock,
    Modulation,
    PatchEmbed,
    TimeTextEmbedding,
    modulate,
    rematerialised,
    unpatch,
    wide,
)
from rgdiff.typing import Array

READ = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "caption_projection_dim": 1152,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
INPUTS = ("joint_attention_dim", "pooled_projection_dim")  # widths of inputs, which the parameters have anyway
FROZEN = ("pos_embed/pos_embed",)  # leaves that are buffers in PyTorch


class SD3Transformer2DModel(nn.Module):
    """SD3: latents, times, the text as tokens and as one vector -> velocity eps - x0.

    SD3.5 divides queries and keys by their root mean square; SD3.5-M has a second attention of the image to itself in its first
    blocks.

    The table of positions, `params["pos_embed"]["pos_embed"]`, is a buffer in PyTorch and a leaf here. No gradient flows through it;
    `from_diffusers` takes the leaves of `FROZEN` out of the prior's parameters, so that no weight decay changes them either.

    Args:
      config: of the file.
      dtype: of the computation; that of parameters and input by default. Norms, softmax, the conditioning and output are
        float32.
      remat: "block" computes each block again in the backward pass.

    Raises:
      ValueError: for a setting that is not known or not supported, or an image that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.config import Config
      >>> from rgdiff.pretrained.sd3 import SD3Transformer2DModel
      >>> tiny = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
      >>> net = SD3Transformer2DModel(Config({**tiny, "sample_size": 4, "pos_embed_max_size": 6}))
      >>> x, t, tokens, pooled = jnp.zeros((2, 8, 4, 16)), jnp.zeros(2), jnp.zeros((2, 5, 7)), jnp.zeros((2, 3))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, tokens, pooled)[0].shape
      (2, 8, 4, 16)
    """

    config: Config
    dtype: Any = None
    remat: str | None = None

    def __post_init__(self):
        self.settings()
        rematerialised(JointTransformerBlock, self.remat)
        super().__post_init__()

    def settings(self) -> Config:
        """Return the settings that are read, with those that the file leaves out."""
        choices = {"qk_norm": (None, "rms_norm")}
        c = self.config.settings("SD3Transformer2DModel", READ, harmless=INPUTS, choices=choices)
        width = c["num_attention_heads"] * c["attention_head_dim"]
        if c["caption_projection_dim"] != width:
            raise ValueError(f"caption_projection_dim is {c['caption_projection_dim']}, expected {width}, the width")
        return c

    @nn.compact
    def __call__(self, x: Array, t: Array, encoder_hidden_states: Array, pooled_projections: Array) -> Array:
        """Return the velocity.

        Args:
          x: [B, H, W, in_channels], latents.
          t: [B], 1000 sigma.
          encoder_hidden_states: [B, L, joint_attention_dim], the text.
          pooled_projections: [B, pooled_projection_dim], the text.

        Returns:
          [B, H, W, out_channels].
        """
        c = self.settings()
        heads, patch = c["num_attention_heads"], c["patch_size"]
        width, last, normed = heads * c["attention_head_dim"], c["num_layers"] - 1, c["qk_norm"] is not None
        check_image(type(self).__name__, x, c["in_channels"], patch)
        base, table = c["sample_size"] // patch, c["pos_embed_max_size"]
        h = PatchEmbed(width, patch, base, table, self.dtype, name="pos_embed")(x)
        emb = TimeTextEmbedding(width, name="time_text_embed")(t, pooled_projections)
        context = dense(width, name="context_embedder", dtype=self.dtype)(encoder_hidden_states)
        block = rematerialised(JointTransformerBlock, self.remat)
        for i in range(c["num_layers"]):
            dual, name = i in c["dual_attention_layers"], f"transformer_blocks.{i}"
            h, context = block(heads, width, normed, dual, i == last, self.dtype, name=name)(h, context, emb)
        scale, shift = Modulation(2, width, self.dtype, name="norm_out")(emb)
        h = modulate(plain_norm(h), shift, scale)
        h = dense(patch * patch * c["out_channels"], name="proj_out", dtype=self.dtype)(h)
        return wide(unpatch(h, x.shape[1] // patch, x.shape[2] // patch, patch))
