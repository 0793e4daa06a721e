"""UNet2DConditionModel and UNet2DModel beside diffusers', at a small size; names and shapes at the released one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies import pretrained_memory
from rgdiff.pretrained.unet import UNet2DConditionModel, UNet2DModel, rename
from tests.pretrained import parity
from tests.pretrained.parity import Case, Full, normal, spec

TIMES = np.array([1, 801], np.int32)
CONTEXT = 24


def conditional(name: str, config: dict[str, Any], size: int = 16, **inputs: Any) -> Case:
    def build(config: dict[str, Any]) -> Any:
        from diffusers import UNet2DConditionModel as Twin

        return Twin(**config)

    def call(module: Any, inputs: dict[str, Any]) -> Any:
        y = module(
            inputs["x"].permute(0, 3, 1, 2),
            inputs["t"],
            inputs["context"],
            class_labels=inputs.get("labels"),
            timestep_cond=inputs.get("condition"),
            added_cond_kwargs=inputs.get("added"),
        )
        return y.sample.permute(0, 2, 3, 1)

    base = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": CONTEXT}
    known = {"x": normal(0, 2, size, size, 4), "t": TIMES, "context": normal(1, 2, 7, CONTEXT)}
    return Case(name, base | config, UNet2DConditionModel, known | inputs, build, call)


def unconditional(name: str, config: dict[str, Any], size: int = 16, **inputs: Any) -> Case:
    def build(config: dict[str, Any]) -> Any:
        from diffusers import UNet2DModel as Twin

        return Twin(**config)

    def call(module: Any, inputs: dict[str, Any]) -> Any:
        y = module(inputs["x"].permute(0, 3, 1, 2), inputs["t"], class_labels=inputs.get("labels"))
        return y.sample.permute(0, 2, 3, 1)

    base = {"in_channels": 3, "out_channels": 3, "sample_size": size}
    return Case(name, base | config, UNet2DModel, {"x": normal(0, 2, size, size, 3), "t": TIMES} | inputs, build, call)


def stages(down: str, up: str) -> dict[str, list[str]]:
    """Types of stages, from letters: D plain, A attention, C attention to the context, R resized by residual blocks."""
    names = {"D": "{}Block2D", "A": "Attn{}Block2D", "C": "CrossAttn{}Block2D", "R": "Resnet{}sampleBlock2D"}
    return {
        "down_block_types": [names[letter].format("Down") for letter in down],
        "up_block_types": [names[letter].format("Up") for letter in up],
    }


SD1 = stages("CCCD", "DCCC") | {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": 8}
SDXL = stages("DCC", "CCD") | {"use_linear_projection": True, "addition_embed_type": "text_time"}
DDPM = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SMALL = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8}

CASES = [
    conditional("unet_small", stages("CD", "DC") | SMALL | {"attention_head_dim": [2, 4]}, size=8),
    unconditional("unet2d_small", stages("DA", "AD") | SMALL | {"attention_head_dim": 8}, size=8),
    conditional("unet_sd1", SD1),
    conditional("unet_sd2", SD1 | {"attention_head_dim": [2, 4, 4, 4], "use_linear_projection": True, "upcast_attention": True}),
    conditional(
        "unet_sdxl",
        SDXL | {
            "block_out_channels": [32, 64, 64], "attention_head_dim": [2, 4, 4], "transformer_layers_per_block": [1, 2, 3],
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20,
        },
        added={"text_embeds": normal(2, 2, 20), "time_ids": np.array([[512, 512, 0, 0, 512, 384]] * 2, np.int32)},
    ),
    conditional(
        "unet_upscaler",  # of four times: classes are noise levels; the outer stages have no self-attention
        stages("DCC", "CCD") | {
            "block_out_channels": [32, 64, 64], "only_cross_attention": [True, True, False], "num_class_embeds": 10,
            "use_linear_projection": True, "conv_in_kernel": 5, "conv_out_kernel": 1, "layers_per_block": [1, 2, 1],
        },
        labels=np.array([3, 9], np.int32),
    ),
    conditional(
        "unet_distilled",  # a latent consistency model's guidance, and a pruned SDXL's transformers
        stages("DC", "CD") | SMALL | {
            "layers_per_block": 2, "attention_head_dim": 4, "time_cond_proj_dim": 12, "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [[1, 1], [2, 1]], "reverse_transformer_layers_per_block": [[1, 2, 1], [1, 1, 1]],
            "class_embed_type": "projection", "projection_class_embeddings_input_dim": 5, "mid_block_scale_factor": 1.5,
        },
        size=8, labels=normal(3, 2, 5), condition=normal(4, 2, 12),
    ),
    unconditional("unet2d_ddpm", stages("DADD", "DDAD") | DDPM | {"block_out_channels": [32, 64, 64, 64]}, size=32),
    unconditional(
        "unet2d_scale_shift",
        stages("DA", "AD") | {
            "block_out_channels": [32, 64], "out_channels": 6, "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 8,
        },
    ),
    unconditional(
        "unet2d_classes",
        stages("RA", "AR") | {
            "block_out_channels": [32, 64], "attention_head_dim": 16, "num_class_embeds": 5, "downsample_type": "resnet",
            "upsample_type": "resnet", "center_input_sample": True, "mid_block_scale_factor": 2.0, "act_fn": "gelu",
        },
        labels=np.array([0, 4], np.int32),
    ),
    conditional(
        "unet_levels",  # a class that is a second time; stages resized by residual blocks
        stages("RA", "CR") | SMALL | {
            "class_embed_type": "timestep", "resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1.25, "time_embedding_act_fn": "gelu", "attention_head_dim": 4, "act_fn": "mish",
            "time_embedding_dim": 40, "mid_block_type": None,
        },
        size=8, labels=np.array([7, 300], np.int32),
    ),
    unconditional(
        "unet2d_identity",  # a class that is an embedding already; attention's groups of the middle set by themselves
        stages("DA", "AD") | SMALL | {
            "class_embed_type": "identity", "attn_norm_num_groups": 4, "resnet_time_scale_shift": "scale_shift",
        },
        size=8, labels=normal(5, 2, 64),
    ),
]  # fmt: skip


def full(name: str, network: Any, config: dict[str, Any], size: int, **inputs: Any) -> Full:
    def build(config: dict[str, Any]) -> Any:
        import diffusers

        return getattr(diffusers, network.__name__)(**config)

    x = spec(1, size, size, config["in_channels"])
    return Full(name, config, network, {"x": x, "t": spec(1), **inputs}, build)


LATENT = {"in_channels": 4, "out_channels": 4}
PIXELS = {"in_channels": 3, "out_channels": 3, "layers_per_block": 2}
WIDE = stages("CCCD", "DCCC") | LATENT | {"block_out_channels": [320, 640, 1280, 1280]}
SD15 = full(
    "unet_sd15",
    UNet2DConditionModel,
    WIDE | {"cross_attention_dim": 768, "attention_head_dim": 8},
    64,
    context=spec(1, 77, 768),
)
FULL = [
    SD15,
    full(
        "unet_sd21", UNet2DConditionModel,
        WIDE | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True, "upcast_attention": True},
        96, context=spec(1, 77, 1024),
    ),
    full(
        "unet_sdxl_base", UNet2DConditionModel,
        SDXL | LATENT | {
            "cross_attention_dim": 2048, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10], "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        128, context=spec(1, 77, 2048), added={"text_embeds": spec(1, 1280), "time_ids": spec(1, 6)},
    ),
    full("unet2d_cifar10", UNet2DModel, stages("DADD", "DDAD") | DDPM | PIXELS | {"block_out_channels": [128, 256, 256, 256]}, 32),
    full(
        "unet2d_celebahq", UNet2DModel,
        stages("DDDDAD", "DADDDD") | DDPM | PIXELS | {"block_out_channels": [128, 128, 256, 256, 512, 512]}, 256,
    ),
]  # fmt: skip
PARAMETERS = {
    "unet_sd15": 859_520_964,
    "unet_sd21": 865_910_724,
    "unet_sdxl_base": 2_567_463_684,
    "unet2d_cifar10": 35_746_307,
    "unet2d_celebahq": 113_673_219,
}


test_golden, test_torch, test_keys, test_bfloat16, test_remat = parity.table(
    [CASES[1], CASES[0], *CASES[2:]],  # the cheapest first
    FULL,
    parameters=PARAMETERS,
    half=[CASES[2], CASES[4], CASES[7], CASES[8]],
    recomputed=[CASES[0], CASES[9]],
    remat=("stage", "block"),
)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["stage", "block"])
def test_stable_diffusion_keeps_a_tenth_of_a_gibibyte_a_call(remat):
    """At 512 x 512 in bfloat16, for the gradient in a LoRA adapter, besides weights."""
    assert pretrained_memory.measure(pretrained_memory.WORK["sd15"], remat).kept <= 0.1 * pretrained_memory.GIB


@pytest.mark.parametrize(
    "network, change, message",
    [
        (UNet2DConditionModel, {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 2}, "down_block_types = 'SimpleCrossAttnDownBlock2D'"),
        (UNet2DConditionModel, {"up_block_types": ["UpBlock2D"]}, "up_block_types has 1 types for 2"),
        (UNet2DConditionModel, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type = "),
        (UNet2DConditionModel, {"encoder_hid_dim": 4096}, "encoder_hid_dim = 4096, only None"),
        (UNet2DConditionModel, {"addition_embed_type": "image"}, "addition_embed_type = 'image'"),
        (UNet2DConditionModel, {"attention_type": "gated"}, "attention_type = 'gated', only 'default'"),
        (UNet2DConditionModel, {"dual_cross_attention": True}, "dual_cross_attention = True, only False"),
        (UNet2DConditionModel, {"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        (UNet2DConditionModel, {"something_new": 3}, "does not know the setting something_new = 3"),
        (UNet2DConditionModel, {"attention_head_dim": [3, 4]}, "attention_head_dim 3 does not divide 16"),
        (UNet2DConditionModel, {"layers_per_block": [1, 1, 1]}, "layers_per_block has 3 values for 2 stages"),
        (UNet2DConditionModel, {"transformer_layers_per_block": [[1], [2]]}, "needs reverse_transformer_layers_per_block"),
        (UNet2DConditionModel, {"norm_num_groups": None}, "norm_num_groups None does not divide"),
        (UNet2DModel, {"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "down_block_types = 'CrossAttnDownBlock2D'"),
        (UNet2DModel, {"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift = 'spatial'"),
        (UNet2DModel, {"class_embed_type": "projection"}, "class_embed_type = 'projection'"),
        (UNet2DModel, {"downsample_type": "fir"}, "downsample_type = 'fir'"),
        (UNet2DModel, {"act_fn": "elu"}, "act_fn = 'elu'"),
    ],
)  # fmt: skip
def test_a_setting_that_would_change_the_function_is_refused_by_name(network, change, message):
    base = (CASES[0] if network is UNet2DConditionModel else CASES[1]).config
    with pytest.raises(ValueError, match=message) as error:
        network(dict(base) | change)
    assert "\n" not in str(error.value)


def test_what_diffusers_writes_beside_is_let_pass():
    beside = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "class_embeddings_concat": False,
        "encoder_hid_dim": None,
    }
    net = UNet2DConditionModel(dict(CASES[0].config) | beside)
    assert hash(net) == hash(UNet2DConditionModel(dict(CASES[0].config) | beside))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.zeros((2, 7, 8, 4))}, "sides that are multiples of 2"),
        ({"x": jnp.zeros((2, 4, 8, 8))}, r"takes \[B, H, W, 4\]"),
        ({"context": jnp.zeros((2, 7, 25))}, r"context \[B, L, 24\]"),
        ({"context": None}, "got none"),
        ({"labels": jnp.zeros(2, int)}, "has no classes"),
        ({"added": {"text_embeds": jnp.zeros((2, 3))}}, "takes no added conditions"),
        ({"condition": jnp.zeros((2, 3))}, "takes no condition"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    net = UNet2DConditionModel(CASES[0].config)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: net.init(jax.random.key(0), **(dict(CASES[0].inputs) | change)))


def test_remat_has_three_values():
    with pytest.raises(ValueError, match="remat is 'all', expected one of None, 'stage', 'block'"):
        UNet2DModel(CASES[1].config, remat="all")


def test_old_names_of_attention_become_the_new():
    assert rename("up_blocks.1.attentions.2.query.weight") == "up_blocks.1.attentions.2.to_q.weight"
    assert rename("mid_block.attentions.0.proj_attn.bias") == "mid_block.attentions.0.to_out.0.bias"
    same = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert rename(same) == same
