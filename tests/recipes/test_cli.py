"""The command line: recipes compose and run for every method x reward, bad input ends in one line, nothing is overwritten."""

import csv
import itertools
import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rgdiff.cli import main, options_first
from rgdiff.domains.images import rewards as image_rewards
from rgdiff.recipes import compose as recipe
from rgdiff.recipes.sweep import expand

TINY = [
    "samples=12",
    "prior=mlp",
    "prior.network.features=[16]",
    "prior.steps=3",
    "prior.train.steps=4",
    "prior.train.optimizer.warmup=1",
    "prior.train.optimizer.decay_steps=4",
]
VALUE = [f"method.value.{o}" for o in ("samples=8", "steps=3", "batch=4", "network.features=[8]")]
TUNED = ["method.steps=2", "method.batch=4"]
PARTICLES = ["method.particles=8"]
POLICY = [*TUNED, "method.heldout=true"]
ROUNDS = ["method.queries=[4,3]", "method.evaluate=4", "method.surrogate.steps=3", "method.noise=0.1"]
FEW = {"draft_lv": TUNED, "pigdm": ["reward=inpainting"]}
FILES = {
    "aesthetic": ("folder", "head"),
    "clip_score": ("folder",),
    "pick_score": ("folder",),
    "hps": ("path",),
    "similarity": ("reference",),
    "substructure": ("reference",),
    "backbone": ("pdb",),
}  # of the user's own, a molecule or a protein
MORE = {
    "adjoint_matching": TUNED,
    "best_of_n": ["method.candidates=2"],
    "classifier_guidance": VALUE,
    "das": PARTICLES,
    "dps": [],
    "draft": TUNED,
    "draft_k": [*TUNED, "method.adapter=2", "method.scales=[0.0,2.0]", "method.diagnose=4"],
    "draft_plus": TUNED,
    "refl": [*TUNED, "method.stopping={window: 1, patience: 1}"],
    "alignprop": TUNED,
    "alignprop_subset": TUNED,
    "drtune": TUNED,
    "mixed_adapters": [
        "method.tuning.steps=2",
        "method.tuning.batch=4",
        "method.tuning.adapter=2",
        "method.tuning.options.k=2",
    ],
    "ddpo": [*POLICY, "reward=compress", "method.stopping={window: 1, patience: 1}"],
    "dpok": POLICY,
    "reward_weighted": POLICY,
    "seiko": [*ROUNDS, "method.seeds=2", "method.tuning.steps=2", "method.tuning.batch=4"],
    "steered_rounds": [*ROUNDS, "method.steering=smc", "+method.options.particles=2"],
    "smc": PARTICLES,
    "filtered": POLICY,
    "fk_steering": PARTICLES,
    "freedom": ["method.sampling.window=[0.0,1.0]"],
    "lgd_mc": ["method.options.draws=2"],
    "svdd": ["method.options.candidates=2", "method.proposal=1.0"],
    "svdd_mc": ["method.options.candidates=2", *VALUE],
    "svdd_r": ["method.options.candidates=2"],
    "tds": PARTICLES,
    "tilt": [],
    "tmpd": ["reward=downsampling", "method.options.diagonal=true"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(tmp_path, cache, *overrides, recipe="steer", out="run"):
    return main(["run", recipe, *TINY, f"out={tmp_path / out}", f"cache_dir={cache}", *overrides])


def failing(capsys, *argv):
    """Run a command that must fail, and return its one line."""
    assert main(list(argv)) != 0
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


def compose(method="svdd", reward="ink", domain="digits", prior="mlp"):
    """Compose a choice of each group, with what it needs of a user, and check it."""
    overrides = [f"method={method}", f"reward={reward}", f"domain={domain}", f"prior={prior}"]
    overrides += ["reward.fn=tests.recipes.user_module.score"] * (reward in ("custom", "smiles"))
    overrides += ["domain.fn=tests.recipes.user_module.load"] * (domain == "custom")
    overrides += ["domain.path=/files"] * (domain == "pictures")
    overrides += ["prior.network._target_=tests.recipes.user_module.Net"] * (prior == "custom")
    overrides += [f"reward.{key}=/files" for key in FILES.get(reward, ())]
    recipe.check(recipe.compose("steer", overrides), recipe.trusted_modules(overrides))


@pytest.mark.first(2)
@pytest.mark.parametrize("group", ["method", "domain", "reward", "prior"])
def test_every_choice_composes_and_checks(group):
    """Beside the usual ones of the other groups."""
    for name in recipe.names(group):
        compose(**{group: name})


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_pairs_of_methods_and_rewards_and_of_domains_and_priors_compose_and_check(part):
    """Every pair."""
    pairs = [dict(method=m, reward=r) for m in recipe.names("method") for r in recipe.names("reward")]
    pairs += [dict(domain=d, prior=p) for d in recipe.names("domain") for p in recipe.names("prior")]
    for pair in pairs[part::5]:  # parts, for several workers
        compose(**pair)


@pytest.mark.parametrize("method", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
@pytest.mark.slow
def test_methods_run(method, tmp_path, cache):
    assert run(tmp_path, cache, "reward=symmetry", f"method={method}", *(FEW | MORE)[method]) == 0
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    for row in ("prior", method):
        for name in ("reward_mean", "reward_se", "heldout_reward_mean", "network_calls", "seconds", "diversity", "kl"):
            unknown = name == "kl" and row in (
                "freedom",
                "steered_rounds",
            )  # repeated moves, other scores: no law is compared
            assert (summary[f"{row}/{name}"] is None) == unknown, (row, name)
    samples = np.load(folder / "samples.npz", allow_pickle=False)
    assert samples[method].shape == (12, 8, 8, 1) and np.isfinite(samples[method]).all()
    for name in ("config.yaml", "versions.json", "metrics.jsonl", "report.html"):
        assert (folder / name).stat().st_size > 0
    page = (folder / "report.html").read_text()
    titles = [title.partition(": ") for title in re.findall(r"<article class=card><h3>(.*?)</h3>", page)]
    assert [title[0] for title in titles] == ["prior", method]
    if method == "mixed_adapters":
        assert titles[1][2] == "0.5 times the adapter of the reward, 0.5 times that of the second"
    assert (
        "<img" in page
        and "reward_mean" not in page
        and page.index("<img") < page.index("<h2>In words") < page.index("<summary>All numbers")
    )
    if method == "draft_k":
        saved, kl = folder / "adapters" / method, {}
        file = tmp_path / "style.safetensors"  # the same in diffusers' format, whose scale is 1 without metadata
        tensors = load_file(saved / "adapter_model.safetensors")
        save_file({key.replace("base_model.model", "unet"): value for key, value in tensors.items()}, file)
        for weight, place in ((1.0, saved), (2.0, file)):
            again = [f"method.adapters={{{place}: {weight}}}", "reward=symmetry", "method=adapters"]
            assert run(tmp_path, cache, *again, out=f"again{weight}") == 0
            kl[weight] = json.loads((tmp_path / f"again{weight}" / "summary.json").read_text())["adapters/kl"]
        np.testing.assert_allclose(kl[1.0], summary["draft_k/kl"], rtol=0.5)  # another draw of the same figure
        np.testing.assert_allclose(kl[2.0] / kl[1.0], 4.0, rtol=0.05)  # twice a small change, on the same noise
    if method == "draft":
        tuned = folder / "tuned" / method
        assert (
            run(tmp_path, cache, f"prior.checkpoint={tuned}", "reward=symmetry", "method=best_of_n", out="again") == 0
        )


@pytest.mark.slow
def test_black_box_reward_guides_svdd(tmp_path, cache):
    assert (
        run(tmp_path, cache, "reward=compress", "method=svdd", "method.options.candidates=4", "method.temperature=1.0")
        == 0
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (
        summary["svdd/reward_mean"] == round(summary["svdd/reward_mean"] * 12) / 12
    )  # bytes: whole numbers over 12 samples


@pytest.mark.slow
def test_users_own_parts(tmp_path, cache, monkeypatch):
    (tmp_path / "my_module.py").write_text(
        "import flax.linen as nn\nimport numpy as np\n"
        "class Net(nn.Module):\n    @nn.compact\n    def __call__(self, x, t, cond=None):\n"
        "        return nn.Dense(x.shape[-1])(x)\n"
        "def score(x0, cond=None):\n    return -(x0 ** 2).mean((1, 2, 3))\n"
        "def load():\n    rng = np.random.default_rng(0)\n"
        "    return rng.uniform(-1, 1, (40, 8, 8, 1)).astype('float32'), np.arange(40) % 2\n"
    )
    monkeypatch.chdir(tmp_path)
    own = ["reward=custom", "reward.fn=my_module.score", "domain=custom", "domain.fn=my_module.load"]
    assert run(tmp_path, cache, *own, "method=draft_k", *MORE["draft_k"]) == 0
    mine = [o for o in TINY if not o.startswith(("prior=", "prior.network"))]
    mine += [
        "prior=custom",
        "prior.network._target_=my_module.Net",
        "modules=[my_module]",
        "method=svdd",
        "method.options.candidates=2",
    ]
    argv = ["run", "steer", *mine, "reward=symmetry", f"out={tmp_path / 'net'}", f"cache_dir={cache}"]
    assert main(argv) == 0
    sys.modules.pop("my_module")
    assert run(tmp_path, cache, *own, "reward.host=true", "method=svdd", "method.options.candidates=2", out="host") == 0


@pytest.mark.slow
def test_resume_of_a_finished_run_changes_nothing(tmp_path, cache):
    arguments = ("reward=symmetry", "method=draft_k", *MORE["draft_k"])
    assert run(tmp_path, cache, *arguments) == 0
    before = np.load(tmp_path / "run" / "samples.npz")
    assert run(tmp_path, cache, *arguments, "resume=true") == 0
    after = np.load(tmp_path / "run" / "samples.npz")
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


CONDITIONAL = ["prior=unet_conditional"]


def test_bad_input_is_one_line(tmp_path, cache, capsys):
    cases = {
        ("run", "quikstart"): "quickstart",
        ("run", "steer", "method=svd"): "did you mean 'svdd'",
        ("run", "steer", "method.temperatur=1"): "method.temperature",
        ("run", "steer", "+method.tempo=1", f"out={tmp_path / 'a'}"): "takes no 'tempo'",
        ("run", "steer", "sed=1"): "did you mean 'seed'",
        ("run", "steer", "seed"): "key=value",
        ("run", "steer", "reward=custom"): "reward.fn",
        ("run", "steer", "reward=custom", "reward.fn=no_such_module.f", f"out={tmp_path / 'a'}"): "no_such_module",
        (
            "run",
            "steer",
            "method.options.candidates=0",
            *TINY,
            f"out={tmp_path / 'b'}",
            f"cache_dir={cache}",
        ): "candidates",
        ("run", "steer", "prior.eta=0", *TINY, f"out={tmp_path / 'c'}", f"cache_dir={cache}"): "eta = 0",
        ("run", "steer", "domain=mnist", f"data_dir={tmp_path}", f"out={tmp_path / 'd'}"): "MNIST file missing",
        ("run", "steer", "method=pigdm", "method.temperature=0.5"): "give method.temperature=1",
        ("run", "steer", "method=seiko", "method.tuning.temperature=0.1"): "do not read method.tuning.temperature",
        ("run", "steer", "method=tmpd", "method.temperature=0.5"): "give method.temperature=1",
        ("run", "steer", "method=seiko", "method.tuning.noise=0.5"): "do not read method.tuning.noise",
        ("run", "steer", "method=ddpo", "+method.options.foo=1"): "foo",
        ("run", "steer", "method=draft_k", "method.stopping={window: 99}", "method.steps=9"): "windows of 99 steps",
        ("run", "steer", "method=adapters"): "give method.adapters={FOLDER: WEIGHT}",
        ("run", "steer", "method=adapters", "method.adapters={/nowhere: 1.0}"): "no adapter at /nowhere",
        ("run", "seiko_digits", "methods.seiko.queries=64"): "queries must be a list",
        ("show", "nothing.yaml"): "no recipe file",
    }
    broken = tmp_path / "broken.yaml"
    broken.write_text("defaults: [steer\nmethod: {")
    cases["show", str(broken)] = "broken"
    for argv, expected in cases.items():
        assert expected in failing(capsys, *argv), argv
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_what_is_refused_once_networks_are_known_is_one_line(tmp_path, cache, capsys):
    fresh = [*TINY, f"out={tmp_path / 'f'}", f"cache_dir={cache}"]
    cases = {
        ("run", "steer", "method=svdd_r", *CONDITIONAL): "away from their conditions",
        ("run", "steer", "method=svdd_mc", *CONDITIONAL): "a learnt value is not offered for a conditional prior",
        ("run", "steer", "method=smc", *CONDITIONAL): "one problem of particles",
        ("run", "steer", "method=seiko", *CONDITIONAL): "a campaign of queries",
        ("run", "steer", "method=tmpd", *TINY, f"out={tmp_path / 'e'}", f"cache_dir={cache}"): "reward=inpainting",
        ("run", "steer", "method=dpok", *CONDITIONAL): "give +method.value.classes=N",
        ("run", "steer", "method=ddpo", "reward=compress", "method.noise=1", *fresh): "method.noise=null",
    }
    for argv, expected in cases.items():
        assert expected in failing(capsys, *argv), argv
    for refused in ("e", "f"):  # before a prior was trained, and the folder is free for the corrected command
        assert not (tmp_path / refused / "config.yaml").exists() and not (tmp_path / refused / "checkpoints").exists()


def test_a_recipe_file_cannot_call_what_the_user_did_not_name(tmp_path, capsys):
    for target in (
        "os.system",
        "rgdiff.runtime.checkpoint.os.system",
        "rgdiff.runtime.checkpoint.shutil.rmtree",
        "rgdiff.runtime.checkpoint._remove",
        "rgdiff.runtime.folder.write_atomic",
        "rgdiff.runtime.cache.open_cache",
        "rgdiff.nets.conv.jax.jit",
        "builtins.eval",
    ):
        path = tmp_path / "evil.yaml"
        path.write_text(f"defaults:\n  - steer\n  - _self_\nreward:\n  _target_: {target}\nout: {tmp_path / 'evil'}\n")
        assert "not a constructor of rgdiff" in failing(capsys, "run", str(path))
    path.write_text(
        f"defaults:\n  - steer\n  - _self_\nmodules: [os]\nreward:\n  _target_: os.system\nout: {tmp_path / 'evil'}\n"
    )
    assert "not a constructor" in failing(capsys, "run", str(path))
    assert not (tmp_path / "evil").exists()


@pytest.mark.slow
def test_another_run_is_not_overwritten(tmp_path, cache, capsys):
    assert run(tmp_path, cache, "reward=symmetry", "method=svdd", "method.options.candidates=2") == 0
    before = (tmp_path / "run" / "samples.npz").read_bytes()
    capsys.readouterr()
    again = ["run", "steer", *TINY, f"out={tmp_path / 'run'}", f"cache_dir={cache}", "reward=symmetry", "method=svdd"]
    assert "already holds a run" in failing(capsys, *again)
    assert "cannot resume" in failing(capsys, *again, "method.options.candidates=3", "resume=true")
    assert (tmp_path / "run" / "samples.npz").read_bytes() == before


@pytest.mark.slow
def test_a_prior_sampled_otherwise_is_not_trained_again(tmp_path, cache):
    kept = lambda: sorted(path.name for path in (cache / "priors").iterdir())  # noqa: E731
    assert run(tmp_path, cache, "reward=symmetry", "method=best_of_n", "method.candidates=1") == 0
    before = kept()
    other = ["prior.steps=3", "prior.eta=0.5", "prior.clip=false"]
    assert run(tmp_path, cache, "reward=symmetry", "method=best_of_n", "method.candidates=1", *other, out="other") == 0
    assert kept() == before


@pytest.mark.slow
def test_a_method_may_have_a_guide_of_its_own(tmp_path, cache, capsys):
    guide = "+rewards.best_of_n._target_=rgdiff.domains.images.tasks.inked"
    few = ["method=best_of_n", "method.candidates=4"]
    assert run(tmp_path, cache, "reward=symmetry", *few, guide, out="own") == 0
    assert run(tmp_path, cache, "reward=ink", *few, out="ink") == 0
    own, ink = (np.load(tmp_path / name / "samples.npz")["best_of_n"] for name in ("own", "ink"))
    np.testing.assert_array_equal(own, ink)
    judged = json.loads((tmp_path / "own" / "summary.json").read_text())["best_of_n/reward_mean"]
    np.testing.assert_allclose(judged, image_rewards.symmetry()(jnp.asarray(own)).mean(), rtol=1e-5)
    label = guide.replace("inked", "labelled")
    assert "of the kind of" in failing(capsys, "run", "steer", *TINY, f"out={tmp_path / 'label'}", *few, label)
    stranger = guide.replace("best_of_n", "nobody")
    assert "guides no method" in failing(capsys, "run", "steer", *TINY, f"out={tmp_path / 'no'}", stranger)


@pytest.mark.slow
def test_a_method_that_diverges_leaves_the_others(tmp_path, cache, capsys):
    few = [
        "domain=digits",
        "prior=mlp",
        "methods.svdd.options.candidates=2",
        "methods.draft.batch=4",
        "methods.draft.steps=30",
    ]
    argv = ["run", "quickstart", *TINY, *few, f"out={tmp_path / 'run'}", f"cache_dir={cache}"]
    assert "draft: 2" in failing(capsys, *argv, "methods.draft.optimizer.learning_rate=1e38")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "not finite" in summary["draft/stopped"] and np.isfinite(summary["svdd/reward_mean"])
    assert list(np.load(tmp_path / "run" / "samples.npz")) == ["prior", "svdd"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "draft (stopped)" in page and "Stopped: draft: 2" in page


@pytest.mark.slow
def test_foreign_and_truncated_prior_checkpoints(tmp_path, cache, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "x").write_text("no checkpoint")
    argv = ["run", "steer", *TINY, f"cache_dir={cache}", f"out={tmp_path / 'run'}", f"prior.checkpoint={foreign}"]
    assert str(foreign) in failing(capsys, *argv)


def test_sweeps_expand_to_all_combinations():
    runs = expand(["method=svdd", "method.temperature=0.5,1", "seed=1,2", "out=here"])
    assert len(runs) == 4 and {r[-1] for r in runs} == {f"out=here/{i}" for i in range(4)}
    assert {tuple(r[1:3]) for r in runs} == set(
        itertools.product(["method.temperature=0.5", "method.temperature=1"], ["seed=1", "seed=2"])
    )


def test_options_stand_anywhere():
    assert options_first(["run", "steer", "--multirun", "a=1,2"]) == ["run", "--multirun", "steer", "a=1,2"]
    assert options_first(["--version"]) == ["--version"] and options_first([]) == []


@pytest.mark.slow
def test_a_sweep_leaves_a_table(tmp_path, cache):
    argv = ["run", "steer", "--multirun", *TINY, "method=dps", "method.temperature=0.5,1", f"out={tmp_path / 'sweep'}"]
    assert main([*argv, f"cache_dir={cache}"]) == 0
    with open(tmp_path / "sweep" / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["method.temperature"] for row in rows] == ["0.5", "1"]
    for i, row in enumerate(rows):
        summary = json.loads((tmp_path / "sweep" / str(i) / "summary.json").read_text())
        assert float(row["dps/reward_mean"]) == summary["dps/reward_mean"]


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_method_that_diverges(tmp_path, cache, capsys):
    few = ["method=draft_lv", "method.batch=4", "method.steps=30", "method.optimizer.learning_rate=1e38,1e-4"]
    argv = ["run", "steer", "--multirun", *TINY, *few, f"out={tmp_path / 'sweep'}", f"cache_dir={cache}"]
    assert "1 of 2 runs stopped" in failing(capsys, *argv)
    with open(tmp_path / "sweep" / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert "not finite" in rows[0]["stopped"] and not rows[1]["stopped"]
    assert rows[0]["prior/reward_mean"] == rows[1]["prior/reward_mean"] != "" and float(rows[1]["draft_lv/reward_mean"])


@pytest.mark.parametrize(
    "method",
    [
        ["method=steered_rounds", "method.steering=best_of_n", "~method.options", *ROUNDS],
        ["method=ddpo", "method.batch=4", "method.steps=3"],
    ],
)
@pytest.mark.slow
def test_a_failing_oracle_stops_the_run_which_resumes(method, tmp_path, cache, monkeypatch, capsys):
    """A black box that raises is no NaN: one line, and the run goes on from before the step that failed."""
    (tmp_path / "my_oracle.py").write_text(
        "import pathlib\n"
        "def score(x0, cond=None):\n"
        "    if pathlib.Path('broken').exists():\n        raise OSError('the laboratory is closed')\n"
        "    return x0.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    own = [
        "reward=custom",
        "reward.fn=my_oracle.score",
        "reward.host=true",
        *method,
        "samples=4",
    ]
    argv = ["run", "steer", *TINY, f"cache_dir={cache}", f"out={tmp_path / 'run'}", *own]
    (tmp_path / "broken").touch()
    error = failing(capsys, *argv)
    assert "the laboratory is closed" in error and "resume=true" in error
    (tmp_path / "broken").unlink()
    assert main([*argv, "resume=true"]) == 0


@pytest.mark.slow
def test_few_step_methods_run(tmp_path, cache):
    """Every method of dxmi_2d at toy size, one of them guided by its values: figures, maps over time, curves."""
    short = [
        f"methods.{name}.iterations=3"
        for name in ("dxmi", "dxmi_scratch", "dxmi_tau_0", "dxmi_released", "gcd", "sft_pg", "energy_mcmc")
    ]
    started = ("dxmi", "dxmi_tau_0", "dxmi_released", "gcd", "ddpm_own_steps")
    short += [f"methods.{name}.pretraining={{steps: 3, batch: 8, learning_rate: 1e-3}}" for name in started]
    tiny = [
        "samples=64",
        "prior.steps=6",
        "prior.train.steps=3",
        "prior.network.features=[8]",
        "methods.dxmi.guidance=0.5",
    ]
    argv = ["run", "dxmi_2d", *short, *tiny, f"out={tmp_path / 'run'}", f"cache_dir={cache}"]
    assert main(argv) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in (
        "prior",
        "dxmi",
        "dxmi_scratch",
        "dxmi_released",
        "gcd",
        "ddpm_own_steps",
        "ddpm",
        "ddim",
        "edm",
        "sft_pg",
    ):
        assert summary[f"{name}/sliced_w2"] > 0, name
    for name in ("dxmi", "dxmi_tau_0", "gcd", "energy_mcmc"):
        assert 0 <= summary[f"{name}/energy_auc"] <= 1, name
    page = (tmp_path / "run" / "report.html").read_text()
    maps = lambda name: len(set(re.findall(rf"[^a-z_]{name}: (V at t = [0-9.]+)", page)))  # noqa: E731
    assert maps("dxmi") >= 6 and maps("gcd") == 1 and "Adaptive velocity by move, after training" in page
    assert main(["run", "dxmi_2d", "methods.dxmi_tau_0.guidance=1.0", f"out={tmp_path / 'no'}"]) == 2
