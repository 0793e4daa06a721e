"""CLIP: a text and a vision transformer whose projections are compared (arXiv:2103.00020), as transformers writes them.

Parameters are named as in the files: `text_model.`, `vision_model.`, `text_projection`, `visual_projection`, `logit_scale`. Read
them with `weights.read(..., rename=clip.rename)`; a file in open_clip's own layout passes `from_open_clip` before. Token ids and
pixels come from the tokenizer and the image processor, which are not here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from rgdiff.pretrained.config import TRANSFORMERS, Config
from rgdiff.pretrained.layers import ACTIVATIONS, attend, conv, dense, layer_norm
from rgdiff.pretrained.transformer import rematerialised, wide
from rgdiff.pretrained.weights import Tensor
from rgdiff.typing import Array

# What a file leaves out has these values: transformers writes differences from its defaults only.
ENCODER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12, "projection_dim": 512}
TEXT = ENCODER | {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
VISION = ENCODER | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
CHOICES = {"hidden_act": ("quick_gelu", "gelu", "gelu_new")}
FIXED = {"is_decoder": False, "add_cross_attention": False, "pruned_heads": Config({})}
HARMLESS = TRANSFORMERS | {"attention_dropout", "dropout"}  # training only


def rename(name: str) -> str | None:
    """Return a file's key as this module names it, for `weights.read`.

    Args:
      name: of the file. Buffers `position_ids` are left out; transformers 5 saves a CLIPTextModel without its prefix
        `text_model.`, which is put back.

    Returns:
      The key, or None for a buffer.

    Example:
      >>> from rgdiff.pretrained import clip
      >>> print(clip.rename("final_layer_norm.bias"), clip.rename("text_model.embeddings.position_ids"))
      text_model.final_layer_norm.bias None
    """
    if name.endswith(".position_ids"):
        return None
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else name


class TextOutput(NamedTuple):
    """What a text model returns, float32.

    Args:
      last_hidden_state: [B, L, D], after the final norm.
      pooler_output: [B, D], its row at the end token.
      hidden_states: the embeddings and the output of every layer, [B, L, D] each, before the final norm; SDXL and "clip skip"
        read `hidden_states[-2]`.
      text_embeds: [B, P], the projection of `pooler_output`, or None for a model without one.
    """

    last_hidden_state: Array
    pooler_output: Array
    hidden_states: tuple[Array, ...]
    text_embeds: Array | None = None


class VisionOutput(NamedTuple):
    """What a vision model returns, float32.

    Args:
      last_hidden_state: [B, 1 + patches, D], without a final norm.
      pooler_output: [B, D], its first row, the class token, after the final norm.
      hidden_states: the embeddings and the output of every layer, [B, 1 + patches, D] each.
      image_embeds: [B, P], the projection of `pooler_output`.
    """

    last_hidden_state: Array
    pooler_output: Array
    hidden_states: tuple[Array, ...]
    image_embeds: Array | None = None


class CLIPOutput(NamedTuple):
    """What a CLIPModel returns, float32.

    Args:
      logits_per_image: [images, texts], exp(logit_scale) times the cosine similarities.
      logits_per_text: [texts, images], its transpose.
      text_embeds: [texts, P], of length 1.
      image_embeds: [images, P], of length 1.
    """

    logits_per_image: Array
    logits_per_text: Array
    text_embeds: Array
    image_embeds: Array


class _Attention(nn.Module):
    heads: int
    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, bias: Array | None) -> Array:
        q, k, v = (dense(self.width, name=f"{part}_proj", dtype=self.dtype)(x) for part in "qkv")
        return dense(self.width, name="out_proj", dtype=self.dtype)(attend(q, k, v, self.heads, bias))


class _MLP(nn.Module):
    inner: int
    width: int
    activation: str
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = ACTIVATIONS[self.activation](dense(self.inner, name="fc1", dtype=self.dtype)(x))
        return dense(self.width, name="fc2", dtype=self.dtype)(h)


class _Layer(nn.Module):
    config: Config
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, bias: Array | None) -> Array:
        c, width, epsilon = self.config, self.config["hidden_size"], self.config["layer_norm_eps"]
        h = layer_norm(epsilon, name="layer_norm1")(x)
        x = x + _Attention(c["num_attention_heads"], width, self.dtype, name="self_attn")(h, bias)
        h = layer_norm(epsilon, name="layer_norm2")(x)
        return x + _MLP(c["intermediate_size"], width, c["hidden_act"], self.dtype, name="mlp")(h)


class _Encoder(nn.Module):
    config: Config
    dtype: Any = None
    remat: str | None = None

    @nn.compact
    def __call__(self, x: Array, bias: Array | None = None) -> tuple[Array, ...]:
        layer, states = rematerialised(_Layer, self.remat), [x]
        for i in range(self.config["num_hidden_layers"]):
            states.append(layer(self.config, self.dtype, name=f"layers.{i}")(states[-1], bias))
        return tuple(states)


class _TextEmbeddings(nn.Module):
    config: Config
    dtype: Any = None

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        c, length = self.config, ids.shape[1]
        if length > c["max_position_embeddings"]:
            raise ValueError(f"input_ids have {length} tokens, the model {c['max_position_embeddings']}; cut them")
        table = lambda rows, name: nn.Embed(rows, c["hidden_size"], self.dtype, name=name)  # noqa: E731
        positions = table(c["max_position_embeddings"], "position_embedding")(jnp.arange(length))
        return table(c["vocab_size"], "token_embedding")(ids) + positions


class _Text(nn.Module):
    config: Config
    dtype: Any = None
    remat: str | None = None

    @nn.compact
    def __call__(self, ids: Array) -> TextOutput:
        c, length = self.config, ids.shape[1]
        x = _TextEmbeddings(c, self.dtype, name="embeddings")(ids)
        past = jnp.where(np.tril(np.ones((length, length), np.bool_)), 0.0, -jnp.inf)[None, None]
        states = _Encoder(c, self.dtype, self.remat, name="encoder")(x, past)
        last = layer_norm(c["layer_norm_eps"], name="final_layer_norm")(states[-1])
        end = c["eos_token_id"]  # 2 in old files, which is wrong: there, the end token is the highest id
        at = ids.argmax(-1) if end == 2 else (ids == end).argmax(-1)
        pooled = jnp.take_along_axis(last, at[:, None, None], 1)[:, 0]
        return TextOutput(wide(last), wide(pooled), tuple(wide(state) for state in states))


class _VisionEmbeddings(nn.Module):
    config: Config
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, width, patch = self.config, self.config["hidden_size"], self.config["patch_size"]
        if x.shape[1:] != (c["image_size"], c["image_size"], c["num_channels"]):
            raise ValueError(
                f"pixel_values are {list(x.shape)}, expected [B, {c['image_size']}, {c['image_size']}, {c['num_channels']}]"
            )
        name = "patch_embedding"
        h = conv(width, patch, patch, (0, 0), bias=False, dtype=self.dtype, name=name)(x)
        h = h.reshape(x.shape[0], -1, width)
        first = self.param("class_embedding", nn.initializers.normal(width**-0.5), (width,)).astype(h.dtype)
        h = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, width)), h], 1)
        positions = nn.Embed(h.shape[1], width, self.dtype, name="position_embedding")
        return h + positions(jnp.arange(h.shape[1]))


class _Vision(nn.Module):
    config: Config
    dtype: Any = None
    remat: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> VisionOutput:
        c, epsilon = self.config, self.config["layer_norm_eps"]
        h = _VisionEmbeddings(c, self.dtype, name="embeddings")(x)
        h = layer_norm(epsilon, name="pre_layrnorm")(h)  # spelt so in every file
        states = _Encoder(c, self.dtype, self.remat, name="encoder")(h.astype(self.dtype or h.dtype))
        pooled = layer_norm(epsilon, name="post_layernorm")(states[-1][:, 0])
        return VisionOutput(wide(states[-1]), wide(pooled), tuple(wide(state) for state in states))


class _Model(nn.Module):
    """Fields of every model here: the file's config, the dtype of the computation, and None or "block"."""

    config: Config
    dtype: Any = None
    remat: str | None = None

    defaults = TEXT

    def __post_init__(self):
        self.settings()
        rematerialised(_Layer, self.remat)
        super().__post_init__()

    def settings(self) -> Config:
        """Return the settings that are read, with those that the file leaves out."""
        return self.config.settings(type(self).__name__, self.defaults, FIXED, HARMLESS, CHOICES)


class CLIPTextModel(_Model):
    """CLIP's text model: token ids [B, L] -> TextOutput.

    SD 1.x, SDXL and Flux read their prompts with it. A padding mask changes nothing up to the end token, since every token
    sees only those before it; there is none here, as in those pipelines.

    Args:
      config: of the file: CLIPTextConfig's settings.
      dtype: of the computation; that of parameters and input by default. Norms, softmax and outputs are float32.
      remat: "block" computes each layer again in the backward pass.

    Raises:
      ValueError: for a setting that is not known or not supported, or too many tokens.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.clip import CLIPTextModel
      >>> from rgdiff.pretrained.config import Config
      >>> tiny = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 9}
      >>> net = CLIPTextModel(Config({**tiny, "eos_token_id": 8}))
      >>> out, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 5), int))
      >>> out.last_hidden_state.shape, out.pooler_output.shape, len(out.hidden_states)
      ((2, 5, 8), (2, 8), 3)
    """

    @nn.compact
    def __call__(self, input_ids: Array) -> TextOutput:
        return _Text(self.settings(), self.dtype, self.remat, name="text_model")(input_ids)


class CLIPTextModelWithProjection(_Model):
    """CLIP's text model with its projection: token ids [B, L] -> TextOutput with `text_embeds`.

    SDXL's second text encoder (OpenCLIP bigG, activation gelu) and SD3's first two are of this class.

    Args:
      config: of the file: CLIPTextConfig's settings.
      dtype: of the computation; that of parameters and input by default. Norms, softmax and outputs are float32.
      remat: "block" computes each layer again in the backward pass.

    Raises:
      ValueError: for a setting that is not known or not supported, or too many tokens.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.clip import CLIPTextModelWithProjection
      >>> from rgdiff.pretrained.config import Config
      >>> tiny = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 9}
      >>> net = CLIPTextModelWithProjection(Config({**tiny, "projection_dim": 6, "hidden_act": "gelu"}))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 5), int))[0].text_embeds.shape
      (2, 6)
    """

    @nn.compact
    def __call__(self, input_ids: Array) -> TextOutput:
        c = self.settings()
        out = _Text(c, self.dtype, self.remat, name="text_model")(input_ids)
        project = dense(c["projection_dim"], False, name="text_projection", dtype=self.dtype)
        return out._replace(text_embeds=wide(project(out.pooler_output)))


class CLIPVisionModelWithProjection(_Model):
    """CLIP's vision model with its projection: normalised pixels [B, H, W, 3] -> VisionOutput.

    Args:
      config: of the file: CLIPVisionConfig's settings.
      dtype: of the computation; that of parameters and input by default. Norms, softmax and outputs are float32.
      remat: "block" computes each layer again in the backward pass.

    Raises:
      ValueError: for a setting that is not known or not supported, or an image of another size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.clip import CLIPVisionModelWithProjection
      >>> from rgdiff.pretrained.config import Config
      >>> tiny = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
      >>> net = CLIPVisionModelWithProjection(Config({**tiny, "image_size": 8, "patch_size": 4, "projection_dim": 6}))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 8, 8, 3)))[0].image_embeds.shape
      (2, 6)
    """

    defaults = VISION

    @nn.compact
    def __call__(self, pixel_values: Array) -> VisionOutput:
        c = self.settings()
        out = _Vision(c, self.dtype, self.remat, name="vision_model")(pixel_values)
        project = dense(c["projection_dim"], False, name="visual_projection", dtype=self.dtype)
        return out._replace(image_embeds=wide(project(out.pooler_output)))


class CLIPModel(nn.Module):
    """CLIP: (token ids [texts, L], normalised pixels [images, H, W, 3]) -> CLIPOutput.

    CLIP-L's and PickScore's files have this layout. `apply(..., method="get_text_features")` and "get_image_features" return one
    side's projection, not divided by its length.

    Args:
      config: of the file: CLIPConfig's settings, `text_config` and `vision_config` inside.
      dtype: of the computation; that of parameters and input by default. Norms, softmax and outputs are float32.
      remat: "block" computes each layer again in the backward pass.

    Raises:
      ValueError: for a setting that is not known or not supported, too many tokens, or an image of another size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.clip import CLIPModel
      >>> from rgdiff.pretrained.config import Config
      >>> tiny = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
      >>> pixels = {"image_size": 8, "patch_size": 4}
      >>> net = CLIPModel(Config({"text_config": tiny, "vision_config": tiny | pixels, "projection_dim": 6}))
      >>> ids, images = jnp.zeros((2, 5), int), jnp.zeros((3, 8, 8, 3))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), ids, images)[0].logits_per_image.shape
      (3, 2)
    """

    config: Config
    dtype: Any = None
    remat: str | None = None

    def __post_init__(self):
        self.settings()
        rematerialised(_Layer, self.remat)
        super().__post_init__()

    def settings(self) -> tuple[Config, Config, Config]:
        """Return the settings of the model, its text model and its vision model, with those that the file leaves out."""
        empty = Config({})
        read = {"text_config": empty, "vision_config": empty, "projection_dim": 512}
        harmless = TRANSFORMERS | {"logit_scale_init_value", "text_config_dict", "vision_config_dict"}
        whole = self.config.settings("CLIPModel", read, harmless=harmless)
        parts = []
        for side, defaults in (("text", TEXT), ("vision", VISION)):
            again = self.config.get(f"{side}_config_dict") or {}  # in some old files; it overrides
            config = Config({**whole[f"{side}_config"], **again}, f"{side}_config")
            parts.append(config.settings("CLIPModel", defaults, FIXED, HARMLESS, CHOICES))
        return whole, parts[0], parts[1]

    def setup(self):
        whole, text, vision = self.settings()
        self.text_model = _Text(text, self.dtype, self.remat)
        self.vision_model = _Vision(vision, self.dtype, self.remat)
        self.text_projection = nn.Dense(whole["projection_dim"], use_bias=False, dtype=self.dtype)
        self.visual_projection = nn.Dense(whole["projection_dim"], use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def get_text_features(self, input_ids: Array) -> Array:
        """Return the projections of texts: [B, L] -> [B, P], float32."""
        return wide(self.text_projection(self.text_model(input_ids).pooler_output))

    def get_image_features(self, pixel_values: Array) -> Array:
        """Return the projections of images: [B, H, W, 3] -> [B, P], float32."""
        return wide(self.visual_projection(self.vision_model(pixel_values).pooler_output))

    def __call__(self, input_ids: Array, pixel_values: Array) -> CLIPOutput:
        text, image = self.get_text_features(input_ids), self.get_image_features(pixel_values)
        text, image = (one / jnp.linalg.norm(one, axis=-1, keepdims=True) for one in (text, image))
        logits = jnp.matmul(image, text.T, precision="highest") * jnp.exp(wide(self.logit_scale))
        return CLIPOutput(logits, logits.T, text, image)


@dataclasses.dataclass(frozen=True)
class _Transposed(Tensor):
    """A matrix that its file holds transposed."""

    def array(self) -> np.ndarray:
        return Tensor(self.file, self.dtype, self.shape[::-1], self.offset).array().T


_OPEN_CLIP = (
    (r"^(visual\.)?transformer\.resblocks\.", r"\1encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.conv1\.", "visual.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "visual.embeddings.class_embedding"),
    (r"^(visual\.)?positional_embedding$", r"\1embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^visual\.ln_pre\.", "visual.pre_layrnorm."),
    (r"^visual\.ln_post\.", "visual.post_layernorm."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),
)


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an open_clip model with vision transformer under the names of a `CLIPModel`; nothing is read.

    HPSv2 and LAION's models have open_clip's layout: the text model's keys have no prefix, the vision model's `visual.`, and the
    query's, key's and value's maps are one matrix. Give the `CLIPModel` a config with `hidden_act` "gelu" (OpenAI's own models:
    "quick_gelu") and, in `text_config`, `eos_token_id` 2. HPSv2's file is a pickle: save its state dict as safetensors first.

    Args:
      tensors: from `weights.index` or `weights.find`.

    Returns:
      key of `CLIPModel` -> tensor, for `weights.read`.
    """
    out = {}
    for name, tensor in tensors.items():
        if name == "attn_mask":  # a buffer of older files
            continue
        key = name
        for pattern, replacement in _OPEN_CLIP:
            key = re.sub(pattern, replacement, key)
        if name in ("visual.proj", "text_projection"):
            out[key] = _Transposed(tensor.file, tensor.dtype, tensor.shape[::-1], tensor.offset)
        elif (joined := re.search(r"in_proj_(weight|bias)$", key)) is not None:
            shape = (tensor.shape[0] // 3, *tensor.shape[1:])
            size = int(np.prod(shape)) * tensor.dtype.itemsize
            for i, part in enumerate("qkv"):
                new = f"{key[: joined.start()]}{part}_proj.{joined[1]}"
                out[new] = dataclasses.replace(tensor, shape=shape, offset=tensor.offset + i * size)
        else:
            out[key] = tensor
    return out
