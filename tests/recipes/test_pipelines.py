"""Recipes on a released pipeline, each run end to end on a small untrained folder of Stable Diffusion's layout."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import rgdiff
from rgdiff.cli import main
from rgdiff.domains.pipelines import pipeline, tasks
from tests.pretrained import tiny

pytest.importorskip("tokenizers", reason="prompts as text need the package tokenizers (rgdiff[text])")

TUNED = ["tuning_steps=1", "batch=2"]
# What makes a recipe small: its steps, batches and particles.
SMALL = {
    "sd_draft": ["tuning_steps=1", "batch=2", "rank=2", "methods.draft_k.options.k=2"],
    "sd_svdd": ["methods.svdd.options.candidates=2", "methods.svdd.options.chunk=1", "methods.best_of_n.candidates=2"],
    "sd_smc": ["methods.fk_steering.particles=2", "methods.das.particles=2", "prior.steps=2"],
    "sd_ddpo": ["methods.ddpo.steps=1", "methods.ddpo.batch=4", "methods.ddpo.options.minibatches=1"],
    "sd_alignprop": ["methods.alignprop.steps=1", "methods.alignprop.batch=2"],
    "sd_mix": ["methods.mixed.tuning.steps=1", "methods.mixed.tuning.batch=2", "methods.mixed.weights=[0.5]"],
    "sd_seiko": ["methods.seiko.queries=[4]", "methods.seiko.evaluate=4", "methods.seiko.tuning.steps=1"],
    "sd_tiny": [
        "methods.svdd.options.candidates=2",
        *(f"methods.{name}.{small}" for name in ("draft_1", "draft_lv", "adjoint_matching") for small in ("steps=1", "batch=2")),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.drawn_digits(tmp_path_factory.mktemp("pipeline") / "digits")


def arguments(folder, name, out, *more):
    prompts = "a red three" if name in ("sd_smc", "sd_seiko") else "[a red three,a blue nine]"
    return [
        "run", name, f"domain.folder={folder}", "domain.dtype=float32", "domain.remat=null", f"prior.prompts={prompts}",
        "prior.steps=3", "samples=4", f"out={out}", f"cache_dir={out.parent / 'cache'}", *SMALL[name], *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_runs_end_to_end(folder, tmp_path, name):
    assert main(arguments(folder, name, tmp_path / "run")) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    methods = {key.split("/")[0] for key in summary} - {"prior"}
    assert methods and all(np.isfinite(summary[f"{method}/reward_mean"]) for method in methods)
    samples = np.load(tmp_path / "run" / "samples.npz")
    assert samples["prior"].shape == (4, 8, 8, 4)
    assert (tmp_path / "run" / "report.html").exists()
    if name == "sd_draft":  # its adapters are for diffusers
        config = json.loads((tmp_path / "run" / "adapters" / "draft_1" / "adapter_config.json").read_text())
        assert config["r"] == 2 and any(target.endswith("attn2.to_q") for target in config["target_modules"])


@pytest.mark.first(2)
@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_composes_and_checks(folder, tmp_path, name, capsys):
    assert main([*arguments(folder, name, tmp_path / "run"), "--dry-run"]) == 0
    assert "PipelinePrior" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A command of cifar_dxmi on a small DDPM and 64 random pictures, up to where it goes."""
    place = tmp_path_factory.mktemp("cifar")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    np.savez(place / "pictures.npz", images=pixels, labels=np.arange(64) % 2)
    one = {
        "block_out_channels": [16],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
    }  # compiles sooner
    return [
        "run", "cifar_dxmi", f"prior.folder={tiny.ddpm(place / 'ddpm', **one)}", f"domain.path={place / 'pictures.npz'}",
        "iterations=2", "batch=4", "samples=8", "prior.steps=2", f"cache_dir={place / 'cache'}", "methods.dxmi.value.features=[8]",
        "methods.sft_pg.critic.features=[8]", "methods.sft_pg.iterations=1",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 4])
def test_dxmi_composes_on_a_ddpm_of_pictures(cifar, tmp_path, steps, capsys):
    assert main([*cifar, f"steps={steps}", f"out={tmp_path / 'run'}", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "PipelinePrior" in told and "dxmi_released" in told and "32 to train on" in told


@pytest.mark.slow
def test_dxmi_learns_on_a_ddpm_of_pictures(cifar, tmp_path):
    alone = [f"~methods.{name}" for name in ("ddpm", "ddim", "sft_pg")]
    alone += [f"~method@{one[1:]}" for one in alone]
    kept = [one for one in cifar if "sft_pg" not in one]
    assert main([*kept, *alone, "steps=2", f"out={tmp_path / 'run'}"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {key.split("/")[0] for key in summary} == {"prior", "dxmi", "fast_dpm"}
    assert summary["dxmi/network_calls"] == 2 and np.isfinite(summary["dxmi/frechet"])
    samples = np.load(tmp_path / "run" / "samples.npz")
    assert samples["dxmi"].shape == (8, 8, 8, 3) and np.all(np.isfinite(samples["dxmi"]))


@pytest.mark.first(3)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["method=dxmi", "method.levels=fast_dpm", "method.start=prior"], "and prior=pipeline on domain=pictures"),
        (["domain.folder=/no/such/folder"], "no folder at /no/such/folder"),
        (["domain.dtype=float16"], "domain.dtype"),
        (["prior.prompts=null"], "guidance needs a condition"),
        (["prior.classes=[1]"], "give one of prior.prompts, prior.file and prior.classes"),
        (["domain.size=[8]"], "domain.size is [h, w]"),
        (["domain=digits", "prior.folder=FOLDER"], "choose domain=pipeline"),
        (["prior.eta=0", "method=smc"], "eta"),
    ],
)  # fmt: skip
def test_refusals(folder, tmp_path, more, message, capsys):
    base = [
        "run",
        "steer",
        "domain=pipeline",
        f"domain.folder={folder}",
        "prior=pipeline",
        "reward=colour",
        "method=svdd",
    ]
    more = [one.replace("FOLDER", str(folder)) for one in more]
    if "domain=digits" in more:
        base.remove(f"domain.folder={folder}")
    base = [one for one in base if one.split("=")[0] not in {m.split("=")[0] for m in more}]
    assert main([*base, f"out={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", *more]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_pictures_are_decoded_some_at_a_time(folder):
    domain = pipeline(str(folder))
    x0 = np.random.default_rng(0).standard_normal((9, 8, 8, 4)).astype(np.float32)
    pixels = domain.pixels(x0)
    assert pixels.shape == (9, 16, 16, 3)
    np.testing.assert_allclose(pixels[8:], jax.jit(domain.decoder)(x0[8:]), atol=1e-5)
    assert domain.decode(x0).dtype == np.uint8


def test_colour_by_hand():
    """Full red is right; full green is wrong by (1 - .2)^2 twice, over ink plus one; black has no ink."""
    x = np.full((3, 2, 2, 3), -1.0, np.float32)
    x[0] = np.array([1.0, -0.6, -0.6])
    x[1] = np.array([-0.6, 1.0, -0.6])
    out = tasks.colour([1.0, 0.2, 0.2]).reward(x)
    np.testing.assert_allclose(out, [0, -4 * 2 * 0.64 / 5, 0], atol=1e-6)
    with pytest.raises(ValueError, match="red, green and blue"):
        tasks.colour([2, 0, 0])


@pytest.mark.slow
def test_a_drawn_digit_is_judged_by_other_images():
    task = tasks.digit(3)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    a, b = task.reward(x, {"prompt": np.zeros(2)}), task.heldout(x)
    assert a.shape == b.shape == (2,) and np.all(a < 0) and not np.allclose(a, b)


@pytest.mark.slow
def test_the_page_on_pretrained_networks_runs(capsys):
    """The code of rgdiff/docs/pretrained.md, as it stands."""
    page = (Path(rgdiff.__file__).parent / "docs" / "pretrained.md").read_text(encoding="utf-8")
    exec(compile(page.split("```python")[1].split("```")[0], "pretrained.md", "exec"), {})
    assert "(2, 16, 16, 3)" in capsys.readouterr().out
