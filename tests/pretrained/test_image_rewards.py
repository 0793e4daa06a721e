"""Rewards by released networks: on small random ones, beside transformers' whole pipeline, and by their gradients."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rgdiff import rewards
from rgdiff.domains.images import tasks
from rgdiff.domains.images.data import from_uint8
from rgdiff.pretrained import clip, weights
from rgdiff.pretrained import rewards as pretrained
from rgdiff.pretrained.config import Config
from tests.pretrained.test_text import clip_folder

SIDE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 12,
}
CONFIG = {
    "projection_dim": 12,
    "text_config": SIDE | {"vocab_size": 519, "eos_token_id": 518, "bos_token_id": 517, "max_position_embeddings": 16},
    "vision_config": SIDE | {"image_size": 16, "patch_size": 4},
}
TEXTS = ["a cat", "the dog's café", "dog " * 30]
IDS = np.array([[517, 320, 513, 518], [517, 515, 518, 518]])


def pictures(count: int = 3, shape: tuple[int, int] = (20, 28)) -> np.ndarray:
    """Smooth random pictures, uint8."""
    draw = np.random.RandomState(0).uniform(0, 255, (count, *(-(-n // 4) for n in shape), 3))
    return np.kron(draw, np.ones((1, 4, 4, 1)))[:, : shape[0], : shape[1]].astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIPModel's folder, with weights large enough that pictures and texts matter."""
    path = tmp_path_factory.mktemp("clip")
    network = clip.CLIPModel(Config(CONFIG))
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4), int), jnp.zeros((1, 16, 16, 3)))["params"]
    draw = np.random.RandomState(1)
    made = lambda leaf: np.asarray(draw.normal(size=leaf.shape) * 0.3, np.float32)  # noqa: E731
    params = jax.tree.map(made, like)
    weights.write(path / "model.safetensors", params | {"logit_scale": np.float32(2.66)})
    preset = {"image_size": 16, "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "clip", "architectures": ["CLIPModel"]}))
    (path / "preprocessor_config.json").write_text(json.dumps({k: v for k, v in preset.items() if k != "image_size"}))
    return clip_folder(path)


def head(file: Path, sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """An aesthetic head of this many features; Dropout has a number in version 2, so that maps are 0, 2, 4, 6 and 7."""
    draw, state = np.random.RandomState(2), {}
    names = ["layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7."] if len(sizes) > 2 else [""]
    for name, before, after in zip(names, sizes, sizes[1:], strict=False):
        state[f"{name}weight"] = (draw.normal(size=(after, before)) / np.sqrt(before)).astype(np.float32)
        state[f"{name}bias"] = draw.normal(size=after).astype(np.float32)
    save_file(state, file)
    return state


@pytest.mark.slow
def test_clip_score_is_the_cosine_of_the_whole_model(folder):
    x = jnp.asarray(from_uint8(pictures(2)))
    reward = pretrained.clip_score(folder, IDS)
    found = rewards.score(reward, x, jnp.array([1, 0]))
    network = clip.CLIPModel(Config(CONFIG))
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.asarray(IDS), jnp.zeros((1, 16, 16, 3)))["params"]
    params = weights.read(weights.find(folder), like)
    apply = jax.jit(lambda params, ids, x: network.apply({"params": params}, ids, reward.embed.preprocess(x)))
    logits = apply(params, jnp.asarray(IDS), x).logits_per_image
    np.testing.assert_allclose(found, logits[jnp.arange(2), jnp.array([1, 0])], rtol=1e-4)
    same = rewards.score(pretrained.hps_v2(folder, IDS), x, jnp.array([1, 0]))  # the cosine alone
    np.testing.assert_allclose(same * np.exp(2.66), found, rtol=1e-4)
    assert abs(found[0] - found[1]) > 0.1  # the weights tell texts and pictures apart


@pytest.mark.slow
def test_cond_says_which_text(folder):
    reward = pretrained.clip_score(folder, IDS)
    x = jnp.asarray(from_uint8(pictures(3)))
    score = jax.jit(reward)
    found = score(x, jnp.array([0, 1, 2]))
    assert np.isnan(found).tolist() == [False, False, True]
    np.testing.assert_array_equal(score(x, {"prompt": jnp.array([0, 1, 2]), "other": x}), found)
    single = pretrained.clip_score(folder, IDS[:1])
    np.testing.assert_allclose(single(x[:1], jnp.array([7.5])), found[:1], rtol=1e-5)  # not read
    for wrong in (None, jnp.zeros(3), jnp.zeros((3, 1), int), {"text": jnp.zeros(3, int)}):
        with pytest.raises(rewards.RewardFailure, match="which of them each picture has: give cond, integer"):
            rewards.score(reward, x, wrong)


@pytest.mark.slow
def test_rounding_is_the_default_and_passes_the_gradient_on(folder):
    """A picture of 8 bits and one a third of a level from it have one score, and still a gradient: that without rounding, nearly."""
    x = jnp.round(jnp.asarray(pictures(1)) * 0.5 + 64.0) / 127.5 - 1  # grey enough that no resize is clipped
    rounded, plain = (pretrained.clip_score(folder, IDS[:1], rounded=r) for r in (True, False))
    assert pretrained.clip_score(folder, IDS[:1]).embed.preprocess.rounded
    both = jax.jit(lambda x: [jax.value_and_grad(lambda x, r=r: r(x)[0])(x) for r in (rounded, plain)])
    (a, gradient), (b, smooth) = both(x)
    (near, _), (other, _) = both(x + 0.3 / 127.5)
    assert near == a and abs(other - b) > 1e-5
    np.testing.assert_allclose(gradient, smooth, atol=0.1 * np.abs(smooth).max())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["clip", "aesthetic"])
def test_gradients_in_pixels_are_those_of_finite_differences(folder, tmp_path, which):
    head(tmp_path / "head.safetensors", (12, 8, 6, 4, 3, 1))
    with jax.enable_x64(True):
        if which == "clip":
            reward = pretrained.clip_score(folder, IDS[:1], rounded=False, dtype=jnp.float64)
        else:
            options = {"rounded": False, "dtype": jnp.float64, "remat": None}
            reward = pretrained.aesthetic(folder, tmp_path / "head.safetensors", **options)
        x = jnp.asarray(from_uint8(pictures(1)).astype(np.float64) * 0.9)
        along = jnp.asarray(np.random.RandomState(3).normal(size=x.shape))
        loss = jax.jit(lambda s: reward(x + s * along)[0])
        numeric = float(loss(1e-3) - loss(-1e-3)) / 2e-3  # attention's softmax is float32 even here
        np.testing.assert_allclose(float(jax.jit(jax.grad(loss))(0.0)), numeric, rtol=2e-3)
    assert abs(numeric) > 1e-2


@pytest.mark.slow
def test_aesthetic_heads_are_linear_maps(folder, tmp_path):
    x = jnp.asarray(from_uint8(pictures(2)))
    for sizes in ((12, 1), (12, 8, 6, 4, 3, 1)):  # versions 1 and 2
        state = head(tmp_path / "head.safetensors", sizes)
        reward = pretrained.aesthetic(folder, tmp_path / "head.safetensors")
        h = np.asarray(jax.jit(lambda embed, x: embed(x))(reward.embed, x))
        np.testing.assert_allclose(np.linalg.norm(h, axis=-1), 1, rtol=1e-5)
        for name in sorted(name for name in state if name.endswith("weight")):
            h = h @ state[name].T + state[name.replace("weight", "bias")]
        np.testing.assert_allclose(rewards.score(reward, x), h[:, 0], rtol=1e-4)


@pytest.mark.slow
def test_a_reward_on_latents_is_that_on_what_is_decoded(folder):
    x = jnp.asarray(from_uint8(pictures(1, (16, 16))))
    reward = pretrained.clip_score(folder, IDS[:1])
    decode = lambda z: jnp.tanh(z) * 0.9  # noqa: E731
    for remat in (True, False):
        through = rewards.decoded(reward, decode, remat=remat)
        np.testing.assert_allclose(rewards.score(through, x), reward(decode(x)), rtol=1e-5)
    plain = jax.jit(jax.grad(lambda z: reward(decode(z))[0]))(x)
    gradient = jax.jit(jax.grad(lambda z: rewards.decoded(reward, decode)(z)[0]))
    np.testing.assert_allclose(gradient(x), plain, atol=1e-5)
    assert np.abs(plain).max() > 1e-3


def test_a_decoder_is_computed_again_unless_told_otherwise():
    total = lambda x, cond: x.sum((1, 2, 3))  # noqa: E731
    for remat in (True, False):
        reward = rewards.decoded(total, jnp.tanh, remat=remat)
        assert ("remat" in str(jax.make_jaxpr(reward)(jnp.zeros((1, 2, 2, 3))))) == remat


def test_files_that_do_not_fit_are_refused_in_one_line(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    cases = (
        (state | {"extra": state["logit_scale"]}, "has 'extra', which CLIP lacks"),
        ({k: v for k, v in state.items() if k != "logit_scale"}, "has no 'logit_scale': expected a whole CLIPModel"),
        ({k: v for k, v in state.items() if k != "visual_projection.weight"}, "has no 'visual_projection.weight'"),
    )
    for made, message in cases:
        save_file(made, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            pretrained.clip_score(tmp_path, IDS)
    for wrong, message in (([], "at least one prompt"), (np.zeros(3, int), "integer"), (np.zeros((1, 3)), "integer")):
        with pytest.raises(ValueError, match=message):
            pretrained.clip_score(folder, wrong)
    for made, message in (
        (
            {"weight": np.zeros((1, 5), np.float32), "bias": np.zeros(1, np.float32)},
            r"expected a weight \[features, 12\]",
        ),
        ({"weight": np.zeros((2, 12), np.float32), "bias": np.zeros(2, np.float32)}, "ends in 2 numbers, expected 1"),
        ({"scale": np.zeros(1, np.float32)}, "has 'scale'; an aesthetic head has"),
    ):
        save_file(made, tmp_path / "head.safetensors")
        with pytest.raises(ValueError, match=message):
            pretrained.aesthetic(folder, tmp_path / "head.safetensors")


@pytest.mark.slow
def test_scores_are_those_of_transformers_pipeline(folder, tmp_path):
    torch = pytest.importorskip("torch", reason="torch and transformers, which are compared with")
    transformers = pytest.importorskip("transformers", reason="transformers, which is compared with")
    torch.set_num_threads(1)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="transformers 5")
    processor = processors.CLIPImageProcessorPil.from_pretrained(folder)
    processor.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shown = pictures(3)
    inputs = tokenizer(TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    pixels = processor(list(shown), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(input_ids=inputs.input_ids, pixel_values=pixels)
    logits = np.diag(out.logits_per_image.numpy())
    x, which = jnp.asarray(from_uint8(shown)), jnp.arange(3)
    for make in (pretrained.clip_score, pretrained.pick_score):
        exact = rewards.score(make(tmp_path, TEXTS), x, which)
        plain = rewards.score(make(tmp_path, TEXTS, rounded=False), x, which)
        print(make.__name__, np.abs(exact - logits).max(), np.abs(plain - logits).max(), logits)
        np.testing.assert_allclose(exact, logits, atol=1e-3)
        np.testing.assert_allclose(plain, logits, atol=0.05)  # without rounding to 8 bits, of about 14
    cosines = logits / np.exp(2.66)
    np.testing.assert_allclose(rewards.score(pretrained.hps_v2(tmp_path, TEXTS), x, which), cosines, atol=1e-4)

    state = head(tmp_path / "head", (12, 8, 6, 4, 3, 1))
    h = torch.nn.functional.normalize(out.image_embeds, dim=-1)
    for name in sorted(name for name in state if name.endswith("weight")):
        h = h @ torch.tensor(state[name]).T + torch.tensor(state[name.replace("weight", "bias")])
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    vision.save_pretrained(tmp_path / "vision")
    processor.save_pretrained(tmp_path / "vision")
    for where in (tmp_path, tmp_path / "vision"):
        reward = pretrained.aesthetic(where, tmp_path / "head")
        np.testing.assert_allclose(rewards.score(reward, x), h[:, 0].numpy(), atol=1e-3)


@pytest.mark.slow
def test_bfloat16_is_near_and_returns_float32(folder):
    x = jnp.asarray(from_uint8(pictures(3)))
    half, full = (pretrained.clip_score(folder, IDS[:1], dtype=dtype)(x) for dtype in ("bfloat16", "float32"))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.5)


def open_clip(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a CLIPModel's tensors in open_clip's layout: joined maps, transposed projections, other names."""
    names = (
        ("text_model.", ""), ("vision_model.", "visual."), ("encoder.layers.", "transformer.resblocks."),
        ("self_attn.", "attn."), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"), ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"),
        ("final_layer_norm", "ln_final"), ("embeddings.patch_embedding", "conv1"),
        ("embeddings.class_embedding", "class_embedding"), ("embeddings.token_embedding", "token_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
    )  # fmt: skip
    out = {"text_projection": state["text_projection.weight"].T, "visual.proj": state["visual_projection.weight"].T}
    for name, array in state.items():
        if name in ("text_projection.weight", "visual_projection.weight") or ".k_proj." in name or ".v_proj." in name:
            continue
        new = name
        for old, other in names:
            new = new.replace(old, other)
        if ".q_proj." in name:
            array = np.concatenate([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            new = new.replace("q_proj.", "in_proj_")
        out[new] = array
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


@pytest.mark.slow
def test_hps_reads_open_clips_layout(folder, tmp_path):
    save_file(open_clip(load_file(folder / "model.safetensors")), tmp_path / "HPS_v2.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    x = jnp.asarray(from_uint8(pictures(2)))
    expected = pretrained.hps_v2(folder, "a cat")(x)
    for path in (tmp_path, tmp_path / "HPS_v2.safetensors"):
        np.testing.assert_allclose(pretrained.hps_v2(path, "a cat", tokenizer=folder)(x), expected, rtol=1e-6)
    network = clip.CLIPModel(pretrained.VIT_H_14)  # what a file without a config.json is
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 77), int), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(like)) == 986_109_441  # open_clip's ViT-H-14


@pytest.mark.slow
def test_tasks_read_their_files(folder, tmp_path):
    head(tmp_path / "head.safetensors", (12, 1))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    x = jnp.asarray(from_uint8(pictures(3)))
    judge = tasks.aesthetic(str(folder), str(tmp_path / "head.safetensors"))
    task = tasks.clip_score(str(folder), file=str(tmp_path / "prompts.txt"), heldout=judge)
    assert task.conditional and not judge.conditional
    np.testing.assert_allclose(task.heldout(x), judge.reward(x), rtol=1e-5)
    expected = pretrained.clip_score(folder, ["a cat", "a dog"])(x, jnp.array([0, 1, 0]))
    np.testing.assert_allclose(task.reward(x), expected, rtol=1e-5)
    for make in (tasks.pick_score, tasks.hps_v2):
        assert not make(str(folder), "a cat").conditional
    with pytest.raises(ValueError, match="one of the two"):
        tasks.clip_score(str(folder))
