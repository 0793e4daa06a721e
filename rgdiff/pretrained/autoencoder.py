"""`AutoencoderKL`, the autoencoder of latent diffusion models: images [B, H, W, 3] in [-1, 1], latents [B, H / 8, W / 8, 4 or 16].

It is built from a config.json, and its parameters bear the names of its state dict (`rgdiff.pretrained.weights`); `rename` brings
old files to these names. Scaling and shifting latents for a denoiser is left to the caller: `scaling_factor` and
`shift_factor` are of the pipeline, not of the network.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.pretrained._blocks import (
    Downsample2D,
    ResnetBlock2D,
    Stage,
    Upsample2D,
    activation_of,
    check_image,
    head,
    recomputed,
    rename,
)
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.layers import Attention, conv
from rgdiff.typing import Array

__all__ = ["AutoencoderKL", "rename"]

EPSILON = 1e-6
LOG_VARIANCE = (-30.0, 20.0)
_READ = frozenset({
    "in_channels", "out_channels", "latent_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "act_fn", "norm_num_groups", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
    "sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast",
})  # fmt: skip


class _Coder(nn.Module):
    """The encoder or decoder: conv_in, the stages and their middle, the head."""

    config: Any  # a `Config`, or a mapping that becomes one
    direction: str
    dtype: Any = None
    remat: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, up = self.config, self.direction == "up"
        channels, groups = c["block_out_channels"], c.get("norm_num_groups", 32)
        channels = channels[::-1] if up else channels
        last, activation = len(channels) - 1, str(c.get("act_fn", "silu")).lower()
        stage, block, attention = (
            recomputed(one, self.remat, level)
            for one, level in ((Stage, "stage"), (ResnetBlock2D, "block"), (Attention, "block"))
        )

        def resnet(width: int) -> Any:
            return functools.partial(block, width, groups, EPSILON, activation, remat=self.remat, dtype=self.dtype)

        def middle(h: Array) -> Array:
            width, attend = h.shape[-1], None
            if c.get("mid_block_add_attention", True):
                attend = lambda i, name: attention(  # noqa: E731
                    width, 1, width, True, groups, EPSILON, residual=True, dtype=self.dtype, name=name
                )
            return stage("mid", 2, resnet(width), attend, name="mid_block")(h)[0]

        h = conv(channels[0], name="conv_in", dtype=self.dtype)(x)
        h = middle(h) if up else h
        for i, width in enumerate(channels):
            sampler = None
            if i < last:
                padding = () if up else (0,)
                sampler = functools.partial(Upsample2D if up else Downsample2D, width, *padding, dtype=self.dtype)
            layers = c.get("layers_per_block", 1) + up
            made = stage(
                self.direction, layers, resnet(width), None, sampler, skipped=False, name=f"{self.direction}_blocks.{i}"
            )
            h, _ = made(h)
        h = h if up else middle(h)
        features = c.get("out_channels", 3) if up else 2 * c.get("latent_channels", 4)
        return head(self, h, features, 3, groups, EPSILON, "silu")


class AutoencoderKL(nn.Module):
    """The autoencoder of Stable Diffusion, SDXL, SD3 and Flux.

    Settings are diffusers' and default to its defaults, but for channels, which must be there. Refused by name: other types
    of stages than DownEncoderBlock2D and UpDecoderBlock2D. The old files' names of attention's maps: see `rename`.

    Args:
      config: settings of config.json.
      dtype: of the computation; None for that of input and parameters. Norms' statistics and softmax are float32 anyway. SDXL's
        first autoencoder overflows in float16 (`force_upcast`).
      remat: what the backward pass computes again: nothing (None), each "stage" or each "block".

    Call:
      encode(x): x [B, H, W, in_channels] -> mean and log variance of the latents, [B, H / f, W / f, latent_channels] each,
        f = 2^(stages - 1), the log variance clipped to [-30, 20].
      decode(z): z [B, h, w, latent_channels] -> [B, f h, f w, out_channels].
      The module itself: decode(encode(x)[0]). All outputs are float32.

    Raises:
      ValueError: in one line, for a setting that is not supported or an input that does not fit.

    References:
      Latent diffusion (arXiv:2112.10752).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.autoencoder import AutoencoderKL
      >>> net = AutoencoderKL({"block_out_channels": [32, 32], "latent_channels": 4})
      >>> x = jnp.zeros((2, 8, 8, 3))
      >>> params = jax.eval_shape(net.init, jax.random.key(0), x)
      >>> jax.eval_shape(lambda params, x: net.apply(params, x, method="encode"), params, x)[0].shape
      (2, 4, 4, 4)
    """

    config: Any  # a `Config`, or a mapping that becomes one
    dtype: Any = None
    remat: str | None = None

    def __post_init__(self):
        if not isinstance(self.config, Config):
            object.__setattr__(self, "config", Config(self.config))
        c = self.config
        recomputed(Stage, self.remat, "stage")
        c.refuse("AutoencoderKL", _READ, {})
        channels, groups = c["block_out_channels"], c.get("norm_num_groups", 32)
        for key, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = c.get(key, (only,) * len(channels))
            if len(types) != len(channels):
                raise ValueError(f"AutoencoderKL: {key} has {len(types)} types for {len(channels)} block_out_channels")
            for name in types:
                if name != only:
                    raise ValueError(f"AutoencoderKL does not support {key} = {name!r}; known is {only}")
        if any(width % groups for width in channels):
            raise ValueError(f"AutoencoderKL: norm_num_groups {groups} does not divide block_out_channels {channels}")
        activation_of(c, "AutoencoderKL")
        super().__post_init__()

    def setup(self):
        c, latent = self.config, self.config.get("latent_channels", 4)
        self.encoder = _Coder(c, "down", self.dtype, self.remat)
        self.decoder = _Coder(c, "up", self.dtype, self.remat)
        if c.get("use_quant_conv", True):
            self.quant_conv = conv(2 * latent, 1, dtype=self.dtype)
        if c.get("use_post_quant_conv", True):
            self.post_quant_conv = conv(latent, 1, dtype=self.dtype)

    def __call__(self, x: Array) -> Array:
        return self.decode(self.encode(x)[0])

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Return mean and log variance of the latents of images."""
        c = self.config
        check_image("AutoencoderKL's encoder", x, c.get("in_channels", 3), 2 ** (len(c["block_out_channels"]) - 1))
        h = self.encoder(x)
        h = _high(self.quant_conv(h)) if c.get("use_quant_conv", True) else h
        mean, log_variance = jnp.split(h, 2, -1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def decode(self, z: Array) -> Array:
        """Return the images of latents."""
        c = self.config
        check_image("AutoencoderKL's decoder", z, c.get("latent_channels", 4), 1)
        return self.decoder(self.post_quant_conv(z) if c.get("use_post_quant_conv", True) else z)


def _high(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
