"""DiT, SD3 and Flux beside diffusers'."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rgdiff
from rgdiff.pretrained import folders, sd3
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.dit import DiTTransformer2DModel
from rgdiff.pretrained.flux import FluxTransformer2DModel, pack, unpack
from rgdiff.pretrained.sd3 import SD3Transformer2DModel
from tests.pretrained import parity

DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2,
    "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10,
}  # fmt: skip
SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 10, "caption_projection_dim": 16, "pooled_projection_dim": 6,
    "pos_embed_max_size": 7,
}  # fmt: skip
FLUX = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 10, "pooled_projection_dim": 6, "axes_dims_rope": [2, 2, 4],
}  # fmt: skip
TEXT = {"encoder_hidden_states": parity.normal(1, 2, 5, 10), "pooled_projections": parity.normal(2, 2, 6)}
X = {"x": parity.normal(0, 2, 8, 12, 4)}  # not square


def torch_twin(name):
    def build(config):
        import diffusers

        return getattr(diffusers, name)(**config)

    return build


def torch_layout(x):
    return x.permute(0, 3, 1, 2)


def call_dit(module, inputs):
    out = module(torch_layout(inputs["x"]), timestep=inputs["t"], class_labels=inputs["class_labels"]).sample
    return out.permute(0, 2, 3, 1)


def call_sd3(module, inputs):
    x, rest = torch_layout(inputs["x"]), {key: inputs[key] for key in TEXT}
    return module(hidden_states=x, timestep=inputs["t"], **rest).sample.permute(0, 2, 3, 1)


def call_flux(module, inputs):
    """Pack and unpack as diffusers' pipeline does, by its own functions."""
    import torch
    from diffusers import FluxPipeline

    x = torch_layout(inputs["x"])
    batch, channels, height, width = x.shape
    places = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    out = module(
        hidden_states=FluxPipeline._pack_latents(x, batch, channels, height, width),
        timestep=inputs["t"] / 1000,
        img_ids=places,
        txt_ids=torch.zeros(inputs["encoder_hidden_states"].shape[1], 3),
        guidance=inputs.get("guidance"),
        **{key: inputs[key] for key in TEXT},
    ).sample
    return FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8).permute(0, 2, 3, 1)


def case(name, config, network, inputs, call):
    return parity.Case(name, config, network, inputs, torch_twin(network.__name__), call)


STEPS, SIGMAS = np.array([7, 801]), np.array([0.0123, 0.9], np.float32)
CASES = [
    case(
        "dit",
        DIT,
        DiTTransformer2DModel,
        {"x": parity.normal(0, 2, 8, 8, 4), "t": STEPS, "class_labels": np.array([3, 10])},
        call_dit,
    ),
    case("sd3", SD3, SD3Transformer2DModel, {**X, "t": 1000 * SIGMAS, **TEXT}, call_sd3),
    case(
        "sd35",
        {**SD3, "num_layers": 3, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm"},
        SD3Transformer2DModel,
        {**X, "t": 1000 * SIGMAS, **TEXT},
        call_sd3,
    ),
    case(
        "flux_dev",
        {**FLUX, "guidance_embeds": True},
        FluxTransformer2DModel,
        {**X, "t": 1000 * SIGMAS, **TEXT, "guidance": np.array([3.5, 1.0], np.float32)},
        call_flux,
    ),
    case("flux_schnell", FLUX, FluxTransformer2DModel, {**X, "t": 1000 * SIGMAS, **TEXT}, call_flux),
]


def full(name, network, config, **inputs):
    every = {
        "x": parity.spec(1, 32, 32, config.get("in_channels", 64) // (4 if network is FluxTransformer2DModel else 1))
    }
    every["t"] = parity.spec(1)
    return parity.Full(name, config, network, every | inputs, torch_twin(network.__name__))


def sd3_of(layers, side, **others):
    width = 64 * layers
    config = {"num_layers": layers, "num_attention_heads": layers, "caption_projection_dim": width, "in_channels": 16}
    return {**config, "pos_embed_max_size": side, **others}


def text_of(length, pooled):
    return {"encoder_hidden_states": parity.spec(1, length, 4096), "pooled_projections": parity.spec(1, pooled)}


FULL = [
    full(
        "dit-xl-2",
        DiTTransformer2DModel,
        {"in_channels": 4, "out_channels": 8},
        class_labels=parity.spec(1, dtype=jnp.int32),
    ),
    full("sd3-medium", SD3Transformer2DModel, sd3_of(24, 192), **text_of(333, 2048)),
    full(
        "sd3.5-medium",
        SD3Transformer2DModel,
        sd3_of(24, 384, dual_attention_layers=list(range(13)), qk_norm="rms_norm"),
        **text_of(333, 2048),
    ),
    full("sd3.5-large", SD3Transformer2DModel, sd3_of(38, 192, qk_norm="rms_norm"), **text_of(333, 2048)),
    full(
        "flux-dev",
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        **text_of(512, 768),
        guidance=parity.spec(1),
    ),
]


def early(case):
    """Divide times by 32: torch's exp is off by a unit in 3 of 128 frequencies, 2e-5 of one sine at t = 801."""
    inputs = {key: a // 32 if a.dtype == int else a / 32 for key, a in case.inputs.items() if key in ("t", "guidance")}
    return dataclasses.replace(case, inputs={**case.inputs, **inputs})


test_golden, test_torch, test_keys, test_bfloat16, test_remat = parity.table(CASES, FULL, in_float64=early)


@pytest.mark.slow
def test_dit_takes_images_that_are_not_square():
    """A grid of twice the columns is stretched to the trained one: every second column has the trained grid's positions."""
    from rgdiff.pretrained.transformer import grid_sinusoids

    trained, wide = grid_sinusoids(16, 4, 4, 4).reshape(4, 4, 16), grid_sinusoids(16, 4, 8, 4).reshape(4, 8, 16)
    np.testing.assert_allclose(wide[:, ::2], trained, atol=1e-6)
    net = DiTTransformer2DModel(Config(DIT))
    inputs = {"x": jnp.zeros((1, 8, 16, 4)), "t": jnp.zeros(1), "class_labels": jnp.zeros(1, int)}
    assert jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), **inputs)[0]).shape == (1, 8, 16, 8)


def test_positions_of_sd3_do_not_train():
    case = CASES[1]
    like = parity.structure(case.network(Config(case.config)), case.inputs)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(like)
    }
    assert set(sd3.FROZEN) <= leaves
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), like)
    adapter = jax.eval_shape(lambda key: rgdiff.nets.lora_init(key, params, 2), jax.random.key(0))
    assert not set(sd3.FROZEN) & set(adapter) and "transformer_blocks.0/attn/to_q/kernel" in adapter


def test_positions_of_sd3_are_no_parameters_of_a_prior(tmp_path):
    """Nothing that tunes sees them, and a written folder has them."""
    network = SD3Transformer2DModel(Config(SD3))
    inputs = {"x": jnp.zeros((1, 8, 8, 4)), "t": jnp.zeros(1), **{key: value[:1] for key, value in TEXT.items()}}
    made = parity.parameters(parity.structure(network, inputs))
    folders.save_pipeline(tmp_path / "sd3", "StableDiffusion3Pipeline", {
        "transformer": folders.Part("diffusers", "SD3Transformer2DModel", SD3, made),
        "scheduler": folders.Part("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    })  # fmt: skip
    prior = folders.from_diffusers(tmp_path / "sd3")
    assert "pos_embed" not in prior.params["pos_embed"] and set(prior.model.held) == set(sd3.FROZEN)
    np.testing.assert_array_equal(prior.model.held[sd3.FROZEN[0]], made["pos_embed"]["pos_embed"])
    cond = {"context": inputs["encoder_hidden_states"], "pooled": inputs["pooled_projections"]}
    shape = jax.eval_shape(lambda p: prior.model(p)(inputs["x"], jnp.float32(0.5), cond), prior.params).shape
    assert shape == (1, 8, 8, 4)
    back = folders.from_diffusers(folders.to_diffusers(prior, prior.params, tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, (back.params, back.model.held), (prior.params, prior.model.held))


def test_flux_packs_as_its_pipeline():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = pack(x)
    assert tokens.shape == (2, 6, 12) and bool((unpack(tokens, 4, 6) == x).all())
    np.testing.assert_array_equal(tokens[0, 4].reshape(3, 2, 2), x[0, 2:4, 2:4].transpose(2, 0, 1))


def test_bad_input_is_refused():
    for network, config, message in (
        (
            DiTTransformer2DModel,
            DIT | {"activation_fn": "geglu"},
            "does not support activation_fn = 'geglu', only 'gelu-approximate'",
        ),
        (
            SD3Transformer2DModel,
            SD3 | {"qk_norm": "layer_norm"},
            "does not support qk_norm = 'layer_norm', only None, 'rms_norm'",
        ),
        (SD3Transformer2DModel, SD3 | {"caption_projection_dim": 8}, "caption_projection_dim is 8, expected 16"),
        (FluxTransformer2DModel, FLUX | {"axes_dims_rope": [2, 2, 2]}, "expected three numbers of sum 8"),
        (FluxTransformer2DModel, FLUX | {"patch_size": 2}, "does not support patch_size = 2, only 1"),
    ):
        with pytest.raises(ValueError, match=message):
            network(Config(config))
    sd, fl = SD3Transformer2DModel(Config(SD3)), FluxTransformer2DModel(Config(FLUX))
    for net, change, message in (
        (
            sd,
            {"x": jnp.zeros((2, 7, 8, 4))},
            r"takes \[B, H, W, 4\] with sides that are multiples of 2; got \[2, 7, 8, 4\]",
        ),
        (sd, {"x": jnp.zeros((2, 16, 8, 4))}, "8 x 4 patches do not fit pos_embed_max_size = 7"),
        (fl, {"guidance": jnp.ones(2)}, "this network takes no guidance"),
    ):
        with pytest.raises(ValueError, match=message):
            parity.structure(net, {**X, "t": SIGMAS, **TEXT, **change})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "t5", "dit", "sd3", "flux"])
def test_class_names_are_those_of_the_files(name):
    module = importlib.import_module(f"rgdiff.pretrained.{name}")
    library = pytest.importorskip("transformers" if name in ("clip", "t5") else "diffusers", reason="compares names")
    public = [key for key in vars(module) if key.endswith(("Model", "Projection")) and not key.startswith("_")]
    assert public and all(hasattr(library, key) for key in public)
