"""A diffusers folder becomes a prior, and what was tuned goes back into one.

`from_diffusers` reads the denoising network, its scheduler, the autoencoder and the text encoders of a pipeline, each by
the class that its own config.json names. `Pretrained` holds them as this library's parts: a process, a model (parameters ->
denoiser), parameters, a grid, and the maps between pictures, latents and prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import assets, checks, denoisers
from rgdiff.pretrained import weights
from rgdiff.pretrained.config import Config, read_config
from rgdiff.pretrained.schedulers import Scheduler, read_scheduler, scaled_time
from rgdiff.processes import GaussianProcess
from rgdiff.typing import Array, Cond, Denoiser, Params, pytree, static

# The class that a config.json names -> the module that has it.
NETWORKS = {
    "UNet2DConditionModel": "unet", "UNet2DModel": "unet", "AutoencoderKL": "autoencoder",
    "CLIPTextModel": "clip", "CLIPTextModelWithProjection": "clip", "T5EncoderModel": "t5",
    "DiTTransformer2DModel": "dit", "SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux",
}  # fmt: skip
DENOISERS = ("UNet2DConditionModel", "UNet2DModel", "DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel")  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _arguments(name: str, cond: Any) -> tuple[Any, ...]:
    """Return what a network of this class is called with after the state and the time."""
    if name == "UNet2DModel":
        return (None if cond is None else cond["labels"],)
    if cond is None:
        raise ValueError(f"{name} needs a condition; make it by the prior's embed(...) or labelled(...)")
    if name == "UNet2DConditionModel":
        return cond["context"], cond.get("added")
    if name == "DiTTransformer2DModel":
        return (cond["labels"],)
    if name == "SD3Transformer2DModel":
        return cond["context"], cond["pooled"]
    return cond["context"], cond["pooled"], cond.get("guidance")


@pytree
class PretrainedModel:
    """Parameters -> denoiser of a released network. Build it with `from_diffusers`.

    Args:
      schedule: the noise levels.
      network: a Linen module of this package.
      prediction: of the network, see `denoisers.predicts`.
      levels: T, by which t is multiplied for the network.
      channels: of the state; a network with more outputs (a learnt variance) is cut to them.
      clip_x0: range to which predictions of x0 are clipped, or None.
    """

    schedule: Any
    network: Any = static()
    prediction: str = static()
    levels: int = static()
    channels: int = static()
    clip_x0: tuple[float, float] | None = static(default=None)

    def __call__(self, params: Params) -> Denoiser:
        first = 0 if self.prediction == "velocity" else 1
        network = scaled_time(ReleasedNetwork(params, self.network, self.channels), self.levels, first)
        denoiser = denoisers.predicts(self.prediction, network, self.schedule)
        return denoiser if self.clip_x0 is None else denoisers.clip_x0(denoiser, *self.clip_x0)


@pytree
class ReleasedNetwork:
    """A network with its parameters, called as (x, step, cond)."""

    params: Params
    network: Any = static()
    channels: int = static()

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        out = self.network.apply({"params": self.params}, x, t, *_arguments(type(self.network).__name__, cond))
        return out[..., : self.channels].astype(jnp.float32)


@pytree
class GuidedModel:
    """A model under classifier-free guidance: parameters -> denoiser. Build it with `Pretrained.guided`."""

    model: PretrainedModel
    scale: Array
    null: Any

    def __call__(self, params: Params) -> Denoiser:
        return denoisers.classifier_free(self.model(params), self.scale, self.null)  # type: ignore[arg-type]


@pytree
class Decoder:
    """Latents [B, h, w, C] -> pictures [B, H, W, 3], in [-1, 1] up to the network's error: decode(z / scale + shift)."""

    params: Params
    network: Any = static()
    scale: float = static()
    shift: float = static()

    def __call__(self, z: Array) -> Array:
        dtype = getattr(self.network, "dtype", None) or jnp.float32
        out = self.network.apply({"params": self.params}, (z / self.scale + self.shift).astype(dtype), method="decode")
        return out.astype(jnp.float32)


@pytree
class Encoder:
    """Pictures [B, H, W, 3] in [-1, 1] -> latents [B, h, w, C], the posterior's mean: (encode(x) - shift) scale."""

    params: Params
    network: Any = static()
    scale: float = static()
    shift: float = static()

    def __call__(self, x: Array) -> Array:
        mean = self.network.apply({"params": self.params}, x, method="encode")[0]
        return (mean.astype(jnp.float32) - self.shift) * self.scale


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a pipeline: token ids [N, L] -> what its network returns. `tokenize` is None where the folder has no tokenizer."""

    network: Any
    params: Params
    length: int
    tokenize: Callable[[Sequence[str]], np.ndarray] | None

    def ids(self, prompts: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return token ids [N, L] of prompts; ids are returned as they are."""
        if isinstance(prompts, np.ndarray | jax.Array):
            return np.asarray(prompts, np.int32)
        if self.tokenize is None:
            raise ValueError("the folder has no tokenizer; give token ids [N, L] in place of prompts")
        return np.asarray(self.tokenize(list(prompts)), np.int32)

    def __call__(self, ids: np.ndarray) -> Any:
        run = jax.jit(lambda params, ids: self.network.apply({"params": params}, ids))
        return run(self.params, jnp.asarray(ids))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A released pipeline as a prior. Build it with `from_diffusers`.

    Args:
      folder: that it was read from.
      scheduler: its levels, prediction and grid.
      process: on states [B, *shape], with the file's schedule.
      model: parameters -> denoiser; a conditional one is called with a pytree of `embed` or `labelled`.
      params: of the denoising network.
      decode, encode: between latents and pictures, callable pytrees; None where states are pictures.
      text: its text encoders, by their folder's name.
      classes: of a class-conditional network, whose label of that number means none; None otherwise.
    """

    folder: Path
    scheduler: Scheduler
    process: GaussianProcess
    model: PretrainedModel
    params: Params
    decode: Decoder | None = None
    encode: Encoder | None = None
    text: Mapping[str, TextEncoder] = dataclasses.field(default_factory=dict)
    classes: int | None = None
    zero_null: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one state: [h, w, C]."""
        return self.process.shape

    def times(self, steps: int) -> Array:
        """Return the grid of the file's scheduler: [steps], decreasing; all but the last network call are moves."""
        return self.process.times(steps)

    def pictures(self, x0: Array) -> Array:
        """Return samples as pictures [B, H, W, C]: decoded, where they are latents."""
        return x0 if self.decode is None else self.decode(x0)

    def with_eta(self, eta: float) -> GaussianProcess:
        """Return the process with another eta: 0 is DDIM, 1 DDPM's ancestral chain, on which methods that need a law run."""
        return self.scheduler.process(self.shape, eta)

    def guided(self, scale: float, negative: str | np.ndarray = "") -> GuidedModel | PretrainedModel:
        """Return the model under classifier-free guidance.

        Args:
          scale: 1 is the conditional network alone.
          negative: the prompt (or its token ids [L]) that the unconditional call is given; of no use to a class-conditional network.

        Returns:
          The model: parameters -> denoiser, which needs a condition. Both calls are one of 2B rows.

        Raises:
          ValueError: for an unconditional network.
        """
        if self.classes is not None:
            null: Any = {"labels": self.classes}
        elif self.text:
            one = [negative] if isinstance(negative, str) else np.asarray(negative)[None]
            null = jax.tree.map(lambda leaf: leaf[0], self.embed(one))
            if self.zero_null and isinstance(negative, str) and not negative:
                zero = {"context": jnp.zeros_like(null["context"])}
                added = null["added"] | {"text_embeds": jnp.zeros_like(null["added"]["text_embeds"])}
                null = null | zero | {"added": added}
        else:
            raise ValueError("this network takes no condition: there is nothing to guide it by")
        return GuidedModel(self.model, jnp.asarray(scale, jnp.float32), null)

    def labelled(self, labels: Any) -> Cond:
        """Return the condition of class labels.

        Args:
          labels: [B], integers below `classes`.
        """
        if self.classes is None:
            raise ValueError("this network has no classes; embed(prompts) makes its condition")
        return {"labels": jnp.asarray(labels, jnp.int32)}

    def embed(self, prompts: Sequence[str] | np.ndarray | Mapping[str, np.ndarray]) -> Cond:
        """Embed prompts, once: the condition of the denoiser, a pytree of leaves [N, ...].

        Args:
          prompts: texts, or token ids [N, L], or ids by the text encoder's folder (text_encoder, text_encoder_2, ...).

        Returns:
          {"context": [N, L, D], "prompt": [N] (their number, for rewards), ...}; with pooled embeddings and sizes where the
          network takes them.

        Raises:
          ValueError: for a pipeline without text, or without a tokenizer for texts.
        """
        if not self.text:
            raise ValueError("this pipeline has no text encoder; labelled(labels) or cond=None is its condition")
        given = {n: prompts[n] if isinstance(prompts, Mapping) else prompts for n in self.text}
        ids = {name: encoder.ids(given[name]) for name, encoder in self.text.items()}
        count = len(next(iter(ids.values())))
        out = {name: encoder(ids[name]) for name, encoder in self.text.items()}
        name = type(self.model.network).__name__
        cond = _conditions(name, out, self.model.network.config, self.shape, self._factor)
        return {"prompt": jnp.arange(count, dtype=jnp.int32)} | cond

    @property
    def _factor(self) -> int:
        """Pixels a latent, along a side."""
        if self.decode is None:
            return 1
        return 2 ** (len(self.decode.network.config["block_out_channels"]) - 1)


def _conditions(
    name: str, out: Mapping[str, Any], config: Config, shape: tuple[int, ...], factor: int
) -> dict[str, Any]:
    """Return the condition that a network of this class is given, of what the text encoders returned."""
    first = out["text_encoder"]
    count = first.last_hidden_state.shape[0]
    if name == "UNet2DConditionModel" and config.get("addition_embed_type") != "text_time":
        return {"context": first.last_hidden_state}
    if name == "UNet2DConditionModel":
        second = out["text_encoder_2"]
        sizes = jnp.asarray([shape[0] * factor, shape[1] * factor], jnp.float32)
        ids = jnp.concatenate([sizes, jnp.zeros(2), sizes])  # original size, crop, target size
        context = jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return {"context": context, "added": {"text_embeds": second.text_embeds, "time_ids": jnp.tile(ids, (count, 1))}}
    if name == "SD3Transformer2DModel":
        second, width = out["text_encoder_2"], config["joint_attention_dim"]
        clip = jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], -1)
        clip = jnp.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1])))
        t5 = (
            out["text_encoder_3"].last_hidden_state
            if "text_encoder_3" in out
            else jnp.zeros((count, 256, width), clip.dtype)
        )
        pooled = jnp.concatenate([first.text_embeds, second.text_embeds], -1)
        return {"context": jnp.concatenate([clip, t5.astype(clip.dtype)], 1), "pooled": pooled}
    cond = {"context": out["text_encoder_2"].last_hidden_state, "pooled": first.pooler_output}
    if config.get("guidance_embeds"):
        cond["guidance"] = jnp.full((count,), 3.5)
    return cond


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
    root, parts, place, config = _opened(folder)
    name = config["_class_name"]
    network = _network(name)(config, dtype=_compute(dtype), remat=remat)
    shape = _shape(config, size)
    read = _scheduler(parts, root, config, shape, scheduler)
    process, channels = read.process(shape, eta), shape[-1]
    params = _params(network, _inputs(name, config, shape), place, root, dtype, sharding)
    model = PretrainedModel(process.schedule, network, read.prediction, read.levels, channels, read.clip_x0)
    classes = _classes(name, config)
    more: dict[str, Any] = {}
    if "vae" in parts:
        more |= _autoencoder(parts["vae"], root, dtype)
    if text:
        more["text"] = _text(parts, root, dtype)
    zero = (root / "model_index.json").exists() and read_config(root / "model_index.json").get(
        "force_zeros_for_empty_prompt"
    )
    return Pretrained(folder=root, scheduler=read, process=process, model=model, params=params, classes=classes, zero_null=bool(zero), **more)  # fmt: skip


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
        weights.write(part / place / WEIGHTS, params)
    return Path(folder)


def _network(name: str) -> Any:
    return getattr(importlib.import_module(f"rgdiff.pretrained.{NETWORKS[name]}"), name)


def _compute(dtype: Any) -> Any:
    return None if jnp.dtype(dtype) == jnp.float32 else dtype


def _opened(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Path], Path, Config]:
    """Return a folder, its parts by name, the place of its denoising network, and that one's settings."""
    root = assets.resolved(folder)
    if not root.is_dir():
        raise ValueError(f"no folder at {root}")
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
    return root, parts, place, config


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
    return _shape(_opened(folder)[3], size)


def scheduler_of(folder: str | os.PathLike[str], shape: tuple[int, ...]) -> Scheduler:
    """Return the scheduler of a folder; its settings are read, and no weights.

    Args:
      folder: as in `from_diffusers`.
      shape: of one state, on which a flow's shift may depend.
    """
    root, parts, _, config = _opened(folder)
    return _scheduler(parts, root, config, shape, None)


def _scheduler(
    parts: Mapping[str, Path], root: Path, config: Config, shape: tuple[int, ...], given: Mapping[str, Any] | None
) -> Scheduler:
    if given is None and "scheduler" not in parts:
        raise ValueError(f"{root} has no scheduler; give scheduler=, the settings of a scheduler_config.json")
    if given is None:
        given = read_config(weights.inside(parts["scheduler"] / "scheduler_config.json", root))
    patch = config.get("patch_size", 1) * (2 if config["_class_name"] == "FluxTransformer2DModel" else 1)
    return read_scheduler(given, tokens=(shape[0] // patch) * (shape[1] // patch))


def _classes(name: str, config: Config) -> int | None:
    if name == "DiTTransformer2DModel":
        return int(config["num_embeds_ada_norm"])
    if name == "UNet2DModel" and config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"]) - 1  # the last one means none
    return None


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


def _params(network: Any, inputs: Any, place: Path, root: Path, dtype: Any, sharding: Any = None, **how: Any) -> Params:
    def shapes(key: Any, *inputs: Any) -> Any:
        return network.init(key, *inputs, **how)["params"]

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


def _text(parts: Mapping[str, Path], root: Path, dtype: Any) -> dict[str, TextEncoder]:
    out = {}
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if name not in parts:
            continue
        config = read_config(weights.inside(parts[name] / "config.json", root))
        kinds = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
        kind = checks.one_of(f"architectures in {parts[name]}", (config.get("architectures") or ("",))[0], kinds)
        network = _network(kind)(config, dtype=_compute(dtype))
        t5_length = (
            512 if any(n.startswith("FluxT") for n in _classes_of(root)) else 256
        )  # diffusers' max_sequence_length
        length = config.get("max_position_embeddings", t5_length)
        ids = jax.ShapeDtypeStruct((1, min(length, 77)), jnp.int32)
        params = _params(network, (ids,), parts[name], root, dtype)
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        out[name] = TextEncoder(network, params, length, None if tokenizer is None else _Tokenizer(tokenizer, length))
    return out


def _classes_of(root: Path) -> list[str]:
    """Return the classes that a pipeline's model_index.json names."""
    index = read_config(root / "model_index.json") if (root / "model_index.json").exists() else Config({})
    return [str(value[1]) for value in index.values() if isinstance(value, tuple) and len(value) == 2]


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
