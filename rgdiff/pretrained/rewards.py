"""Rewards on pictures by released networks: likeness to a text (CLIP), human preference (PickScore, HPSv2), aesthetics (LAION).

Each reads the user's own files and is a callable pytree (x0, cond) -> [B] on pixels [B, H, W, 1 or 3] in [-1, 1], differentiable,
with the network's parameters as leaves. Texts are embedded once, when a reward is made; the text model is not kept. Where
several are given, `cond` says which of them each row has: an integer [B], or a mapping with such an entry `prompt`; with one, it
is not read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff.pretrained import clip, preprocess, weights
from rgdiff.pretrained.config import Config, read_config
from rgdiff.pretrained.text import tokenizer as read_tokenizer
from rgdiff.pretrained.weights import Tensor
from rgdiff.typing import Array, Cond, Params, Reward, pytree, static

Folder = str | os.PathLike[str]
TEXTS = 64  # that are embedded at once
TEXT_PART, VISION_PART = ("text_model.", "text_projection."), ("vision_model.", "visual_projection.")
# OpenCLIP's ViT-H-14, which HPSv2 was tuned from; its own files have no config.json.
VIT_H_14 = Config(
    {
        "projection_dim": 1024,
        "text_config": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
            "hidden_act": "gelu", "eos_token_id": 2,
        },
        "vision_config": {
            "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32,
            "hidden_act": "gelu", "patch_size": 14,
        },
    }
)  # fmt: skip


@pytree
class ImageEmbedding:
    """Pixels [B, H, W, 1 or 3] in [-1, 1] to CLIP's embeddings [B, P], of length 1."""

    params: Params
    preprocess: preprocess.Preprocess
    network: clip.CLIPVisionModelWithProjection = static()

    def __call__(self, x: Array) -> Array:
        out = self.network.apply({"params": self.params}, self.preprocess(x))
        return _unit(out.image_embeds)  # type: ignore[union-attr]


@pytree
class TextLikeness:
    """`scale` times the cosine of a picture's embedding and its text's; see `clip_score`."""

    embed: ImageEmbedding
    texts: Array  # [texts, P], of length 1
    scale: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        images, count = self.embed(x0), len(self.texts)
        which = cond.get("prompt") if isinstance(cond, Mapping) else cond
        if count == 1:
            which = jnp.zeros(len(images), jnp.int32)
        elif which is None or jnp.shape(which) != images.shape[:1] or not jnp.issubdtype(which.dtype, jnp.integer):
            raise ValueError(
                f"a reward on {count} texts needs to know which of them each picture has: give cond, integer [B], "
                "or a mapping with such an entry 'prompt'"
            )
        known = (which >= 0) & (which < count)
        cosines = jnp.sum(images * self.texts[jnp.where(known, which, 0)], -1)
        return jnp.where(known, self.scale * cosines, jnp.nan)


@pytree
class Aesthetic:
    """A linear function of a picture's embedding; see `aesthetic`."""

    embed: ImageEmbedding
    weight: Array
    bias: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return jnp.sum(self.embed(x0) * self.weight, -1) + self.bias


def clip_score(
    folder: Folder,
    prompts: str | Sequence[str] | Array | np.ndarray,
    *,
    rounded: bool = True,
    dtype: Any = jnp.float32,
    remat: str | None = "block",
) -> Reward:
    """Reward likeness to a text: r(x) = exp(logit_scale) cos(image, text), CLIP's `logits_per_image`, at most 100 for OpenAI's.

    Args:
      folder: of a CLIPModel: config.json, safetensors in transformers' or open_clip's layout, and, for prompts as text, the
        tokenizer's files; its preprocessor_config.json is followed, if there.
      prompts: a text, several, or token ids [texts, L] with start and end tokens. With several, `cond` says which each row has:
        integer [B], or a mapping with such an entry `prompt`; a row with an index that none has is NaN.
      rounded: round pixels to 8 bits, and again after each axis of the resize, with a straight-through gradient: a picture's file and
        Pillow do so, and scores are the published ones to 1e-3 (to 5e-2 without). False has the gradient of what it computes.
      dtype: of the networks' computation; norms, softmax and embeddings are float32.
      remat: "block" computes each layer again in the backward pass; None keeps them.

    Returns:
      The reward, on pixels [B, H, W, 1 or 3] in [-1, 1].

    Raises:
      ValueError: in one line, for files that are missing or do not fit, a setting that is not supported, or no text.

    References: Radford et al. 2021, arXiv:2103.00020. Hessel et al. 2021, arXiv:2104.08718, have 2.5 max(cos, 0).
    """
    return _likeness(folder, prompts, None, None, rounded, dtype, remat)


def pick_score(
    folder: Folder,
    prompts: str | Sequence[str] | Array | np.ndarray,
    *,
    tokenizer: Folder | None = None,
    rounded: bool = True,
    dtype: Any = jnp.float32,
    remat: str | None = "block",
) -> Reward:
    """Reward human preference by PickScore: r(x) = exp(logit_scale) cos(image, text) of a tuned CLIP-H, about 20.

    Args:
      folder: of yuvalkirstain/PickScore_v1, as `clip_score`.
      prompts: as `clip_score`.
      tokenizer: folder of the tokenizer's files, where they are not in `folder`.
      rounded: as `clip_score`.
      dtype: as `clip_score`.
      remat: as `clip_score`.

    Returns:
      The reward, on pixels [B, H, W, 1 or 3] in [-1, 1].

    Raises:
      ValueError: as `clip_score`.

    References: Kirstain et al. 2023, arXiv:2305.01569.
    """
    return _likeness(folder, prompts, None, tokenizer, rounded, dtype, remat)


def hps_v2(
    path: Folder,
    prompts: str | Sequence[str] | Array | np.ndarray,
    *,
    tokenizer: Folder | None = None,
    rounded: bool = True,
    dtype: Any = jnp.float32,
    remat: str | None = "block",
) -> Reward:
    """Reward human preference by HPSv2: r(x) = cos(image, text) of a tuned CLIP-H, about .27; without logit_scale, as its authors.

    Args:
      path: a safetensors file in open_clip's layout, or a folder as of `clip_score`; without a config.json it is a ViT-H-14. HPSv2 is
        released as a pickle; torch.load(FILE)["state_dict"], given to safetensors.torch.save_file, becomes such a file.
      prompts: as `clip_score`.
      tokenizer: folder of CLIP's tokenizer, where its files are not beside the weights.
      rounded: as `clip_score`.
      dtype: as `clip_score`.
      remat: as `clip_score`.

    Returns:
      The reward, on pixels [B, H, W, 1 or 3] in [-1, 1].

    Raises:
      ValueError: as `clip_score`.

    References: Wu et al. 2023, arXiv:2306.09341.
    """
    return _likeness(path, prompts, 1.0, tokenizer, rounded, dtype, remat, VIT_H_14)


def aesthetic(
    folder: Folder, head: Folder, *, rounded: bool = True, dtype: Any = jnp.float32, remat: str | None = "block"
) -> Reward:
    """Reward aesthetics by LAION's predictors: a linear function of CLIP's embedding of length 1, about 1 to 10.

    Version 1 is one linear map. Version 2, of Black et al. 2023 and DRaFT, is five without an activation between them, and so
    one as well: their product is kept.

    Args:
      folder: of a CLIPModel or CLIPVisionModelWithProjection; both versions were trained on OpenAI's ViT-L/14.
      head: safetensors file with `weight` and `bias` (version 1), or `layers.0.weight` ... (version 2). They are released as pickles;
        safetensors.torch.save_file(torch.load(FILE), NEW) converts one. Heads trained with a ReLU have the same names and are
        another function.
      rounded: as `clip_score`.
      dtype: as `clip_score`.
      remat: as `clip_score`.

    Returns:
      The reward, on pixels [B, H, W, 1 or 3] in [-1, 1].

    Raises:
      ValueError: in one line, for files that are missing or do not fit, or a setting that is not supported.

    References: Schuhmann et al. 2022, arXiv:2210.08402; Black et al. 2023, arXiv:2305.13301, section 5.1.
    """
    source = Path(folder)
    config, tensors = _model(source, None)
    embed, width = _image_embedding(config, tensors, source, rounded, dtype, remat)
    weight, bias = _linear(Path(head), width)
    return Aesthetic(embed, jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32))


def _likeness(
    path: Folder,
    prompts: Any,
    scale: float | None,
    tokenizer: Folder | None,
    rounded: bool,
    dtype: Any,
    remat: str | None,
    config: Config | None = None,
) -> Reward:
    source = Path(path)
    config, tensors = _model(source, config)
    if "logit_scale" not in tensors:
        raise ValueError(
            f"{source} has no 'logit_scale': expected a whole CLIPModel, with its text and its vision model"
        )
    ids = _token_ids(prompts, source.parent if source.is_file() else source, tokenizer, config)
    texts = _text_embeddings(config, tensors, source, ids, dtype)
    if scale is None:
        scale = float(np.exp(np.asarray(tensors["logit_scale"].array(), np.float64)))
    embed, _ = _image_embedding(config, tensors, source, rounded, dtype, remat)
    return TextLikeness(embed, texts, jnp.asarray(scale, jnp.float32))


def _model(source: Path, config: Config | None) -> tuple[Config, dict[str, Tensor]]:
    """Return the config and the tensors, by their names in a CLIPModel, of a folder or a file."""
    folder = source.parent if source.is_file() else source
    tensors = weights.index(source) if source.is_file() else weights.find(source)
    if config is None or (folder / "config.json").exists():
        config = read_config(folder / "config.json")
    if "visual.conv1.weight" in tensors:
        tensors = clip.from_open_clip(tensors)
    tensors = {new: tensor for name, tensor in tensors.items() if (new := clip.rename(name)) is not None}
    parts = (*TEXT_PART, *VISION_PART)
    if extra := [name for name in tensors if name != "logit_scale" and not name.startswith(parts)]:
        raise ValueError(f"{source} has {extra[0]!r}, which CLIP lacks ({len(extra)} tensors are left over)")
    return config, tensors


def _sides(config: Config) -> tuple[Config, Config]:
    """Return the configs of the text and the vision model, each with the width of the projection."""
    if "vision_config" not in config:  # of a CLIPVisionModelWithProjection
        return config, config
    whole, *sides = clip.CLIPModel(config).settings()
    text, vision = (Config({**side, "projection_dim": whole["projection_dim"]}) for side in sides)
    return text, vision


def _image_embedding(
    config: Config, tensors: Mapping[str, Tensor], source: Path, rounded: bool, dtype: Any, remat: str | None
) -> tuple[ImageEmbedding, int]:
    network = clip.CLIPVisionModelWithProjection(_sides(config)[1], jnp.dtype(dtype), remat)
    settings = network.settings()
    size = settings["image_size"]
    prepare = preprocess.from_folder(source.parent if source.is_file() else source, size, rounded=rounded)
    pixels = jnp.zeros((1, size, size, 3))
    params = _params(network, tensors, VISION_PART, source, pixels)
    return ImageEmbedding(params, prepare, network), settings["projection_dim"]


def _text_embeddings(config: Config, tensors: Mapping[str, Tensor], source: Path, ids: np.ndarray, dtype: Any) -> Array:
    network = clip.CLIPTextModelWithProjection(_sides(config)[0], jnp.dtype(dtype))
    params = _params(network, tensors, TEXT_PART, source, jnp.zeros((1, ids.shape[1]), jnp.int32))
    embed = jax.jit(lambda params, ids: _unit(network.apply({"params": params}, ids).text_embeds))  # type: ignore[union-attr]
    return jnp.concatenate([embed(params, jnp.asarray(ids[at : at + TEXTS])) for at in range(0, len(ids), TEXTS)])


def _params(network: Any, tensors: Mapping[str, Tensor], part: tuple[str, ...], source: Path, example: Array) -> Params:
    like = jax.eval_shape(network.init, jax.random.key(0), example)["params"]
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(part)}
    return weights.read(mine, like, source=source)


def _token_ids(prompts: Any, folder: Path, tokenizer: Folder | None, config: Config) -> np.ndarray:
    """Return the token ids [texts, L] of texts, or of ids."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if len(prompts) == 0:
        raise ValueError("a reward on texts needs at least one prompt")
    if isinstance(prompts[0], str):
        length = clip.CLIPModel(config).settings()[1]["max_position_embeddings"]
        return read_tokenizer(tokenizer or folder, length)(prompts)
    ids = np.asarray(prompts)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompts are texts, or token ids, integer [texts, L]; got {ids.dtype}{list(ids.shape)}")
    return ids.astype(np.int32)


def _linear(file: Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight [width] and the bias [] of a chain of linear maps to one number."""
    tensors = weights.index(file)
    maps: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(?:layers\.(\d+)\.)?(weight|bias)", name)
        if not found:
            raise ValueError(
                f"{file} has {name!r}; an aesthetic head has weight and bias, or layers.N.weight and .bias"
            )
        maps.setdefault(int(found[1] or 0), {})[found[2]] = np.asarray(tensor.array(), np.float64)
    weight, bias = np.eye(width), np.zeros(width)
    for number in sorted(maps):
        if set(maps[number]) != {"weight", "bias"} or maps[number]["weight"].shape[1:] != bias.shape:
            shapes = {name: list(array.shape) for name, array in maps[number].items()}
            raise ValueError(f"{file}: map {number} has {shapes}, expected a weight [features, {len(bias)}] and a bias")
        weight = maps[number]["weight"] @ weight
        bias = maps[number]["weight"] @ bias + maps[number]["bias"]
    if bias.shape != (1,):
        raise ValueError(f"{file} ends in {len(bias)} numbers, expected 1")
    return weight[0], bias[0]


def _unit(x: Array) -> Array:
    """Divide vectors by their length."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
