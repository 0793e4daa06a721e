"""A diffusers folder as a prior: chains, pictures and conditions are diffusers', damage is one line, and tuned weights go back."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies import pretrained_load
from rgdiff import nets, pretrained, samplers, tuners
from rgdiff.pretrained import weights
from tests.pretrained import tiny
from tests.pretrained.parity import GOLDEN, normal


def token_ids() -> np.ndarray:
    """Those of pipeline_golden.py: two prompts and an empty one."""
    out = np.full((3, 12), 99)
    out[:, 0] = 98
    out[0, 1:6], out[1, 1:4] = [5, 17, 3, 60, 41], [80, 2, 33]
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("pipeline") / "sd")


@pytest.fixture(scope="module")
def prior(folder):
    return pretrained.from_diffusers(folder)


def relative(found, expected) -> float:
    return float(abs(np.asarray(found) - expected).max() / abs(expected).max())


@pytest.mark.slow
def test_fifty_ddim_moves_with_guidance_are_those_of_diffusers(prior):
    """The chain ends at the first level, as the file says; pictures and latents are the autoencoder's."""
    golden = np.load(GOLDEN / "pipeline.npz")
    cond = prior.embed(token_ids())
    assert relative(cond["context"], golden["context"]) < 1e-5
    denoiser = prior.guided(7.5, token_ids()[2])(prior.params)
    two = jax.tree.map(lambda leaf: leaf[:2], cond)
    sampler = samplers.ancestral(prior.process, denoiser)
    times = prior.times(50)
    assert prior.process.end == np.float32(0.001) and times[-1] == np.float32(0.002)

    @jax.jit
    def chain(sampler, x):
        keep = lambda carry, info: carry  # noqa: E731
        x, states = samplers.roll(sampler, jax.random.key(0), x, times, two, keep=keep)
        return states[9], sampler.final(x, times[-1], two)[0]

    early, last = chain(sampler, normal(0, 2, 8, 8, 4))
    assert relative(early, golden["early"]) < 5e-5
    assert relative(last, golden["last"]) < 5e-5
    assert abs(np.asarray(prior.decode(jnp.asarray(golden["last"]))) - golden["pictures"]).max() < 1 / 255
    assert relative(prior.encode(jnp.asarray(golden["pictures"])), golden["latents"]) < 1e-4


def test_a_ddpm_is_a_prior_of_pictures(tmp_path):
    prior = pretrained.from_diffusers(tiny.ddpm(tmp_path / "ddpm"), eta=1.0)
    assert prior.shape == (8, 8, 3) and prior.decode is None and not prior.text and prior.process.stochastic
    sampler = samplers.ancestral(prior.process, prior.model(prior.params))
    x0 = samplers.sample(sampler, jax.random.key(0), 2, prior.times(4)).x0
    assert x0.shape == (2, 8, 8, 3) and np.all(np.abs(x0) <= 1)  # DDPM's file clips
    with pytest.raises(ValueError, match="takes no condition"):
        prior.guided(2.0)
    with pytest.raises(ValueError, match="has no text encoder"):
        prior.embed(["a bird"])
    with pytest.raises(ValueError, match="give token ids"):
        pretrained.from_diffusers(tiny.stable_diffusion(tmp_path / "sd")).embed(["a bird"])


@pytest.mark.slow
def test_labels_are_the_networks_classes(tmp_path):
    """A U-Net's file does not say that one of its classes means none: it has no guidance."""
    prior = pretrained.from_diffusers(tiny.ddpm(tmp_path / "classes", num_class_embeds=3))
    assert prior.classes == 3
    denoiser, x = prior.model(prior.params), jnp.asarray(normal(0, 1, 8, 8, 3))
    call = jax.jit(lambda x, cond: denoiser(x, jnp.float32(0.5), cond))
    outs = [np.asarray(call(x, prior.labelled([label]))) for label in range(3)]
    assert np.abs(outs[0] - outs[2]).max() > 1e-4
    for labels in ([3], [-1], [0.5]):
        with pytest.raises(ValueError, match=r"labels are integers in 0 ... 2"):
            prior.labelled(labels)
    with pytest.raises(ValueError, match="no class that means none"):
        prior.guided(2.0)


@pytest.mark.slow
def test_one_networks_folder_needs_a_scheduler(folder):
    with pytest.raises(ValueError, match="give scheduler="):
        pretrained.from_diffusers(folder / "unet")
    settings = {"_class_name": "DDIMScheduler", **tiny.SCHEDULER}
    prior = pretrained.from_diffusers(folder / "unet", scheduler=settings, size=(4, 16))
    assert prior.shape == (4, 16, 4) and prior.decode is None


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(folder, prior):
    half = pretrained.from_diffusers(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    cond, x = prior.embed(token_ids()[:1]), jnp.asarray(normal(1, 1, 8, 8, 4))
    call = jax.jit(lambda model, params, x: model(params)(x, jnp.float32(0.5), cond))
    a, b = (call(p.model, p.params, x) for p in (prior, half))
    assert b.dtype == jnp.float32 and 0 < relative(b, np.asarray(a)) < 0.05


@pytest.mark.slow
def test_a_tuned_adapter_goes_back_into_a_folder(folder, prior, tmp_path):
    """DRaFT-1 on an adapter, by a reward on decoded pixels; merged, written, and read by name again."""
    cond = prior.embed(token_ids()[:2])
    adapter = nets.lora_init(jax.random.key(1), prior.params, 2, target=r"attn\d/to_(q|k|v|out\.0)/kernel")
    reward = lambda z, cond=None: -jnp.mean((prior.decode(z) - 0.5) ** 2, (1, 2, 3))  # noqa: E731
    model = nets.LoRAModel(prior.params, prior.guided(3.0, token_ids()[2]))
    tuner = tuners.draft_k(model, prior.process, reward, prior.times(3), tuners.adamw(0.05), k=1, batch=2)
    state = tuners.fit(tuner, jax.random.key(2), tuner.init(adapter), 2, data=cond, batch=2)
    merged = nets.lora_merge(prior.params, state.params)
    out = pretrained.to_diffusers(prior, merged, tmp_path / "tuned")
    back = pretrained.from_diffusers(out)
    jax.tree.map(np.testing.assert_array_equal, back.params, merged)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (back.params, prior.params)), strict=True))
    assert (out / WEIGHTS).stat().st_mode & 0o777 == (out / "model_index.json").stat().st_mode & 0o777  # for everybody
    for name in ("model_index.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(ValueError, match="not empty"):
        pretrained.to_diffusers(prior, merged, out)
    with pytest.raises(ValueError, match="structure of prior.params"):
        pretrained.to_diffusers(prior, {}, tmp_path / "other")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob("*.part"))


@pytest.fixture
def copy(folder, tmp_path):
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "copy"))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def truncate(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def edit_header(change):
    def damage(folder):
        file = folder / WEIGHTS
        raw = file.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return damage


def swap(header):
    a, b = "conv_in.weight", "conv_out.weight"
    header[a], header[b] = header[b], header[a]


def whole_numbers(header):
    header["conv_in.bias"]["dtype"] = "I32"


def unknown_type(header):
    header["conv_in.bias"]["dtype"] = "F7"


def drop(header):
    del header["conv_in.bias"]


def add(header):
    header["conv_in.extra"] = header["conv_in.bias"]


def beyond(header):
    header["conv_in.bias"]["data_offsets"] = [10**9, 10**9 + 64]


def parts_without_an_index(folder):
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")


def an_index_of_nothing(folder):
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {"conv_in.bias": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def a_link_out(folder):
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def a_pickle_in_disguise(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"conv_in.bias": np.zeros(16)}))


def only_a_pickle(folder):
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.bin")


def a_header_of_ten_gigabytes(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10 * 2**30) + b"{}")


def no_json(folder):
    (folder / "unet/config.json").write_text("{")


def another_class(folder):
    file = folder / "unet/config.json"
    file.write_text(file.read_text().replace("UNet2DConditionModel", "UNet3DConditionModel"))


def no_channels(folder):
    file = folder / "unet/config.json"
    file.write_text(file.read_text().replace('"in_channels": 4,', ""))


def no_scheduler(folder):
    (folder / "scheduler/scheduler_config.json").unlink()


DAMAGES = [
    (truncate, "is cut off: "),
    (edit_header(swap), r"'conv_in.weight' is \[4, 16, 3, 3\], expected \[16, 4, 3, 3\]"),
    (edit_header(whole_numbers), "'conv_in.bias' has dtype int32, expected floating numbers"),
    (edit_header(unknown_type), "'conv_in.bias' has dtype F7"),
    (edit_header(drop), "has no 'conv_in.bias'"),
    (edit_header(add), "has 'conv_in.extra', which the network lacks"),
    (edit_header(beyond), "is cut off: 'conv_in.bias' ends at"),
    (parts_without_an_index, "and no index"),
    (an_index_of_nothing, "no file at .*00001-of-00002"),
    (a_link_out, "leads out of"),
    (a_pickle_in_disguise, "it begins as a pickle does"),
    (only_a_pickle, "a pickle, which is not read"),
    (a_header_of_ten_gigabytes, "is no safetensors file, or cut off"),
    (no_json, "is no readable JSON"),
    (another_class, "_class_name in .*config.json"),
    (no_channels, "has no 'in_channels'|needs the setting in_channels"),
    (no_scheduler, "no file at .*scheduler_config.json"),
]


@pytest.mark.first(6)
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_one_line_that_names_the_file(copy, damage, message, monkeypatch):
    """And it is found before a tensor is read."""
    damage(copy)
    monkeypatch.setattr(weights, "_placed", lambda *args: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=message) as error:
        pretrained.from_diffusers(copy, text=False)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_a_link_inside_a_cache_of_the_hub_is_followed(folder, tmp_path):
    """models--NAME/snapshots/REVISION/... -> models--NAME/blobs/HASH."""
    import shutil

    root = tmp_path / "models--me--tiny"
    snapshot = Path(shutil.copytree(folder, root / "snapshots" / "abc"))
    (root / "blobs").mkdir()
    (snapshot / WEIGHTS).rename(root / "blobs" / "123")
    (snapshot / WEIGHTS).symlink_to(root / "blobs" / "123")
    assert pretrained.from_diffusers(snapshot, text=False).shape == (8, 8, 4)


def test_sharded_files_with_an_index(copy):
    """What `max_shard_size` makes: two files and an index."""
    from safetensors.numpy import load_file, save_file

    file = copy / WEIGHTS
    state = load_file(file)
    names = sorted(state)
    parts = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
             "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, copy / "unet" / part)
    where = {name: part for part, held in parts.items() for name in held}
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    file.unlink()
    assert pretrained.from_diffusers(copy, text=False).shape == (8, 8, 4)


def test_parameters_go_into_their_shardings(folder, prior):
    """Each device holds its slice of a kernel; numbers are the file's."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))

    def place(path, shape):
        axis = "fsdp" if shape and shape[-1] % 2 == 0 else None
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * (len(shape) - 1), axis))

    split = pretrained.from_diffusers(folder, sharding=place, text=False)
    kernel = split.params["conv_in"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 3, 4, 8)
    jax.tree.map(np.testing.assert_array_equal, split.params, prior.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "dtype", "devices"), [("F32", "float32", 1), ("BF16", "float32", 1), ("F32", "float32", 4)]
)
def test_reading_takes_little_more_memory_than_the_largest_file(tmp_path, stored, dtype, devices):
    """1.3 times the file, or what it becomes in a wider type, all parameters of three networks included; on four devices, a quarter each."""
    found = pretrained_load.measure(pretrained_load.write(tmp_path / "sd", 384, stored), dtype, devices)
    assert found.file > 3e8 and found.peak <= 1.3 * max(found.file, found.becomes)


def test_half_precision_files_are_converted(copy):
    from safetensors.numpy import load_file, save_file

    state = load_file(copy / WEIGHTS)
    save_file({name: value.astype(np.float16) for name, value in state.items()}, copy / WEIGHTS)
    prior = pretrained.from_diffusers(copy, text=False)
    assert prior.params["conv_in"]["kernel"].dtype == jnp.float32
    stored = weights.index(copy / WEIGHTS)["conv_in.bias"]
    assert stored.dtype == np.float16
