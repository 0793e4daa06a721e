"""Tiny pipelines in diffusers' folders, with weights that are a function of key and shape: made without torch, read by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff.pretrained.autoencoder import AutoencoderKL
from rgdiff.pretrained.clip import CLIPTextModel
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.folders import Part, save_pipeline
from rgdiff.pretrained.unet import UNet2DConditionModel, UNet2DModel
from rgdiff.recipes import train_pipeline
from tests.pretrained.parity import parameters, structure

SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [16, 32], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4, "cross_attention_dim": 16, "norm_num_groups": 8,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4,
    "sample_size": 16, "scaling_factor": 0.18215,
}  # fmt: skip
TEXT = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 99, "bos_token_id": 98,
    "pad_token_id": 99, "model_type": "clip_text_model",
}  # fmt: skip
DDPM = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
    "norm_num_groups": 8,
}  # fmt: skip


def weights_of(network: Any, **inputs: Any) -> Any:
    return parameters(structure(network, inputs))


def stable_diffusion(folder: Path) -> Path:
    """Write a pipeline of the kind of Stable Diffusion 1: 8 x 8 latents, 16 x 16 pictures, no tokenizer."""
    x, ids = jnp.zeros((1, 8, 8, 4)), jax.ShapeDtypeStruct((1, 12), jnp.int32)
    unet = weights_of(UNet2DConditionModel(Config(UNET)), x=x, t=jnp.zeros(1), context=jnp.zeros((1, 12, 16)))
    vae = weights_of(AutoencoderKL(Config(VAE)), x=jnp.zeros((1, 16, 16, 3)))
    text = weights_of(CLIPTextModel(Config(TEXT)), input_ids=ids)
    return save_pipeline(folder, "StableDiffusionPipeline", {
        "unet": Part("diffusers", "UNet2DConditionModel", UNET, unet),
        "vae": Part("diffusers", "AutoencoderKL", VAE, vae),
        "text_encoder": Part("transformers", "CLIPTextModel", TEXT, text),
        "scheduler": Part("diffusers", "DDIMScheduler", SCHEDULER),
    })  # fmt: skip


def ddpm(folder: Path, **settings: Any) -> Path:
    """Write a pipeline of the kind of the CIFAR-10 DDPM: 8 x 8 pictures."""
    labels = {"labels": jnp.zeros(1, jnp.int32)} if "num_class_embeds" in settings else {}
    unet = weights_of(UNet2DModel(Config(DDPM | settings)), x=jnp.zeros((1, 8, 8, 3)), t=jnp.zeros(1), **labels)
    return save_pipeline(folder, "DDPMPipeline", {
        "unet": Part("diffusers", "UNet2DModel", DDPM | settings, unet),
        "scheduler": Part("diffusers", "DDPMScheduler", {"beta_schedule": "linear", "clip_sample": True}),
    })  # fmt: skip


def drawn_digits(folder: Path) -> Path:
    """Write the pipeline that comes with the package, with a tokenizer, but untrained: tests do not depend on what it has learnt."""
    x, context = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, train_pipeline.LENGTH, 32))
    ids = jax.ShapeDtypeStruct((1, train_pipeline.LENGTH), jnp.int32)
    params = {
        "unet": weights_of(UNet2DConditionModel(Config(train_pipeline.UNET)), x=x, t=jnp.zeros(1), context=context),
        "vae": weights_of(AutoencoderKL(Config(train_pipeline.VAE)), x=jnp.zeros((1, 16, 16, 3))),
        "text_encoder": weights_of(CLIPTextModel(Config(train_pipeline.text_settings())), input_ids=ids),
    }
    train_pipeline.write(folder, params, 1.0)
    return folder
