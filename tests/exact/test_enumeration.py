"""Exact laws against brute force over all pairs of states (tests/worlds.py), SIX6 against its known figures, samplers against both."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import processes, samplers, schedules
from rgdiff.domains.sequences import data as sequences
from rgdiff.exact import enumeration
from tests.worlds.worlds import (
    MASK_SCHEDULES,
    CategoricalWorld,
    TableDenoiser,
    assert_mean,
    correlated,
    factorised,
    slope,
)

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


# ---------------------------------------------------------------- one event at a time, and path KL


def one_event_at_a_time(world, table, other):
    """Law of x0 and path KL of L moves, each unmasking one uniformly drawn position: state by state, letter by letter."""
    place = {tuple(state): n for n, state in enumerate(world.states)}
    law, kl = {tuple(world.states[-1]): 1.0}, 0.0
    for _ in range(world.length):
        new = {}
        for state, mass in law.items():
            masked = [i for i in range(world.length) if state[i] == world.classes]
            for i in masked:
                p, q = table[place[state], i], other[place[state], i]
                kl += mass / len(masked) * float(p @ np.log(p / q))
                for letter in range(world.classes):
                    to = (*state[:i], letter, *state[i + 1 :])
                    new[to] = new.get(to, 0.0) + mass / len(masked) * p[letter]
        law = new
    return np.array([law[tuple(x)] for x in world.data]), kl


def random_table(world, seed=5):
    table = np.random.default_rng(seed).dirichlet(np.full(world.classes, 1.5), world.table.shape[:2])
    return table, TableDenoiser(jnp.asarray(np.log(table), jnp.float32), world.classes)


@pytest.mark.parametrize(("length", "classes"), [(3, 3), (4, 2)])
def test_first_hitting_law_and_path_kl_equal_brute_force(length, classes):
    world = correlated(length, classes)
    process, (other, reference) = processes.first_hitting(world.process), random_table(world)
    law, kl = enumeration.chain_law_and_kl(process, world.denoiser, process.times(), reference, batch=17)
    expected, expected_kl = one_event_at_a_time(world, world.table, other)
    np.testing.assert_allclose(law, expected, rtol=2e-6)
    assert kl == pytest.approx(expected_kl, rel=1e-5) and kl > 0.3
    np.testing.assert_allclose(law, world.joint.reshape(-1), rtol=2e-6)  # of an exact denoiser: the data's, no gap
    law, kl = enumeration.chain_law_and_kl(process, reference, process.times(), world.denoiser)
    expected, expected_kl = one_event_at_a_time(world, other, world.table)
    np.testing.assert_allclose(law, expected, rtol=2e-6)
    assert kl == pytest.approx(expected_kl, rel=1e-5)
    assert np.abs(law - world.joint.reshape(-1)).max() > 1e-2


@pytest.mark.parametrize("steps", [1, 4])
def test_path_kl_of_a_masked_chain_equals_brute_force(steps):
    world = correlated(schedule="cosine", steps=steps)
    other, reference = random_table(world)
    law, kl = enumeration.chain_law_and_kl(world.process, world.denoiser, world.times, reference, batch=17)
    np.testing.assert_allclose(law, world.law(), rtol=2e-6, atol=1e-9)
    assert kl == pytest.approx(world.path_kl(other), rel=1e-5)


def test_chains_of_many_moves_tend_to_one_event_at_a_time():
    """Law and path KL, both of order 1/T, for a denoiser that is not exact (whose limit is not the data's law)."""
    world = correlated()
    process, (_, tuned) = processes.first_hitting(world.process), random_table(world)
    limit, limit_kl = enumeration.chain_law_and_kl(process, tuned, process.times(), world.denoiser)
    laws, kls = [], []
    for steps in (8, 16, 32):
        law, kl = enumeration.chain_law_and_kl(world.process, tuned, world.process.times(steps), world.denoiser)
        laws.append(np.abs(law - limit).sum())
        kls.append(abs(kl - limit_kl))
    assert -1.15 < slope([8, 16, 32], laws) < -0.85
    assert -1.15 < slope([8, 16, 32], kls) < -0.85


@pytest.mark.parametrize("one_event", [True, False])
def test_law_and_path_kl_are_what_sampling_gives(one_event):
    world = correlated()
    _, tuned = random_table(world)
    process = processes.first_hitting(world.process) if one_event else world.process
    times = process.times() if one_event else world.times
    law, kl = enumeration.chain_law_and_kl(process, tuned, times, world.denoiser)
    sampler = samplers.ancestral(process, tuned, reference=world.denoiser)
    out = samplers.sample(sampler, jax.random.key(0), 40_000, times, keep=samplers.path_kl)
    assert_mean(out.kept.sum(0), kl)
    frequencies = world.frequencies(out.x0)
    assert np.all(np.abs(frequencies - law) <= 4.5 * np.sqrt(law / 40_000) + 1e-6)


def test_the_tilted_prior_is_the_first_hitting_optimum():
    """E[r] - alpha * path KL of the tilted law's own conditionals is alpha log Z, and any other policy has less."""
    world = correlated(temperature=0.5)
    process = processes.first_hitting(world.process)
    prior = enumeration.chain_law(process, world.denoiser, process.times())
    tilt = enumeration.tilted(prior, world.rewards, 0.5)
    best = CategoricalWorld(tilt.probabilities.reshape(world.joint.shape))
    worth = {}
    for name, denoiser in (("best", best.denoiser), ("prior", world.denoiser), ("other", random_table(best)[1])):
        law, kl = enumeration.chain_law_and_kl(process, denoiser, process.times(), world.denoiser)
        worth[name] = law @ world.rewards - 0.5 * kl
    assert worth["best"] == pytest.approx(0.5 * tilt.log_z, rel=1e-5)
    assert worth["prior"] < worth["best"] - 0.05 and worth["other"] < worth["best"] - 0.05
    value = enumeration.chain_value(process, world.denoiser, process.times(), world.rewards, 0.5)
    for n in (len(world.states) - 1, 5, 40):  # log E[exp(r/tau) | x] from the definition
        known = world.states[n] < world.classes
        fits = (world.data[:, known] == world.states[n][known]).all(1) * world.joint.reshape(-1)
        expected = np.log(fits @ np.exp(world.rewards / 0.5) / fits.sum())
        np.testing.assert_allclose(value.table[0][n] / 0.5, expected, rtol=1e-5, atol=1e-5)


def test_a_first_hitting_chain_reads_each_state_at_its_own_time():
    world = correlated()
    process = processes.first_hitting(world.process)
    times = process.times()
    base = TableDenoiser(jnp.asarray(np.log(world.table), jnp.float32), world.classes)
    powers = {round(float(t), 4): 1 - float(t) / 2 for t in times}
    denoiser = jax.tree_util.Partial(lambda x, t, cond=None: base(x, t) * (1 - t / 2))
    masks = (world.states == world.classes).sum(1)
    power = np.array([powers[round(m / world.length, 4)] for m in masks])  # log-linear: m of L masks at t = m / L
    table = world.table ** power[:, None, None]
    table /= table.sum(-1, keepdims=True)
    expected, kl = one_event_at_a_time(world, table, world.table)
    law, got = enumeration.chain_law_and_kl(process, denoiser, times, world.denoiser)
    np.testing.assert_allclose(law, expected, rtol=2e-6)
    assert got == pytest.approx(kl, rel=1e-4)
    with pytest.raises(ValueError, match="3 moves"):
        enumeration.chain_law(process, denoiser, jnp.array([1.0, 0.5, 0.0]))


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
