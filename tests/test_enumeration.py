"""Exact laws against brute force over all pairs of states (tests/worlds.py), SIX6 against its known figures, samplers against both."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import processes, samplers, schedules
from rgdiff.domains import enumeration, sequences
from tests.worlds import MASK_SCHEDULES, CategoricalWorld, TableDenoiser, correlated, factorised, slope

DATA = os.environ.get("RGDIFF_DATA", "")
needs_six6 = pytest.mark.skipif(
    not (Path(DATA) / "SIX6_REF_R1_8mers.txt").is_file() or not DATA,
    reason="needs SIX6_REF_R1_8mers.txt in the folder RGDIFF_DATA",
)

# E[r], KL and log Z under the tilt of the uniform law, and the mean under it: /work/shared/data/README.md, by enumeration there.
SIX6 = {
    0.2: (0.140, 0.440, 0.261),
    0.1: (0.289, 1.524, 1.364),
    0.05: (0.400, 3.065, 4.943),
    0.02: (0.458, 4.799, 18.10),
}


@pytest.mark.parametrize("schedule", sorted(MASK_SCHEDULES))
@pytest.mark.parametrize("steps", [1, 4])
def test_chain_law_equals_brute_force(schedule, steps):
    world = correlated(schedule=schedule, steps=steps)
    law = enumeration.chain_law(world.process, world.denoiser, world.times, batch=17)
    np.testing.assert_allclose(law, world.law(), rtol=2e-6, atol=1e-9)


def test_chain_law_is_of_the_chain_not_of_the_data():
    """The gap to the data's law is the chain's discretisation: of order 1/T for a denoiser that is exact."""
    errors = []
    for steps in (8, 16, 32):
        world = correlated(steps=steps)
        law = enumeration.chain_law(world.process, world.denoiser, world.times)
        errors.append(np.abs(law - world.joint.reshape(-1)).sum())
    assert -1.15 < slope([8, 16, 32], errors) < -0.85


def test_a_denoiser_that_reads_the_time_is_asked_at_every_move():
    class Tempered(CategoricalWorld):
        """Token probabilities p^(1 - t/2), renormalised."""

        def transition(self, t, s, table=None):
            powered = self.table ** (1 - t / 2)
            return super().transition(t, s, powered / powered.sum(-1, keepdims=True))

    world = Tempered(correlated().joint, steps=3)
    base = TableDenoiser(jnp.asarray(np.log(world.table), jnp.float32), world.classes)
    denoiser = lambda x, t, cond=None: base(x, t) * (1 - t / 2)  # noqa: E731
    law = enumeration.chain_law(world.process, jax.tree_util.Partial(denoiser), world.times)
    np.testing.assert_allclose(law, world.law(), rtol=2e-6, atol=1e-9)
    assert np.abs(law - correlated(steps=3).law()).max() > 1e-3


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_chain_value_equals_brute_force(temperature):
    world = correlated(temperature=temperature, steps=3)
    value = enumeration.chain_value(world.process, world.denoiser, world.times, world.rewards, temperature)
    for i, expected in enumerate(world.log_value()[:-1]):
        np.testing.assert_allclose(value.table[i] / temperature, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(value.table[-1][world.unmasked], world.rewards, rtol=1e-6, atol=1e-6)
    states = jax.nn.one_hot(enumeration.tokens(world.length, world.classes + 1), world.classes + 1)
    np.testing.assert_array_equal(value(states, world.times[1]), value.table[1])


def test_product_value_and_law_equal_brute_force():
    world = factorised(temperature=0.3)
    probabilities = np.exp(np.asarray(world.denoiser.table)[-1])
    np.testing.assert_allclose(enumeration.product_law(probabilities), world.joint.reshape(-1), rtol=1e-6)
    value = enumeration.product_value(probabilities, world.rewards, 0.3)
    for expected in world.log_value()[:-1]:  # whatever the time
        np.testing.assert_allclose(value.table[0] / 0.3, expected, rtol=1e-5, atol=1e-5)
    chain = enumeration.chain_law(
        world.process, enumeration.Factorised(jnp.log(jnp.asarray(probabilities))), world.times
    )
    np.testing.assert_allclose(chain, world.joint.reshape(-1), rtol=1e-6)


def test_infeasible_sequences_have_no_weight():
    law, rewards = np.array([0.2, 0.3, 0.5]), np.array([1.0, np.nan, 2.0])
    tilt = enumeration.tilted(law, rewards, 0.5)
    weights = np.array([0.2 * np.exp(2.0), 0.0, 0.5 * np.exp(4.0)])
    np.testing.assert_allclose(tilt.probabilities, weights / weights.sum())
    assert tilt.log_z == pytest.approx(np.log(weights.sum()))
    assert tilt.reward_mean == pytest.approx((weights * [1, 0, 2]).sum() / weights.sum())
    p = tilt.probabilities[[0, 2]]
    assert tilt.kl == pytest.approx((p * np.log(p / [0.2, 0.5])).sum())
    cold = enumeration.tilted(law, 1e4 * rewards, 1e-3)  # r / tau = 2e7: no overflow
    assert cold.reward_mean == 2e4 and np.isfinite(cold.log_z)
    value = enumeration.product_value(np.array([[0.2, 0.3, 0.5]]), rewards, 0.5)
    np.testing.assert_allclose(value.table[0], [1.0, -np.inf, 2.0, 0.5 * np.log(weights.sum())], rtol=1e-6)


def test_svdd_with_the_enumerated_value_tends_to_the_enumerated_tilt():
    world = correlated(temperature=0.5, steps=3)
    value = enumeration.chain_value(world.process, world.denoiser, world.times, world.rewards, 0.5)
    tilt = enumeration.tilted(
        enumeration.chain_law(world.process, world.denoiser, world.times), world.rewards, world.temperature
    )
    sampler = samplers.svdd(world.process, world.denoiser, value, temperature=0.5, candidates=32)
    x0 = samplers.sample(sampler, jax.random.key(0), 2048, world.times).x0
    rewards = np.asarray(world.reward(x0))
    assert abs(rewards.mean() - tilt.reward_mean) < 0.02 + 4 * rewards.std() / 2048**0.5
    assert rewards.mean() > world.law() @ world.rewards + 0.3


def test_what_cannot_be_enumerated_is_refused():
    masked = processes.masked(schedules.log_linear_mask(), 50, 4)
    assert enumeration.enumerable(8, 4) and not enumeration.enumerable(50, 4)
    for bad, message in [
        (masked, "too many to enumerate"),
        (processes.gaussian(schedules.flow(), (2,)), "masked process"),
    ]:
        with pytest.raises(ValueError, match=message):
            enumeration.chain_law(bad, lambda x, t, cond: x, jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="one shape"):
        enumeration.tilted(np.ones(2) / 2, np.ones(3), 1.0)
    for call in (enumeration.tilted, lambda *a: enumeration.product_value(np.ones((1, 2)), *a[1:])):
        with pytest.raises(ValueError, match="temperature"):
            call(np.ones(2) / 2, np.ones(2), 0.0)


@needs_six6
def test_six6_tilted_laws_have_their_known_figures():
    domain = sequences.tfbind8(DATA)
    table = domain.table
    assert round(float(table.mean()), 3) == -0.029 and round(float(table.max()), 3) == 0.491
    best = domain.decode(jax.nn.one_hot(enumeration.tokens(8, 4)[[table.argmax()]], 4))
    assert best in (["AGGTATCA"], ["TGATACCT"])  # a sequence and its reverse complement bind alike
    uniform = np.full((8, 4), 0.25)
    law = enumeration.product_law(uniform)
    for temperature, expected in SIX6.items():
        tilt = enumeration.tilted(law, table, temperature)
        np.testing.assert_allclose([tilt.reward_mean, tilt.kl, tilt.log_z], expected, atol=6e-4, rtol=5e-4)
        value = enumeration.product_value(uniform, table, temperature)
        mask = jax.nn.one_hot(jnp.full((1, 8), 4), 5)
        assert float(value(mask, jnp.float32(1))[0]) / temperature == pytest.approx(tilt.log_z, rel=1e-5)


@needs_six6
@pytest.mark.slow
def test_svdd_with_the_exact_value_reaches_the_exact_mean_reward_on_six6():
    """Issue 3: SVDD with M = 64 within 0.01 of 0.289 at temperature 0.1 under the uniform prior."""
    domain = sequences.tfbind8(DATA)
    process = processes.masked(schedules.log_linear_mask(), 8, 4)
    value = enumeration.product_value(np.full((8, 4), 0.25), domain.table, 0.1)
    denoiser = enumeration.Factorised(jnp.zeros((8, 4)))
    sampler = samplers.svdd(process, denoiser, value, temperature=0.1, candidates=64)
    x0 = np.asarray(samplers.sample(sampler, jax.random.key(0), 4096, process.times(16)).x0)
    rewards = domain.table[x0.argmax(-1) @ 4 ** np.arange(7, -1, -1)]
    assert abs(rewards.mean() - 0.289) < 0.01
