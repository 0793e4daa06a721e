"""The dilated convolutional network for DNA sequences of Stark et al., in the form DRAKES and SVDD use.

It holds that network. It assumes one-hot sequences with the mask last, [B, L, K + 1], of any length L. The
masked process and the carrying-over of known tokens are left to the kernel.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.nets.conv import Conv
from rgdiff.nets.init import lecun_normal
from rgdiff.nets.time import Conditioning
from rgdiff.typing import Array, Cond

DILATIONS = (1,) * 8 + (4,) * 4 + (16,) * 4 + (64,) * 4


class ConvNet1D(nn.Module):
    """Map one-hot sequences [B, L, K + 1] to logits [B, L, K] through residual dilated convolutions.

        emb = ReLU(conditioning(t, cond));  h = ReLU(Conv(x))
        h  <- h + ReLU(Conv_d(LayerNorm(h + Dense(emb))))      for each dilation d
        out = Dense(ReLU(Dense(h)))                            zero at first

    Args:
      out: number K of tokens, the mask not counted.
      width: channels.
      dilations: one residual layer each.
      kernel: taps of each convolution, odd.
      time_conditioning: when False the network sees t = 0 at all times; p(x0 | the unmasked
        tokens) does not depend on t. The layers stay, so that both cases have the same parameters.
      classes: number N of classes, or None. Label N, or cond=None, means "no class".
      dtype: of the computation; input, output and parameters are float32.

    Note:
      3.33 M parameters at the defaults with K = 4, as released. The released network embeds time by random
      frequencies; ours are sinusoids. Its last layer starts at random; ours at zero, uniform logits.

    References:
      Dirichlet flow matching (arXiv:2402.05841), MDLM (arXiv:2406.07524), DRAKES (arXiv:2410.13643).

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.ConvNet1D(out=4, width=8, dilations=(1,))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 6, 5)), jnp.zeros(2))[0].shape
      (2, 6, 4)
    """

    out: int
    width: int = 128
    dilations: tuple[int, ...] = DILATIONS
    kernel: int = 9
    time_conditioning: bool = False
    classes: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        object.__setattr__(self, "dilations", tuple(self.dilations))
        if self.out < 1 or self.kernel % 2 == 0:
            raise ValueError(f"out >= 1 tokens and an odd kernel are needed; got {self.out} and {self.kernel}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        if x.ndim != 3:
            raise ValueError(f"ConvNet1D takes one-hot sequences [B, L, K + 1]; got shape {x.shape}")
        t = jnp.asarray(t, jnp.float32) * (1.0 if self.time_conditioning else 0.0)
        emb = Conditioning(self.width, 128, self.classes, deep=False, dtype=self.dtype, name="emb")
        emb = nn.relu(emb(x.shape[0], t, cond))
        h = nn.relu(Conv(self.width, (self.kernel,), dtype=self.dtype, name="conv_in")(x))
        for i, dilation in enumerate(self.dilations):
            r = h + nn.Dense(self.width, kernel_init=lecun_normal, dtype=self.dtype, name=f"emb{i}")(emb)[:, None, :]
            r = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=f"norm{i}")(r)
            conv = Conv(self.width, (self.kernel,), dilation=dilation, dtype=self.dtype, name=f"conv{i}")
            h = h + nn.relu(conv(r))
        h = nn.relu(nn.Dense(self.width, kernel_init=lecun_normal, dtype=self.dtype, name="head")(h))
        out = nn.Dense(self.out, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out")
        return out(h).astype(jnp.float32)
