"""Adapters in diffusers' and kohya's files: names written down by hand, and diffusers itself beside ours."""

from __future__ import annotations

import json
import math
import re
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from rgdiff.nets import lora_merge
from rgdiff.pretrained.clip import CLIPTextModel
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.unet import UNet2DConditionModel
from rgdiff.runtime import lora_keys
from rgdiff.runtime.adapters import load_lora, module_name, save_lora, save_peft
from tests.pretrained.parity import normal, read_keys, tiny_weights
from tests.pretrained.tiny import SCHEDULER, TEXT, UNET, weights_of

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
SHAPES = {TO_Q: (6, 5), TO_OUT: (5, 6), CONV: (3, 3, 4, 6)}
LEAVES = {
    TO_Q: "down_blocks.0/attentions.0/transformer_blocks.0/attn1/to_q/kernel",
    TO_OUT: "down_blocks.0/attentions.0/transformer_blocks.0/attn1/to_out.0/kernel",
    CONV: "down_blocks.0/resnets.0/conv1/kernel",
}


def network():
    """Kernels of three modules of a UNet, and a bias that no adapter has."""
    tree: dict = {"conv_out": {"bias": jnp.zeros(3)}}
    for module, path in LEAVES.items():
        *parents, leaf = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = jnp.asarray(normal(len(module), *SHAPES[module]))
    return tree


def factors(module, rank, seed=0):
    """Return down and up of a module in PyTorch's layout, and up * down in Flax's."""
    *window, into, out = SHAPES[module]
    down = normal(seed, rank, into, *window)
    up = normal(seed + 1, out, rank, *[1] * len(window))
    return down, up, np.einsum("ri...,or->...io", down, up.reshape(out, rank))


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def changes(params, adapter, scale):
    """Return what an adapter adds to each leaf that it has."""
    before, after = leaves(params), leaves(lora_merge(params, adapter, scale))
    return {path: np.asarray(after[path]) - np.asarray(before[path]) for path in adapter}


def random_adapter(params, *targets):
    """Return an adapter that changes the network, of rank 2 for the modules of the first target, 3 for those of the second, ..."""
    adapter = {}
    for rank, target in enumerate(targets, 2):
        for path, leaf in leaves(params).items():
            if re.search(rf"({target}).*kernel", path):
                into, out = math.prod(leaf.shape[:-1]), leaf.shape[-1]
                adapter[path] = {"a": normal(rank, into, rank) / rank, "b": 0.2 * normal(len(path), rank, out)}
    return adapter


@pytest.mark.parametrize("place", ["folder", "style.safetensors"])
def test_what_is_written_comes_back(tmp_path, place):
    params = network()
    adapter = random_adapter(params, "to_q", "conv1")
    save_lora(tmp_path / place, adapter, params, scale=0.5)
    loaded, scale = load_lora(tmp_path / place, params)
    assert scale == 0.5
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    file = tmp_path / place if "." in place else tmp_path / place / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="np") as opened:
        assert set(opened.keys()) == {f"unet.{name}.lora_{f}.weight" for name in (TO_Q, CONV) for f in "AB"}
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 1.0
    save_lora(tmp_path / "transformer", adapter, params, prefix="transformer")
    assert set(load_lora(tmp_path / "transformer", params)[0]) == set(adapter)
    save_peft(tmp_path / "peft", adapter, params, scale=0.5)
    for peft in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        assert load_lora(peft, params)[1] == 0.5


def test_kohya_by_hand(tmp_path):
    """Names and alphas of two modules as sd-scripts writes them; the convolution's factor is 3x3 below and 1x1 above."""
    params = network()
    (down, up, product), (below, above, other) = factors(TO_Q, 4), factors(CONV, 2, 7)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": np.array(1, np.float32),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": below,
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": above,
        "lora_unet_down_blocks_0_resnets_0_conv1.alpha": np.array(4, np.float32),
    }
    assert below.shape == (2, 4, 3, 3) and above.shape == (6, 2, 1, 1)
    save_file(tensors, tmp_path / "kohya.safetensors", {"ss_network_module": "networks.lora"})
    found = changes(params, *load_lora(tmp_path / "kohya.safetensors", params))
    np.testing.assert_allclose(found[LEAVES[TO_Q]], product / 4, atol=2e-6)
    np.testing.assert_allclose(found[LEAVES[CONV]], other * 2, atol=2e-6)
    renamed = {
        key.replace("down_blocks_0_resnets_0_conv1", "input_blocks_1_0_in_layers_2"): t for key, t in tensors.items()
    }
    renamed = {key.replace("down_blocks_0_attentions_0", "input_blocks_1_1"): t for key, t in renamed.items()}
    save_file({key: t.astype(ml_dtypes.bfloat16) for key, t in renamed.items()}, tmp_path / "xl.safetensors")
    coarse = changes(params, *load_lora(tmp_path / "xl.safetensors", params))
    for path in found:
        np.testing.assert_allclose(coarse[path], found[path], atol=0.02 * np.abs(found[path]).max())


def full_modules(name):
    keys = [key for key, shape in read_keys(name).items() if key.endswith(".weight") and len(shape) >= 2]
    return {key.removesuffix(".weight"): [key] for key in keys}


@pytest.mark.parametrize("name", ["unet_sdxl_base", "unet_sd15", "sd3-medium", "clip-l-text"])
def test_underscores_name_one_module_each(name):
    modules = full_modules(name)
    spelled = lora_keys.kohya_names(modules)
    assert all(len(found) == 1 for found in spelled.values())
    assert len(spelled) == len(modules) * (2 if name.startswith("unet") else 1)


def test_modules_of_the_original_code():
    """Of Stable Diffusion XL, whose stages have two layers, and of 1.5, whose first stage upwards has no attention."""
    xl, first = (lora_keys.original_names(full_modules(name)) for name in ("unet_sdxl_base", "unet_sd15"))
    assert xl["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert xl["down_blocks.2.attentions.1.proj_in"] == "input_blocks.8.1.proj_in"
    assert xl["mid_block.resnets.1.conv2"] == "middle_block.2.out_layers.3"
    assert xl["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert xl["up_blocks.2.resnets.2.conv_shortcut"] == "output_blocks.8.0.skip_connection"
    assert first["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"


def test_diffusers_of_every_age(tmp_path):
    """The same update under the keys of diffusers 0.42, of 0.20 and of 0.15."""
    params = network()
    (down, up, product), (below, above, other) = factors(TO_Q, 3), factors(TO_OUT, 3, 5)
    processor = TO_Q.replace("attn1.to_q", "attn1.processor")
    spellings = [
        (f"unet.{TO_Q}.lora_A.weight", f"unet.{TO_Q}.lora_B.weight", f"unet.{TO_OUT}.lora_A.weight", f"unet.{TO_OUT}.lora_B.weight"),
        (f"unet.{TO_Q}.lora.down.weight", f"unet.{TO_Q}.lora.up.weight", f"unet.{TO_OUT}.lora.down.weight", f"unet.{TO_OUT}.lora.up.weight"),
        (f"{processor}.to_q_lora.down.weight", f"{processor}.to_q_lora.up.weight", f"{processor}.to_out_lora.down.weight", f"{processor}.to_out_lora.up.weight"),
    ]  # fmt: skip
    for i, keys in enumerate(spellings):
        folder = tmp_path / str(i)
        folder.mkdir()
        tensors = dict(zip(keys, (down, up, below, above), strict=True))
        save_file(tensors, folder / "pytorch_lora_weights.safetensors")
        adapter, scale = load_lora(folder, params)
        found = changes(params, adapter, scale)
        assert scale == 1.0
        np.testing.assert_allclose(found[LEAVES[TO_Q]], product, atol=2e-6)
        np.testing.assert_allclose(found[LEAVES[TO_OUT]], other, atol=2e-6)


def test_metadata_give_the_scales(tmp_path):
    params = network()
    (down, up, product), (below, above, other) = factors(TO_Q, 4), factors(CONV, 2, 7)
    tensors = {f"unet.{TO_Q}.lora_A.weight": down, f"unet.{TO_Q}.lora_B.weight": up}
    tensors |= {f"unet.{CONV}.lora_A.weight": below, f"unet.{CONV}.lora_B.weight": above}
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"conv1": 2}, "unet.alpha_pattern": {"conv1": 3}}
    for more, first, second in (({}, 2.0, 1.5), ({"unet.use_rslora": True}, 4.0, 3 / 2**0.5)):
        metadata = {"lora_adapter_metadata": json.dumps(config | more | {"text_encoder.r": 9})}
        save_file(tensors, tmp_path / "a.safetensors", metadata)
        adapter, scale = load_lora(tmp_path / "a.safetensors", params)
        found = changes(params, adapter, scale)
        assert scale == first
        np.testing.assert_allclose(found[LEAVES[TO_Q]], product * first, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[LEAVES[CONV]], other * second, rtol=1e-4, atol=1e-5)
    save_file(
        tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config | {"unet.use_dora": True})}
    )
    with pytest.raises(ValueError, match="use_dora=True"):
        load_lora(tmp_path / "a.safetensors", params)


def test_text_encoders_are_refused_or_left_out(tmp_path):
    params, text = network(), {"text_model": {"q_proj": {"kernel": jnp.ones((4, 4))}}}
    down, up, product = factors(TO_Q, 4)
    name = "lora_unet_" + TO_Q.replace(".", "_")
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    tensors |= {f"lora_te_text_model_q_proj.lora_{way}.weight": np.ones(s, np.float32) for way, s in (("down", (2, 4)), ("up", (4, 2)))}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="'lora_te_text_model_q_proj.lora_down.weight' belongs to the text_encoder"):
        load_lora(tmp_path / "a.safetensors", params)
    found = changes(params, *load_lora(tmp_path / "a.safetensors", params, skip_others=True))
    np.testing.assert_allclose(found[LEAVES[TO_Q]], product, atol=2e-6)
    adapter, scale = load_lora(tmp_path / "a.safetensors", text, prefix="text_encoder", skip_others=True)
    assert scale == 1.0 and set(adapter) == {"text_model/q_proj/kernel"}


KOHYA = "lora_unet_" + CONV.replace(".", "_")
REFUSED = {
    f"{KOHYA}.hada_w1_a": "is no low-rank factor but LoHa",
    f"{KOHYA}.lokr_w1": "is no low-rank factor but LoKr",
    f"{KOHYA}.dora_scale": "is no low-rank factor but DoRA",
    f"{KOHYA}.lora_mid.weight": "LoCon's Tucker decomposition",
    f"{KOHYA}.diff": "a difference of full weights",
    f"{KOHYA}.diff_b": "a difference of full weights",
    f"{KOHYA}.strange": "strange' is no low-rank factor; an",
    "lora_unet_nowhere.lora_down.weight": "no parameter is named after module 'nowhere'",
    f"lora_unet_{TO_OUT.replace('.', '_')}.lora_down.weight": "has no factor 'up' beside it",
    f"unet.{CONV}.lora_A.weight": f"no parameter is named after module '{CONV}'",
}


@pytest.mark.parametrize("key", REFUSED)
def test_tensors_that_are_not_applied_are_refused_by_name(tmp_path, key):
    down, up, _ = factors(CONV, 2)
    tensors = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up, key: np.ones((2, 2), np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=REFUSED[key]) as refusal:
        load_lora(tmp_path / "a.safetensors", network())
    assert "\n" not in str(refusal.value)


def test_files_that_do_not_fit(tmp_path):
    params, file = network(), tmp_path / "a.safetensors"
    down, up, _ = factors(CONV, 2)

    def refused(match, tensors, **options):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=match):
            load_lora(file, params, **options)

    good = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up}
    refused(r"does not fit a kernel \[3, 3, 4, 6\]", good | {f"{KOHYA}.lora_down.weight": down[:, :, :2]})
    refused(r"does not fit a kernel \[3, 3, 4, 6\]", good | {f"{KOHYA}.lora_up.weight": np.tile(up, (1, 1, 3, 3))})
    refused("alpha of .* is 0.0", good | {f"{KOHYA}.alpha": np.zeros((), np.float32)})
    same = f"unet.{CONV}"
    twice = {f"{same}.{key}.weight": t for key, t in zip(("lora_A", "lora_B", "lora.up"), (down, up, up), strict=True)}
    refused("are the same factor", twice)
    refused("prefix is 'vae', expected one of unet", good, prefix="vae")
    refused("holds no low-rank factors", good, prefix="text_encoder", skip_others=True)
    both = network() | {"down_blocks": {"0": {"resnets": {"0": {"conv1": {"kernel": jnp.ones((3, 3, 4, 6))}}}}}}
    save_file(good, file)
    with pytest.raises(ValueError, match="two parameters are named after module 'down_blocks_0_resnets_0_conv1'"):
        load_lora(file, both)
    save_file(good, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="holds 2 safetensors files"):
        load_lora(tmp_path, params)
    with pytest.raises(ValueError, match="holds nothing"):
        load_lora(tmp_path / "nowhere", params)
    file.write_bytes(b"PK not tensors")
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        load_lora(file, params)
    with pytest.raises(ValueError, match="prefix is 'vae'"):
        save_lora(file, {}, params, prefix="vae")


# Side by side with diffusers and PEFT

X, T, CONTEXT = normal(0, 2, 8, 8, 4), np.array([3, 700], np.float32), normal(1, 2, 12, 16)
TARGETS = ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"]
SETTINGS = {
    "plain": {},
    "patterns": {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn2.to_k": 3}},
    "use_rslora": {"use_rslora": True, "rank_pattern": {"attn1.to_q": 2}},
}


@pytest.fixture(scope="module")
def ours():
    """Our tiny UNet's parameters, and its outputs as a function of them."""
    net = UNet2DConditionModel(Config(UNET))
    params = weights_of(net, x=jnp.asarray(X), t=jnp.asarray(T), context=jnp.asarray(CONTEXT))
    return params, jax.jit(lambda p: net.apply({"params": p}, X, T, CONTEXT))


def pipeline():
    """Diffusers' pipeline of the same UNet."""
    torch = pytest.importorskip("torch", reason="the other side is torch's")
    diffusers = pytest.importorskip("diffusers", reason="the other side is diffusers'")
    pytest.importorskip("peft", reason="diffusers' adapters are PEFT's")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**UNET).eval()
    state = tiny_weights({key: tuple(value.shape) for key, value in unet.state_dict().items()})
    unet.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.DDIMScheduler(**SCHEDULER)
    return diffusers.StableDiffusionPipeline(**none, unet=unet, scheduler=scheduler, requires_safety_checker=False)


def outputs(pipe):
    import torch

    with torch.no_grad():
        out = pipe.unet(torch.tensor(X).permute(0, 3, 1, 2), torch.tensor(T), torch.tensor(CONTEXT)).sample
    return out.permute(0, 2, 3, 1).numpy()


def near(mine, wanted, tolerance=1e-5):
    assert float(np.abs(np.asarray(mine) - wanted).max() / np.abs(wanted).max()) <= tolerance


def tuned(pipe, targets, settings):
    """Give a pipeline an adapter that PEFT made; return its tensors."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict

    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
    with torch.no_grad():
        for name, value in pipe.unet.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.2)
    return {key: value.contiguous() for key, value in get_peft_model_state_dict(pipe.unet).items()}


@pytest.mark.slow
def test_diffusers_reads_ours(tmp_path, ours):
    params, apply = ours
    adapter = random_adapter(params, "to_q|to_out", "conv1|conv_in|conv_shortcut", "time_emb_proj|proj_in|ff")
    save_lora(tmp_path, adapter, params, scale=0.7)
    pipe = pipeline()
    near(apply(params), outputs(pipe))
    pipe.load_lora_weights(str(tmp_path))
    theirs = outputs(pipe)
    near(apply(lora_merge(params, adapter, 0.7)), theirs)
    assert np.abs(theirs - apply(params)).max() > 0.1 * np.abs(theirs).max()


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_ours_reads_diffusers(tmp_path, ours, settings):
    """With its metadata the file has the scales of PEFT; without them diffusers takes 1 for each, and so do we."""
    params, apply = ours
    pipe = pipeline()
    state = tuned(pipe, TARGETS, SETTINGS[settings])
    config = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(str(tmp_path / "a"), unet_lora_layers=state, unet_lora_adapter_metadata=config)
    near(apply(lora_merge(params, *load_lora(tmp_path / "a", params))), outputs(pipe))
    pipe.save_lora_weights(str(tmp_path / "b"), unet_lora_layers=state)
    other = pipeline()
    other.load_lora_weights(str(tmp_path / "b"))
    near(apply(lora_merge(params, *load_lora(tmp_path / "b", params))), outputs(other))


@pytest.mark.slow
def test_ours_reads_peft(tmp_path, ours):
    params, apply = ours
    unet = pipeline().unet
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(unet, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **SETTINGS["patterns"], init_lora_weights=False))  # fmt: skip
    model.save_pretrained(str(tmp_path))
    pipe = pipeline()
    pipe.unet = model
    near(apply(lora_merge(params, *load_lora(tmp_path, params))), outputs(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["older", "kohya", "original"])
def test_diffusers_reads_the_other_spellings_alike(tmp_path, ours, kind):
    """Files of older diffusers, and of kohya with diffusers' names and with those of the original code.

    An attention's own alpha is not tested here: diffusers 0.42 gives every attention the alpha that most modules have.
    """
    params, apply = ours
    pipe = pipeline()
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    targets = attention if kind == "older" else [*attention, "proj_in", "ff.net.2", "conv2", "conv_shortcut"]
    state = tuned(pipe, targets, {"rank_pattern": {"attn1.to_q": 2}})
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from safetensors.torch import save_file as save_torch

    if kind == "older":
        state = {f"unet.{key}": value for key, value in convert_state_dict_to_diffusers(state).items()}
        assert any(".lora.down.weight" in key for key in state)
    else:
        modules = [key.removesuffix(".lora_A.weight") for key in state if key.endswith("lora_A.weight")]
        paths = jax.tree_util.tree_leaves_with_path(params)
        every = [".".join(part.key for part in path[:-1]) for path, leaf in paths if np.ndim(leaf) >= 2]
        called = lora_keys.original_names(every) if kind == "original" else {}
        kohya = {}
        for module in modules:
            name = "lora_unet_" + called.get(module, module).replace(".", "_")
            kohya[f"{name}.lora_down.weight"] = state[f"{module}.lora_A.weight"]
            kohya[f"{name}.lora_up.weight"] = state[f"{module}.lora_B.weight"]
            kohya[f"{name}.alpha"] = state[f"{module}.lora_A.weight"].new_tensor(1.5 if "conv" in module else 3.0)
        state = kohya
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_torch(state, str(file))
    other = pipeline()
    other.load_lora_weights(str(file), **({"unet_config": other.unet.config} if kind == "original" else {}))
    near(apply(lora_merge(params, *load_lora(file, params))), outputs(other))


@pytest.mark.slow
def test_the_original_code_has_diffusers_names():
    """Each of the 794 modules of Stable Diffusion XL is what diffusers takes kohya's name for."""
    pytest.importorskip("torch", reason="diffusers needs it")
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils", reason="it has the other names")
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    names = lora_keys.original_names(full_modules("unet_sdxl_base"))
    state = {f"lora_unet_{old.replace('.', '_')}.lora_down.weight": module for module, old in names.items()}
    state = conversion._maybe_map_sgm_blocks_to_diffusers(state, types.SimpleNamespace(layers_per_block=2))
    state = convert_unet_state_dict_to_peft({conversion._convert_unet_lora_key(key): m for key, m in state.items()})
    assert len(state) == 794 and all(key == f"{module}.lora_A.weight" for key, module in state.items())


@pytest.mark.slow
def test_text_encoders_of_transformers(tmp_path):
    """transformers 5 calls a CLIP text encoder's modules without the `text_model` of the released files."""
    pipe = pipeline()
    transformers = pytest.importorskip("transformers", minversion="5", reason="the names are version 5's")
    import torch

    net, ids = CLIPTextModel(Config(TEXT)), np.array([[98, *range(1, 11), 99]])
    params = weights_of(net, input_ids=jnp.asarray(ids))
    module = pipe.text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval()
    state = tiny_weights({f"text_model.{key}": tuple(value.shape) for key, value in module.state_dict().items()})
    module.load_state_dict({key.removeprefix("text_model."): torch.tensor(value) for key, value in state.items()})
    adapter, name = random_adapter(params, "q_proj|v_proj", "fc1"), lambda path: module_name(path).removeprefix("text_model.")  # fmt: skip
    save_lora(tmp_path, adapter, params, scale=0.7, prefix="text_encoder", name=name)
    pipe.load_lora_weights(str(tmp_path))
    with torch.no_grad():
        theirs = module(torch.tensor(ids)).last_hidden_state.numpy()
    mine = [net.apply({"params": p}, ids)[0] for p in (params, lora_merge(params, adapter, 0.7))]
    near(mine[1], theirs)
    assert np.abs(mine[0] - theirs).max() > 0.1 * np.abs(theirs).max()
    loaded, _ = load_lora(tmp_path, params, prefix="text_encoder", name=name)
    assert set(loaded) == set(adapter)
