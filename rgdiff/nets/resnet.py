"""A residual network of images with one number per example: energies and costs to go."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.nets.conv import Conv
from rgdiff.nets.init import lecun_normal
from rgdiff.nets.time import Conditioning
from rgdiff.typing import Array, Cond

SLOPE = 0.2  # of the leaky ReLU


class _Block(nn.Module):
    """Two 3x3 convolutions beside a skip, then the mean of 2 x 2 pixels where `down`, then the leaky ReLU."""

    features: int
    down: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, emb: Array | None) -> Array:
        conv = lambda h, name: Conv(self.features, (3, 3), dtype=self.dtype, name=name)(h)  # noqa: E731
        h = conv(x, "conv1")
        if emb is not None:
            shift = nn.Dense(self.features, use_bias=False, kernel_init=lecun_normal, dtype=self.dtype, name="emb")(emb)
            h = h + shift[:, None, None]
        h = conv(nn.leaky_relu(h, SLOPE), "conv2")
        if self.down or x.shape[-1] != self.features:
            x = nn.Dense(self.features, use_bias=False, kernel_init=lecun_normal, dtype=self.dtype, name="skip")(x)
        h = h + x
        return nn.leaky_relu(nn.avg_pool(h, (2, 2), (2, 2)) if self.down else h, SLOPE)


class ValueResNet(nn.Module):
    """Map images, a time and a class to one number per example, [B]: the energy network of implicit generation, without norms.

        h = Conv3x3(x), c_0; for each c_i: a residual block to c_i and half the side, and one that keeps both;
        the sum over pixels, and Dense to 1 (zero at first)

    Args:
      features: c_i, channels; the default has 5,134,593 parameters at `timed=False` on three colours, DxMI's for CIFAR-10 but for its scale
        and offset of the output.
      timed: whether time and class enter, at the middle of every block; without, they are not read.
      classes: number N of classes, or None. Label N, or cond=None, means "no class".
      dtype: of the computation; input, output and parameters are float32.

    Raises:
      ValueError: for states that are no images, or too small to be halved so often.

    References: Du and Mordatch 2019, arXiv:1903.08689, without their spectral norm, as in DxMI (arXiv 2407.00626).

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.ValueResNet(features=(8, 16))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 8, 8, 3)), jnp.zeros(2))[0].shape
      (2,)
    """

    features: tuple[int, ...] = (128, 256, 256)
    timed: bool = True
    classes: int | None = None
    dtype: Any = jnp.float32
    scalar_time = True

    def __post_init__(self):
        object.__setattr__(self, "features", tuple(self.features))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        least = 2 ** len(self.features)
        if x.ndim != 4 or min(x.shape[1:3]) < least:
            raise ValueError(f"ValueResNet takes images [B, H, W, C] with sides from {least} up; got {x.shape}")
        first, emb = self.features[0], None
        if self.timed:
            emb = Conditioning(4 * first, first, self.classes, dtype=self.dtype, name="emb")(x.shape[0], t, cond)
            emb = nn.silu(emb)
        h = Conv(first, (3, 3), dtype=self.dtype, name="conv_in")(x)
        for level, width in enumerate(self.features):
            for down in (True, False):
                h = _Block(width, down, self.dtype, name=f"level{level}_{'half' if down else 'keep'}")(h, emb)
        h = h.sum((1, 2))
        out = nn.Dense(1, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out")
        return out(h)[:, 0].astype(jnp.float32)
