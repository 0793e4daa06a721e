"""Values: the losses have the minimisers they claim (by enumeration), learning finds them, and their error is told right."""

from __future__ import annotations

import itertools
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, special

from rgdiff import denoisers, nets, processes, rewards, samplers, schedules, tuners, values
from rgdiff.typing import pytree
from tests.worlds.worlds import (
    CategoricalWorld,
    GaussianWorld,
    MixedWorld,
    assert_mean,
    codes,
    correlated,
    factorised,
    slope,
)

SGD = optax.sgd(1e-3)
f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


# ---------------------------------------------------------------- models that contain the exact value


def nearest(times: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.argmin(jnp.abs(times - jnp.asarray(t)[..., None]), -1)


@pytree
class Tabular:
    """A number per grid time and masked state: params -> value, and the value."""

    times: jax.Array
    table: Any = None

    def __call__(self, *args):
        if len(args) == 1:
            return Tabular(self.times, args[0])
        x, t = args[:2]
        return self.table[nearest(self.times, t), codes(x)]


@pytree
class TabularQuadratic:
    """c_i + h_i x - p_i x^2 / 2 on the line, a row of params per grid time."""

    times: jax.Array
    table: Any = None

    def __call__(self, *args):
        if len(args) == 1:
            return TabularQuadratic(self.times, args[0])
        x, t = args[0][:, 0], args[1]
        c, h, p = jnp.moveaxis(self.table[nearest(self.times, t)], -1, 0)
        return c + h * x - 0.5 * p * x**2


def outcomes(w: CategoricalWorld) -> list[np.ndarray]:
    """p(x0 | x_t) of the chain at every grid time, [states, K^L] each."""
    ends = np.eye(len(w.states))[:, w.unmasked]
    out = [ends]
    for t, s in reversed(list(zip(w.grid[:-1], w.grid[1:], strict=True))):
        out.append(w.transition(t, s) @ out[-1])
    return out[::-1]


def mean_table(w: CategoricalWorld) -> np.ndarray:
    """E[r(x0) | x_t] at every grid time; 0 where the end is not reached."""
    return np.stack([p @ w.rewards for p in outcomes(w)])


def soft_table(w: CategoricalWorld) -> np.ndarray:
    return w.temperature * np.stack(w.log_value())


def quadratic_tables(w: GaussianWorld) -> tuple[np.ndarray, np.ndarray]:
    """Soft value (of the world) and mean value as rows (c, h, p), on the line."""
    soft = w.temperature * np.array([[c, h[0], p[0, 0]] for c, h, p in w.log_value()])
    g, offset = w.gain(w.grid[-1], w.theta)
    moves = [(*w.move(t, s, w.theta),) for t, s in zip(w.grid[:-1], w.grid[1:], strict=True)] + [(g, offset, 0.0)]
    form, mean = (0.0, w.b[0], w.q[0, 0]), []
    for a, d, std in reversed(moves):  # E of a quadratic form of a x + d + std z
        (c, h, p), a, d = form, a[0, 0], d[0]
        form = c + h * d - 0.5 * p * (d**2 + std**2), a * (h - p * d), p * a**2
        mean.append(form)
    return soft, np.array(mean[::-1])


@partial(jax.jit, static_argnames="chunks")
def gradients(tuner, params, data, chunks):
    """The loss's gradient on each of `chunks` equal parts of the data, next states valued by the exact table: [chunks, ...]."""
    parts = jax.tree.map(lambda leaf: leaf.reshape(chunks, -1, *leaf.shape[1:]), data)
    one = lambda key, rows: jax.grad(tuner.loss)(params["at"], key, rows, params["exact"])  # noqa: E731
    return jax.vmap(one)(jax.random.split(jax.random.key(3), chunks), parts)


def balanced() -> CategoricalWorld:
    """Two correlated bits, no state rare."""
    return CategoricalWorld([[0.3, 0.2], [0.1, 0.4]], steps=3, reward=[0.0, 1.0, 2.0, -1.0], temperature=0.7)


WORLDS = {
    "correlated": lambda: correlated(2, 3, 3, temperature=0.3),
    "factorised": lambda: factorised(3, temperature=0.3),
    "balanced": balanced,
}


@cache
def rolled(name: str) -> tuple[CategoricalWorld, dict[str, Any]]:
    """A world and 20,000 rollouts of its chain."""
    w = WORLDS[name]()
    return w, tuners.rollouts(jax.random.key(0), w.process, w.denoiser, w.times, w.reward, 20_000, chunk=2)


def rms(table, exact, w: CategoricalWorld) -> float:
    """Root mean square of the difference under the chain's own law, over all times."""
    return float(np.sqrt(np.mean([law @ (a - b) ** 2 for law, a, b in zip(w.laws(), table, exact, strict=True)])))


# ---------------------------------------------------------------- the losses, by enumeration


@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_the_soft_loss_is_least_at_the_soft_value_and_the_squared_one_at_the_mean(temperature):
    """Expected slopes change sign within 1e-3 temperatures of tau log E exp(r/tau), and of E r, at every state."""
    w = correlated(2, 3, temperature=temperature)
    reward = f32(w.rewards)

    def expected_slope(p, f, tau):
        one = jax.grad(lambda f, y: values.regression_loss(f, y, tau, 20.0))
        return p @ jax.vmap(one, (None, 0))(f, reward)

    slopes = jax.jit(jax.vmap(expected_slope, (0, 0, None)))
    for p, soft, mean in zip(outcomes(w), soft_table(w), mean_table(w), strict=True):
        reached = p.sum(1) > 0
        p, soft, mean = f32(p[reached]), f32(soft[reached]), f32(mean[reached])
        for exact, tau, off in ((soft, temperature, 1e-3 * temperature), (mean, None, 1e-3)):
            assert np.all(slopes(p, exact + off, tau) > 0) and np.all(slopes(p, exact - off, tau) < 0)
    assert soft_table(w)[0][-1] - mean_table(w)[0][-1] > 0.01  # the two are not one, or nothing was shown


def test_the_bound_leaves_likely_outcomes_whole_and_bounds_rare_ones():
    """E min(e^z, e^b) = 1 at the minimiser: the soft value while the best outcome is likelier than e^-b, less after."""
    tau, y = 0.1, np.array([0.0, 1.0])
    for p, bound in ((0.3, 2.0), (0.14, 2.0), (0.05, 2.0), (1e-3, 2.0), (1e-3, 7.0)):
        law = np.array([1 - p, p])
        excess = lambda f: law @ np.minimum(np.exp((y - f) / tau), np.exp(bound)) - 1  # noqa: B023, E731
        least = optimize.brentq(excess, -1, 2)
        soft = tau * special.logsumexp(y / tau, b=law)
        assert np.isclose(least, soft, atol=1e-9) if p > np.exp(-bound) else least < soft - 1e-3
        mean_loss = lambda f: f32(law) @ values.regression_loss(f, f32(y), tau, bound)  # noqa: B023, E731
        assert jax.grad(mean_loss)(f32(least + 1e-4)) > 0 > jax.grad(mean_loss)(f32(least - 1e-4))


def test_the_soft_loss_has_its_formula_and_never_overflows():
    f, tau = 0.3, 0.4
    y = np.linspace(-3, 3, 13)
    z = (y - f) / tau
    np.testing.assert_allclose(
        values.regression_loss(f32(f), f32(y), tau, 10.0), 2 * tau**2 * (np.exp(z) - z - 1), rtol=2e-5, atol=1e-6
    )
    np.testing.assert_allclose(values.regression_loss(f32(f), f32(y), 300.0), (y - f) ** 2, rtol=0.01, atol=1e-3)
    for ratio in (1e4, -1e4, 1e7, -1e7):  # r / tau
        tau = 1 / abs(ratio)
        loss, g = jax.value_and_grad(values.regression_loss)(f32(0.0), f32(np.sign(ratio)), tau)
        np.testing.assert_allclose(g, 2 * tau * (1 - np.exp(10) if ratio > 0 else 1), rtol=1e-5)
        np.testing.assert_allclose(
            loss,
            2 * tau**2 * ((np.exp(10) - 1) * (ratio - 10) + np.exp(10) - 11 if ratio > 0 else -ratio - 1),
            rtol=1e-5,
        )


def test_a_fit_at_a_tiny_temperature_ends_at_the_soft_value():
    """r/tau = 1e4 from a start at 0: tau log(1/2 + exp(1/tau)/2) = 1 - tau log 2, and Adam comes back from overshooting."""
    w, tau = factorised(2), 1e-4
    model = lambda f: lambda x, t, cond=None: jnp.full(x.shape[0], f)  # noqa: E731
    optimizer = optax.adam(optax.exponential_decay(0.02, 100, 0.4))
    tuner = tuners.value_regression(model, w.process, optimizer, temperature=tau, ema_decay=0.0)
    data = {"x0": jnp.tile(jax.nn.one_hot(jnp.zeros((1, 3), int), 3), (64, 1, 1)), "reward": jnp.arange(64.0) % 2}
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(f32(0.0)), 1000, data=data, batch=64, chunk=1000)
    assert int(state.skipped) == 0
    np.testing.assert_allclose(state.params, 1 - tau * np.log(2), atol=0.3 * tau)


def test_backups_are_means_and_log_mean_exps():
    v = np.random.default_rng(0).normal(size=(7, 5))
    np.testing.assert_allclose(values.backup(f32(v)), v.mean(0), rtol=1e-5, atol=1e-6)
    expected = 0.2 * (special.logsumexp(v / 0.2, axis=0) - np.log(7))
    np.testing.assert_allclose(values.backup(f32(v), 0.2), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values.backup(f32(v[:1]), 0.2), v[0], rtol=1e-6)
    hard = f32([[1.0, np.nan, np.nan, -np.inf, 1e30, 1e4], [3.0, 2.0, np.nan, -np.inf, 0.0, -1e4]])
    for tau, first in ((None, 2.0), (1e-3, 3.0 - 1e-3 * np.log(2))):
        out = np.asarray(values.backup(hard, tau))
        np.testing.assert_allclose(out[:2], [first, 2.0], rtol=1e-6)
        assert np.isnan(out[2]) and out[3] == -np.inf and 4e29 < out[4] <= 1e30 and np.isfinite(out[5])


# ---------------------------------------------------------------- regression


@pytest.mark.parametrize("data", ["rollouts", "noised"])
@pytest.mark.slow
def test_a_tabular_value_becomes_the_soft_value_or_the_mean(data):
    """On chains of a correlated law (whose values are the chain's own) and on noised samples of a factorised one."""
    w, rows = rolled("correlated" if data == "rollouts" else "factorised")
    exact: dict = {w.temperature: soft_table(w)}
    if data == "noised":  # the mean on noised samples: tests/test_pretraining.py
        rows = {name: rows[name] for name in ("x0", "reward")}
    else:
        exact[None] = mean_table(w)
    apart = rms(mean_table(w), soft_table(w), w)
    optimizer = optax.adam(optax.exponential_decay(0.1, 50, 0.4))
    for tau, table in exact.items():
        tuner = tuners.value_regression(
            Tabular(w.times), w.process, optimizer, temperature=tau, times=w.times, ema_decay=0.9
        )
        state = tuner.init(jnp.zeros((len(w.grid), len(w.states))))
        state = tuners.fit(tuner, jax.random.key(1), state, 250, data=rows, batch=512, chunk=250)
        assert rms(state.best, table, w) < 0.15 * apart


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("learning", ["regression", "temporal_difference"])
@pytest.mark.first(1)
def test_gradients_on_a_gaussian_chain_vanish_at_its_exact_value_and_have_the_right_size_off_it(learning, soft):
    """At v + e the slope in c_i is 2e, or 2 tau (1 - exp(-e/tau)), over the T + 1 times (next states' values stay v)."""
    tau, off = 0.8, 0.2
    w = GaussianWorld([0.5], [[0.6]], steps=4, b=[0.7], q=[[0.3]], temperature=tau)
    exact = f32(quadratic_tables(w)[0 if soft else 1])
    model, temperature = TabularQuadratic(w.times), tau if soft else None
    data = tuners.rollouts(jax.random.key(0), w.process, w.denoiser, w.times, w.reward, 10_000)
    if learning == "regression":
        tuner = tuners.value_regression(model, w.process, SGD, temperature=temperature, times=w.times)
    else:
        tuner = tuners.temporal_difference(
            model, w.process, w.denoiser, w.times, SGD, temperature=temperature, candidates=2
        )
    g = gradients(tuner, {"at": exact, "exact": exact}, data, 50)
    assert_mean(g, np.zeros(exact.shape), errors=4.5, slack=1e-4)
    size = 2 * tau * (1 - np.exp(-off / tau)) if soft else 2 * off
    g = gradients(tuner, {"at": exact.at[:, 0].add(off), "exact": exact}, data, 50)[..., 0]
    assert_mean(g, np.full(len(w.grid), size / len(w.grid)), errors=4.5, slack=2e-3)


def test_infeasible_rewards_are_left_out():
    """NaN and infinities, in regression and at the end of a temporal difference; what is left is averaged."""
    w = factorised(2)
    reward = f32([1.0, np.nan, 3.0, np.inf, -np.inf, 5.0])
    x = jnp.broadcast_to(jax.nn.one_hot(3, 4), (6, 3, 3, 4))
    data, nothing = ({"path": x, "reward": r} for r in (reward, jnp.full(6, jnp.nan)))
    constant = lambda p: lambda x, t, cond=None: jnp.full(x.shape[0], p)  # noqa: E731
    step = jax.jit(lambda tuner, rows: tuner.step(jax.random.key(0), tuner.init(f32(0.0)), rows)[1])
    regression = tuners.value_regression(constant, w.process, SGD, times=w.times)
    info = step(regression, data)
    np.testing.assert_allclose([info["loss"], info["gradient_norm"]], [35 / 3, 2 * 3], rtol=1e-6)
    assert int(info["infeasible"]) == 3 and int(info["skipped"]) == 0
    difference = tuners.temporal_difference(constant, w.process, w.denoiser, w.times, SGD, temperature=0.1)
    assert np.isfinite(step(difference, data)["gradient_norm"])
    for tuner in (regression, difference):  # the difference still learns from its own next values, all 0 here
        info = step(tuner, nothing)
        assert info["loss"] == 0 and int(info["infeasible"]) == 6 and int(info["skipped"]) == 0


# ---------------------------------------------------------------- temporal differences


@pytest.mark.slow
def test_a_log_mean_exp_of_m_next_states_is_biased_by_one_over_m_and_its_exponential_is_not():
    """E target - v = -tau Var(e)/(2 M), Var the relative variance of exp(v(y)/tau); over all draws, by enumeration."""
    tau, v, p = 0.7, np.array([0.0, 0.4, -0.3, 0.1]), np.array([0.4, 0.2, 0.3, 0.1])
    soft = tau * special.logsumexp(v / tau, b=p)
    relative = p @ np.exp(2 * v / tau) / (p @ np.exp(v / tau)) ** 2 - 1
    sizes, bias = [1, 2, 3, 4, 5, 6], []
    for m in sizes:
        draws = np.array(list(itertools.product(range(4), repeat=m)))
        target, probability = np.asarray(values.backup(f32(v[draws].T), tau), float), p[draws].prod(1)
        np.testing.assert_allclose(probability @ np.exp(target / tau), np.exp(soft / tau), rtol=1e-5)
        bias.append(soft - probability @ target)
    assert abs(slope(sizes[2:], bias[2:]) + 1) < 0.05
    np.testing.assert_allclose(bias[-1] * 6, tau * relative / 2, rtol=0.03)


@pytest.mark.slow
def test_temporal_differences_have_the_exact_value_as_their_fixed_point():
    """With the soft loss, at M = 2; with the squared one and M = 1 the target is too low by all of soft - mean."""
    w, data = rolled("balanced")
    exact, table = f32(soft_table(w)), soft_table(w)

    def at(loss, m):
        tuner = tuners.temporal_difference(
            Tabular(w.times), w.process, w.denoiser, w.times, SGD, temperature=w.temperature, candidates=m, loss=loss
        )
        return gradients(tuner, {"at": exact, "exact": exact}, data, 100)

    g = at("soft", 2)
    assert_mean(g, np.zeros(g.shape[1:]), errors=5, slack=1e-5)
    low = table[0][-1] - w.transition(w.grid[0], w.grid[1])[-1] @ table[1]
    assert low > 0.1
    assert_mean(at("squared", 1)[:, 0, -1], 2 * low / 4, errors=4.5)


@pytest.mark.slow
def test_temporal_differences_converge_to_the_exact_soft_value_at_the_rate_of_averages():
    """Tabular, steps of 1/n: from a start far off the error falls as n^-1/2, by the soft loss, with two next states."""
    w, data = rolled("balanced")
    tuner = tuners.temporal_difference(
        Tabular(w.times), w.process, w.denoiser, w.times, optax.sgd(lambda n: 3 / (1 + n / 12)),
        temperature=w.temperature, candidates=2, ema_decay=0.5,
    )  # fmt: skip
    exact, steps = soft_table(w), [60, 240, 960]
    errors = np.zeros((3, 3))
    for seed in range(3):
        state = tuner.init(jnp.zeros(exact.shape))
        for i, n in enumerate(steps):
            state = tuners.fit(tuner, jax.random.key(seed), state, n, data=data, batch=64, chunk=60)
            errors[seed, i] = rms(np.asarray(state.params), exact, w)
    errors = np.sqrt((errors**2).mean(0))
    assert abs(slope(steps, errors) + 0.5) < 0.15
    assert errors[-1] < 0.1 * rms(exact, mean_table(w), w)


@pytest.mark.slow
def test_the_published_setting_backs_up_plain_means():
    w, data = rolled("balanced")
    tuner = tuners.temporal_difference(Tabular(w.times), w.process, w.denoiser, w.times, SGD, candidates=2)
    exact = f32(mean_table(w))
    g = gradients(tuner, {"at": exact, "exact": exact}, data, 100)
    assert_mean(g, np.zeros(g.shape[1:]), errors=5, slack=1e-5)


def test_next_states_keep_their_conditions():
    """A value that is the condition is its own backup, row by row: the loss is zero."""
    w = factorised(3)
    cond = {"bonus": jnp.arange(6.0)}
    data = tuners.rollouts(jax.random.key(0), w.process, w.denoiser, w.times, lambda x0, c: c["bonus"], 6, cond)
    np.testing.assert_array_equal(data["reward"], cond["bonus"])
    model = lambda p: lambda x, t, c: p * c["bonus"]  # noqa: E731
    tuner = tuners.temporal_difference(model, w.process, w.denoiser, w.times, SGD, candidates=3, temperature=0.3)
    loss = jax.jit(jax.vmap(tuner.loss, (None, 0, None, None)))
    keys = jax.random.split(jax.random.key(0), 5)
    np.testing.assert_allclose(loss(f32(1.0), keys, data, f32(1.0)), 0, atol=1e-6)
    assert loss(f32(1.0), keys, data, f32(0.5)).min() > 0.1  # the target's parameters are another's


def test_a_masked_value_may_end_at_the_reward_itself():
    """learned(net, reward, process) is the reward at t = 0, for one time and for a time per example."""
    w, data = rolled("correlated")
    value = jax.jit(values.learned(lambda x, t, c: jnp.full(x.shape[0], 9.0), w.reward, w.process))
    x, reward = data["path"][:8, -1], data["reward"][:8]
    np.testing.assert_array_equal(value(x, f32(0.0)), reward)
    np.testing.assert_array_equal(value(x, f32(0.5)), np.full(8, 9.0))
    t = np.tile([0.0, 0.5], 4)
    np.testing.assert_array_equal(value(x, f32(t)), np.where(t > 0, 9.0, reward))


# ---------------------------------------------------------------- rollouts, and the error over time


def test_rollouts_hold_the_states_of_the_chain():
    w = correlated(2, 3, 4)
    data = tuners.rollouts(jax.random.key(0), w.process, w.denoiser, w.times, w.reward, 20_000, chunk=2)
    seen = np.stack(
        [np.bincount(np.asarray(codes(x)), minlength=len(w.states)) for x in jnp.moveaxis(data["path"], 1, 0)]
    )
    for counts, law in zip(seen, w.laws(), strict=True):
        np.testing.assert_allclose(counts / 20_000, law, atol=4.5 * np.sqrt(0.25 / 20_000))
    np.testing.assert_array_equal(data["path"][:, -1, :, :-1], data["x0"])
    np.testing.assert_array_equal(w.reward(data["x0"]), data["reward"])


def test_rollouts_of_a_gaussian_chain_begin_where_it_began():
    w, key = GaussianWorld([0.5, 0.0], np.eye(2), steps=4), jax.random.key(0)
    data = tuners.rollouts(key, w.process, w.denoiser, w.times, w.reward, 16)
    sampler = samplers.ancestral(w.process, w.denoiser)
    y, _ = sampler.step(jax.random.fold_in(key, 1), data["path"][:, 0], w.times[0], w.times[1])
    np.testing.assert_allclose(y, data["path"][:, 1], rtol=1e-5, atol=1e-6)
    end = data["path"][:, -1]
    np.testing.assert_allclose(w.denoiser(end, w.times[-1]), data["x0"], rtol=1e-5, atol=1e-6)
    assert data["path"].shape == (16, len(w.grid), 2)


def test_the_error_over_time_of_exact_values_is_the_rewards_own_variance():
    """explained = Var E[r | x_t] / Var r by enumeration, from 0 at all masks to 1 at data; biases are zero in their kind."""
    w, data = rolled("correlated")
    mean, soft = Tabular(w.times, f32(mean_table(w))), Tabular(w.times, f32(soft_table(w)))
    out = values.error_over_time(mean, w.times, data, exact=mean)
    final = w.laws()[-1][w.unmasked]
    variance = final @ w.rewards**2 - (final @ w.rewards) ** 2
    part = [law @ m**2 - (law @ m) ** 2 for law, m in zip(w.laws(), mean_table(w), strict=True)]
    np.testing.assert_allclose(out.explained, np.array(part) / variance, atol=0.035)
    np.testing.assert_allclose(out.mse, variance - np.array(part), atol=0.035 * variance)
    np.testing.assert_allclose(out.bias, 0, atol=4 * np.sqrt(variance / 20_000))
    np.testing.assert_array_equal(out.exact, 0)
    assert out.explained[0] < 1e-3 and out.explained[-1] > 1 - 1e-5
    out = values.error_over_time(soft, w.times, data, temperature=w.temperature, exact=mean)
    np.testing.assert_allclose(out.bias, 0, atol=0.02)
    gap = [law @ (a - b) ** 2 for law, a, b in zip(w.laws(), soft_table(w), mean_table(w), strict=True)]
    np.testing.assert_allclose(out.exact, gap, rtol=0.05, atol=1e-6)
    wrong = values.error_over_time(mean, w.times, data, temperature=w.temperature)
    excess = np.exp((w.rewards[None] - mean_table(w)[0][-1]) / w.temperature) @ final
    np.testing.assert_allclose(wrong.bias[0], w.temperature * np.log(excess)[0], atol=0.02)


@pytest.mark.slow
def test_the_error_over_time_leaves_infeasible_examples_out_and_refuses_another_grid():
    """Half the examples, or each of them twice: the same averages."""
    w, data = rolled("correlated")
    half = jax.tree.map(lambda leaf: leaf[:10_000], data)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), half)
    some = data | {"reward": jnp.where(jnp.arange(20_000) < 10_000, data["reward"], jnp.nan)}
    value = Tabular(w.times, f32(mean_table(w)))
    a, b = (values.error_over_time(value, w.times, d, temperature=0.3) for d in (some, twice))
    for name in ("mse", "explained", "bias"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-5)
    constant = values.error_over_time(value, w.times, data | {"reward": jnp.ones(20_000)}, temperature=0.3)
    assert np.all(np.isnan(constant.explained)) and np.all(np.isfinite(constant.mse))
    with pytest.raises(ValueError, match="times must be those of the rollouts"):
        values.error_over_time(value, w.times[1:], data)


# ---------------------------------------------------------------- posterior means, networks, refusals


def test_the_mode_plug_in_is_one_token_at_ties_too():
    """The first of equally probable tokens, never a mixture of them; copies stay copies; infinite logits are nothing special."""
    process = processes.masked(schedules.log_linear_mask(), 3, 3)
    reward = lambda x0, cond=None: (x0**2).sum((-1, -2)) + 10 * x0[:, 0, 1]  # noqa: E731
    logits = f32([[[1, 1, 0], [0, 0, 0], [-np.inf, 2, -np.inf]]])
    denoiser = lambda x, t, cond=None: jnp.broadcast_to(logits, (x.shape[0], 3, 3))  # noqa: E731
    mode, mean = (values.posterior_mean(reward, process, denoiser, plug_in=plug_in) for plug_in in ("mode", "mean"))
    x = jax.nn.one_hot(jnp.array([[3, 3, 0], [1, 3, 3], [3, 2, 3]]), 4)
    out, g = jax.jit(lambda x: (mode(x, f32(0.5)), jax.grad(lambda x: mode(x, f32(0.5)).sum())(x)))(x)
    np.testing.assert_allclose(out, [3.0, 13.0, 3.0])  # the first position is token 0, or known to be 1
    assert np.all(np.isfinite(g))
    np.testing.assert_allclose(jax.jit(mean)(x, f32(0.5))[2], 2 + 2 * 0.4223188**2 + 0.1553624**2 + 4.223188, rtol=1e-5)


def test_the_mode_plug_in_of_a_mixed_state_takes_tokens_only():
    w = MixedWorld()
    reward = lambda x0, cond=None: x0["x"][:, 0] + 100 * (x0["c"][:, 0] ** 2).sum(-1)  # noqa: E731
    mode, mean = (values.posterior_mean(reward, w.process, w.denoiser, plug_in=plug_in) for plug_in in ("mode", "mean"))

    @jax.jit
    def evaluate(key, t):
        x = w.process.prior(5).sample(key)
        return mode(x, t), mean(x, t), w.denoiser(x, t)["x"][:, 0]

    of_mode, of_mean, x0 = evaluate(jax.random.key(0), f32(0.7))
    np.testing.assert_allclose(of_mode, x0 + 100, rtol=1e-6)
    assert np.all(of_mean < 95)
    continuous = processes.product(x=processes.gaussian(w.schedule, (1,)))
    with pytest.raises(ValueError, match="plug_in='mode' is for masked processes"):
        values.posterior_mean(reward, continuous, w.denoiser, plug_in="mode")


def test_a_network_with_a_number_per_position_is_averaged():
    x, t = jax.nn.one_hot(jnp.zeros((2, 6), int), 5), jnp.full(2, 0.5)
    per_position = jnp.arange(12.0).reshape(2, 6, 1)
    np.testing.assert_allclose(values.learned(lambda x, t, c=None: per_position)(x, t), [2.5, 8.5])
    np.testing.assert_allclose(values.learned(lambda x, t, c=None: per_position[:, 0])(x, t), [0.0, 6.0])
    with pytest.raises(ValueError, match=r"must return \[B\]"):
        values.learned(lambda x, t, c=None: x)(x, t)
    net = nets.ConvNet1D(1, width=8, dilations=(1,), time_conditioning=True)
    params = jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
    value = lambda params, x, t: values.learned(denoisers.from_linen(net, params))(x, t)  # noqa: E731
    assert jax.eval_shape(value, params, x, t).shape == (2,)


def test_settings_are_refused_where_they_are_built():
    w, data = rolled("correlated")
    model = Tabular(w.times)
    with pytest.raises(ValueError, match="temperature must be"):
        tuners.value_regression(model, w.process, SGD, temperature=0.0)
    with pytest.raises(ValueError, match="at least one move"):
        g = GaussianWorld([0.0], [[1.0]], steps=1)
        tuners.temporal_difference(model, g.process, g.denoiser, g.times, SGD)
    with pytest.raises(ValueError, match="loss must be one of"):
        tuners.temporal_difference(model, w.process, w.denoiser, w.times, SGD, loss="square")
    with pytest.raises(ValueError, match="eta = 0"):
        g = GaussianWorld([0.0], [[1.0]], eta=0.0)
        tuners.temporal_difference(model, g.process, g.denoiser, g.times, SGD)
    tuner = tuners.value_regression(model, w.process, SGD)
    with pytest.raises(ValueError, match="build the tuner with times="):
        jax.eval_shape(tuner.loss, jnp.zeros((4, 16)), jax.random.key(0), data)
    tuner = tuners.value_regression(model, w.process, SGD, times=factorised(5).times)
    with pytest.raises(ValueError, match="must hold the 6 states of times"):
        jax.eval_shape(tuner.loss, jnp.zeros((6, 16)), jax.random.key(0), data)


def test_a_soft_threshold_is_the_hard_one_smoothed_and_has_its_gradient():
    x = jnp.linspace(-3.0, 3.0, 13)[:, None]
    first = lambda x0, cond=None: x0[:, 0]  # noqa: E731
    hard = rewards.threshold(first, -1.0, 2.0)(x)
    np.testing.assert_array_equal(hard, [0.0] * 4 + [1.0] * 7 + [0.0] * 2)
    np.testing.assert_array_equal(rewards.threshold(first, high=0.0)(jnp.full((1, 1), jnp.nan)), [jnp.nan])
    soft = rewards.threshold(first, -1.0, 2.0, width=0.01)
    np.testing.assert_allclose(soft(x + 0.1), hard.at[3].set(0.0).at[10].set(0.0), atol=1e-4)
    slope = jax.grad(lambda x: rewards.threshold(first, low=0.5, width=0.2)(x).sum())(jnp.full((1, 1), 0.5))
    np.testing.assert_allclose(slope, [[1 / (4 * 0.2)]], rtol=1e-5)  # of a logistic at its middle


def test_a_value_in_place_of_infeasible_is_seen_in_programs_and_between_them():
    x = jnp.array([[4.0], [-4.0]])
    root = lambda np, x: np.where(x > 0, np.abs(x) ** 0.5, np.nan)[:, 0]  # noqa: E731
    for reward in (lambda x0, cond=None: root(jnp, x0), rewards.from_host(lambda x0, cond: root(np, x0))):
        filled = rewards.where_infeasible(reward, -1)
        np.testing.assert_array_equal(rewards.score(filled, x), [2, -1])
        assert isinstance(filled, rewards.HostReward) == isinstance(reward, rewards.HostReward)
    np.testing.assert_array_equal(filled.answers(np.asarray(x)), [2, -1])  # as `run` asks a black box
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        rewards.where_infeasible(reward, float("nan"))
