"""A run's folder back in Python: what it sampled can be sampled again, to the last bit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import rgdiff
from rgdiff import cli, samplers
from rgdiff.recipes import loaded
from rgdiff.tuners import pretraining  # noqa: F401  its module must not be needed by load

TINY = [
    "domain=planar",
    "prior=mlp",
    "prior.network.features=[8]",
    "prior.steps=3",
    "prior.train.steps=4",
    "reward=log_density",
    "samples=8",
    "+method@methods.whole=draft_k",
    "+method@methods.lora=draft_k",
    "methods.lora.adapter=2",
    "methods.lora.eta=1.0",
    "~method",
    *(f"methods.{name}.{option}" for name in ("whole", "lora") for option in ("steps=2", "batch=4")),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["run", "steer", *TINY, f"out={out}", f"cache_dir={out.parent / 'cache'}"]) == 0
    return out


def again(run, name, phase):
    sampler = samplers.ancestral(run.process(name), run.denoiser(name))
    return np.asarray(samplers.sample(sampler, run.key(phase), 8, run.prior.times).x0)


@pytest.mark.slow
def test_a_run_is_loaded_without_training(made, monkeypatch):
    monkeypatch.setattr(rgdiff.tuners, "fit", lambda *_, **__: pytest.fail("it was trained"))
    run = rgdiff.load(made)
    assert list(run.samples) == ["prior", "whole", "lora"] and set(run.tuned) == {"whole", "lora"}
    assert run.config["samples"] == 8 and np.isfinite(run.summary["whole/reward_mean"])
    assert [row["step"] for row in run.metrics if row["phase"] == "whole"] == [0, 1]
    for name, phase in (("prior", "prior_samples"), ("whole", "whole"), ("lora", "lora")):
        np.testing.assert_array_equal(again(run, name, phase), run.samples[name])
    with pytest.raises(ValueError, match="'svdd' tuned nothing .* whole, lora"):
        run.denoiser("svdd")


@pytest.mark.slow
def test_a_prior_that_is_not_cached_any_more_comes_from_the_runs_checkpoints(made, tmp_path):
    moved = shutil.copytree(made, tmp_path / "moved")
    run = rgdiff.load(moved, cache_dir=tmp_path / "empty")
    np.testing.assert_array_equal(again(run, "prior", "prior_samples"), run.samples["prior"])
    shutil.rmtree(moved / "checkpoints")
    with pytest.raises(ValueError, match="name their cache with cache_dir="):
        rgdiff.load(moved, cache_dir=tmp_path / "empty_too")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it has no config.yaml"):
        rgdiff.load(tmp_path)
    (tmp_path / "config.yaml").write_text("domain: {_target_: os.system}\nprior: {}\nseed: 0\n")
    with pytest.raises(ValueError, match="not a constructor of rgdiff"):
        loaded.load(tmp_path)
