"""What U-Nets and autoencoders of images share: residual blocks, transformers over pixels, and the stages made of them.

Images are [B, H, W, C]. Each module bears the name of its class in diffusers and its parameters the names of its state dict.
Normalisation, softmax and embeddings of times are float32 (or float64, where that is given); all else computes in `dtype`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.pretrained.config import Config
from rgdiff.pretrained.layers import ACTIVATIONS, Attention, conv, dense, group_norm, layer_norm
from rgdiff.typing import Array

REMAT = (None, "stage", "block")
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename(key: str) -> str:
    """Return today's name of a tensor of an old file: attention's maps were `query`, `key`, `value` and `proj_attn`.

    It is what `rgdiff.pretrained.weights.read` takes as `rename`; names of today stay as they are.

    Args:
      key: of the file's state dict.

    Returns:
      The key of `UNet2DModel`, `UNet2DConditionModel` or `AutoencoderKL`.

    Example:
      >>> from rgdiff.pretrained.unet import rename
      >>> rename("mid_block.attentions.0.proj_attn.weight")
      'mid_block.attentions.0.to_out.0.weight'
    """
    return re.sub(
        r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.(?=\w+$)",
        lambda match: f"{match[1]}.{OLD_NAMES[match[2]]}.",
        key,
    )


class ResnetBlock2D(nn.Module):
    """Add to x: group norm, activation, [resize], convolution, time, group norm, activation, convolution.

    The time's embedding is added before the second norm, or with `scale_shift` scales and shifts its result. Without one, as
    in autoencoders, there is no such map. A skip, where there is one, is joined to x first.

    Args:
      features: output channels; x passes a 1x1 convolution where it has others.
      groups: of the norms.
      epsilon: of the norms.
      activation: its name.
      scale_shift: whether the embedding gives (scale, shift) of the second norm.
      activate_time: whether the embedding passes the activation first.
      rescale: divisor of the sum.
      resize: None, "down" (mean of 2x2 pixels) or "up" (each pixel to 2x2).
      remat: "block" to compute norms and activations again in the backward pass, whose float32 images are most of its memory.
      dtype: of the computation.
    """

    features: int
    groups: int = 32
    epsilon: float = 1e-5
    activation: str = "silu"
    scale_shift: bool = False
    activate_time: bool = True
    rescale: float = 1.0
    resize: str | None = None
    remat: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None, skip: Array | None = None) -> Array:
        act = ACTIVATIONS[self.activation]

        def first(block: Any, x: Array) -> Array:
            return act(group_norm(self.groups, self.epsilon, name="norm1")(x))

        def second(block: Any, h: Array, e: Array | None) -> Array:
            norm = group_norm(self.groups, self.epsilon, name="norm2")
            if e is None:
                return act(norm(h))
            if not self.scale_shift:
                return act(norm(h + e))
            scale, shift = jnp.split(e, 2, -1)
            return act(norm(h) * (1 + scale) + shift)

        first, second = (recomputed(one, self.remat, "block") for one in (first, second))
        x = x if skip is None else jnp.concatenate([x, skip], -1)
        h = first(self, x)
        if self.resize is not None:
            x, h = _RESIZE[self.resize](x), _RESIZE[self.resize](h)
        h = conv(self.features, name="conv1", dtype=self.dtype)(h)
        e = None
        if temb is not None:
            width = 2 * self.features if self.scale_shift else self.features
            temb = act(temb) if self.activate_time else temb
            e = dense(width, name="time_emb_proj", dtype=self.dtype)(temb)[:, None, None]
        h = conv(self.features, name="conv2", dtype=self.dtype)(second(self, h, e))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, name="conv_shortcut", dtype=self.dtype)(x)
        return (x + h) / self.rescale


class Downsample2D(nn.Module):
    """A convolution of stride 2. It pads by `padding` on both sides; with 0, by one pixel at the bottom and right alone."""

    features: int
    padding: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        before = (self.padding, self.padding) if self.padding else (0, 1)
        return conv(self.features, 3, 2, before, name="conv", dtype=self.dtype)(x)


class Upsample2D(nn.Module):
    """Each pixel to 2x2, then a convolution."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        return conv(self.features, name="conv", dtype=self.dtype)(_double(x))


class GatedFeedForward(nn.Module):
    """Linear map to (h, gate), h * gelu(gate), linear map; the exact GELU."""

    features: int
    factor: int = 4
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = dense(2 * self.factor * self.features, name="net.0.proj", dtype=self.dtype)(x)
        h, gate = jnp.split(h, 2, -1)
        return dense(self.features, name="net.2", dtype=self.dtype)(h * ACTIVATIONS["gelu"](gate))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, a gated perceptron; each is added to what precedes its layer norm.

    With `only_cross`, the first attention is to the context as well.
    """

    features: int
    heads: int
    only_cross: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        attention = functools.partial(Attention, self.features, self.heads, self.features, dtype=self.dtype)
        h = layer_norm(name="norm1")(x)
        x = x + attention(name="attn1")(h, context if self.only_cross else None)
        x = x + attention(name="attn2")(layer_norm(name="norm2")(x), context)
        return x + GatedFeedForward(self.features, dtype=self.dtype, name="ff")(layer_norm(name="norm3")(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of an image, between two linear maps, added to the image.

    Args:
      features: channels.
      heads: of each attention.
      depth: number of blocks.
      groups: of the norm that comes first; its epsilon is 1e-6.
      linear: whether the maps are linear maps in the file; else they are 1x1 convolutions.
      only_cross: see `BasicTransformerBlock`.
      remat: "block" to compute each block again in the backward pass.
      dtype: of the computation.
    """

    features: int
    heads: int
    depth: int = 1
    groups: int = 32
    linear: bool = False
    only_cross: bool = False
    remat: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        def project(h: Array, name: str) -> Array:
            options: Any = {"name": name, "dtype": self.dtype}
            return dense(self.features, **options)(h) if self.linear else conv(self.features, 1, **options)(h)

        def enter(transformer: Any, x: Array) -> Array:
            h = project(group_norm(self.groups, 1e-6, name="norm")(x), "proj_in")
            return h.reshape(h.shape[0], -1, self.features)

        h = recomputed(enter, self.remat, "block")(self, x)
        for i in range(self.depth):
            block = recomputed(BasicTransformerBlock, self.remat, "block")
            h = block(self.features, self.heads, self.only_cross, self.dtype, name=f"transformer_blocks.{i}")(
                h, context
            )
        return project(h.reshape(x.shape), "proj_out") + x


class Stage(nn.Module):
    """One resolution: `layers` times a residual block and an attention, then a map to the next resolution.

    On the way down each result joins the skips, on the way up each residual block takes the last of them. In the middle the
    last residual block has no attention after it.

    Args:
      direction: "down", "mid" or "up".
      layers: number of residual blocks.
      resnet: name -> a residual block, called with (x, temb, skip).
      attention: (index, name) -> an attention, called with (x, context), or with x alone unless `cross`; or None.
      sampler: name -> the map to the next resolution, called with (x, temb); or None.
      cross: whether attention is to the context.
      skipped: whether there are skips; autoencoders have none.
    """

    direction: str
    layers: int
    resnet: Callable[..., nn.Module]
    attention: Callable[..., nn.Module] | None = None
    sampler: Callable[..., nn.Module] | None = None
    cross: bool = False
    skipped: bool = True

    @nn.compact
    def __call__(
        self, x: Array, temb: Array | None = None, context: Array | None = None, skips: tuple[Array, ...] = ()
    ) -> tuple[Array, tuple[Array, ...]]:
        push, pop = (self.skipped and self.direction == way for way in ("down", "up"))
        for i in range(self.layers):
            skip, skips = (skips[-1], skips[:-1]) if pop else (None, skips)
            x = self.resnet(name=f"resnets.{i}")(x, temb, skip)
            if self.attention is not None and (self.direction != "mid" or i < self.layers - 1):
                x = self.attention(i, name=f"attentions.{i}")(x, context if self.cross else None)
            skips = (*skips, x) if push else skips
        if self.sampler is not None:
            x = self.sampler(name=f"{self.direction}samplers.0")(x, temb)
            skips = (*skips, x) if push else skips
        return x, skips


def recomputed(module: Any, remat: str | None, level: str) -> Any:
    """Return a module's class, or a function of a module, recomputed in the backward pass where `remat` names its level.

    Args:
      module: the class or function.
      remat: of the network: None, "stage" or "block".
      level: "stage" or "block".

    Raises:
      ValueError: for another `remat`.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}, expected one of {', '.join(map(repr, REMAT))}")
    return nn.remat(module) if remat == level else module


def head(module: Any, x: Array, features: int, kernel: int, groups: int, epsilon: float, activation: str) -> Array:
    """Return what every network here ends with: conv_norm_out, an activation, conv_out.

    Args:
      module: whose scope gets the parameters; its `remat` and `dtype` hold.
      x: [B, H, W, C].
      features: output channels.
      kernel: side of the convolution.
      groups: of the norm.
      epsilon: of the norm.
      activation: its name.

    Returns:
      [B, H, W, features], float32 (float64 where x is).
    """

    def run(module: Any, x: Array) -> Array:
        h = ACTIVATIONS[activation](group_norm(groups, epsilon, name="conv_norm_out")(x))
        return conv(features, kernel, name="conv_out", dtype=module.dtype)(h)

    out = (nn.remat(run) if module.remat else run)(module, x)
    return out.astype(jnp.promote_types(out.dtype, jnp.float32))


def activation_of(config: Config, network: str, key: str = "act_fn") -> str:
    """Return the name of the configuration's activation.

    Raises:
      ValueError: for one that is not known.
    """
    name = str(config.get(key, "silu")).lower()
    if name not in ACTIVATIONS:
        raise ValueError(f"{network}: {key} is {name!r}, known are {', '.join(ACTIVATIONS)}")
    return name


def check_image(network: str, x: Array, channels: int, factor: int) -> None:
    """Refuse an input that is no image of these channels, or whose sides do not divide by `factor`.

    Raises:
      ValueError: in one line.
    """
    if x.ndim != 4 or x.shape[-1] != channels or any(side % factor for side in x.shape[1:3]):
        raise ValueError(
            f"{network} takes [B, H, W, {channels}] with sides that are multiples of {factor}; got {list(x.shape)}"
        )


def _double(x: Array) -> Array:
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


def _halve(x: Array) -> Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


_RESIZE = {"up": _double, "down": _halve}
