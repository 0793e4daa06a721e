"""A small U-Net for images and signals, simple enough to rewrite in another framework line by line.

It holds the residual and attention blocks and the U-Net made of them. It assumes images [B, H, W, C], or any
other number of spatial axes, whose sides divide by 2^(levels - 1), and channel counts that divide by 8, the number of normalisation groups. What
the output means (x0, noise, velocity) is left to the denoiser that wraps it.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.nets.attention import attention
from rgdiff.nets.conv import Conv
from rgdiff.nets.init import lecun_normal
from rgdiff.nets.time import Conditioning
from rgdiff.typing import Array, Cond

GROUPS = 8


def conv3(features: int, x: Array, **options: Any) -> Conv:
    """Return the layer of a convolution of 3 taps on every spatial axis of x, padded by one.

    Args:
      features: output channels.
      x: [B, *spatial, I]; its number of axes is read.
      options: further fields of `Conv`.

    Returns:
      The layer.
    """
    axes = x.ndim - 2
    return Conv(features, (3,) * axes, padding=((1, 1),) * axes, **options)


class GroupNorm(nn.Module):
    """Normalise over space and the channels of each of 8 groups, scale and shift; epsilon 1e-5, float32.

    With `film` = (scale, shift), [B, C] each, the result is then multiplied by 1 + scale and shifted: all of it is one
    pass x * a + c, and the moments are summed per channel before they are summed per group, which a CPU does several
    times faster than a reduction over (space, channels of a group).
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, film: tuple[Array, Array] | None = None) -> Array:
        return _affine(x, *self.coefficients(x, film)).astype(self.dtype)

    @nn.compact
    def coefficients(self, x: Array, film: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
        """Return a and c of x * a + c, [B, C] each, float32."""
        batch, channels = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        flat = x.astype(jnp.float32).reshape(batch, -1, channels)
        moments = jnp.stack([flat.sum(1), (flat * flat).sum(1)])  # [2, B, C]
        grouped = moments.reshape(2, batch, GROUPS, -1).sum(-1) * (GROUPS / flat[0].size)
        mean, square = jnp.repeat(grouped, channels // GROUPS, axis=-1)
        if film is not None:
            scale, bias = scale * (1 + film[0]), bias * (1 + film[0]) + film[1]
        deviation = jnp.sqrt(square - mean * mean + 1e-5)
        return scale / deviation, (bias * deviation - mean * scale) / deviation


def _affine(x: Array, a: Array, c: Array) -> Array:
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return x * a.reshape(shape) + c.reshape(shape)


def _affine_silu(x: Array, a: Array, c: Array, dropped: Array | None = None) -> Array:
    h = nn.silu(_affine(x, a, c))
    return h if dropped is None else h * dropped


class ResBlock(nn.Module):
    """Add to x: GroupNorm, SiLU, Conv3x3, GroupNorm * (1 + scale) + shift, SiLU, dropout, Conv3x3.

    (scale, shift) = Dense(SiLU(emb)), in that order; x passes a Dense (a 1x1 convolution) when its channels
    change.
    """

    features: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool = False) -> Array:
        def conv(name: str) -> Conv:
            return conv3(self.features, x, before=_affine_silu, dtype=self.dtype, name=name)

        h = conv("conv1")(x, *GroupNorm(name="norm1").coefficients(x))
        film = nn.Dense(2 * self.features, kernel_init=lecun_normal, dtype=self.dtype, name="emb")(nn.silu(emb))
        scale, shift = jnp.split(film, 2, axis=-1)
        inputs = GroupNorm(name="norm2").coefficients(h, (scale, shift))
        if train and self.dropout:
            inputs = (*inputs, nn.Dropout(self.dropout, deterministic=False)(jnp.ones_like(h)))
        h = conv("conv2")(h, *inputs)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, kernel_init=lecun_normal, dtype=self.dtype, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Add to x: GroupNorm, one Dense to (q, k, v), softmax(q k^T / sqrt(d)) v over positions, Dense.

    Heads have 32 channels, or one head has all when 32 does not divide them.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, features = x.shape[0], x.shape[-1]
        heads = features // 32 if features % 32 == 0 else 1
        h = GroupNorm(self.dtype, name="norm")(x).reshape(batch, -1, features)
        h = nn.Dense(3 * features, kernel_init=lecun_normal, dtype=self.dtype, name="qkv")(h)
        q, k, v = (a.reshape(*h.shape[:2], heads, features // heads) for a in jnp.split(h, 3, axis=-1))
        h = attention(q, k, v).reshape(x.shape)
        return x + nn.Dense(features, kernel_init=lecun_normal, dtype=self.dtype, name="out")(h)


class UNet(nn.Module):
    """Map an image, a time and a class to an image, through halved and doubled resolutions with skips.

    A signal [B, L, C] is an image of one spatial axis; a vector [B, L] a signal of one channel.

    The order of operations, for `channels = (c_0, ..., c_n)` (every 3x3 convolution pads (1, 1); arrays are
    NHWC):

        emb  = Dense(SiLU(Dense([cos, sin](1000 t)))) + class row                       4 c_0 features
        h    = Conv3x3(x), c_0; push h
        down = per level i: `blocks` times (ResBlock to c_i, attention if i is listed; push h);
               then, except at the last level, Conv3x3 of stride 2; push h
        mid  = ResBlock, attention if the last level is listed, ResBlock
        up   = per level i from the last: `blocks` + 1 times (ResBlock of [h, pop] to c_i, attention if i is
               listed); then, except at level 0, nearest upsampling by 2 and Conv3x3
        out  = GroupNorm, SiLU, Conv3x3 (zero at first)

    With `patch` = p > 1, the blocks see each p x p patch of pixels as the channels of one position (space to depth), and
    their output is put back into pixels: p^2 times fewer positions, for images whose finest detail is cheap to model.

    Args:
      channels: channels of each level, multiples of 8.
      blocks: residual blocks per level on the way down.
      attention: levels (0 is the full resolution) with self-attention.
      classes: number N of classes, or None. Label N, or cond=None, means "no class".
      out_channels: channels of the output; those of the input when None.
      dropout: rate; active in `apply(..., train=True, rngs={"dropout": key})` only.
      patch: side of the patches, in pixels; 1 for none.
      dtype: of the computation; input, output and parameters are float32.

    Raises:
      ValueError: when channels, levels or the image's sides do not fit.

    References:
      DDPM (arXiv:2006.11239), with scale-shift conditioning as in arXiv:2102.09672.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.UNet(channels=(8, 8))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 4, 4, 1)), jnp.zeros(2))[0].shape
      (2, 4, 4, 1)
    """

    channels: tuple[int, ...] = (32, 64, 64)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    classes: int | None = None
    out_channels: int | None = None
    dropout: float = 0.0
    patch: int = 1
    dtype: Any = jnp.float32

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "attention", tuple(self.attention))
        if not self.channels or any(c < GROUPS or c % GROUPS for c in self.channels):
            raise ValueError(f"channels must be multiples of {GROUPS}, one per level; got {self.channels}")
        if self.patch < 1:
            raise ValueError(f"patch must be at least 1 pixel; got {self.patch}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1; got {self.blocks}")
        if not set(self.attention) <= set(range(len(self.channels))):
            raise ValueError(f"attention lists levels 0..{len(self.channels) - 1}; got {self.attention}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None, train: bool = False) -> Array:
        last, side = len(self.channels) - 1, self.patch * 2 ** (len(self.channels) - 1)
        shape = x.shape
        x = x[..., None] if x.ndim == 2 else x
        if x.ndim < 3 or any(size % side for size in x.shape[1:-1]):
            raise ValueError(
                f"UNet of {last + 1} levels takes [B, H, W, C], [B, L, C] or [B, L], sides multiples of {side}; got {shape}"
            )

        def res(h: Array, level: int, name: str) -> Array:
            return ResBlock(self.channels[level], self.dropout, self.dtype, name=name)(h, emb, train)

        def attend(h: Array, level: int, name: str) -> Array:
            return AttentionBlock(self.dtype, name=name)(h) if level in self.attention else h

        def conv(h: Array, features: int, name: str, **options: Any) -> Array:
            return conv3(features, h, dtype=self.dtype, name=name, **options)(h)

        width = self.out_channels or x.shape[-1]
        x, first = _space_to_depth(x, self.patch), self.channels[0]
        emb = Conditioning(4 * first, first, self.classes, dtype=self.dtype, name="emb")(x.shape[0], t, cond)
        h = conv(x, first, "conv_in")
        skips = [h]
        for level, features in enumerate(self.channels):
            for i in range(self.blocks):
                h = attend(res(h, level, f"down{level}_res{i}"), level, f"down{level}_attn{i}")
                skips.append(h)
            if level < last:
                h = conv(h, features, f"down{level}_half", strides=2)
                skips.append(h)
        h = res(attend(res(h, last, "mid_res0"), last, "mid_attn"), last, "mid_res1")
        for level in reversed(range(last + 1)):
            for i in range(self.blocks + 1):
                h = res(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up{level}_res{i}")
                h = attend(h, level, f"up{level}_attn{i}")
            if level > 0:
                for axis in range(1, h.ndim - 1):
                    h = jnp.repeat(h, 2, axis=axis)
                h = conv(h, self.channels[level], f"up{level}_double")
        norm = GroupNorm(name="norm_out").coefficients(h)
        width *= self.patch ** (h.ndim - 2)
        out = conv3(width, h, zero_init=True, before=_affine_silu, dtype=self.dtype, name="conv_out")
        h = _depth_to_space(out(h, *norm).astype(jnp.float32), self.patch)
        return h[..., 0] if len(shape) == 2 else h


def _space_to_depth(x: Array, patch: int) -> Array:
    """Make the pixels of each patch channels of one position: [B, *spatial, C] -> [B, *(spatial / p), p^axes C]."""
    if patch == 1:
        return x
    axes = x.ndim - 2
    parts = [n for size in x.shape[1:-1] for n in (size // patch, patch)]
    h = x.reshape(x.shape[0], *parts, x.shape[-1])
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return h.transpose(order).reshape(x.shape[0], *(size // patch for size in x.shape[1:-1]), -1)


def _depth_to_space(x: Array, patch: int) -> Array:
    """Invert `_space_to_depth`."""
    if patch == 1:
        return x
    axes = x.ndim - 2
    h = x.reshape(*x.shape[:-1], *(patch,) * axes, -1)
    order = (0, *(i for axis in range(axes) for i in (1 + axis, 1 + axes + axis)), 2 * axes + 1)
    return h.transpose(order).reshape(x.shape[0], *(size * patch for size in x.shape[1:-1]), -1)
