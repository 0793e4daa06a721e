"""SEIKO: exact rounds against their closed form, the outer loop against enumeration, and what reaches the surrogate."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, nets, processes, samplers, schedules, seiko, surrogates, tuners
from rgdiff.exact import enumeration, regret
from rgdiff.typing import pytree, static
from tests.worlds.worlds import GaussianWorld


def solved(f, alpha, beta, prior, previous):
    """The law that maximises the round's objective, by L-BFGS on its logits: nothing of the closed form is used."""
    from scipy.optimize import minimize

    def loss(logits):
        shifted = logits - logits.max()
        log_p = shifted - np.log(np.exp(shifted).sum())
        p = np.exp(log_p)
        inside = f - alpha * (log_p - np.log(prior)) - beta * (log_p - np.log(previous))
        return -p @ inside, -p * (inside - p @ inside)

    found = minimize(
        loss, np.log(prior), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-12}
    )
    p = np.exp(found.x - found.x.max())
    return p / p.sum()


def rewards_of_rounds(n, rounds, seed=0):
    rng = np.random.default_rng(seed)
    return [np.sin(np.linspace(0, 6, n) + i) + 0.3 * rng.normal(size=n) for i in range(rounds)]


def test_five_exact_rounds_on_a_grid_have_the_closed_form_and_telescope():
    n, alpha = 64, 0.3
    prior = np.exp(-(np.linspace(-2, 2, n) ** 2))
    prior /= prior.sum()
    law, total = prior, np.zeros(n)
    for i, f in enumerate(rewards_of_rounds(n, 5)):
        by_optimiser = solved(f, alpha, alpha * i, prior, law)
        law = regret.anchored(f, alpha, alpha * i, prior, law)
        total += f
        # research/seiko.md 2.1 got 7e-8 at worst from L-BFGS on the same size of grid.
        np.testing.assert_allclose(by_optimiser, law, atol=1e-6)
        np.testing.assert_allclose(law, enumeration.tilted(prior, total, alpha * (i + 1)).probabilities, atol=1e-14)


def test_another_schedule_does_not_telescope():
    n, alpha = 64, 0.3
    prior, law, total = np.full(n, 1 / n), np.full(n, 1 / n), np.zeros(n)
    for f in rewards_of_rounds(n, 3):
        law = regret.anchored(f, alpha, alpha, prior, law)
        total += f
    assert np.abs(law - enumeration.tilted(prior, total, alpha * 3).probabilities).max() > 1e-3


def test_rounds_on_six6_have_the_closed_form():
    folder = os.environ.get("RGDIFF_DATA")
    if not folder or not (Path(folder) / "SIX6_REF_R1_8mers.txt").exists():
        pytest.skip("needs SIX6_REF_R1_8mers.txt in RGDIFF_DATA")
    from rgdiff.domains.sequences.data import tfbind8

    table = np.asarray(tfbind8(folder).table, np.float64).reshape(-1)
    prior = np.full(table.size, 1 / table.size)
    law = regret.anchored(table, 0.1, 0.0, prior, prior)
    # data/README.md: E[r] 0.289, KL 1.524 nats, log Z 1.364 at alpha = 0.1
    assert abs(law @ table - 0.289) < 5e-4 and abs(regret.divergence(law, prior) - 1.524) < 5e-4
    assert abs(regret.objective(law, table, prior, 0.1) - 0.1 * 1.364) < 5e-5
    again = regret.anchored(table, 0.1, 0.1, prior, law)  # the same reward twice at beta = alpha: nothing changes
    np.testing.assert_allclose(again, law, atol=1e-15)
    law, total = prior, np.zeros(table.size)
    for i, f in enumerate(table + 0.2 * noise for noise in np.random.default_rng(0).normal(size=(5, table.size))):
        before, law, total = law, regret.anchored(f, 0.1, 0.1 * i, prior, law), total + f
        slope = (
            f - 0.1 * np.log(law / prior) - 0.1 * i * np.log(law / before)
        )  # of the round's objective, in every direction
        assert np.ptp(slope) < 1e-9  # equal: the maximum of a concave function on the simplex
        np.testing.assert_allclose(law, enumeration.tilted(prior, total, 0.1 * (i + 1)).probabilities, atol=1e-14)


def test_anchored_refuses_and_leaves_infeasible_samples_out():
    prior = np.array([0.5, 0.25, 0.25])
    law = regret.anchored(np.array([1.0, np.nan, 0.0]), 1.0, 0.0, prior, prior)
    np.testing.assert_allclose(law, np.array([0.5 * np.e, 0, 0.25]) / (0.5 * np.e + 0.25))
    with pytest.raises(ValueError, match="one of them > 0"):
        regret.anchored(np.zeros(3), 0.0, 0.0, prior, prior)
    with pytest.raises(ValueError, match="one shape"):
        regret.anchored(np.zeros(2), 1.0, 0.0, prior, prior)


# The outer loop in a world of 27 sequences, tuned for real.

L, K, ALPHA, NOISE = 3, 3, 0.3, 0.1
MASKED = processes.masked(schedules.log_linear_mask(), L, K)
EVENTS = processes.first_hitting(MASKED)
TABLE = np.random.default_rng(1).normal(size=K**L)
SGD = optax.adam(3e-2)


TRACED = []


def tabular(params, x, t, cond=None):
    """Logits of every partly masked state."""
    TRACED.append(1)
    return params[jnp.argmax(x, -1) @ jnp.asarray([(K + 1) ** i for i in reversed(range(L))])]


def model(params):
    return denoisers.from_function(tabular, params)


def indicator(x0):
    """One feature a sequence, differentiable in the letters: [B, K^L]."""
    return jnp.einsum("bi,bj,bk->bijk", x0[:, 0], x0[:, 1], x0[:, 2]).reshape(-1, K**L)


PRIOR = jnp.zeros(((K + 1) ** L, L, K))
EVERY = jax.nn.one_hot(np.array(list(itertools.product(range(K), repeat=L))), K)


def inner(reward, **kl):
    return tuners.drakes(model, EVENTS, reward, EVENTS.times(), SGD, batch=256, estimator="log_variance", **kl)


@pytree
class Told:
    """A belief that knows f_i from outside, whatever was answered."""

    values: jax.Array

    def upper(self, x0, cond=None):
        return indicator(x0) @ self.values

    mean = upper

    def std(self, x0, cond=None):
        return jnp.zeros(x0.shape[0])


@pytree
class Teller:
    """Believes f_i in round i, counted by the answers; for tests of what is done with a belief."""

    values: jax.Array  # [rounds, K^L]
    batch: int = static()

    def fit(self, key, observations, previous=None):
        return Told(self.values[jnp.sum(observations.answered) // self.batch - 1])


@pytree
class Wide(Told):
    """Unsure by 0.3 everywhere."""

    def std(self, x0, cond=None):
        return jnp.full(x0.shape[0], 0.3)


@pytree
class Counting:
    """Adds 1 to the belief that it is given; 1 where it begins anew."""

    first: jax.Array
    warm = True

    def fit(self, key, observations, previous=None):
        return Told((self.first if previous is None else previous.values) + 1)


def method(surrogate, batch=16, rounds=4, steps=300, **options):
    options = {
        "temperature": ALPHA,
        "batch": batch,
        "capacity": batch * rounds,
        "steps": steps,
        "prior": model(PRIOR),
    } | options
    return seiko.seiko(model, EVENTS, EVENTS.times(), surrogate, inner, **options)


def ridge(**options):
    return surrogates.ridge(indicator, regularization=0.01, noise=NOISE, **options)


def law_of(params):
    return enumeration.chain_law(EVENTS, model(params), EVENTS.times())


def oracle(x0, cond=None):
    return indicator(jnp.asarray(x0)) @ jnp.asarray(TABLE, jnp.float32)


@pytest.mark.parametrize("schedule, beta", [("linear", None), pytest.param("constant", 0.5, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_tuned_rounds_follow_the_exact_ones(schedule, beta):
    values = 0.5 * np.stack(rewards_of_rounds(K**L, 3, seed=3))
    told = method(Teller(jnp.asarray(values, jnp.float32), 16), schedule=schedule, proximal_weight=beta)
    tuner, state = tuners.as_tuner(told, oracle), told.init(PRIOR)
    prior = exact = np.full(K**L, 1 / K**L)
    for i in range(3):
        state = tuners.fit(tuner, jax.random.key(0), state, i + 1)
        weight, before = ALPHA * i if schedule == "linear" else 0.5, exact
        exact = regret.anchored(values[i], ALPHA, weight, prior, before)
        assert regret.divergence(law_of(state.params), exact) < 1e-4
        # The law is another one without either anchor, or with the other schedule.
        others = [(0.0, weight or 0.1), (ALPHA, 0.0), (ALPHA, 0.5 if schedule == "linear" else ALPHA * i)]
        for alpha, beta in others[: 3 if i else 1]:
            assert regret.divergence(regret.anchored(values[i], alpha, beta, prior, before), exact) > 1e-3


@pytest.mark.slow
def test_rounds_in_one_program_and_on_the_host_are_the_same_and_compile_once():
    told = method(ridge(), steps=20)
    tuner, state = tuners.as_tuner(told, oracle), told.init(PRIOR)
    state = tuners.fit(tuner, jax.random.key(1), state, 1, chunk=1)
    TRACED.clear()
    state = tuners.fit(tuner, jax.random.key(1), state, 4, chunk=1)
    assert not TRACED
    host = tuners.fit_online(told, jax.random.key(1), told.init(PRIOR), 4, lambda x0, cond: np.asarray(oracle(x0)))
    np.testing.assert_allclose(state.params, host.params, atol=1e-5)
    np.testing.assert_array_equal(state.observations.x0, host.observations.x0)
    assert int(state.asked) == 64 and int(state.step) == 4


@pytest.mark.slow
def test_infeasible_queries_never_reach_the_reward_and_are_reported():
    told = method(ridge(), steps=1)
    state = told.init(PRIOR)
    queries = told.ask(jax.random.key(0), state, 16)
    rewards = jnp.where(jnp.arange(16) % 4 == 0, jnp.nan, oracle(queries.x0))
    state, info = told.tell(state, queries, rewards)
    assert float(info["infeasible"]) == 0.25 and np.isnan(info["bonus"]) and np.isnan(info["covered"])
    np.testing.assert_allclose(info["reward"], np.nanmean(np.asarray(rewards)), rtol=1e-6)
    fitted = told.refit(jax.random.key(1), state).belief
    kept = jnp.where(jnp.isnan(rewards), 0, 1)
    phi = np.asarray(indicator(queries.x0), np.float64)[np.asarray(kept, bool)]
    solved = np.linalg.solve(
        phi.T @ phi + 0.01 * np.eye(K**L), phi.T @ np.asarray(rewards, np.float64)[np.asarray(kept, bool)]
    )
    np.testing.assert_allclose(fitted.mean(EVERY), solved, atol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.slow
def test_answers_of_a_calibrated_belief_are_covered_noise_and_all(noise):
    """A reward drawn from the belief itself, answers with noise: 95 % of them within the interval."""
    told = method(Counting(jnp.zeros(K**L)), batch=4096, rounds=1, noise=noise)
    state = told.init(PRIOR)._replace(belief=Wide(jnp.zeros(K**L)), step=jnp.int32(1))
    queries = told.ask(jax.random.key(0), state, 4096)
    rewards = jax.random.normal(jax.random.key(1), (4096,)) * np.hypot(0.3, noise)
    _, info = told.tell(state, queries, rewards)
    assert abs(float(info["covered"]) - 0.95) < 0.015 and int(info["dropped"]) == 0


def test_answers_beyond_the_capacity_are_refused_or_counted():
    told = method(ridge(), batch=16, rounds=1)
    state = told.init(PRIOR)
    queries = told.ask(jax.random.key(0), state, 24)
    with pytest.raises(ValueError, match="24 answers do not fit into 16 slots"):
        told.tell(state, queries, jnp.zeros(24))
    assert int(jax.jit(told.tell)(state, queries, jnp.zeros(24))[1]["dropped"]) == 8


def test_a_warm_surrogate_goes_on_from_its_last_fit():
    """Rounds hand on the belief of the round before, and none in the first."""
    told = method(Counting(jnp.zeros(K**L)), steps=1)
    state = told.init(PRIOR)
    for expected in (1.0, 2.0, 3.0):
        state = told.refit(jax.random.key(0), state)._replace(step=state.step + 1)
        assert float(state.belief.values[0]) == expected


def test_the_bound_on_the_regret_holds_where_the_belief_is_calibrated():
    """(1/K) sum J(p*) - J(p_i) <= (2/K) sum E_{p_i}[g_i] for exact rounds under beta = alpha (i - 1), |r_i - r| <= g_i."""
    rng, prior = np.random.default_rng(0), np.full(K**L, 1 / K**L)
    best = ALPHA * enumeration.tilted(prior, TABLE, ALPHA).log_z
    for _ in range(20):
        law, regrets, bonuses = prior, [], []
        for i in range(4):
            g = rng.exponential(1 / (1 + i), size=K**L)
            mean = TABLE + g * rng.uniform(-1, 1, size=K**L)
            law = regret.anchored(mean + g, ALPHA, ALPHA * i, prior, law)
            regrets.append(best - regret.objective(law, TABLE, prior, ALPHA))
            bonuses.append(law @ g)
        assert 0 <= np.mean(regrets) <= 2 * np.mean(bonuses)


@pytest.mark.slow
def test_steered_rounds_ask_the_prior_first_and_the_tilt_of_the_belief_then():
    """Best of 4 under a belief that has seen every sequence, without noise: its law is known by ranks."""
    denoiser = model(PRIOR)
    chain = samplers.ancestral(EVENTS, denoiser)
    steer = lambda reward: samplers.best_of_n(chain, reward, 4)  # noqa: E731
    told = seiko.steered(EVENTS, EVENTS.times(), ridge(bonus=0.0), steer, prior=denoiser, batch=512, capacity=1024)
    state = told.init(None)
    queries = told.rollout(jax.random.key(1), state)
    asked = np.asarray(indicator(queries.x0)).mean(0)
    assert 0.5 * np.abs(asked - 1 / K**L).sum() < 0.12  # 512 draws of 27: about .09 by chance
    state, _ = told.update(jax.random.key(0), state, queries, oracle(queries.x0))
    later = np.asarray(oracle(told.rollout(jax.random.key(2), state).x0))
    upto = (1 + np.argsort(np.argsort(TABLE))) / K**L
    law = upto**4 - (upto - 1 / K**L) ** 4
    spread = np.sqrt(law @ TABLE**2 - (law @ TABLE) ** 2)
    assert abs(later.mean() - law @ TABLE) < 4 * spread / np.sqrt(512)


def test_refusals():
    with pytest.raises(ValueError, match="capacity must hold"):
        method(ridge(), batch=16, capacity=8)
    with pytest.raises(ValueError, match="surrogate must have fit"):
        method(lambda x: x)
    with pytest.raises(ValueError, match="schedule must be one of"):
        method(ridge(), schedule="linaer")
    with pytest.raises(ValueError, match="eta = 0"):
        point = processes.gaussian(schedules.linear_vp(), (2,), eta=0.0)
        seiko.seiko(
            model, point, point.times(4), ridge(), inner, prior=model(PRIOR), temperature=1.0, batch=1, capacity=1
        )


@pytest.mark.slow
def test_rounds_on_a_mixed_state():
    """A number and two tokens at once: 96 noisy queries raise the number and the share of the token that is worth something."""
    number = GaussianWorld([0.0], [[0.5]], schedule="flow", steps=5, eta=1.0)
    process = processes.product(x=number.process, c=processes.masked(schedules.log_linear_mask(), 2, K))
    times = process.times(5)

    def network(params, x, t, cond=None):
        logits = jnp.broadcast_to(params["c"], (x["x"].shape[0], 2, K))
        return {"x": number.model(params["x"])(x["x"], t), "c": logits}

    mixed = lambda params: denoisers.from_function(network, params)  # noqa: E731
    begin = {"x": jnp.float32([0.0, 1.0]), "c": jnp.zeros((2, K))}
    truth = lambda s: s["x"][:, 0] + 2.0 * s["c"][:, 0, 2]  # noqa: E731

    def inner(reward, **kl):
        return tuners.drakes(
            mixed, process, reward, times, optax.adam(3e-2), batch=128, estimator="straight_through", remat="none", **kl
        )

    surrogate = surrogates.ensemble(nets.ValueMLP((32,)), optax.adam(1e-2), heads=3, steps=200, batch=32)
    method = seiko.seiko(
        mixed, process, times, surrogate, inner, prior=mixed(begin), temperature=0.3, batch=32, capacity=96, steps=60
    )
    noisy = lambda s, cond=None: truth(s) + 0.1 * jnp.sin(1e4 * s["x"][:, 0])  # noqa: E731
    tuner = tuners.as_tuner(method, noisy)
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(begin), 3)

    def draw(params):
        sampler = samplers.ancestral(process, mixed(params))
        return samplers.sample(sampler, jax.random.key(1), 4096, times).x0

    before, after = draw(begin), draw(state.params)
    worth = float(after["c"][:, 0, 2].mean())
    assert int(state.observations.answered.sum()) == 96
    assert float(truth(after).mean()) > float(truth(before).mean()) + 1.0
    assert worth > 0.6 > 0.4 > float(before["c"][:, 0, 2].mean())
    assert abs(float(after["c"][:, 1, 2].mean()) - 1 / 3) < 0.2  # of no worth: near the prior's
