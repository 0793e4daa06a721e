"""Layers that several released networks share, named and computed as in their state dicts; arrays are NHWC or [B, L, D].

Linear maps and convolutions compute in `dtype`; norms, softmax and sinusoids compute in float32.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from rgdiff.nets.attention import attention
from rgdiff.nets.conv import conv as convolve
from rgdiff.nets.init import lecun_normal
from rgdiff.typing import Array

ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
BLOCK = 1024  # queries whose attention scores are held at once


class Convolution(nn.Module):
    """A convolution of [B, H, W, C] with PyTorch's names; on a CPU its gradients stay fast inside loops (`rgdiff.nets.conv`).

    Args:
      features: output channels.
      kernel_size, strides: of rows and columns.
      padding: (before, after) of rows and columns.
      use_bias: whether there is one.
      dtype: of the computation; None for that of input and parameters.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", lecun_normal, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        out = convolve(x, kernel, stride=self.strides, padding=self.padding)
        return out if bias is None else out + bias


def conv(
    features: int,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    *,
    bias: bool = True,
    name: str | None = None,
    dtype: Any = None,
) -> Convolution:
    """Return a convolution with PyTorch's padding: the same before and after each axis unless it is given."""
    before = (kernel // 2, kernel // 2) if padding is None else padding
    return Convolution(features, (kernel, kernel), (stride, stride), (before, before), bias, name=name, dtype=dtype)


def dense(features: int, bias: bool = True, *, name: str, dtype: Any = None) -> nn.Dense:
    """Return a linear map."""
    return nn.Dense(features, use_bias=bias, name=name, dtype=dtype)


def group_norm(groups: int, epsilon: float, *, name: str) -> nn.GroupNorm:
    """Return a group normalisation; its statistics are float32."""
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, name=name)


def layer_norm(epsilon: float = 1e-5, *, name: str) -> nn.LayerNorm:
    """Return a layer normalisation with PyTorch's epsilon, 1e-5, where Flax's is 1e-6."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


def plain_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """Normalise the last axis, without parameters."""
    high = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = high - high.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)).astype(x.dtype)


def sinusoids(
    t: Array,
    features: int,
    *,
    cosine_first: bool = True,
    shift: float = 0.0,
    scale: float = 1.0,
    period: float = 10_000.0,
) -> Array:
    """Embed times in sines and cosines.

    The frequencies are computed in NumPy, in PyTorch's order of operations: at t = 1000 the last bit of a frequency
    changes the sine by 1e-4.

    Args:
      t: [B], in the network's unit (mostly steps 0 ... 999).
      features: even.
      cosine_first: diffusers' `flip_sin_to_cos`.
      shift: diffusers' `freq_shift`, `downscale_freq_shift`.
      scale: a factor of t.
      period: the longest, over 2 pi.

    Returns:
      [B, features], float32 (float64 for float64 times).
    """
    half = features // 2
    powers = -math.log(period) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    frequencies = np.exp(powers.astype(np.float64)).astype(np.float32)  # NumPy's float32 exp is off by up to 3 units
    angles = scale * t.astype(jnp.promote_types(t.dtype, jnp.float32))[:, None] * frequencies
    pair = (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(pair if cosine_first else pair[::-1], -1)


class TimestepEmbedding(nn.Module):
    """linear_1, an activation, linear_2: [B, D] -> [B, features]; a condition [B, C], if any, is mapped by cond_proj and added first."""

    features: int
    activation: str = "silu"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        if condition is not None:
            x = x + dense(x.shape[-1], bias=False, name="cond_proj", dtype=self.dtype)(condition)
        h = ACTIVATIONS[self.activation](dense(self.features, name="linear_1", dtype=self.dtype)(x))
        return dense(self.features, name="linear_2", dtype=self.dtype)(h)


def attend(q: Array, k: Array, v: Array, heads: int, bias: Array | None = None, *, scale: float | None = None) -> Array:
    """Return multi-head attention of [B, L, D] arrays, without keeping scores of long sequences.

    On a GPU in half precision cuDNN's fused kernel computes it. Elsewhere queries are taken `BLOCK` at a time where there are
    more, and their scores are computed again in the backward pass: what is kept is q, k and v, and not heads x L x L numbers.

    Args:
      q: [B, L, D]; k, v: [B, M, D].
      heads: by which D is divided.
      bias: added to the scores, broadcast to [B, heads, L, M]; -inf where a key is hidden. With one, no blocks are taken.
      scale: of the scores; 1/sqrt(D / heads) by default.

    Returns:
      [B, L, D].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.pretrained.layers import attend
      >>> x = jnp.ones((1, 3, 4))
      >>> print(attend(x, x, 2 * x, heads=2)[0, 0])  # equal weights
      [2. 2. 2. 2.]
    """
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)  # noqa: E731
    q_, k_, v_ = split(q), split(k), split(v)
    fused = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and q_.shape[-1] % 8 == 0
    if fused and bias is None:
        return jax.nn.dot_product_attention(q_, k_, v_, scale=scale, implementation="cudnn").reshape(q.shape)
    plain = lambda q_: attention(q_, k_, v_, bias, scale=scale)  # noqa: E731
    length = q.shape[1]
    pieces = next(n for n in range(-(-length // BLOCK), length + 1) if length % n == 0)
    if bias is not None or pieces == 1:
        return plain(q_).reshape(q.shape)
    rows = jnp.moveaxis(q_.reshape(q.shape[0], pieces, length // pieces, *q_.shape[2:]), 1, 0)
    return jnp.moveaxis(jax.lax.map(jax.checkpoint(plain), rows), 0, 1).reshape(q.shape)


class Attention(nn.Module):
    """to_q, to_k, to_v, to_out.0: self-attention, or attention to a context [B, M, C].

    With `groups` and `residual` it is the attention block of DDPM networks and autoencoders, on [B, H, W, D].
    """

    inner: int
    heads: int
    out: int
    bias: bool = False
    groups: int | None = None
    epsilon: float = 1e-5
    rescale: float = 1.0
    residual: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        h = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.groups is not None:
            h = group_norm(self.groups, self.epsilon, name="group_norm")(h)
        source = h if context is None else context
        q, k, v = (
            dense(self.inner, self.bias, name=f"to_{name}", dtype=self.dtype)(rows)
            for name, rows in (("q", h), ("k", source), ("v", source))
        )
        h = dense(self.out, name="to_out.0", dtype=self.dtype)(attend(q, k, v, self.heads))
        h = h.reshape(*x.shape[:-1], self.out)
        return (h + x) / self.rescale if self.residual else h
