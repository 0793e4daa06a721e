"""What the command line does before and around a run: refuses in one line and leaves nothing, goes on, finds its folders.

Runs are of points in the plane with a small perceptron, so that they take seconds.
"""

from __future__ import annotations

import csv
import inspect
import json
import logging
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import cli
from rgdiff.recipes import compose as recipe
from rgdiff.recipes import run as running
from rgdiff.recipes.explain import explained
from rgdiff.recipes.kinds import of_kind
from rgdiff.recipes.methods.steering import PriorSampling
from rgdiff.runtime import checkpoint
from rgdiff.runtime.cache import open_cache
from rgdiff.runtime.checkpoint import CheckpointError, Checkpoints, load_params, save_params
from rgdiff.runtime.folder import RunFolder, alone, next_free
from rgdiff.runtime.run import Run
from rgdiff.tuners._loop import start, update
from rgdiff.typing import pytree

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "domain=planar",
    "prior=mlp",
    "prior.network.features=[8]",
    "prior.steps=3",
    "prior.train.steps=4",
    "reward=log_density",
    "samples=8",
]
SVDD = [*TINY, "method.options.candidates=2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache):
    """The folder of a finished run, with a name that no grammar likes."""
    out = tmp_path_factory.mktemp("runs") / "größe (1)=b"
    assert cli.main(["run", "steer", *SVDD, f"out={out}", f"cache_dir={cache}"]) == 0
    return out


def refused(capsys, *argv):
    """Run a command that must fail, and return its one line."""
    assert cli.main(list(argv)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


# ---------------------------------------------------------------- refused first, by name, leaving nothing

REFUSED = {
    "samples=1": "samples must be an integer of at least 2, got 1",
    "samples=0": "samples must be an integer of at least 2, got 0",
    "samples=abc": "samples must be an integer of at least 2, got 'abc'",
    "samples=16.9": "samples must be an integer of at least 2, got 16.9",
    "seed=null": "seed must be an integer of at least 0, got None",
    "seed=1.5": "seed must be an integer of at least 0, got 1.5",
    "seed=-1": "seed must be an integer of at least 0, got -1",
    "seed=12345678901234567890": "seed must be below 2^32",  # jax.random.key takes 2^32 for 0
    "prior.seed=4294967296": "prior.seed must be below 2^32",
    "resume=maybe": 'resume must be true or false, got "maybe"',
    "prior.steps=0": "prior.steps must be an integer of at least 1, got 0",
    "prior.train.batch=0": "prior.train.batch must be an integer of at least 1, got 0",
    "+prior.train.foo=1": "prior.train: pretraining() got an unexpected keyword argument 'foo'",
    "prior.checkpoint=/nowhere": "no checkpoint at /nowhere",
    "prior.clip=maybe": 'prior.clip must be true or false, got "maybe"',
    "prior.prediction=foo": "prediction must be one of",
    "prior.schedule=null": "prior.schedule must be given, got null",
    "prior.train=3": "prior.train is a part with keys of its own, e.g. prior.train.steps, got 3",
    "method.steps=-5": "method.steps must be an integer of at least 0, got -5",
    "method.steps=1.5": "method.steps must be a whole number, got 1.5",
    "method.options=null": "method.options must be a mapping, got null",
    "method.options.k=0": "draft_k: ",
    "out=a[1]": "cannot be written where a path has [",
    "+foo=1": "nothing reads 'foo'",
    "+hydra.run.dir=x": "unknown key '+hydra.run.dir'",
}


@pytest.mark.parametrize(("override", "line"), REFUSED.items(), ids=list(REFUSED))
@pytest.mark.first(12)
def test_wrong_values_are_refused_before_anything_is_made(override, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "method=draft_k", "out=run", f"cache_dir={tmp_path / 'cache'}", override]
    assert line in refused(capsys, "run", "steer", *argv)
    assert not (tmp_path / "run").exists() and not (tmp_path / "a[1]").exists()


def test_values_are_of_the_kind_that_a_constructor_is_annotated_with():
    def of(annotation, value, default=inspect.Parameter.empty):
        keyword = inspect.Parameter.KEYWORD_ONLY
        of_kind("k", value, inspect.Parameter("k", keyword, annotation=annotation, default=default))

    table = [
        ("int", [1], [1.5, True, None, "a"]),
        ("bool", [True], [1, "yes"]),
        ("int | None", [None, 2], [1.0]),
        ("float | Sequence[float]", [1, 2.0, [1, 2.5]], ["a", ["a"], [True]]),
        ("tuple[int, ...]", [[1, 2]], [["a"], 3, [1.5]]),
        ("Mapping[str, float] | None", [None, {"a": 1}], [{"a": "b"}, [1]]),
        ("dict[str, Any]", [{}, {"a": None}], [3, [], None]),
        ("Any", [1, "a", []], [None]),
        ("str | os.PathLike | None", [None, "a", 3], []),  # a path is no plain kind: anything may be one
        (int, [1], ["a", None]),  # of a module without postponed annotations
        (int | None, [1, None, "a"], []),
        (inspect.Parameter.empty, [3, None], []),
    ]
    for annotation, good, bad in table:
        of(annotation, None, default=None)
        for value in good:
            of(annotation, value)
        for value in bad:
            with pytest.raises(ValueError, match="k must be "):
                of(annotation, value)


def test_a_recipe_without_a_part_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    for text, line in (
        ("title: x\n", "has no domain"),
        ("defaults: [steer, _self_]\nmethod: null\n", "has no method"),
        ("defaults: [steer, _self_]\nsamples: null\n", "samples must be"),
        ("defaults: [steer, _self_]\nrewards: {svdd: 3}\n", "rewards.svdd is no reward"),
        ("defaults: [steer, _self_]\nreward: {_target_: rgdiff.rewards.from_host}\n", "takes no 'target'"),
    ):
        path.write_text(text)
        assert line in refused(capsys, "run", str(path), f"out={tmp_path / 'run'}")


@pytest.mark.parametrize("method", [
    "draft_k", "dps", "tds", "gradient_guidance", "elegant",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "draft", "draft_lv", "draft_plus", "refl", "alignprop", "alignprop_subset", "drtune", "mixed_adapters", "freedom",
        "lgd_mc", "tilt", "das", "gradient_guidance_refit", "dxdp", "adjoint_matching",
    )),
])  # fmt: skip
def test_a_black_box_is_refused_by_every_method_of_gradients(method, tmp_path, capsys):
    prior = "unet" if method == "dxdp" else "mlp"
    argv = ["reward=compress", f"prior={prior}", f"method={method}", f"out={tmp_path / 'run'}"]
    line = refused(capsys, "run", "steer", *argv, f"cache_dir={tmp_path / 'cache'}")
    assert line.startswith(f"rgdiff: {method}: ") and "black box" in line and not (tmp_path / "run").exists()


def test_a_reward_that_cannot_be_called_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards.py").write_text(
        "import numpy as np\n"
        "def numpy(x0, cond=None):\n    return np.asarray(x0)[:, 0]\n"
        "def column(x0, cond=None):\n    return x0[:, :1]\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, line in (("numpy", "reward.host=true"), ("column", "[2, 1]")):
        own = [*SVDD, "reward=custom", f"reward.fn=my_rewards.{name}", "out=run", "cache_dir=cache"]
        assert line in refused(capsys, "run", "steer", *own)
        assert not (tmp_path / "run").exists()


def test_domains_and_priors_that_do_not_fit_are_refused(tmp_path, capsys):
    cases = {
        ("domain=planar", "prior=exact"): "a domain with an exact denoiser",
        ("domain=planar", "prior=conv1d"): "this prior is of sequences",
        ("domain=planar", "prior=one_class"): "one-class problems",
        ("domain=planar", "prior=unet_conditional"): "a domain with labels",
        ("domain=mixture", "prior=mlp"): "examples to train a prior on",
        ("domain=mixture", "prior=unet"): "choose another prior, `rgdiff list` shows them",
        ("domain=mixture", "prior=exact_flow", "reward=along"): "domain=subspace or domain=sphere",
        ("domain=mixture", "prior=exact_flow", "reward=ink"): "it was given x0 [2, 1]",
    }
    for overrides, line in cases.items():
        reward = [] if "reward" in overrides[-1] else ["reward=compress"]
        assert line in refused(capsys, "run", "steer", *overrides, *reward, f"out={tmp_path / 'run'}", "--dry-run")


def test_no_device_is_one_line(monkeypatch, tmp_path, capsys):
    def none():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand more")

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    line = refused(capsys, "run", "steer", *SVDD, f"out={tmp_path / 'run'}")
    assert "JAX_PLATFORMS is cuda; unset it" in line and "Unable to initialize" in line


# ---------------------------------------------------------------- the grammar of overrides


def test_too_little_memory_is_one_line(monkeypatch, tmp_path, capsys):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nand more")

    monkeypatch.setattr(running, "execute", full)
    line = refused(capsys, "run", "steer", *SVDD, f"out={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}")
    assert "out of memory; ask for fewer samples" in line and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_paths_are_taken_as_they_are(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for given in ("runs/größe", "runs/paren(1)", "runs/a=b", "runs/a,b", "007", "runs/a b", "true", "runs/a{b}"):
        assert recipe.compose("steer", [f"out={given}"])["out"] == given
    for given, expected in (("~/x.fa", "/home/me/x.fa"), ("a~b", "a~b"), ("~", "/home/me")):
        assert recipe.compose("steer", ["domain=sequences", f"domain.source={given}"])["domain"]["source"] == expected
    assert recipe.compose("steer", ["data_dir=~/d", "domain=tfbind8"])["domain"]["data_dir"] == "/home/me/d"
    assert recipe.compose("steer", ["data_dir=null"])["data_dir"] is None
    assert recipe.compose("steer", ["out='a b'"])["out"] == "a b"
    assert recipe.compose("steer", ["seed=3", "out=runs/${seed}"])["out"] == "runs/3"
    assert recipe.compose("steer", ["title=größe: (a=b)"])["title"] == "größe: (a=b)"
    adapters = recipe.compose("steer", ["method=adapters", "method.adapters={~/größe (1): 0.5, b: 1}"])["method"]
    assert adapters["adapters"] == {"/home/me/größe (1)": 0.5, "b": 1}


def test_a_method_joins_the_others():
    config, chosen = recipe.composed("quickstart", ["+method=smc"])
    assert list(recipe.methods_of(config, chosen)) == ["svdd", "draft", "smc"]
    config, chosen = recipe.composed("steer", ["+method@methods.smc=smc"])
    assert set(recipe.methods_of(config, chosen)) == {"svdd", "smc"}
    refusals = {
        ("quickstart", "method=smc"): r"several methods \(draft, svdd\); give \+method=smc",
        ("quickstart", "value=exact"): "give value@methods.svdd.value=exact",
        ("quickstart", "+value=exact"): "nothing reads 'value'",
        ("steer", "+method=smc"): "has a method already, svdd; give method=smc in its place",
    }
    for (name, override), line in refusals.items():
        with pytest.raises(ValueError, match=line):
            recipe.compose(name, [override])
    for override, line in (
        ("+method=svdd", "two methods of the name svdd"),
        ("+methods.svd.options.candidates=2", "did you mean 'svdd'"),
    ):
        with pytest.raises(ValueError, match=line):
            recipe.methods_of(*recipe.composed("quickstart", [override]))


def test_a_part_that_is_replaced_keeps_what_it_takes_of_the_recipe():
    prior = recipe.compose("tfbind8_svdd", ["prior=factorised", "prior.uniform=true"])["prior"]
    assert prior["steps"] == 16 and prior["uniform"] and "network" not in prior and "train" not in prior
    prior = recipe.compose("tfbind8_svdd", ["prior=mlp"])["prior"]
    assert set(prior["network"]) == {"_target_", "features"} and prior["train"]["steps"] == 1500
    method = recipe.compose("quickstart", ["method@methods.draft=svdd"])["methods"]["draft"]
    assert "batch" not in method and method["options"]["candidates"] == 16
    with pytest.raises(ValueError, match="takes no 'tempo'"):  # what the command line says is never dropped
        recipe.check(recipe.compose("tfbind8_svdd", ["prior=factorised", "+prior.tempo=1"]), set())


def test_the_list_is_printed_where_letters_are_few():
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "rgdiff", "list"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "quickstart" in done.stdout and not done.stderr


def test_the_resolved_config_keeps_the_comments_that_explain_it():
    import yaml

    text = explained("quickstart", ["methods.svdd.temperature=0.5"])
    assert yaml.safe_load(text) == recipe.compose("quickstart", ["methods.svdd.temperature=0.5"])
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "temperature: 0.5 # in the reward's unit" in lines
    assert "eta: 1.0 # of the tuned chain; DDIM, as in the papers. null for a masked prior" in lines
    assert (
        "draft: # the reward's gradient through the whole chain, held to the prior by a path KL" in lines
    )  # the recipe's
    assert (
        "prior: # the U-Net of 16x16 digits that comes with the package (`rgdiff run pretrain_digits` makes it anew)"
        in lines
    )


# ---------------------------------------------------------------- folders


def test_a_finished_run_is_told_again_and_not_repeated(made, cache, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    monkeypatch.setattr(PriorSampling, "run", lambda *_: pytest.fail("it was sampled again"))
    again = ["run", "steer", *SVDD, f"out={made}"]
    assert cli.main([*again, f"cache_dir={cache}", "resume=true"]) == 0
    assert "svdd" in capsys.readouterr().out
    assert (
        cli.main([*again, f"cache_dir={made.parent / 'elsewhere'}", "resume=true"]) == 0
    )  # where the cache is, is no setting
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert "already holds a run; give resume=true" in refused(capsys, *again, f"cache_dir={cache}")


def test_foreign_files_are_not_overwritten(tmp_path, capsys):
    for name in ("report.html", "samples.npz", "checkpoints"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("mine")
        for resume in ("true", "false"):
            argv = [*SVDD, f"out={out}", f"resume={resume}", f"cache_dir={tmp_path / 'cache'}"]
            assert f"has a {name} that is no run's" in refused(capsys, "run", "steer", *argv)
        assert (out / name).read_text() == "mine" and os.listdir(out) == [name]


def test_without_out_the_next_free_folder_is_taken(tmp_path):
    assert next_free(tmp_path / "a") == tmp_path / "a"
    for name in ("a", "a-2", "a-3"):
        assert next_free(tmp_path / "a") == tmp_path / name
        RunFolder.create(tmp_path / name, {})
        assert next_free(tmp_path / "a", resume=True) == tmp_path / name
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("nothing of a run")
    assert next_free(tmp_path / "b") == tmp_path / "b"


def test_the_first_command_can_be_repeated(tmp_path, monkeypatch, capsys, cache):
    """Without out=: another folder, and a line that says so; with resume=true the one that was begun last."""
    monkeypatch.chdir(tmp_path)
    taken = []
    monkeypatch.setattr(running, "execute", lambda prepared: taken.append(prepared.out) or {})
    for resume in ("false", "false", "true"):
        assert cli.main(["run", "steer", *SVDD, f"cache_dir={cache}", f"resume={resume}"]) == 0
        if resume == "false":
            RunFolder.create(taken[-1], running.prepare("steer", [*SVDD, f"cache_dir={cache}"], dry=True).config)
    runs = tmp_path / "runs"
    assert taken == [runs / "steer", runs / "steer-2", runs / "steer-2"]
    assert (
        "holds a run, not finished: resume=true goes on with it; this one goes into runs/steer-2"
        in capsys.readouterr().out
    )


def test_one_process_at_a_time_is_in_a_folder(tmp_path):
    with alone(tmp_path / "run"):
        with pytest.raises(ValueError, match="another run is at work in"), alone(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()  # nothing came of it
    with alone(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("{}")
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_a_run_that_fails_before_it_made_anything_leaves_nothing(tmp_path, monkeypatch, capsys, cache, made):
    def fails(*_):
        raise ValueError("no luck")

    monkeypatch.setattr(PriorSampling, "run", fails)  # the prior is cached: nothing was trained
    assert "no luck" in refused(capsys, "run", "steer", *SVDD, f"out={tmp_path / 'run'}", f"cache_dir={cache}")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- sweeps


def test_a_sweep_checks_all_before_the_first_runs(tmp_path, capsys):
    argv = [
        "run",
        "steer",
        "--multirun",
        *TINY,
        "method=dps",
        "method.temperature=1,-1,0.2",
        f"out={tmp_path / 'sweep'}",
    ]
    line = refused(capsys, *argv, f"cache_dir={tmp_path / 'cache'}")
    assert line.startswith("rgdiff: method.temperature=-1: dps: ")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_labels_its_runs_and_ends_with_a_table(tmp_path, capsys, monkeypatch):
    rows = {0.5: 1.25, 1.0: 2.5}

    def execute(prepared):
        return {"prior/reward_mean": 0.125, "dps/reward_mean": rows[prepared.config["method"]["temperature"]]}

    monkeypatch.setattr(running, "execute", execute)
    out = tmp_path / "sweep"
    argv = ["run", "steer", "--multirun", *TINY, "method=dps", "method.temperature=0.5,1.0", f"out={out}"]
    assert cli.main([*argv, f"cache_dir={tmp_path / 'cache'}"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2: method.temperature=0.5" in printed and "2 of 2: method.temperature=1.0" in printed
    ends = [line.split() for line in printed.splitlines()]
    for row in (["prior", "0.125"], ["temperature=0.5", "1.25"], ["temperature=1.0", "2.5"]):
        assert row in ends
    with open(out / "sweep.csv") as file:
        assert [row["method.temperature"] for row in csv.DictReader(file)] == ["0.5", "1.0"]
    assert "already holds a sweep" in refused(capsys, *argv, f"cache_dir={tmp_path / 'cache'}")


# ---------------------------------------------------------------- dry runs


def test_a_dry_run_tells_the_plan_and_writes_nothing(made, cache, tmp_path, capsys):
    methods_ = ["+method@methods.smc=smc", "methods.smc.particles=16", "+method@methods.tuned=draft_k"]
    tuned = ["methods.tuned.steps=5", "methods.tuned.batch=4"]
    argv = ["run", "steer", "--dry-run", *SVDD, *methods_, *tuned, f"out={tmp_path / 'run'}", f"cache_dir={cache}"]
    assert cli.main(argv) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    summary = json.loads((made / "summary.json").read_text())
    assert (
        f"{summary['prior/network_calls']} network calls a sample" in told["prior"]
        and "trained earlier" in told["prior"]
    )
    assert (
        told["svdd"]
        == f"CandidateSampling: options.candidates 2; {summary['svdd/network_calls']} network calls a sample"
    )
    assert told["smc"].endswith("6 network calls a sample")  # 3 calls of 16 particles for 8 samples
    assert told["tuned"] == "FineTuning draft_k: steps 5, batch 4; 60 network calls to tune"  # 5 x 4 chains of 3 calls
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- caches


def test_no_home_and_no_writable_cache(tmp_path, monkeypatch, caplog):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "RGDIFF_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    file = tmp_path / "file"
    file.write_text("")
    cases = [({}, "no home folder"), ({"XDG_CACHE_HOME": str(file)}, "(File exists|Not a directory)")]
    for variables, why in cases:
        caplog.clear()
        with monkeypatch.context() as here, caplog.at_level(logging.WARNING, "rgdiff"):
            for name, value in variables.items():
                here.setenv(name, value)
            cache = open_cache()
        assert cache.is_dir() and len(caplog.records) == 1
        assert re.search(f"no cache can be kept .*{why}.*RGDIFF_CACHE", caplog.text)
        shutil.rmtree(cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_cache() == tmp_path / "xdg" / "rgdiff"
    monkeypatch.setenv("RGDIFF_CACHE", str(file / "below"))
    with pytest.raises(ValueError, match="RGDIFF_CACHE=.* cannot be written"):
        open_cache()
    with pytest.raises(ValueError, match="cache_dir=.* cannot be written"):
        open_cache(str(file))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RGDIFF_CACHE", "~/größe (1)")
    assert open_cache() == tmp_path / "größe (1)" and not caplog.records[1:]


@pytest.mark.slow
def test_a_prior_is_one_for_all_seeds_and_trained_again_where_it_is_damaged(made, cache, tmp_path, capsys):
    kept = sorted((cache / "priors").iterdir())
    assert cli.main(["run", "steer", *SVDD, "seed=7", f"out={tmp_path / 'other'}", f"cache_dir={cache}"]) == 0
    assert sorted((cache / "priors").iterdir()) == kept and "trained earlier" in capsys.readouterr().out
    one, other = (np.load(path / "samples.npz")["prior"] for path in (made, tmp_path / "other"))
    assert not np.array_equal(one, other)
    for file in (path for path in kept[0].rglob("*") if path.is_file()):
        os.truncate(file, 10)
    assert cli.main(["run", "steer", *SVDD, f"out={tmp_path / 'again'}", f"cache_dir={cache}"]) == 0
    assert "trained again, for the cached one cannot be used" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(tmp_path / "again" / "samples.npz")["prior"], one)
    assert cli.main(["run", "steer", *SVDD, f"out={tmp_path / 'third'}", f"cache_dir={cache}"]) == 0
    assert "trained earlier" in capsys.readouterr().out


# ---------------------------------------------------------------- checkpoints


@pytree
class Steady:
    """A tuner that moves by noise of its own step: what it comes to depends on every key."""

    size: jax.Array

    def init(self, params):
        import optax

        return start(params, optax.sgd(0.1))

    def step(self, key, state, batch):
        import optax

        state, info = update(state, self.size * jax.random.normal(key, state.params.shape), optax.sgd(0.1))
        return state, {"loss": state.params.sum()} | info


@pytest.fixture
def ctrl_c():
    """Let Ctrl-C interrupt, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interruption_saves_what_is_done(tmp_path, capfd, ctrl_c, number):
    """Ctrl-C or SIGTERM within a phase: the steps that are done are on disk, and the run that goes on ends in the same numbers."""
    tuner = Steady(jnp.float32(1.0))

    def fit(name, at=None):
        run = Run(RunFolder.create(tmp_path / name, {}, resume=True), 0, tmp_path / "cache")
        write = run.log.write

        def watched(phase, step, values):
            write(phase, step, values)
            if step == at:
                os.kill(os.getpid(), number)

        run.log.write = watched
        return run.fit("tune", tuner, run.key("tune"), jnp.zeros(3), 40, chunk=10).params

    whole = fit("whole")
    with pytest.raises(checkpoint.Stopped) as stopped:
        fit("broken", at=13)
    assert stopped.value.signal == number
    with Checkpoints(tmp_path / "broken" / "checkpoints" / "tune") as kept:
        assert kept.latest() == 20  # the chunk in which it came
    assert f"{number.name}: stopping when the steps under way are done" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    np.testing.assert_array_equal(fit("broken"), whole)


@pytest.mark.slow
def test_some_steps_of_training_are_traced(tmp_path, capsys):
    folder = RunFolder.create(tmp_path / "run", {})
    run = Run(folder, 0, tmp_path / "cache", profile={"skip": 12, "steps": 5})
    traced = run.fit("tune", Steady(jnp.float32(1.0)), run.key("tune"), jnp.zeros(3), 40, chunk=10).params
    assert list((tmp_path / "run" / "profile" / "tune").rglob("*.xplane.pb"))
    assert capsys.readouterr().out.count("traced into") == 1
    plain = Run(RunFolder.create(tmp_path / "plain", {}), 0, tmp_path / "cache")
    whole = plain.fit("tune", Steady(jnp.float32(1.0)), plain.key("tune"), jnp.zeros(3), 40, chunk=10).params
    np.testing.assert_array_equal(traced, whole)


def test_the_second_interruption_stops_at_once(ctrl_c):
    with pytest.raises(checkpoint.Stopped), checkpoint.interruptible() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")
    with pytest.raises(KeyboardInterrupt), checkpoint.interruptible():
        os.kill(os.getpid(), signal.SIGINT)  # nobody asks: it is raised at the end


def test_a_failing_save_is_one_line_without_a_traceback(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    with pytest.raises(CheckpointError, match="step 1 was not written .* no room"), Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(checkpoint, "_start_save", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        checkpoints.save(1, {"a": jnp.zeros(2)})
    record = logging.LogRecord(
        "absl", logging.ERROR, "/x/orbax/checkpoint/future.py", 1, "raised", (), (OSError, OSError(), None)
    )
    assert not checkpoint._not_orbax(record)
    record.exc_info = None
    assert checkpoint._not_orbax(record)


def test_paths_that_orbax_takes_for_patterns_are_refused(tmp_path):
    """Orbax would write no arrays below them, without a word."""
    for name in ("a[1]", "b*", "c?"):
        with pytest.raises(CheckpointError, match="a path must not have"):
            save_params(tmp_path / name / "params", {"a": jnp.ones(2)})
    for name in ("größe", "paren(1)", "a=b", "p%20q", "x y", "a,b"):
        save_params(tmp_path / name / "params", {"a": jnp.ones(2)})
        np.testing.assert_array_equal(load_params(tmp_path / name / "params", {"a": jnp.zeros(2)})["a"], 1.0)


def test_parameters_are_checked_without_being_read(tmp_path, monkeypatch):
    save_params(tmp_path / "params", {"a": jnp.ones(2)})
    shapes = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    checkpoint.check_params(tmp_path / "params", shapes)
    for like, line in (
        ({"b": shapes["a"]}, "found nothing"),
        ({"a": jax.ShapeDtypeStruct((3,), jnp.float32)}, "does not fit"),
    ):
        with pytest.raises(CheckpointError, match=line):
            checkpoint.check_params(tmp_path / "params", like)
