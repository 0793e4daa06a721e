"""Diffusers' folders: `from_diffusers` reads a pipeline as a prior, `to_diffusers` and `save_pipeline` write one.

The denoising network, its scheduler, the autoencoder and the text encoders are each read by the class that their own config.json
names. What is written appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rgdiff import assets, checks
from rgdiff.pretrained import weights
from rgdiff.pretrained.config import Config, read_config
from rgdiff.pretrained.pipelines import Decoder, Encoder, Pretrained, PretrainedModel, TextEncoder
from rgdiff.pretrained.schedulers import Scheduler, read_scheduler
from rgdiff.typing import Params

# The class that a config.json names -> the module that has it.
NETWORKS = {
    "UNet2DConditionModel": "unet", "UNet2DModel": "unet", "AutoencoderKL": "autoencoder",
    "CLIPTextModel": "clip", "CLIPTextModelWithProjection": "clip", "T5EncoderModel": "t5",
    "DiTTransformer2DModel": "dit", "SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux",
}  # fmt: skip
DENOISERS = ("UNet2DConditionModel", "UNet2DModel", "DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel")  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def from_diffusers(
    folder: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    sharding: Any = None,
    remat: str | None = None,
    eta: float = 0.0,
    size: tuple[int, int] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    text: bool = True,
) -> Pretrained:
    """Read a pipeline's folder, or a denoising network's own, as a prior.

    Files are those of `save_pretrained`: model_index.json, a folder a part with config.json and safetensors. Every tensor must
    be named, shaped and typed as the configuration says. Tensors are read one at a time, each into its sharding.

    Args:
      folder: of Stable Diffusion 1.x, 2.x, XL or 3, Flux, DiT, or a DDPM; or of one network, with `scheduler`. `package:NAME` is one
        that comes with the package.
      dtype: that networks are stored and computed in; norms, softmax and results are float32. An autoencoder whose file asks for
        float32 (`force_upcast`) keeps it.
      sharding: of the denoising network's parameters: one for all, or a function of a leaf's path and shape.
      remat: what the denoising network recomputes in the backward pass, see its class.
      eta: of the process: 0 is DDIM, 1 DDPM.
      size: (h, w) of states, in latents; the network's own by default.
      scheduler: settings in place of the folder's scheduler_config.json.
      text: read the text encoders; False where conditions are embedded elsewhere.

    Returns:
      The prior.

    Raises:
      ValueError: in one line, for a folder that is incomplete, damaged, of another kind, or holds pickles.

    References: DDIM (arXiv 2010.02502); the networks' own papers are in their docstrings.

    Example:
      >>> import rgdiff
      >>> rgdiff.pretrained.from_diffusers("/no/such/folder")
      Traceback (most recent call last):
      ...
      ValueError: no folder at /no/such/folder
    """
    opened = _opened(folder)
    root, parts, config = opened.root, opened.parts, opened.config
    name = config["_class_name"]
    network = _network(name)(config, dtype=_compute(dtype), remat=remat)
    shape = _shape(config, size)
    read = _scheduler(opened, shape, scheduler)
    process, channels = read.process(shape, eta), shape[-1]
    params = _params(network, _inputs(name, config, shape), opened.place, root, dtype, sharding)
    frozen = getattr(importlib.import_module(type(network).__module__), "FROZEN", ())
    params, held = _split(params, frozen)
    model = PretrainedModel(process.schedule, network, read.prediction, read.levels, channels, read.clip_x0, held)
    classes, null_class = _classes(name, config)
    more: dict[str, Any] = {}
    if "vae" in parts:
        more |= _autoencoder(parts["vae"], root, dtype)
    if text:
        more["text"] = _text(opened, dtype)
    return Pretrained(
        folder=root,
        scheduler=read,
        process=process,
        model=model,
        params=params,
        classes=classes,
        null_class=null_class,
        zero_null=bool(opened.index.get("force_zeros_for_empty_prompt")),
        **more,
    )


def to_diffusers(prior: Pretrained, params: Params, folder: str | os.PathLike[str]) -> Path:
    """Write a pipeline with tuned parameters of its denoising network: a copy of the folder that it was read from, with new weights.

    The folder appears whole or not at all. An adapter is merged first (`nets.lora_merge`), or written apart (`runtime.adapters`).

    Args:
      prior: from `from_diffusers`.
      params: tuned, with the structure of `prior.params`.
      folder: to be written; it must not exist, or be empty.

    Returns:
      The folder.

    Raises:
      ValueError: for a folder that holds files, or parameters of another structure.
    """
    like, found = (jax.tree_util.tree_structure(tree) for tree in (prior.params, params))
    if like != found:
        raise ValueError(
            "params are not of this prior: expected the structure of prior.params (merge an adapter first)"
        )
    place = next((n for n in ("unet", "transformer") if (prior.folder / n).is_dir()), ".")
    old = lambda directory, names: (  # noqa: E731 - the weights that are replaced are not copied
        [n for n in names if n.startswith("diffusion_pytorch_model")] if Path(directory) == prior.folder / place else []
    )
    with _appearing(Path(folder)) as part:
        shutil.copytree(prior.folder, part, ignore=old, dirs_exist_ok=True)
        weights.write(part / place / WEIGHTS, prior.model.whole(params))
    return Path(folder)


def _split(params: Params, frozen: Sequence[str]) -> tuple[Params, dict[str, Any]]:
    """Return the leaves that are parameters as a tree, and those of these paths by path."""
    leaves = flatten_dict(params, sep="/") if frozen else {}
    held = {path: leaves.pop(path) for path in frozen}
    return (unflatten_dict(leaves, sep="/") if frozen else params), held


def _network(name: str) -> Any:
    return getattr(importlib.import_module(f"rgdiff.pretrained.{NETWORKS[name]}"), name)


def _compute(dtype: Any) -> Any:
    return None if jnp.dtype(dtype) == jnp.float32 else dtype


class _Opened(NamedTuple):
    """A folder, its model_index.json, its parts by name, the place of its denoising network, and that one's settings."""

    root: Path
    index: Config
    parts: dict[str, Path]
    place: Path
    config: Config


def _opened(folder: str | os.PathLike[str]) -> _Opened:
    root = assets.resolved(folder)
    if not root.is_dir():
        raise ValueError(f"no folder at {root}")
    index = Config({})
    if (root / "model_index.json").exists():
        index = read_config(weights.inside(root / "model_index.json", root))
        parts = {name: root / name for name, value in index.items() if isinstance(value, tuple) and all(value)}
    elif (root / "config.json").exists():
        parts = {"unet": root}
    else:
        raise ValueError(f"{root} holds no model_index.json and no config.json: expected a folder of save_pretrained")
    place = next((parts[name] for name in ("unet", "transformer") if name in parts), None)
    if place is None:
        raise ValueError(f"{root} has no part named unet or transformer; it has {', '.join(parts) or 'none'}")
    config = read_config(weights.inside(place / "config.json", root))
    checks.one_of(f"_class_name in {place / 'config.json'}", config.get("_class_name"), DENOISERS)
    return _Opened(root, index, parts, place, config)


def _shape(config: Config, size: tuple[int, int] | None) -> tuple[int, int, int]:
    own = config.get("sample_size", 128)
    high, wide = size or ((own, own) if isinstance(own, int) else own)
    channels = config["in_channels"] // (4 if config["_class_name"] == "FluxTransformer2DModel" else 1)
    return int(high), int(wide), int(channels)


def state_shape(folder: str | os.PathLike[str], size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Return the shape [h, w, C] of a folder's states; its settings are read, and no weights.

    Args:
      folder: as in `from_diffusers`.
      size: (h, w), the network's own by default.

    Raises:
      ValueError: for a folder that is none.
    """
    return _shape(_opened(folder).config, size)


def scheduler_of(folder: str | os.PathLike[str], shape: tuple[int, ...]) -> Scheduler:
    """Return the scheduler of a folder; its settings are read, and no weights.

    Args:
      folder: as in `from_diffusers`.
      shape: of one state, on which a flow's shift may depend.
    """
    return _scheduler(_opened(folder), shape, None)


def _scheduler(opened: _Opened, shape: tuple[int, ...], given: Mapping[str, Any] | None) -> Scheduler:
    root, config = opened.root, opened.config
    if given is None and "scheduler" not in opened.parts:
        raise ValueError(f"{root} has no scheduler; give scheduler=, the settings of a scheduler_config.json")
    if given is None:
        given = read_config(weights.inside(opened.parts["scheduler"] / "scheduler_config.json", root))
    flux = config["_class_name"] == "FluxTransformer2DModel"
    patch = config.get("patch_size", 1) * (2 if flux else 1)
    tokens = (shape[0] // patch) * (shape[1] // patch)
    return read_scheduler(given, tokens=tokens, even=flux)


def _classes(name: str, config: Config) -> tuple[int | None, int | None]:
    """Return the number of classes, and the label that means none: DiT has one row more than classes; a U-Net's file knows of none."""
    if name == "DiTTransformer2DModel":
        count = int(config["num_embeds_ada_norm"])
        return count, count
    if name == "UNet2DModel" and config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"]), None
    return None, None


def _inputs(name: str, config: Config, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return shapes of what a denoising network is called with."""
    of = lambda *axes, dtype=jnp.float32: jax.ShapeDtypeStruct((1, *axes), dtype)  # noqa: E731
    x, t, label = of(*shape), of(), of(dtype=jnp.int32)
    if name == "UNet2DModel":
        return x, t, label if config.get("num_class_embeds") is not None else None
    if name == "DiTTransformer2DModel":
        return x, t, label
    if name == "UNet2DConditionModel":
        added = None
        if config.get("addition_embed_type") == "text_time":
            ids = 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": of(config["projection_class_embeddings_input_dim"] - ids), "time_ids": of(6)}
        return x, t, of(77, config["cross_attention_dim"]), added
    context, pooled = of(8, config["joint_attention_dim"]), of(config["pooled_projection_dim"])
    if name == "SD3Transformer2DModel":
        return x, t, context, pooled
    return x, t, context, pooled, of() if config.get("guidance_embeds") else None


def _params(network: Any, inputs: Any, place: Path, root: Path, dtype: Any, sharding: Any = None) -> Params:
    def shapes(key: Any, *inputs: Any) -> Any:
        return network.init(key, *inputs)["params"]

    like = jax.eval_shape(shapes, jax.random.key(0), *inputs)
    rename = getattr(importlib.import_module(type(network).__module__), "rename", None)
    tensors = weights.find(place, root)
    return weights.read(tensors, like, dtype=dtype, sharding=sharding, rename=rename, source=place)


def _autoencoder(place: Path, root: Path, dtype: Any) -> dict[str, Any]:
    config = read_config(weights.inside(place / "config.json", root))
    name = checks.one_of(f"_class_name in {place / 'config.json'}", config.get("_class_name"), ("AutoencoderKL",))
    kept = jnp.float32 if config.get("force_upcast", False) else dtype
    network = _network(name)(config, dtype=_compute(kept))
    size = config.get("sample_size", 64)
    x = jax.ShapeDtypeStruct((1, size, size, config.get("in_channels", 3)), jnp.float32)
    params = _params(network, (x,), place, root, kept)
    scale, shift = float(config.get("scaling_factor", 0.18215)), float(config.get("shift_factor", 0.0))
    return {kind: make(params, network, scale, shift) for kind, make in (("decode", Decoder), ("encode", Encoder))}


def _text(opened: _Opened, dtype: Any) -> dict[str, TextEncoder]:
    parts, root, out = opened.parts, opened.root, {}
    t5_length = (
        512 if opened.config["_class_name"] == "FluxTransformer2DModel" else 256
    )  # diffusers' max_sequence_length
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if name not in parts:
            continue
        config = read_config(weights.inside(parts[name] / "config.json", root))
        kinds = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
        kind = checks.one_of(f"architectures in {parts[name]}", (config.get("architectures") or ("",))[0], kinds)
        network = _network(kind)(config, dtype=_compute(dtype))
        length = config.get("max_position_embeddings", t5_length)
        ids = jax.ShapeDtypeStruct((1, min(length, 77)), jnp.int32)
        params = _params(network, (ids,), parts[name], root, dtype)
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        out[name] = TextEncoder(network, params, length, None if tokenizer is None else _Tokenizer(tokenizer, length))
    return out


class _Tokenizer:
    """The folder's tokenizer, loaded at its first use: the package that reads it is an extra."""

    def __init__(self, folder: Path, length: int):
        self.folder, self.length, self._tokenize = folder, length, None

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        if self._tokenize is None:
            from rgdiff.pretrained.text import tokenizer

            self._tokenize = tokenizer(self.folder, self.length)
        return self._tokenize(prompts)


class Part(NamedTuple):
    """A part of a pipeline's folder: its library and class as model_index.json names them, its settings, and its parameters, if any.

    Args:
      library: diffusers or transformers.
      kind: the class.
      settings: of its config.json; of a scheduler, its scheduler_config.json; empty for a tokenizer.
      params: of a network.
      files: further files, name -> contents: those of a tokenizer.
    """

    library: str
    kind: str
    settings: Mapping[str, Any]
    params: Params = None
    files: Mapping[str, bytes] = {}


def save_pipeline(folder: str | os.PathLike[str], kind: str, parts: Mapping[str, Part]) -> Path:
    """Write a pipeline's folder, as diffusers' `save_pretrained` does; whole or not at all.

    Args:
      folder: to be written; it must not exist, or be empty.
      kind: the pipeline's class, such as StableDiffusionPipeline.
      parts: folder -> part.

    Returns:
      The folder.

    Raises:
      ValueError: for a folder that holds files.
    """
    with _appearing(Path(folder)) as place:
        index = {name: [part.library, part.kind] for name, part in parts.items()}
        _write_json(place / "model_index.json", {"_class_name": kind, **index})
        for name, part in parts.items():
            (place / name).mkdir()
            if part.settings:
                file = "scheduler_config.json" if part.kind.endswith("Scheduler") else "config.json"
                own = {"architectures": [part.kind]} if part.library == "transformers" else {"_class_name": part.kind}
                _write_json(place / name / file, own | dict(part.settings))
            if part.params is not None:
                stem = WEIGHTS if part.library == "diffusers" else "model.safetensors"
                weights.write(place / name / stem, part.params)
            for file, content in part.files.items():
                (place / name / file).write_bytes(content)
    return Path(folder)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which takes its own name when all is written."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty; give another folder")
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if target.exists():
            target.rmdir()
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
