"""A run's training: it stops when too many updates in a row of its own were skipped, and keeps the last good state."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import guides, processes, rewards, schedules, tuners
from rgdiff.domains.judging import BaseJudge
from rgdiff.recipes.methods.steering import CandidateSampling, GuidedSampling, ParticleSampling
from rgdiff.recipes.outcome import without_divergence
from rgdiff.recipes.priors import GaussianPrior, MaskedPrior
from rgdiff.recipes.typing import ReadyPrior
from rgdiff.recipes.values import LikelihoodValue
from rgdiff.rewards import Task
from rgdiff.runtime.checkpoint import Checkpoints
from rgdiff.runtime.cpu import OLD_EMITTERS, keep_memory, use_quick_compilation
from rgdiff.runtime.folder import RunFolder
from rgdiff.runtime.progress import pieces
from rgdiff.runtime.run import PATIENCE, Diverged, Run
from rgdiff.tuners._loop import start, update
from rgdiff.typing import Function, pytree


@pytree
class FailsFrom:
    """A tuner whose gradient is not a number from step `first` on."""

    first: jax.Array

    def init(self, params):
        return start(params, optax.sgd(0.1))

    def step(self, key, state, batch):
        gradient = jnp.where(state.step < self.first, 1.0, jnp.nan) * jnp.ones_like(state.params)
        state, info = update(state, gradient, optax.sgd(0.1))
        return state, {"loss": state.params.sum()} | info


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_phase_stops_after_too_many_skipped_updates(tmp_path, monkeypatch, chunk):
    monkeypatch.setenv("RGDIFF_SAVE_EVERY", "0")
    run = Run(RunFolder.create(str(tmp_path / "run"), {"seed": 0}, resume=False), 0, tmp_path / "cache")
    tuner = FailsFrom(jnp.int32(10))
    with pytest.raises(ValueError, match=r"tune: \d+ of \d+ updates before step \d+ were not finite") as error:
        run.fit("tune", tuner, run.key("tune"), jnp.zeros(2), 200, chunk=chunk)
    assert int(str(error.value).split("tune: ")[1].split(" of")[0]) > PATIENCE
    with Checkpoints(run.folder.path / "checkpoints" / "tune") as kept:
        state, step, _ = kept.restore(tuner.init(jnp.zeros(2)))
    assert int(state.step) == step and jnp.isfinite(state.params).all()
    assert (
        step > PATIENCE if chunk == 100 else step == 10
    )  # the last before any was skipped; chunks of 7 become 5, of 200
    assert f"is kept, step {step}" in str(error.value)
    with pytest.raises(ValueError, match="is kept, step"):  # going on comes to the same end
        run.fit("tune", tuner, run.key("tune"), jnp.zeros(2), 200, chunk=chunk)
    assert float(state.params[0]) == pytest.approx(-1.0)  # what ten good steps made of it


def test_a_few_skipped_updates_are_counted_and_forgiven(tmp_path):
    run = Run(RunFolder.create(str(tmp_path / "run"), {"seed": 0}, resume=False), 0, tmp_path / "cache")
    state = run.fit("tune", FailsFrom(jnp.int32(30)), run.key("tune"), jnp.zeros(2), 40, chunk=10)
    assert int(state.skipped) == 10 and int(state.step) == 40
    assert float(state.params[0]) == pytest.approx(-3.0)


def test_a_black_box_between_programs_has_a_number_in_place_of_infeasible(tmp_path):
    """In the same first batch, what was infeasible counts as the number: the mean over all, and none infeasible."""
    run = Run(RunFolder.create(str(tmp_path / "run"), {"seed": 0}, resume=False), 0, tmp_path / "cache")
    process = processes.gaussian(schedules.linear_vp(), (1,))
    model = lambda w: lambda x, t, cond=None: w * x  # noqa: E731
    box = rewards.from_host(lambda x0, cond: np.where(x0[:, 0] > 0, 3.0, np.nan))
    for name, reward in (("left_out", box), ("filled", rewards.where_infeasible(box, -1.0))):
        online = tuners.ddpo(model, process, process.times(3), optax.sgd(0.0), batch=32)
        tuner = tuners.as_tuner(online, reward)
        run.fit(name, tuner, jax.random.key(0), jnp.float32(0.5), 1)
    left_out, filled = (next(row for row in run.log.rows if row["phase"] == name) for name in ("left_out", "filled"))
    share = 1 - left_out["infeasible"] / 32
    assert 0 < share < 1 and left_out["reward"] == 3.0
    assert filled["infeasible"] == 0 and filled["reward"] == pytest.approx(3 * share - (1 - share), rel=1e-5)


def test_phases_and_chains_are_cut_into_pieces_of_one_length():
    for total in range(1, 200):
        length = pieces(total, 25, 13)
        assert length is None or (total % length == 0 and 13 <= length <= 25)
        assert (length is None) == all(total % n for n in range(13, 26))
    assert pieces(40, 25, 13) == 20 and pieces(29, 8, 2) is None and pieces(3, 1, 0) == 1


def test_priors_are_one_where_training_sees_no_difference_and_only_there():
    """Cached under one name: settings of sampling alone. A network with a null class is another one than without."""
    shared = {"network": None, "schedule": None}
    gaussian = lambda seed=0, **train: GaussianPrior(  # noqa: E731
        **shared, prediction="v", train={"steps": 5, **train}, seed=seed
    )
    masked = MaskedPrior(**shared, train={"steps": 5})
    plain = {"network": "mlp", "train": {"steps": 5}}
    sampled = {"steps": 9, "eta": 0.5, "clip": False, "guidance": 2.0, "checkpoint": None}
    data = SimpleNamespace(train_x=np.zeros((3, 2), np.float32), train_y=np.zeros(3, np.int32))
    one = gaussian().digest(plain, data)
    assert one == gaussian().digest(plain | sampled, data)
    assert masked.digest(plain | {"steps": 9, "order": "first_hitting"}, data) == masked.digest(plain, data)
    differ = [plain | {"network": "unet"}, plain | {"train": {"steps": 6}}, plain | {"order": "x"}]
    changed = SimpleNamespace(train_x=data.train_x + 1, train_y=data.train_y)
    relabelled = SimpleNamespace(train_x=data.train_x, train_y=data.train_y + 1)
    others = [gaussian().digest(settings, data) for settings in differ]
    others += [
        gaussian(null=10).digest(plain, data),
        gaussian(seed=1).digest(plain, data),
        gaussian().digest(plain, changed),
    ]
    assert len({one, *others}) == 1 + len(others)
    assert gaussian(null=10).digest(plain, relabelled) != gaussian(null=10).digest(plain, data)
    assert gaussian().digest(plain, relabelled) == one  # labels that training does not see


def test_a_prior_of_a_users_network_is_another_where_its_code_is(tmp_path, monkeypatch):
    data = SimpleNamespace(train_x=np.zeros((3, 2), np.float32))
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for number in (1, 2, 1):
        (tmp_path / f"net_{number}.py").write_text(f"class Net:\n    size = {number}\n")
        network = importlib.import_module(f"net_{number}").Net()
        prior = GaussianPrior(network=network, schedule=None, prediction="v", train={"steps": 5})
        digests.append(prior.digest({"network": "mine"}, data))
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.slow
def test_particles_under_a_likelihood_end_with_the_likelihood_of_x0(tmp_path):
    """The chain ends before t = 0, where the value still has some of x0's variance: the last potential is the measurement's own."""
    process = processes.gaussian(schedules.linear_vp(), (1,))
    seen = guides.inpainting(jnp.ones(1), jnp.float32([0.5]), 0.1)
    prior = ReadyPrior(process, process.times(30), _Exact(process), None, None, (1,))
    run = Run(RunFolder.create(tmp_path / "run", {}), 0, tmp_path / "cache")
    method = ParticleSampling(setting="tds", particles=8192, temperature=1.0, value=LikelihoodValue())
    out = method.run(run, "tds", prior, Task(seen, seen), 8192)
    variance = 1 / (1 + 100)
    assert abs(out.x0.var() / variance - 1) < 0.06 and abs(out.x0.mean() - 50 * variance) < 4 * np.sqrt(variance / 1000)


@pytest.mark.slow
def test_samples_that_diverged_are_said_and_counted(tmp_path, capsys):
    """DPS of y = x0 + 0.1 noise in 50 steps, above its stable scale: every sample of 1e6 and beyond; in 150 steps none."""
    process = processes.gaussian(schedules.linear_vp(), (1,))
    seen = guides.linear([[1.0]], [1.5], 0.1)
    run = Run(RunFolder.create(tmp_path / "run", {}), 0, tmp_path / "cache")
    for steps in (50, 150):
        prior = ReadyPrior(process, process.times(steps), _Exact(process), None, None, (1,))
        outcome = GuidedSampling(temperature=1.0).run(run, "dps", prior, Task(seen, seen), 8)
        if steps == 50:
            with pytest.raises(Diverged, match="dps: 8 of 8 samples diverged; lower its learning rate or its scale"):
                without_divergence(run, "dps", prior, outcome)
        else:
            assert without_divergence(run, "dps", prior, outcome) is outcome
    outcome = dataclasses.replace(outcome, x0=np.concatenate([[[1e7], [np.nan], [-np.inf]], outcome.x0[3:]]))
    assert without_divergence(run, "dps", prior, outcome).figures == {"divergent": 3.0}
    assert "dps: 3 of 8 samples diverged" in capsys.readouterr().out


@pytest.mark.slow
def test_the_table_has_errors_of_particles_as_repeated_runs_show_them(tmp_path):
    """N(0, 1) tilted by x / 0.7: means and log Z of 24 runs spread by their standard errors, not by those of 4096 samples."""
    process = processes.gaussian(schedules.linear_vp(), (1,))
    reward = Function(lambda x0, cond=None: x0[:, 0])
    task, prior = Task(reward, reward), ReadyPrior(process, process.times(8), _Exact(process), None, None, (1,))
    method = ParticleSampling(
        particles=256, temperature=0.7, options={"ess_threshold": 1.0, "resampling": "multinomial"}
    )
    rows = []
    for seed in range(24):
        run = Run(RunFolder.create(tmp_path / str(seed), {}), seed, tmp_path / "cache")
        out = method.run(run, "smc", prior, task, 4096)
        rows.append(BaseJudge(SimpleNamespace(shape=(1,)), jax.random.key(0)).row(out, task) | out.figures)
    column = lambda name: np.array([row[name] for row in rows])  # noqa: E731
    for name, se in (("reward_mean", "reward_se"), ("log_z", "log_z_se")):
        assert 0.65 < np.sqrt(np.mean(column(se) ** 2)) / column(name).std(ddof=1) < 1.5
        assert (np.abs(column(name) - column(name).mean()) < 3.5 * column(se)).all()
    assert column("reward_se").min() > 2 / 64  # a std of about 1 over 64 would be that of independent samples
    assert (column("lineages") > 2).all() and (column("lineages") < 100).all()


@pytest.mark.slow
def test_svdd_shows_where_candidates_were_infeasible(tmp_path):
    """Chains that keep away from infeasible means are not those of the tilted law: the report has their share."""
    process = processes.gaussian(schedules.linear_vp(), (1,))
    prior = ReadyPrior(process, process.times(5), _Exact(process), None, None, (1,))
    title = "infeasible share of the candidates along the chain"
    for cut, seen in ((0.0, True), (99.0, False)):
        reward = Function(lambda x0, cond=None, cut=cut: jnp.where(x0[:, 0] > cut, jnp.nan, 0.0))
        run = Run(RunFolder.create(tmp_path / str(cut), {}), 0, tmp_path / "cache")
        out = CandidateSampling(temperature=1.0, options={"candidates": 4}).run(
            run, "svdd", prior, Task(reward, reward), 512
        )
        assert (title in out.curves) == seen
        if seen:  # x_T says nothing of x0: half of the first candidates have a mean beyond the cut
            assert (
                abs(out.curves[title][1][0] - 0.5) < 4 * 0.5 / np.sqrt(4 * 512) and (out.x0 > 0).mean() < 0.5**4
            )  # all four of a move


@pytree
class _Exact:
    """Parameters, of which there are none, to the denoiser of N(0, 1)."""

    process: object

    def __call__(self, params):
        return tuners.standard_normal(self.process)


@pytest.mark.parametrize(
    ("installed", "given", "expected"),
    [
        ("0.10.2", "", OLD_EMITTERS),
        ("0.10.2", "--xla_a=1", f"--xla_a=1 {OLD_EMITTERS}"),
        ("0.10.2", "--xla_cpu_use_fusion_emitters=true", "--xla_cpu_use_fusion_emitters=true"),
        ("0.11.0", "--xla_a=1", "--xla_a=1"),
    ],
)
def test_a_run_compiles_quickly_where_xla_has_the_flag(monkeypatch, installed, given, expected):
    """Later jaxlibs end at a flag that they do not know; a user's own choice stands."""
    monkeypatch.setattr("rgdiff.runtime.cpu.version", lambda name: installed)
    monkeypatch.setenv("XLA_FLAGS", given)
    use_quick_compilation()
    assert os.environ["XLA_FLAGS"] == expected


FAULTS = """
import resource, sys
import numpy as np
from rgdiff.runtime.cpu import keep_memory
if sys.argv[1] == "kept" and not keep_memory():
    sys.exit("no glibc")
np.ones(10_000_000)  # 80 MB, which are freed
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept(monkeypatch):
    """A second block of 80 MB (19,531 pages) is mapped again by default, and found again where memory is kept."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    faults = {}
    for which in ("usual", "kept"):
        command = [sys.executable, "-c", FAULTS, which]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
        if "no glibc" in done.stderr:
            pytest.skip("the C library is not glibc")
        faults[which] = int(done.stdout)
    assert faults["kept"] < 100 and faults["kept"] < faults["usual"]
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_memory()  # a user's own choice stands
