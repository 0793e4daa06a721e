"""AutoencoderKL beside diffusers', at a small size; names and shapes at the released ones; what its gradient keeps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies import pretrained_memory
from rgdiff.pretrained import weights
from rgdiff.pretrained.autoencoder import AutoencoderKL, rename
from rgdiff.pretrained.config import Config
from tests.pretrained import parity
from tests.pretrained.parity import Case, Full, normal, spec


def build(config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL as Twin

    return Twin(**config)


def encode(module: Any, inputs: dict[str, Any]) -> Any:
    law = module.encode(inputs["x"].permute(0, 3, 1, 2)).latent_dist
    return law.mean.permute(0, 2, 3, 1), law.logvar.permute(0, 2, 3, 1)


def call(module: Any, inputs: dict[str, Any]) -> Any:
    mean = module.encode(inputs["x"].permute(0, 3, 1, 2)).latent_dist.mean
    return module.decode(mean).sample.permute(0, 2, 3, 1)


def types(count: int) -> dict[str, list[str]]:
    return {"down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count}


SMALL = types(2) | {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8}
SD = types(3) | {"block_out_channels": [32, 64, 64], "layers_per_block": 2, "latent_channels": 4}
SD3 = types(2) | {
    "block_out_channels": [32, 64], "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False,
    "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5305,
}  # fmt: skip
CASES = [
    Case("vae_small", SMALL, AutoencoderKL, {"x": normal(0, 2, 8, 8, 3)}, build, call),
    Case("vae_sd", SD, AutoencoderKL, {"x": normal(0, 2, 16, 16, 3)}, build, call),
    Case("vae_sd_encode", SD, AutoencoderKL, {"x": normal(0, 2, 16, 16, 3)}, build, encode, method="encode"),
    Case("vae_sd3", SD3, AutoencoderKL, {"x": normal(0, 2, 16, 16, 3)}, build, call),
    Case("vae_no_attention", SMALL | {"mid_block_add_attention": False}, AutoencoderKL, {"x": normal(0, 2, 8, 8, 3)}, build, call),
]  # fmt: skip
WIDE = types(4) | {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
SIXTEEN = WIDE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FULL = [
    Full("vae_sd_full", WIDE | {"latent_channels": 4}, AutoencoderKL, {"x": spec(1, 64, 64, 3)}, build),
    Full("vae_sd3_flux", SIXTEEN, AutoencoderKL, {"x": spec(1, 64, 64, 3)}, build),
]
PARAMETERS = {"vae_sd_full": 83_653_863, "vae_sd3_flux": 83_819_683}


test_golden, test_torch, test_keys, test_bfloat16, test_remat = parity.table(
    CASES, FULL, parameters=PARAMETERS, half=[CASES[1], CASES[3]], recomputed=CASES[:1], remat=("stage", "block")
)


@pytest.mark.slow
def test_log_variance_is_clipped():
    net = AutoencoderKL(SMALL)
    x = jnp.zeros((1, 8, 8, 3))
    params = parity.parameters(parity.structure(net, {"x": x}))
    params["quant_conv"]["bias"] = params["quant_conv"]["bias"].at[4:].set(jnp.array([1e3, -1e3, 1e3, -1e3]))
    _, log_variance = net.apply({"params": params}, x, method="encode")
    np.testing.assert_array_equal(log_variance[0, 0, 0], [20, -30, 20, -30])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types = 'AttnDownEncoderBlock2D'"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types has 1 types for 2"),
        ({"spatial": True}, "does not know the setting spatial = True"),
        ({"norm_num_groups": 32}, "norm_num_groups 32 does not divide"),
        ({"act_fn": "elu"}, "act_fn is 'elu'"),
    ],
)
def test_a_setting_that_would_change_the_function_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(SMALL | change)


def test_inputs_that_do_not_fit_are_refused():
    net = AutoencoderKL(SMALL)
    with pytest.raises(ValueError, match="sides that are multiples of 2"):
        jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 7, 8, 3))))
    with pytest.raises(ValueError, match=r"takes \[B, H, W, 4\]"):
        jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), method="decode"))


@pytest.mark.slow
def test_a_file_of_old_names_is_read(tmp_path):
    from safetensors.numpy import save_file

    net = AutoencoderKL(Config(SMALL))
    like = parity.structure(net, {"x": spec(1, 8, 8, 3)})
    state = parity.tiny_weights(parity.shapes_of(like))
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, array in state.items():
        for new, name in new_to_old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        old[key] = array[:, :, None, None] if array.ndim == 2 else array  # as the first files had them
    assert "encoder.mid_block.attentions.0.query.weight" in old
    save_file(old, tmp_path / "model.safetensors")
    params = weights.read(weights.find(tmp_path), like, rename=rename)
    jax.tree.map(np.testing.assert_array_equal, params, parity.parameters(like))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["stage", "block"])
def test_the_decoder_keeps_five_times_less_with_recomputation(remat):
    """For the gradient of one 512 x 512 image in its latents."""
    work = pretrained_memory.WORK["vae512"]
    assert pretrained_memory.measure(work, remat).kept * 5 < pretrained_memory.measure(work, None).kept
