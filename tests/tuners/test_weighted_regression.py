"""Reward-weighted regression and filtering: weights against NumPy, fixed points against enumeration."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import processes, schedules, tuners
from rgdiff.tuners import weighted_regression
from tests.tuners.test_policy_gradient import TRACES, Net, enumerated, f32, masked_case, slow

exponential_weights = jax.jit(weighted_regression.exponential_weights)
top_weights = jax.jit(weighted_regression.top_weights)


def test_weights_against_numpy():
    rng = np.random.default_rng(0)
    r = rng.normal(size=12)
    r[[4, 9]] = np.nan, -np.inf
    e = np.where(np.isfinite(r), np.exp(r / 0.3), 0.0)
    np.testing.assert_allclose(exponential_weights(f32(r), f32(0.3)), e / e.sum(), rtol=1e-5)
    huge = exponential_weights(f32([1e4, 1e4 - 1, np.nan]), f32(0.5))
    np.testing.assert_allclose(huge, [1 / (1 + np.exp(-2)), np.exp(-2) / (1 + np.exp(-2)), 0], rtol=1e-3)
    kept = np.argsort(-np.where(np.isfinite(r), r, -np.inf))[:3]  # ceil(0.25 * 10)
    expected = np.zeros(12)
    expected[kept] = 1 / 3
    np.testing.assert_allclose(top_weights(f32(r), f32(0.25)), expected, rtol=1e-6)
    for fraction, count in ((0.1, 3), (0.3, 9), (1.0, 30), (1e-6, 1)):
        weights = np.asarray(top_weights(f32(np.arange(30.0)), f32(fraction)))
        assert (weights > 0).sum() == count and (weights[-count:] > 0).all()
    ties = np.asarray(top_weights(jnp.zeros(10), f32(0.2)))
    np.testing.assert_allclose(ties, [0.5, 0.5] + [0] * 8)
    np.testing.assert_array_equal(exponential_weights(jnp.full(3, jnp.nan), f32(1.0)), 0)


def gaussian(make=tuners.reward_weighted, **options):
    process = processes.gaussian(schedules.linear_vp(), (2,))
    params = {"w": 0.5 * jnp.eye(2), "c": jnp.zeros(3)}
    number = {"temperature": 0.5} if make is tuners.reward_weighted else {"fraction": 0.25}
    online = make(Net, process, process.times(3), optax.adam(1e-2), **({"batch": 12} | number | options))
    return online, params, lambda x0, cond: x0[:, 0] - 0.2 * x0[:, 1] ** 2


GROUPED = np.array([1, 2, 3, 4, np.nan, np.nan, np.nan, 7, np.nan, np.nan, np.nan, np.nan])


def test_groups_count_alike():
    """Weights sum to 1, each group with a feasible sample alike; without any sample they are NaN."""
    online, _, _ = gaussian(tuners.filtered, group=4, fraction=0.5)
    weights = jax.jit(lambda online, r: online.weights(r))
    expected = np.array([0, 0, 0.25, 0.25, 0, 0, 0, 0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(weights(online, f32(GROUPED)), expected)
    assert np.isnan(weights(online, jnp.full(12, jnp.nan))).all()


@pytest.mark.slow
def test_a_step_without_feasible_samples_is_skipped_and_counted():
    online, params, _ = gaussian(tuners.filtered, group=4, fraction=0.5)
    state = online.init(params)
    experience = jax.jit(online.rollout)(jax.random.key(0), state, jnp.zeros(12, jnp.int32))
    update = jax.jit(online.update)
    new, info = update(jax.random.key(1), state, experience, jnp.full(12, jnp.nan))
    assert int(new.skipped) == 1 and int(new.step) == 1 and int(info["infeasible"]) == 12
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
    _, info = update(jax.random.key(1), state, experience, f32(GROUPED))
    np.testing.assert_allclose(info["ess"], 1 / (2 * 0.25**2 + 0.5**2), rtol=1e-5)
    np.testing.assert_allclose(info["reward"], (1 + 2 + 3 + 4 + 7) / 5, rtol=1e-6)


@pytest.mark.slow
def test_weighted_loss_is_the_mean_loss_with_equal_weights_and_linear_in_them():
    online, params, _ = gaussian()
    loss = jax.jit(lambda weights: online.training.loss(params, jax.random.key(0), x0, cond, weights))
    x0, cond = jax.random.normal(jax.random.key(1), (12, 2)), jnp.zeros(12, jnp.int32)
    np.testing.assert_allclose(loss(jnp.full(12, 1 / 12)), loss(None), rtol=1e-6)
    each = [loss(jnp.eye(12)[i]) for i in range(12)]
    weights = jax.nn.softmax(jnp.arange(12.0))
    np.testing.assert_allclose(loss(weights), weights @ jnp.stack(each), rtol=1e-5)
    assert np.std(each) > 0.1 * np.mean(each)


def total_variation(w, logits, law):
    return 0.5 * np.abs(enumerated(w, np.asarray(logits, float), 0.0, True)[1] - law).sum()


@pytest.mark.parametrize("source", ["prior", slow("model")])
@pytest.mark.slow
def test_fixed_point_of_reward_weighted_regression_is_the_tilted_prior(source):
    """On samples of the prior: p exp(r/tau)/Z. On its own samples: it tilts again and again, far beyond."""
    w, process, times, _, model = masked_case(True)
    tau = 0.8
    prior = enumerated(w, np.log(w.table), 0.0, True)[1]
    tilted = prior * np.exp(w.rewards / tau)
    tilted /= tilted.sum()
    online = tuners.reward_weighted(
        model, process, times, optax.adam(optax.cosine_decay_schedule(0.05, 400)), batch=1024, temperature=tau,
        prior=w.denoiser if source == "prior" else None, ema_decay=0.98,
    )  # fmt: skip
    tuner = tuners.as_tuner(online, w.reward)
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(f32(np.log(w.table))), 400, chunk=400)
    assert total_variation(w, np.log(w.table), tilted) > 0.25
    end = total_variation(w, state.best, tilted)
    assert end < 0.02 if source == "prior" else end > 0.25, end


@pytest.mark.slow
def test_filtering_the_prior_ends_at_its_best_fraction():
    """Each batch's best 0.3 of the prior's samples: the fixed point is the prior's law of its best 0.3, by enumeration."""
    w, process, times, _, model = masked_case(True)
    prior = enumerated(w, np.log(w.table), 0.0, True)[1]
    left, best = 0.3, np.zeros(9)
    for i in np.argsort(-w.rewards):
        best[i] = min(prior[i], left)
        left -= best[i]
    online = tuners.filtered(
        model, process, times, optax.adam(optax.cosine_decay_schedule(0.05, 400)), batch=1024, fraction=0.3,
        prior=w.denoiser, ema_decay=0.98,
    )  # fmt: skip
    tuner = tuners.as_tuner(online, w.reward)
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(f32(np.log(w.table))), 400, chunk=400)
    law = best / best.sum()
    assert total_variation(w, np.log(w.table), law) > 0.3
    assert total_variation(w, state.best, law) < 0.03


@pytest.mark.parametrize("make", [tuners.reward_weighted, slow(tuners.filtered)])
@pytest.mark.slow
def test_drivers_agree_continue_and_do_not_retrace(make):
    online, params, reward = gaussian(make, epochs=2, minibatches=3, group=3, repeats=3)
    key, data = jax.random.key(3), jnp.arange(3)
    tuner = tuners.as_tuner(online, reward)
    whole = tuners.fit(tuner, key, tuner.init(params), 4, data=data, batch=4, chunk=4)
    host = lambda x0, cond: x0[:, 0] - np.float32(0.2) * x0[:, 1] ** 2  # noqa: E731
    run = lambda online, state, steps: tuners.fit_online(online, key, state, steps, host, data=data, batch=4)  # noqa: E731
    state = run(online, online.init(params), 4)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(compare, whole, state)
    before = len(TRACES)
    again = run(online, run(online, online.init(params), 1), 4)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    other = run(dataclasses.replace(online, number=f32(0.9)), online.init(params), 4)
    assert len(TRACES) == before
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True))


def test_what_cannot_work_is_refused_when_it_is_built():
    for message, options in [
        ("fraction must be at most 1", {"fraction": 1.5}),
        ("group must divide", {"group": 5}),
        ("minibatches must divide", {"minibatches": 5}),
    ]:
        with pytest.raises(ValueError, match=message):
            gaussian(tuners.filtered, **options)
    with pytest.raises(ValueError, match="temperature must be"):
        gaussian(temperature=0.0)
