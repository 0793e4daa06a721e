"""`rgdiff plan`: the programs that are planned are those that run, and every recipe has a plan."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rgdiff import assets, checks, samplers, tuners
from rgdiff.cli import main
from rgdiff.recipes import compose, programs
from rgdiff.recipes.run import prepare
from rgdiff.runtime import planning
from rgdiff.samplers import _loop as sampling
from rgdiff.tuners import _loop as tuning

SMALL = [
    "domain=planar",
    "prior=planar_mlp",
    "reward=log_density",
    "prior.steps=4",
    "samples=16",
    "prior.network.features=[8,8]",
]
libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="TPU programs are compiled by libtpu: pip install libtpu"
)


def planned(recipe, *overrides):
    found, notes = programs.programs(prepare(recipe, overrides, dry=True))
    return {program.name: program for program in found}, notes


def text(call):
    return call.function.lower(*call.arguments, **call.static).as_text()


@pytest.mark.slow
def test_a_plan_is_printed_and_nothing_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "plan",
        "steer",
        *SMALL,
        "method=draft_k",
        "method.batch=8",
        "target=cpu",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "steer on 1 x cpu" in out and "draft_k: a step, batch 8, 4 network calls a row, " in out
    assert "peak" in out and "no collectives" not in out
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    assert main(["plan", "steer", *SMALL, "target=v9x"]) == 2


def test_planned_programs_are_those_that_run():
    """The same StableHLO, to the letter, from shapes as from the arrays of a run."""
    found, _ = planned("steer", *SMALL, "method=draft_k", "method.batch=8")
    prepared = prepare("steer", [*SMALL, "method=draft_k", "method.batch=8"], dry=True)
    settings, domain = prepared.settings, prepared.domain
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), settings.like(domain))
    params = jax.tree.map(jax.numpy.asarray, params)
    prior = settings.ready(domain, params)
    sampler = samplers.ancestral(prior.process, prior.denoiser)
    key = jax.random.key(0)
    ran = sampling._whole.lower(sampler, key, prior.times, None, 16, None, shards=None).as_text()
    assert text(found["prior"].call(16)) == ran
    method = prepared.built["draft_k"]
    task = compose.build(prepared.config["reward"], domain=domain)
    tuner = method.tuner(prior.model, prior.with_eta(method.eta), task, prior.times, prior.denoiser)
    ran = tuning._advance.lower(tuner, key, tuner.init(params), None, 1, None).as_text()
    assert text(found["draft_k"].call(8)) == ran
    assert text(found["draft_k"].call(16)) != ran
    assert tuners.fit(tuner, key, tuner.init(params), 1).step == 1


@pytest.mark.slow
def test_a_prior_in_bfloat16_keeps_its_parameters_and_moments():
    """Its products are of bfloat16; parameters, moments, states and what is made of predictions are float32."""
    tuned = [*SMALL, "method=draft_k", "method.batch=8"]
    plain, half = (planned("steer", *tuned, *more)[0]["draft_k"].call(8) for more in ([], ["prior.dtype=bfloat16"]))
    products = [line for line in text(half).splitlines() if "dot_general" in line]
    assert products and all("bf16" in line for line in products) and "bf16" not in text(plain)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.arguments[2].params)} == {np.dtype("float32")}
    floats = [leaf for leaf in jax.tree.leaves(half.arguments[2]) if np.issubdtype(leaf.dtype, np.inexact)]
    assert {leaf.dtype for leaf in floats} == {np.dtype("float32")}
    with pytest.raises(ValueError, match="prior.dtype must be one of"):
        planned("steer", *tuned, "prior.dtype=float16")


@pytest.mark.slow
def test_a_network_of_860_million_parameters_by_shapes_alone():
    """No weights come with the package's shapes of Stable Diffusion 1.5; a run of them says so."""
    folder = assets.resolved("package:sd15_shapes")
    assert not list(folder.rglob("*.safetensors"))
    found, notes = planned("sd_draft", "domain.folder=package:sd15_shapes", "~methods.draft_k", "~methods.draft_lv")
    assert found["prior"].parameters == 859_520_964 and notes == []
    assert found["draft_1"].network_calls == 50
    state = found["draft_1"].call(2).arguments[2]
    assert programs.count(state.params) == found["draft_1"].parameters < 1e7  # the adapter
    weights = found["prior"].call(2).arguments[0].denoiser
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(weights) if np.ndim(leaf) > 1} <= {"bfloat16", "float32"}


@pytest.mark.parametrize("parts, largest", [(1, 776), (24, 768)])
def test_the_largest_batch_is_a_multiple_of_what_the_method_takes(monkeypatch, parts, largest):
    """777 rows fit; eight devices take eights, and minibatches what they divide."""

    def call(batch):
        checks.divides("minibatches", parts, batch)
        return batch

    monkeypatch.setattr(planning, "figures", lambda batch, target, cache: planning.Figures(arguments=100 * batch))
    pod = SimpleNamespace(devices=8, memory=77_700)
    program = programs.Program("ddpo", "a step", 96 if parts > 1 else 8, call, 0)
    found, each = programs.largest_batch(program, pod, None)
    assert found == largest and found % each == 0 and each == program.batch


@libtpu
@pytest.mark.parametrize("target", ["v5e:2x4", pytest.param("v5p:2x2x4", marks=pytest.mark.slow)])
def test_a_chain_on_a_pod_has_no_collectives(target, capsys, tmp_path):
    options = [*SMALL, "method=best_of_n", "method.candidates=2", f"cache_dir={tmp_path}"]
    assert main(["plan", "steer", *options, f"target={target}", "prior.checkpoint=null"]) == 0
    out = capsys.readouterr().out
    assert "prior: a chain of 3 moves" in out and "it fits" in out
    assert "no collectives" in out.partition("prior: a chain")[2].partition("best_of_n")[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in compose.names() if not name.startswith(("sd_", "pretrain"))])
def test_every_recipe_has_a_plan(recipe):
    try:
        found, _ = planned(recipe)
    except (ValueError, OSError) as error:
        pytest.skip(f"this recipe's data are not here: {error}")
    assert "prior" in found and len(found) > 1
    for program in found.values():
        call = program.call(program.batch)
        jax.eval_shape(functools.partial(call.function, **call.static), *call.arguments)
