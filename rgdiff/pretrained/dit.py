"""DiT, the class-conditional diffusion transformer (arXiv:2212.09748), as diffusers writes it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.pretrained._blocks import check_image
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.layers import Attention, TimestepEmbedding, dense, plain_norm
from rgdiff.pretrained.transformer import (
    FeedForward,
    Modulation,
    PatchEmbed,
    modulate,
    rematerialised,
    times,
    unpatch,
    wide,
)
from rgdiff.typing import Array

READ = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
FIXED = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
HARMLESS = ("norm_num_groups", "dropout", "upcast_attention")  # no group norm, training only, scores are float32 anyway


class _LabelEmbedding(nn.Module):
    count: int
    width: int

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        return nn.Embed(self.count, self.width, name="embedding_table")(labels)


class _Conditioning(nn.Module):
    """Time plus class, float32."""

    width: int
    classes: int
    shift: float

    @nn.compact
    def __call__(self, t: Array, labels: Array) -> Array:
        time = TimestepEmbedding(self.width, name="timestep_embedder")(times(t, self.shift))
        return time + _LabelEmbedding(self.classes + 1, self.width, name="class_embedder")(labels)


class _AdaLayerNormZero(Modulation):
    """Modulation by time and class; every block has its own embedders, and the last layer reads the first block's."""

    classes: int = 0
    shift: float = 1.0

    @nn.compact
    def __call__(self, t: Array, labels: Array) -> tuple[Array, ...]:  # type: ignore[override]
        emb = _Conditioning(self.width, self.classes, self.shift, name="emb")(t, labels)
        out = dense(self.parts * self.width, name="linear", dtype=self.dtype)(nn.silu(emb))
        return (emb, *jnp.split(out, self.parts, -1))


class _Block(nn.Module):
    config: Config
    freq_shift: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, t: Array, labels: Array) -> tuple[Array, Array]:
        c, width, heads = self.config, x.shape[-1], self.config["num_attention_heads"]
        norm = _AdaLayerNormZero(6, width, self.dtype, c["num_embeds_ada_norm"], self.freq_shift, name="norm1")
        emb, *vectors = norm(t, labels)
        attention = Attention(width, heads, width, c["attention_bias"], dtype=self.dtype, name="attn1")
        x = x + vectors[2][:, None] * attention(modulate(plain_norm(x), *vectors[:2]))
        h = modulate(plain_norm(x, c["norm_eps"]), *vectors[3:5])
        return x + vectors[5][:, None] * FeedForward(width, self.dtype, name="ff")(h), emb


class DiTTransformer2DModel(nn.Module):
    """DiT: latents, times and class labels -> noise, and the learnt variance's channels.

    The released networks have twice as many output channels as input channels: the first half is eps; the second half are
    weights in [-1, 1] between the logarithms of the smallest and the largest variance of a step, which a prior of eps ignores.
    Positions are sines and cosines that no file holds.

    SiT (arXiv:2401.08740) is the same network: its output's first half is the velocity (the second is not used), t is in [0, 1],
    and `freq_shift` is 0. Its files have other names, for which there is no mapping here.

    Args:
      config: of the file.
      dtype: of the computation; that of parameters and input by default. Norms, softmax, the time embedding and output are
        float32.
      remat: "block" computes each block again in the backward pass.
      freq_shift: of the times' sinusoids; 1 in diffusers' DiT, 0 in SiT.

    Raises:
      ValueError: for a setting that is not known or not supported, or an image of another size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.config import Config
      >>> from rgdiff.pretrained.dit import DiTTransformer2DModel
      >>> tiny = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4, "out_channels": 8}
      >>> net, x, t, labels = DiTTransformer2DModel(Config(tiny)), jnp.zeros((2, 4, 4, 4)), jnp.zeros(2), jnp.array([3, 1000])
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, labels)[0].shape
      (2, 4, 4, 8)
    """

    config: Config
    dtype: Any = None
    remat: str | None = None
    freq_shift: float = 1.0

    def __post_init__(self):
        self.settings()
        rematerialised(_Block, self.remat)
        super().__post_init__()

    def settings(self) -> Config:
        """Return the settings that are read, with those that the file leaves out."""
        return self.config.settings("DiTTransformer2DModel", READ, FIXED, HARMLESS)

    @nn.compact
    def __call__(self, x: Array, t: Array, class_labels: Array) -> Array:
        """Return the network's output.

        Args:
          x: [B, H, W, in_channels], latents.
          t: [B], steps 0 ... 999 (SiT: [0, 1]).
          class_labels: [B], integers; `num_embeds_ada_norm` (1000 for ImageNet) is "no class".

        Returns:
          [B, H, W, out_channels].
        """
        c = self.settings()
        patch, width = c["patch_size"], c["num_attention_heads"] * c["attention_head_dim"]
        check_image(type(self).__name__, x, c["in_channels"], patch)
        base = c["sample_size"] // patch
        h = PatchEmbed(width, patch, base, None, self.dtype, name="pos_embed")(x)
        block, embeddings = rematerialised(_Block, self.remat), []
        for i in range(c["num_layers"]):
            h, emb = block(c, self.freq_shift, self.dtype, name=f"transformer_blocks.{i}")(h, t, class_labels)
            embeddings.append(emb)
        vectors = dense(2 * width, name="proj_out_1", dtype=self.dtype)(nn.silu(embeddings[0]))
        h = modulate(plain_norm(h), *jnp.split(vectors, 2, -1))
        out = c.get("out_channels", c["in_channels"])
        h = dense(patch * patch * out, name="proj_out_2", dtype=self.dtype)(h)
        return wide(unpatch(h, x.shape[1] // patch, x.shape[2] // patch, patch))
