"""The U-Nets of released diffusion models: `UNet2DConditionModel` (Stable Diffusion 1, 2, XL) and `UNet2DModel` (DDPM's family).

Both are one arrangement of stages, down, middle and up, and differ in what conditions them. They are built from a config.json, and
their parameters bear the names of its state dict (`rgdiff.pretrained.weights`); `rename` brings old files to these names. What
the output means (noise, velocity) and what a time is, is left to the model that wraps a network. Dropout is not computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from rgdiff.pretrained._blocks import (
    Downsample2D,
    ResnetBlock2D,
    Stage,
    Transformer2DModel,
    Upsample2D,
    check_image,
    head,
    recomputed,
    rename,
)
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.layers import ACTIVATIONS, Attention, TimestepEmbedding, conv, dense, sinusoids
from rgdiff.typing import Array

__all__ = ["UNet2DConditionModel", "UNet2DModel", "rename"]


class _Kind(NamedTuple):
    """What a type of stage has beside residual blocks: "self" or "cross" attention; "conv" or "resnet" to resize, None as set."""

    attention: str | None
    sampler: str | None


class _Mid(NamedTuple):
    """What the middle has: its number of residual blocks, and the attention between them."""

    layers: int
    attention: str | None


_DOWN = {
    "DownBlock2D": _Kind(None, "conv"),
    "AttnDownBlock2D": _Kind("self", None),
    "CrossAttnDownBlock2D": _Kind("cross", "conv"),
    "ResnetDownsampleBlock2D": _Kind(None, "resnet"),
}
_UP = {name.replace("Down", "Up"): kind for name, kind in _DOWN.items()}
_KINDS = {"down": _DOWN, "up": _UP}
_READ = frozenset({
    "sample_size", "dropout", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift",
    "down_block_types", "mid_block_type", "up_block_types", "block_out_channels", "layers_per_block", "downsample_padding",
    "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "attention_head_dim", "resnet_time_scale_shift",
    "class_embed_type", "num_class_embeds", "time_embedding_dim",
})  # fmt: skip


class _Parts:
    """The residual blocks, attentions and resizings of every stage, from the configuration; stage 0 has the full resolution."""

    def __init__(self, config: Config, dtype: Any, remat: str | None):
        self.config, self.dtype, self.remat = config, dtype, remat
        self.channels = config["block_out_channels"]
        self.count = n = len(self.channels)
        self.layers = config.per_stage("layers_per_block", n, 2)
        self.depths = config.per_stage("transformer_layers_per_block", n, 1)
        self.up_depths = config.get("reverse_transformer_layers_per_block", self.depths[::-1])
        self.only_cross = config.per_stage("only_cross_attention", n, False)
        # A width of heads in UNet2DModel (null: one head), their number in UNet2DConditionModel: diffusers kept the wrong name.
        whole = "attention_head_dim" in config and config["attention_head_dim"] is None
        self.widths = [None] * n if whole else config.per_stage("attention_head_dim", n, 8)
        self.heads = config.per_stage("num_attention_heads", n, tuple(self.widths))
        self.groups, self.epsilon = config.get("norm_num_groups", 32), config.get("norm_eps", 1e-5)
        self.activation = str(config.get("act_fn", "silu")).lower()
        self.scale_shift = config.get("resnet_time_scale_shift") == "scale_shift"

    def resnet(self, i: int, **options: Any) -> Callable[..., nn.Module]:
        """name -> a residual block of stage i."""
        return functools.partial(
            recomputed(ResnetBlock2D, self.remat, "block"), self.channels[i], self.groups, self.epsilon,
            self.activation, self.scale_shift, remat=self.remat, dtype=self.dtype, **options,
        )  # fmt: skip

    def transformer(self, i: int, depth: Any, only_cross: bool) -> Callable[..., nn.Module]:
        """(index, name) -> a transformer of stage i; depth is a number of blocks, or one for each transformer."""
        linear = self.config.get("use_linear_projection", False)
        return lambda index, name: Transformer2DModel(
            self.channels[i], self.heads[i], depth[index] if isinstance(depth, tuple) else depth, self.groups, linear,
            only_cross, self.remat, self.dtype, name=name,
        )  # fmt: skip

    def attention(self, i: int, groups: int | None, rescale: float = 1.0) -> Callable[..., nn.Module]:
        """(index, name) -> a self-attention of stage i, added to its input."""
        width, heads = self.channels[i], self.channels[i] // (self.widths[i] or self.channels[i])
        block = recomputed(Attention, self.remat, "block")
        return lambda index, name: block(
            width, heads, width, True, groups, self.epsilon, rescale, True, self.dtype, name=name
        )

    def stage(self, direction: str, place: int) -> tuple[nn.Module, int]:
        """Return a stage of the way down or up, and its number of residual blocks."""
        i = place if direction == "down" else self.count - 1 - place
        kind = _KINDS[direction][self.config[f"{direction}_block_types"][place].removeprefix("UNetRes")]
        layers = self.layers[i] + (direction == "up")
        options: dict[str, Any] = {}
        if kind.sampler == "resnet":
            options["activate_time"] = not self.config.get("resnet_skip_time_act", False)
            options["rescale"] = self.config.get("resnet_out_scale_factor", 1.0)
        attention = sampler = None
        if kind.attention == "self":
            attention = self.attention(i, self.groups)
        elif kind.attention == "cross":
            depth = (self.depths if direction == "down" else self.up_depths)[place]
            attention = self.transformer(i, depth, self.only_cross[i])
        if place < self.count - 1:
            if (kind.sampler or self.config.get(f"{direction}sample_type", "conv")) == "resnet":
                sampler = self.resnet(i, resize=direction, **options)
            elif direction == "down":
                padding = self.config.get("downsample_padding", 1)
                sampler = functools.partial(Downsample2D, self.channels[i], padding, self.dtype)
            else:
                sampler = functools.partial(Upsample2D, self.channels[i], self.dtype)
        made = recomputed(Stage, self.remat, "stage")(
            direction, layers, self.resnet(i, **options), attention, sampler, kind.attention == "cross",
            name=f"{direction}_blocks.{place}",
        )  # fmt: skip
        return made, layers

    def middle(self, kind: _Mid) -> nn.Module:
        """Return the stage between the ways down and up."""
        last, rescale = self.count - 1, self.config.get("mid_block_scale_factor", 1.0)
        attention = None
        if kind.attention == "cross":
            attention = self.transformer(last, self.depths[-1], False)
        elif kind.attention == "self" and self.config.get("add_attention", True):
            groups = self.config.get("attn_norm_num_groups", None if self.scale_shift else self.groups)
            attention = self.attention(last, groups, rescale)
        return recomputed(Stage, self.remat, "stage")(
            "mid", kind.layers, self.resnet(last, rescale=rescale), attention, None, kind.attention == "cross",
            name="mid_block",
        )  # fmt: skip


class _UNet(nn.Module):
    """The stages, and the embedding of times and classes; a subclass says which settings and types it knows."""

    config: Any  # a `Config`, or a mapping that becomes one
    dtype: Any = None
    remat: str | None = None

    def __post_init__(self):
        if not isinstance(self.config, Config):
            object.__setattr__(self, "config", Config(self.config))
        self._check()
        super().__post_init__()

    # Of the subclass: settings, types of the middle (the first is the default), class embeddings.
    _settings: ClassVar[tuple[frozenset[str], dict[str, Any]]] = (_READ, {})
    _mids: ClassVar[Mapping[str | None, _Mid]] = {}
    _classes: ClassVar[tuple[str | None, ...]] = ()

    def _check(self) -> None:
        c, network = self.config, type(self).__name__
        recomputed(Stage, self.remat, "stage")
        c.refuse(network, *self._settings)
        channels = c["block_out_channels"]
        for direction, known in _KINDS.items():
            types = c[f"{direction}_block_types"]
            if len(types) != len(channels):
                raise ValueError(
                    f"{network}: {direction}_block_types has {len(types)} types for {len(channels)} block_out_channels"
                )
            crosses = any(mid.attention == "cross" for mid in self._mids.values())
            names = [name for name, kind in known.items() if crosses or kind.attention != "cross"]
            for name in types:
                _one_of(network, f"{direction}_block_types", name.removeprefix("UNetRes"), names)
        _one_of(network, "mid_block_type", _nullable(c, "mid_block_type", next(iter(self._mids))), self._mids)
        _one_of(network, "class_embed_type", c.get("class_embed_type"), self._classes)
        _one_of(network, "resnet_time_scale_shift", c.get("resnet_time_scale_shift", "default"), _SHIFTS)
        for key in ("downsample_type", "upsample_type"):
            _one_of(network, key, c.get(key, "conv"), ("conv", "resnet"))
        _one_of(network, "act_fn", str(c.get("act_fn", "silu")).lower(), ACTIVATIONS)
        parts = _Parts(c, self.dtype, self.remat)
        if (
            any(isinstance(depth, tuple) for depth in parts.depths)
            and c.get("reverse_transformer_layers_per_block") is None
        ):
            raise ValueError(
                f"{network}: transformer_layers_per_block by transformer needs reverse_transformer_layers_per_block"
            )
        if len(parts.up_depths) != len(channels):
            raise ValueError(
                f"{network}: reverse_transformer_layers_per_block has {len(parts.up_depths)} values for {len(channels)} stages"
            )
        for i, width in enumerate(channels):
            kind = _DOWN[c["down_block_types"][i].removeprefix("UNetRes")].attention
            by = {"cross": parts.heads[i], "self": parts.widths[i] or width}.get(kind or "", 1)
            if width % by:
                raise ValueError(f"{network}: attention_head_dim {by} does not divide {width} channels")
        groups = _nullable(c, "norm_num_groups", 32)
        if not groups or any(channel % groups for channel in channels):
            raise ValueError(f"{network}: norm_num_groups {groups} does not divide block_out_channels {channels}")

    def _sinusoids(self, t: Array, features: int) -> Array:
        c = self.config
        return sinusoids(t, features, cosine_first=c.get("flip_sin_to_cos", True), shift=c.get("freq_shift", 0))

    def _embed(
        self, x: Array, t: Array, labels: Array | None, activation: str, condition: Array | None = None
    ) -> Array:
        """Return the embedding of times and classes, [B, 4 C] unless `time_embedding_dim` says another width."""
        c, first = self.config, self.config["block_out_channels"][0]
        width, kind, count = (
            c.get("time_embedding_dim", 4 * first),
            c.get("class_embed_type"),
            c.get("num_class_embeds"),
        )
        if (labels is None) != (kind is None and count is None):
            has = "has no classes, and got labels" if labels is not None else "has classes, and got no labels [B]"
            raise ValueError(f"{type(self).__name__} {has}")
        sines = self._sinusoids(jnp.broadcast_to(t, x.shape[:1]), first)
        emb = TimestepEmbedding(width, activation, name="time_embedding")(sines, condition)
        if labels is None:
            return emb
        if kind == "timestep":
            return emb + TimestepEmbedding(width, activation, name="class_embedding")(self._sinusoids(labels, first))
        if kind == "projection":
            return emb + TimestepEmbedding(width, name="class_embedding")(labels)
        if kind == "simple_projection":
            return emb + dense(width, name="class_embedding")(labels)
        if kind == "identity":
            return emb + labels
        return emb + nn.Embed(c["num_class_embeds"], width, name="class_embedding")(labels)

    def _stages(self, x: Array, temb: Array, context: Array | None, activation: str) -> Array:
        """Return the output of conv_in, every stage and the head."""
        c, parts = self.config, _Parts(self.config, self.dtype, self.remat)
        check_image(type(self).__name__, x, c["in_channels"], 2 ** (parts.count - 1))
        x = 2 * x - 1 if c.get("center_input_sample", False) else x
        x = conv(parts.channels[0], c.get("conv_in_kernel", 3), name="conv_in", dtype=self.dtype)(x)
        skips = (x,)
        for place in range(parts.count):
            x, skips = parts.stage("down", place)[0](x, temb, context, skips)
        mid = self._mids[_nullable(c, "mid_block_type", next(iter(self._mids)))]
        if mid.layers:
            x, _ = parts.middle(mid)(x, temb, context)
        for place in range(parts.count):
            stage, taken = parts.stage("up", place)
            x, _ = stage(x, temb, context, skips[-taken:])
            skips = skips[:-taken]
        kernel = c.get("conv_out_kernel", 3)
        return head(self, x, c["out_channels"], kernel, parts.groups, parts.epsilon, activation)


class UNet2DConditionModel(_UNet):
    """The U-Net of Stable Diffusion 1, 2 and XL: an image, a time and a context, such as a text's tokens, to an image.

    Settings are diffusers' and default to its defaults, but for channels and types of stages, which must be there. Refused by
    name: other types of stages than Down, CrossAttnDown, AttnDown and ResnetDownsample (and up as down), Fourier times,
    projections of the context, GLIGEN, dual attention, conditions beside `text_time`.

    Args:
      config: settings of config.json.
      dtype: of the computation, such as `jnp.bfloat16`; None for that of input and parameters. Norms' statistics, softmax
        and embeddings of times are float32 anyway.
      remat: what the backward pass computes again: nothing (None), each "stage", which keeps least, or each "block", which
        keeps little more and has far less at a time.

    Call:
      x: [B, H, W, in_channels]; H and W are multiples of 2^(stages - 1).
      t: [B] or [], in the unit it was trained in, mostly steps 0 ... 999.
      context: [B, L, cross_attention_dim].
      added: for SDXL, {"text_embeds": [B, D], "time_ids": [B, 6]}.
      labels: [B] integers where there is `num_class_embeds`; otherwise what `class_embed_type` takes.
      condition: [B, time_cond_proj_dim] where there is that setting (a distilled guidance scale's embedding); zeros by default.

    Returns:
      [B, H, W, out_channels], float32.

    Raises:
      ValueError: in one line, for a setting that is not supported or an input that does not fit.

    References:
      Latent diffusion (arXiv:2112.10752); SDXL (arXiv:2307.01952).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.unet import UNet2DConditionModel
      >>> config = {"in_channels": 4, "out_channels": 4, "block_out_channels": [32], "layers_per_block": 1, "attention_head_dim": 2,
      ...           "cross_attention_dim": 8, "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
      >>> net, x, t, context = UNet2DConditionModel(config), jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), jnp.zeros((2, 5, 8))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, context)[0].shape
      (2, 8, 8, 4)
    """

    _settings = (
        _READ | {
            "cross_attention_dim", "only_cross_attention", "mid_block_only_cross_attention", "num_attention_heads",
            "transformer_layers_per_block", "reverse_transformer_layers_per_block", "use_linear_projection",
            "upcast_attention", "addition_embed_type", "addition_time_embed_dim", "addition_embed_type_num_heads",
            "projection_class_embeddings_input_dim", "resnet_skip_time_act", "resnet_out_scale_factor",
            "time_embedding_act_fn", "time_cond_proj_dim", "conv_in_kernel", "conv_out_kernel",
        },
        {"time_embedding_type": "positional", "attention_type": "default", "dual_cross_attention": False,
         "class_embeddings_concat": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "timestep_post_act": None,
         "cross_attention_norm": None},
    )  # fmt: skip
    _mids = {"UNetMidBlock2DCrossAttn": _Mid(2, "cross"), "UNetMidBlock2D": _Mid(1, None), None: _Mid(0, None)}
    _classes = (None, "timestep", "identity", "projection", "simple_projection")

    def _check(self) -> None:
        super()._check()
        c, network = self.config, type(self).__name__
        _one_of(network, "addition_embed_type", c.get("addition_embed_type"), (None, "text_time"))
        _one_of(network, "time_embedding_act_fn", c.get("time_embedding_act_fn"), (None, *ACTIVATIONS))

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        context: Array | None = None,
        added: Mapping[str, Array] | None = None,
        labels: Array | None = None,
        condition: Array | None = None,
    ) -> Array:
        c = self.config
        width = c.get("cross_attention_dim", 1280)
        width = width[0] if isinstance(width, tuple) else width
        if context is None or context.ndim != 3 or context.shape[-1] != width:
            got = "none" if context is None else list(context.shape)
            raise ValueError(f"UNet2DConditionModel takes a context [B, L, {width}]; got {got}")
        if (size := c.get("time_cond_proj_dim")) is None and condition is not None:
            raise ValueError("UNet2DConditionModel without time_cond_proj_dim takes no condition, and got one")
        if size is not None and condition is None:
            condition = jnp.zeros((x.shape[0], size))
        activation = str(c.get("act_fn", "silu")).lower()
        temb = self._embed(x, t, labels, activation, condition)
        if c.get("addition_embed_type") == "text_time":
            if added is None or set(added) != {"text_embeds", "time_ids"}:
                got = "none" if added is None else f"one of {sorted(added)}"
                raise ValueError(f"UNet2DConditionModel takes added = {{text_embeds, time_ids}}; got {got}")
            ids = self._sinusoids(added["time_ids"].reshape(-1), c["addition_time_embed_dim"])
            joint = jnp.concatenate([added["text_embeds"], ids.reshape(x.shape[0], -1)], -1)
            wanted = c.get("projection_class_embeddings_input_dim", joint.shape[-1])
            if joint.shape[-1] != wanted:
                raise ValueError(
                    f"text_embeds {list(added['text_embeds'].shape)} and time_ids {list(added['time_ids'].shape)} make "
                    f"{joint.shape[-1]} numbers, projection_class_embeddings_input_dim is {wanted}"
                )
            temb = temb + TimestepEmbedding(temb.shape[-1], name="add_embedding")(joint)
        elif added is not None:
            raise ValueError("UNet2DConditionModel without addition_embed_type takes no added conditions, and got some")
        if (last := c.get("time_embedding_act_fn")) is not None:
            temb = ACTIVATIONS[last](temb)
        return self._stages(x, temb, context, activation)


class UNet2DModel(_UNet):
    """The U-Net of DDPM, its successors and class-conditional ones: an image, a time and a class to an image.

    Settings are diffusers' and default to its defaults, but for channels and types of stages, which must be there. Refused by
    name: other types of stages than Down, AttnDown and ResnetDownsample (and up as down), Fourier and learned times.

    Args:
      config: settings of config.json.
      dtype: of the computation; see `UNet2DConditionModel`.
      remat: None, "stage" or "block"; see `UNet2DConditionModel`.

    Call:
      x: [B, H, W, in_channels]; H and W are multiples of 2^(stages - 1).
      t: [B] or [], in the unit it was trained in, mostly steps 0 ... 999.
      labels: [B] integers where there is `num_class_embeds`; otherwise what `class_embed_type` takes.

    Returns:
      [B, H, W, out_channels], float32; with twice in_channels, the second half says variances.

    Raises:
      ValueError: in one line, for a setting that is not supported or an input that does not fit.

    References:
      DDPM (arXiv:2006.11239); scale and shift by the time's embedding, arXiv:2102.09672.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.pretrained.unet import UNet2DModel
      >>> config = {"in_channels": 3, "out_channels": 3, "block_out_channels": [32, 64], "layers_per_block": 1,
      ...           "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
      >>> net, x = UNet2DModel(config), jnp.zeros((2, 8, 8, 3))
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x, jnp.zeros(2))[0].shape
      (2, 8, 8, 3)
    """

    _settings = (
        _READ | {"downsample_type", "upsample_type", "attn_norm_num_groups", "add_attention", "num_train_timesteps"},
        {"time_embedding_type": "positional"},
    )
    _mids = {"UNetMidBlock2D": _Mid(2, "self"), None: _Mid(0, None)}
    _classes = (None, "timestep", "identity")

    @nn.compact
    def __call__(self, x: Array, t: Array, labels: Array | None = None) -> Array:
        return self._stages(x, self._embed(x, t, labels, "silu"), None, "silu")


_SHIFTS = ("default", "scale_shift")


def _nullable(config: Config, key: str, default: Any) -> Any:
    """Return a setting for which null means something; the default where it is absent."""
    return config[key] if key in config else default


def _one_of(network: str, key: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{network} does not support {key} = {value!r}; known are {', '.join(map(str, known))}")
