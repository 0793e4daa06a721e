"""Conditions of SDXL, SD3 and Flux are diffusers' own, from folders that it has written: two or three text encoders, pooled texts, sizes.

Chains of SD3 and Flux are those of diffusers' pipelines, given the same noise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import pretrained, processes, samplers
from rgdiff.recipes import train_pipeline

PROMPTS = ["a red three", "a blue nine", ""]

pytestmark = pytest.mark.slow


def relative(found, expected):
    expected = np.asarray(expected)
    return float(abs(np.asarray(found) - expected).max() / abs(expected).max())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    torch = pytest.importorskip("torch", reason="a comparison with diffusers needs torch, diffusers and transformers")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    from tests.pretrained import tiny

    folder = tiny.drawn_digits(tmp_path_factory.mktemp("conditions") / "digits")
    settings = train_pipeline.text_settings() | {"num_hidden_layers": 3}
    small = transformers.CLIPTextConfig(**settings, projection_dim=24)
    large = transformers.CLIPTextConfig(**settings | {"hidden_size": 40, "hidden_act": "gelu"}, projection_dim=20)
    return {
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "first": transformers.CLIPTextModel(small),
        "first_projected": transformers.CLIPTextModelWithProjection(small),
        "second": transformers.CLIPTextModelWithProjection(large),
    }


@pytest.fixture(scope="module")
def t5(parts):
    """A T5 encoder of width 80, with a tokenizer that knows some letters."""
    import transformers

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((letter, -2.0) for letter in "abdehlnrtu")]
    config = transformers.T5Config(
        vocab_size=40, d_model=80, d_kv=10, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config).eval(), transformers.T5TokenizerFast(vocab=words, extra_ids=2)


def autoencoder(channels):
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    ).eval()  # fmt: skip


def drawn(prior, noise, model, cond, steps):
    """Our chain from noise [B, C, h, w], and its pictures."""
    process = processes.started_from(prior.process, lambda key, batch: jnp.asarray(noise.permute(0, 2, 3, 1).numpy()))
    sampler = samplers.ancestral(process, model(prior.params))
    x0 = samplers.sample(sampler, jax.random.key(0), len(noise), prior.times(steps), cond).x0
    return x0, prior.decode(x0)


def as_ours(latents):
    return latents.permute(0, 2, 3, 1).numpy()


def pictures(pipe, latents):
    """What the autoencoder makes of a pipeline's latents [B, C, h, w]."""
    import torch

    with torch.no_grad():
        return as_ours(pipe.vae.decode(latents / 1.5305 + 0.0609).sample)


def test_sdxl(parts, tmp_path):
    import diffusers
    import torch

    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=[32, 64], down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], attention_head_dim=[2, 4], cross_attention_dim=72, layers_per_block=1,
        transformer_layers_per_block=[1, 1], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 20,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae, parts["first"], parts["second"], parts["tokenizer"], parts["tokenizer"], unet, scheduler
    )
    pipe.save_pretrained(tmp_path / "sdxl")
    prior = pretrained.from_diffusers(tmp_path / "sdxl")
    cond = prior.embed(PROMPTS)
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        x = torch.randn(3, 4, 8, 8)
        ids = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 20).repeat(3, 1)
        added = {"text_embeds": pooled, "time_ids": ids}
        eps = unet(x, 501, context, added_cond_kwargs=added).sample.permute(0, 2, 3, 1)
    assert relative(cond["context"], context) < 1e-5 and relative(cond["added"]["text_embeds"], pooled) < 1e-5
    np.testing.assert_array_equal(cond["added"]["time_ids"], ids)
    t = np.float32(0.502)
    x0 = prior.model(prior.params)(x.permute(0, 2, 3, 1).numpy(), t, cond)
    found = prior.process.eps(x.permute(0, 2, 3, 1).numpy(), t, x0)
    assert relative(found, eps) < 1e-4
    null = prior.guided(5.0).null
    assert not np.any(null["context"]) and not np.any(null["added"]["text_embeds"])  # force_zeros_for_empty_prompt
    assert np.any(prior.guided(5.0, "a red three").null["context"])


def test_sd3_without_t5(parts, tmp_path):
    import diffusers
    import torch

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=80,
        caption_projection_dim=32, pooled_projection_dim=44, pos_embed_max_size=8, in_channels=16, out_channels=16,
    ).eval()  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(16),
        parts["first_projected"], parts["tokenizer"], parts["second"], parts["tokenizer"], None, None,
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "sd3")
    prior = pretrained.from_diffusers(tmp_path / "sd3")
    cond = prior.embed(PROMPTS)
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        x = torch.randn(3, 16, 8, 8)
        velocity = transformer(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=torch.tensor([640.0] * 3)).sample  # fmt: skip
    assert cond["context"].shape == tuple(context.shape)
    assert relative(cond["context"], context) < 1e-5 and relative(cond["pooled"], pooled) < 1e-5
    z = x.permute(0, 2, 3, 1).numpy()
    x0 = prior.model(prior.params)(z, np.float32(0.64), cond)
    assert relative((z - np.asarray(x0)) / 0.64, velocity.permute(0, 2, 3, 1)) < 1e-4
    pipe.scheduler.set_timesteps(7)
    np.testing.assert_allclose(prior.times(7) * 1000, pipe.scheduler.timesteps, rtol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sd3_draws_what_its_pipeline_draws(parts, t5, tmp_path, dynamic):
    """With T5, a negative prompt and guidance; 3.5's files may shift by the image's size."""
    import diffusers
    import torch

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=80, qk_norm="rms_norm",
        caption_projection_dim=32, pooled_projection_dim=44, pos_embed_max_size=8, in_channels=16, out_channels=16,
    ).eval()  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic), autoencoder(16),
        parts["first_projected"], parts["tokenizer"], parts["second"], parts["tokenizer"], *t5,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "sd3")
    prior = pretrained.from_diffusers(tmp_path / "sd3")
    noise = torch.randn(2, 16, 8, 8)
    latents = pipe(
        prompt=PROMPTS[:2], negative_prompt="a red nine", height=16, width=16, num_inference_steps=6, guidance_scale=5.0,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    cond = prior.embed(PROMPTS[:2])
    assert cond["context"].shape == (2, train_pipeline.LENGTH + 256, 80)
    x0, shown = drawn(prior, noise, prior.guided(5.0, "a red nine"), cond, 6)
    assert relative(x0, as_ours(latents)) < 5e-5
    np.testing.assert_allclose(shown, pictures(pipe, latents), atol=1 / 255)


@pytest.mark.parametrize("dev", [False, True])
def test_flux_draws_what_its_pipeline_draws(parts, t5, tmp_path, dev):
    """schnell: four steps, no guidance, no shift; dev: guidance as an input, a shift by the image's size."""
    import diffusers
    import torch

    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=80,
        pooled_projection_dim=32, axes_dims_rope=[2, 2, 4], guidance_embeds=dev,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    pipe = diffusers.FluxPipeline(scheduler, autoencoder(4), parts["first"], parts["tokenizer"], *t5, transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "flux")
    prior = pretrained.from_diffusers(tmp_path / "flux", size=(8, 12))
    noise = torch.randn(2, 4, 8, 12)
    packed = pipe._pack_latents(noise, 2, 4, 8, 12)
    tokens = pipe(
        prompt=PROMPTS[:2], height=16, width=24, num_inference_steps=4, guidance_scale=3.5, latents=packed, output_type="latent"
    ).images  # fmt: skip
    latents = pipe._unpack_latents(tokens, 16, 24, pipe.vae_scale_factor)
    cond = prior.embed(PROMPTS[:2])
    assert cond["context"].shape == (2, 512, 80) and ("guidance" in cond) == dev
    x0, shown = drawn(prior, noise, prior.model, cond, 4)
    assert relative(x0, as_ours(latents)) < 5e-5
    np.testing.assert_allclose(shown, pictures(pipe, latents), atol=1 / 255)
