"""A released pipeline as this library's parts: a process, a model (parameters -> denoiser), and maps of pictures, latents and prompts.

`Pretrained` holds them. `rgdiff.pretrained.folders` reads it from a diffusers folder, and writes one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rgdiff import denoisers
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.schedulers import Scheduler, scaled_time
from rgdiff.processes import GaussianProcess
from rgdiff.typing import Array, Cond, Denoiser, Params, pytree, static

GUIDANCE = 3.5  # Flux's own, where its network takes one


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
      held: leaves of the network that are no parameters, by path: buffers of its file, which nothing tunes or decays.
    """

    schedule: Any
    network: Any = static()
    prediction: str = static()
    levels: int = static()
    channels: int = static()
    clip_x0: tuple[float, float] | None = static(default=None)
    held: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def whole(self, params: Params) -> Params:
        """Return all leaves of the network: the parameters and what is held."""
        return unflatten_dict({**flatten_dict(params, sep="/"), **self.held}, sep="/") if self.held else params

    def __call__(self, params: Params) -> Denoiser:
        first = 0 if self.prediction == "velocity" else 1
        network = scaled_time(ReleasedNetwork(self.whole(params), self.network, self.channels), self.levels, first)
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
        return _encoded(self.network, self.params, jnp.asarray(ids))


@functools.partial(jax.jit, static_argnums=0)
def _encoded(network: Any, params: Params, ids: Array) -> Any:
    return network.apply({"params": params}, ids)


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
      classes: number of labels of a class-conditional network; None otherwise.
      null_class: the label that means none, which guidance needs; None where the network was trained without one.
      zero_null: whether an empty negative prompt is embedded as zeros (Stable Diffusion XL).
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
    null_class: int | None = None
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
          ValueError: for a network without a condition, or with classes of which none means none.
        """
        if self.classes is not None:
            if self.null_class is None:
                raise ValueError("this network has no class that means none: there is nothing to guide it against")
            null: Any = {"labels": self.null_class}
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
          labels: [B], integers in 0 ... classes - 1.

        Raises:
          ValueError: for a network without classes, or another label.
        """
        if self.classes is None:
            raise ValueError("this network has no classes; embed(prompts) makes its condition")
        given = np.asarray(labels)
        if (
            not np.issubdtype(given.dtype, np.integer)
            or given.min(initial=0) < 0
            or given.max(initial=0) >= self.classes
        ):
            raise ValueError(f"labels are integers in 0 ... {self.classes - 1}, got {given.tolist()}")
        return {"labels": jnp.asarray(given, jnp.int32)}

    def embed(self, prompts: Sequence[str] | np.ndarray | Mapping[str, np.ndarray]) -> Cond:
        """Embed prompts, once: the condition of the denoiser, a pytree of leaves [N, ...].

        Args:
          prompts: texts, or token ids [N, L], or ids by the text encoder's folder (text_encoder, text_encoder_2, ...).

        Returns:
          {"context": [N, L, D], "prompt": [N] (their number, for rewards), ...}; with pooled embeddings and sizes where the
          network takes them. Flux's `guidance` is 3.5; replace that leaf for another.

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
        cond["guidance"] = jnp.full((count,), GUIDANCE)
    return cond
