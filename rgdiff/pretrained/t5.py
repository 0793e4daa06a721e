"""T5's encoder (arXiv:1910.10683), version 1.0 and 1.1, as transformers writes it: the text encoder of SD3 and Flux.

Read its files with `weights.read(..., rename=t5.rename)`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from rgdiff.pretrained.config import TRANSFORMERS, Config
from rgdiff.pretrained.layers import ACTIVATIONS, attend, dense
from rgdiff.pretrained.transformer import rematerialised, wide
from rgdiff.typing import Array

READ = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
FEED_FORWARD = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True), "gated-silu": ("silu", True)}
HARMLESS = TRANSFORMERS | {
    "num_decoder_layers", "dropout_rate", "classifier_dropout", "scale_decoder_outputs", "output_past", "n_positions",
}  # fmt: skip


def rename(name: str) -> str | None:
    """Return a file's key as this module names it, for `weights.read`.

    Args:
      name: of the file. `encoder.embed_tokens.weight` is `shared.weight` once more, and is left out; so is a decoder.

    Returns:
      The key, or None for a tensor that is not read.

    Example:
      >>> from rgdiff.pretrained import t5
      >>> print(t5.rename("shared.weight"), t5.rename("encoder.embed_tokens.weight"))
      shared.weight None
    """
    return None if name == "encoder.embed_tokens.weight" or name.startswith(("decoder.", "lm_head.")) else name


def buckets(length: int, count: int, furthest: int) -> np.ndarray:
    """Return the bucket of every distance between a query (row) and a key (column).

    Keys after the query have the upper half of the buckets. In each half, the first buckets stand for one distance each, and
    the others for ranges that grow geometrically up to the furthest; the last one has all beyond.

    Args:
      length: L, of the sequence.
      count: of buckets.
      furthest: distance, in tokens.

    Returns:
      [L, L], integers 0 ... count - 1.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, distance = count // 2, np.abs(offset)
    exact = half // 2
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))  # in float32, as it was trained
    steps = ratio / np.float32(math.log(furthest / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)


class T5Output(NamedTuple):
    """What the encoder returns.

    Args:
      last_hidden_state: [B, L, D], after the final norm, float32.
    """

    last_hidden_state: Array


class _Norm(nn.RMSNorm):
    """Division by the root mean square, and a scale: no mean, no shift."""


class _SelfAttention(nn.Module):
    config: Config
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, mask: Array | None) -> tuple[Array, Array]:
        c, heads = self.config, self.config["num_heads"]
        q, k, v = (dense(heads * c["d_kv"], False, name=part, dtype=self.dtype)(x) for part in "qkv")
        if bias is None:  # the first block's, which the others use as well
            count = c["relative_attention_num_buckets"]
            at = buckets(x.shape[1], count, c["relative_attention_max_distance"])
            table = nn.Embed(count, heads, name="relative_attention_bias")
            bias = jnp.moveaxis(table(jnp.asarray(at)), -1, 0)[None]
            if mask is not None:
                bias += jnp.where(mask[:, None, None, :].astype(bool), 0.0, -jnp.inf)
        h = attend(q, k, v, heads, bias, scale=1.0)
        return dense(c["d_model"], False, name="o", dtype=self.dtype)(h), bias


class _DenseReluDense(nn.Module):
    config: Config
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        name, gated = FEED_FORWARD[self.config["feed_forward_proj"]]
        inner = lambda name: dense(self.config["d_ff"], False, name=name, dtype=self.dtype)(x)  # noqa: E731
        h = ACTIVATIONS[name](inner("wi_0" if gated else "wi"))
        return dense(self.config["d_model"], False, name="wo", dtype=self.dtype)(h * inner("wi_1") if gated else h)


class _Block(nn.Module):
    config: Config
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, mask: Array | None) -> tuple[Array, Array]:
        epsilon = self.config["layer_norm_epsilon"]
        h = _Norm(epsilon, name="layer.0.layer_norm")(x)
        h, bias = _SelfAttention(self.config, self.dtype, name="layer.0.SelfAttention")(h, bias, mask)
        x = x + h
        h = _Norm(epsilon, name="layer.1.layer_norm")(x)
        return x + _DenseReluDense(self.config, self.dtype, name="layer.1.DenseReluDense")(h), bias


class _Stack(nn.Module):
    config: Config
    dtype: Any = None
    remat: str | None = None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        block, bias = rematerialised(_Block, self.remat), None
        for i in range(self.config["num_layers"]):
            x, bias = block(self.config, self.dtype, name=f"block.{i}")(x, bias, mask)
        return _Norm(self.config["layer_norm_epsilon"], name="final_layer_norm")(x)


class T5EncoderModel(nn.Module):
    """T5's encoder: token ids [B, L] -> T5Output, the last hidden state [B, L, D].

    Positions enter as a bias of the scores, which depends on the distance of query and key, is learnt per head in the first
    block, and serves all blocks. Scores are not divided by the width of a head. Compute in bfloat16 or float32: the residual
    stream of T5-XXL overflows float16.

    Args:
      config: of the file: T5Config's settings.
      dtype: of the computation; that of the parameters by default. Norms, softmax and output are float32.
      remat: "block" computes each block again in the backward pass.

    Raises:
      ValueError: for a setting that is not known or not supported.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.config import Config
      >>> from rgdiff.pretrained.t5 import T5EncoderModel
      >>> tiny = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 9}
      >>> net = T5EncoderModel(Config({**tiny, "feed_forward_proj": "gated-gelu"}))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 5), int))[0].last_hidden_state.shape
      (2, 5, 8)
    """

    config: Config
    dtype: Any = None
    remat: str | None = None

    def __post_init__(self):
        self.settings()
        rematerialised(_Block, self.remat)
        super().__post_init__()

    def settings(self) -> Config:
        """Return the settings that are read, with those that the file leaves out."""
        read = self.config.get("feed_forward_proj", "relu")
        name, gated = FEED_FORWARD.get(read, ("", False))
        fixed = {"is_decoder": False, "dense_act_fn": name, "is_gated_act": gated} if name else {"is_decoder": False}
        harmless = HARMLESS if name else HARMLESS | {"dense_act_fn", "is_gated_act"}
        return self.config.settings("T5EncoderModel", READ, fixed, harmless, {"feed_forward_proj": FEED_FORWARD})

    @nn.compact
    def __call__(self, input_ids: Array, attention_mask: Array | None = None) -> T5Output:
        """Return the last hidden state.

        Args:
          input_ids: [B, L].
          attention_mask: [B, L], 0 where a token is hidden from all others; SD3 and Flux give none.

        Returns:
          The last hidden state.
        """
        c = self.settings()
        x = nn.Embed(c["vocab_size"], c["d_model"], self.dtype, name="shared")(input_ids)
        return T5Output(wide(_Stack(c, self.dtype, self.remat, name="encoder")(x, attention_mask)))
