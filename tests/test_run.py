"""A run's training: it stops when too many updates in a row of its own were skipped, and keeps the last good state."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import guides, processes, schedules, tuners
from rgdiff.rewards import Task
from rgdiff.runtime.checkpoint import Checkpoints
from rgdiff.runtime.folder import RunFolder
from rgdiff.runtime.methods import without_divergence
from rgdiff.runtime.priors import Prior, gaussian_prior, masked_prior
from rgdiff.runtime.progress import pieces
from rgdiff.runtime.run import PATIENCE, Diverged, Run
from rgdiff.runtime.steering import Guided, Smc
from rgdiff.runtime.values import Likelihood
from rgdiff.tuners._loop import start, update
from rgdiff.typing import pytree


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


def test_phases_and_chains_are_cut_into_pieces_of_one_length():
    for total in range(1, 200):
        length = pieces(total, 25, 13)
        assert length is None or (total % length == 0 and 13 <= length <= 25)
        assert (length is None) == all(total % n for n in range(13, 26))
    assert pieces(40, 25, 13) == 20 and pieces(29, 8, 2) is None and pieces(3, 1, 0) == 1


def test_priors_are_one_where_training_sees_no_difference_and_only_there():
    """Cached under one name: settings of sampling alone. A network with a null class is another one than without."""
    gaussian = lambda **train: gaussian_prior(None, None, "v", {"steps": 5, **train})  # noqa: E731
    masked = masked_prior(None, None, {"steps": 5})
    plain = {"domain": {"name": "digits"}, "prior": {"network": "mlp", "train": {"steps": 5}}, "seed": 0}
    sampled = {"steps": 9, "eta": 0.5, "clip": False, "guidance": 2.0, "checkpoint": None}
    other = lambda **changes: plain | {"prior": plain["prior"] | changes}  # noqa: E731
    one = gaussian().digest(plain)
    assert one == gaussian().digest(other(**sampled))
    assert masked.digest(other(steps=9, order="first_hitting")) == masked.digest(plain)
    differ = [
        other(network="unet"),
        other(train={"steps": 6}),
        other(order="x"),
        plain | {"seed": 1},
        plain | {"domain": {}},
    ]
    assert one not in {gaussian(null=10).digest(plain), *map(gaussian().digest, differ)}


def test_particles_under_a_likelihood_end_with_the_likelihood_of_x0(tmp_path):
    """The chain ends before t = 0, where the value still has some of x0's variance: the last potential is the measurement's own."""
    process = processes.gaussian(schedules.linear_vp(), (1,))
    seen = guides.inpainting(jnp.ones(1), jnp.float32([0.5]), 0.1)
    prior = Prior(process, process.times(30), _Exact(process), None, None, (1,))
    run = Run(RunFolder.create(tmp_path / "run", {}), 0, tmp_path / "cache")
    method = Smc(setting="tds", particles=8192, temperature=1.0, value=Likelihood())
    out = method.run(run, "tds", prior, Task(seen, seen), 8192)
    variance = 1 / (1 + 100)
    assert abs(out.x0.var() / variance - 1) < 0.06 and abs(out.x0.mean() - 50 * variance) < 4 * np.sqrt(variance / 1000)


def test_samples_that_diverged_are_said_and_counted(tmp_path, capsys):
    """DPS of y = x0 + 0.1 noise in 50 steps, above its stable scale: every sample of 1e6 and beyond; in 150 steps none."""
    process = processes.gaussian(schedules.linear_vp(), (1,))
    seen = guides.linear([[1.0]], [1.5], 0.1)
    run = Run(RunFolder.create(tmp_path / "run", {}), 0, tmp_path / "cache")
    for steps in (50, 150):
        prior = Prior(process, process.times(steps), _Exact(process), None, None, (1,))
        outcome = Guided(temperature=1.0).run(run, "dps", prior, Task(seen, seen), 8)
        if steps == 50:
            with pytest.raises(Diverged, match="dps: 8 of 8 samples diverged; lower its learning rate or its scale"):
                without_divergence(run, "dps", prior, outcome)
        else:
            assert without_divergence(run, "dps", prior, outcome) is outcome
    outcome = dataclasses.replace(outcome, x0=np.concatenate([[[1e7], [np.nan], [-np.inf]], outcome.x0[3:]]))
    assert without_divergence(run, "dps", prior, outcome).figures == {"divergent": 3.0}
    assert "dps: 3 of 8 samples diverged" in capsys.readouterr().out


@pytree
class _Exact:
    """Parameters, of which there are none, to the denoiser of N(0, 1)."""

    process: object

    def __call__(self, params):
        return tuners.standard_normal(self.process)
