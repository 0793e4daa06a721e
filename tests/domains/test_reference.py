"""Digits that come with the package: the files say what they are, load, judge and are made anew by their recipe."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from rgdiff import assets, nets
from rgdiff.cli import main
from rgdiff.domains import images
from rgdiff.domains.images import data as image_data
from rgdiff.domains.images import tasks
from rgdiff.domains.images.judge import ImageJudge
from rgdiff.nets.unet import _depth_to_space, _space_to_depth
from rgdiff.recipes import compose as recipe

FOLDER = Path(assets.__file__).parent
DATA = os.environ.get("RGDIFF_DATA", "")


def test_the_files_are_small_and_say_what_they_are():
    files = sorted(FOLDER.glob("*.safetensors"))
    assert [file.name for file in files] == ["mnist16_prior.safetensors", "mnist16_reference.safetensors"]
    assert sum(file.stat().st_size for file in files) < 5e6
    for file in files:
        with safe_open(file, "np") as opened:
            meta = json.loads(opened.metadata()["rgdiff"])
        assert meta["recipe"] == "rgdiff run pretrain_digits" and "MNIST" in meta["data"] and "CC BY-SA" in meta["data"]
        assert file.name in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_domain_judges_without_images():
    domain = images.pretrained()
    assert domain.shape == (16, 16, 1) and domain.accuracy > 0.96
    assert (np.bincount(domain.labels) == 400).all() and domain.features.shape == (4000, 64)
    judge = ImageJudge(domain, jax.random.key(0))
    task = tasks.digit(domain, judge, jax.random.key(1), target=3)
    assert task.reward.classifier is domain.guide and task.heldout.classifier is domain.judge
    assert judge.real_features(task).shape == (400, 64) and judge.references(task) == {}
    # the features are those that the judge's own head takes for their class
    logits = domain.features @ np.asarray(domain.judge.params["head"]["w"]) + np.asarray(
        domain.judge.params["head"]["b"]
    )
    assert (logits.argmax(-1) == domain.labels).mean() > 0.97


@pytest.mark.slow
def test_what_needs_images_is_refused_by_name(tmp_path, capsys):
    domain = images.pretrained()
    judge = ImageJudge(domain, jax.random.key(0))
    for make in (
        lambda: tasks.digit(domain, judge, jax.random.key(1), heads=2),
        lambda: tasks.digit(domain, judge, jax.random.key(1), judged="likeness"),
        lambda: tasks.inpainted(domain, judge, jax.random.key(1)),
        lambda: tasks.downsampled(domain, judge, jax.random.key(1)),
    ):
        with pytest.raises(ValueError, match="do not come with the package; take domain=digits"):
            make()
    shared = ["run", "steer", "domain=mnist16", f"out={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
    for more, line in (
        (["prior=unet"], "this prior needs a domain with examples to train a prior on"),
        (["prior=mnist16", "method=dxmi"], "this method learns from data"),
        (
            ["prior=mnist16", "prior.checkpoint=package:x"],
            "package:x does not come with the package, which has digits_pipeline, mnist16_",
        ),
        (["prior=mnist16", "domain.path=nowhere.safetensors"], "no file at nowhere.safetensors"),
    ):
        assert main([*shared, *more]) == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_patches_are_channels_and_come_back():
    for axes in (1, 2):
        x = jax.random.normal(jax.random.key(0), (2, *(8, 12)[:axes], 3))
        folded = _space_to_depth(x, 2)
        assert folded.shape == (2, *(4, 6)[:axes], 3 * 2**axes)
        np.testing.assert_array_equal(_depth_to_space(folded, 2), x)
    np.testing.assert_array_equal(_space_to_depth(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 0, 1], [2, 3, 6, 7])


@pytest.mark.slow
def test_a_network_of_patches_is_the_network_of_their_channels():
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([0.2, 0.8])
    patched = nets.UNet(channels=(8, 8), patch=2)
    params = nets.UNet(channels=(8, 8)).init(jax.random.key(1), _space_to_depth(x, 2), t)
    params = jax.tree.map(lambda p: p + 0.1, params)  # its last layer is zero at first
    plain = nets.UNet(channels=(8, 8)).apply(params, _space_to_depth(x, 2), t)
    np.testing.assert_allclose(patched.apply(params, x, t), _depth_to_space(plain, 2), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 4"):
        patched.init(jax.random.key(0), jnp.zeros((1, 6, 6, 1)), t)


@pytest.mark.skipif(not (Path(DATA) / "mnist-t10k-images-idx3-ubyte.gz").exists(), reason="needs MNIST in RGDIFF_DATA")
def test_the_judge_is_as_good_on_unseen_images_as_its_file_says():
    domain, real = images.pretrained(), images.mnist(DATA, size=16)
    found = np.asarray(domain.judge.logits(jnp.asarray(real.test_x))).argmax(-1)
    assert abs((found == real.test_y).mean() - domain.accuracy) < 2e-3
    wide = images.mnist(DATA, size=32)
    np.testing.assert_allclose(real.test_x[:5, 3, 4, 0], wide.test_x[:5, 6:8, 8:10, 0].mean((1, 2)), atol=1e-6)


@pytest.mark.slow
def test_the_recipe_makes_files_that_a_run_can_use(tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "train_classifier", partial(image_data.train_classifier, steps=20))
    shared = [f"cache_dir={tmp_path / 'cache'}", "samples=8", "prior.steps=3"]
    shared += ["prior.network.channels=[8,8]"]
    few = ["prior.train.steps=4", "prior.train.optimizer.warmup=1", "prior.train.optimizer.decay_steps=4"]
    made, mine = tmp_path / "made", tmp_path / "mine.yaml"  # a recipe of another name
    text = (recipe.config_dir() / "pretrain_digits.yaml").read_text(encoding="utf-8")
    mine.write_text(text, encoding="utf-8")
    assert main(["run", str(mine), "domain=digits", "domain.size=16", *shared, *few, f"out={made}"]) == 0
    argv = [f"domain.path={made / 'digits16_reference.safetensors'}", *shared, "reward.target=4", "method=best_of_n"]
    argv += [f"prior.checkpoint={made / 'digits16_prior.safetensors'}", "domain=mnist16", "prior=mnist16"]
    assert main(["run", "steer", *argv, "method.candidates=2", f"out={tmp_path / 'used'}"]) == 0
    with safe_open(made / "digits16_prior.safetensors", "np") as opened:
        assert json.loads(opened.metadata()["rgdiff"])["recipe"] == f"rgdiff run {mine}"
    one, two = (np.load(path / "samples.npz")["prior"] for path in (made, tmp_path / "used"))
    np.testing.assert_array_equal(one, two)


def test_the_packaged_prior_is_that_of_its_recipe():
    mine, used = (recipe.compose(name, [])["prior"] for name in ("pretrain_digits", "quickstart"))
    assert used.pop("checkpoint").startswith("package:") and mine.pop("checkpoint") is None
    assert mine == used
