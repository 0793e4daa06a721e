"""DxDP against closed forms: Riccati values and policies, exact gradients, speeds at rest, quadrature over Gaussian policies in 1-D."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, policies, processes, samplers, schedules, tuners
from rgdiff.typing import pytree
from tests.test_policies import affine_model

# The linear-quadratic world: prior N(0, 1), reward -a (x - m)^2 / 2, auxiliary steps of variances s^2.
A, M, TAU = 0.8, 0.6, 0.3
SPEED = np.array([0.5, 0.3, 0.2])


@pytree
class Parabola:
    """-a (x - m)^2 / 2."""

    a: jax.Array
    m: jax.Array

    def __call__(self, x0, cond=None):
        return -0.5 * self.a * jnp.sum((x0 - self.m) ** 2, -1)


REWARD = Parabola(jnp.float32(A), jnp.float32(M))


def quadratic(params, x, t, cond=None):
    """c_i + q_i x + p_i x^2 at move i."""
    i = jnp.minimum(jnp.round((1 - t) * params["p"].shape[0]).astype(jnp.int32), params["p"].shape[0] - 1)
    c, q, p = params["c"][i], params["q"][i], params["p"][i]
    return c + q * x[:, 0] + p * x[:, 0] ** 2


def value_model(params):
    return denoisers.from_function(quadratic, params)


PROCESS = policies.few_step(policies.variances((0.8, 0.5, 0.4)), (1,))
POLICY = policies.policy(PROCESS, affine_model, reach=100.0)


def blank():
    value = {k: jnp.zeros(3) for k in "cqp"}
    return {"policy": POLICY.init({k: jnp.zeros(3) for k in "wb"}), "value": value}


def build(reward=REWARD, **options):
    chosen = {"temperature": TAU, "speed": SPEED, "velocity_decay": 1.0, "clip": 1e6, "ema_decay": None} | options
    return tuners.dxdp(POLICY, PROCESS, reward, value_model, **chosen)


def riccati(speed, a=A, m=M, tau=TAU):
    """V_t(x) = c + a_t (x - m)^2 / 2 and the optimal policy N(k x + (1 - k) m, v), backwards from the data.

    -tau log of the integral of N(y; x, s^2) exp(-V(y) / tau) is again a parabola; the integrand, normalised, is the policy.
    """
    c, out = 0.0, []
    for s2 in speed[::-1]:
        share = 1 + a * s2 / tau
        v, k = 1 / (1 / s2 + a / tau), 1 / share
        c, a = c + 0.5 * tau * np.log(share), a / share
        out.append((c, a, k, v))
    return [np.array(column) for column in zip(*out[::-1], strict=True)]


def test_the_recursion_is_the_soft_bellman_equation():
    """The test's own algebra, by quadrature of one step, and by the value of another policy, which is higher."""
    c, a, k, v = riccati(SPEED)
    y = np.linspace(-12, 12, 200_001)
    after = c[1] + 0.5 * a[1] * (y - M) ** 2
    for x in (-1.0, 0.4, 2.0):
        base = np.exp(-0.5 * (y - x) ** 2 / SPEED[0]) / np.sqrt(2 * np.pi * SPEED[0])
        soft = -TAU * np.log(np.trapezoid(base * np.exp(-after / TAU), y))
        np.testing.assert_allclose(soft, c[0] + 0.5 * a[0] * (x - M) ** 2, rtol=1e-6)
        mean, var = k[0] * x + (1 - k[0]) * M, v[0]

        def bellman(mean, var, x=x):
            kl = 0.5 * ((var + (mean - x) ** 2) / SPEED[0] - 1 - np.log(var / SPEED[0]))
            return c[1] + 0.5 * a[1] * ((mean - M) ** 2 + var) + TAU * kl

        np.testing.assert_allclose(bellman(mean, var), soft, rtol=1e-9)
        assert bellman(mean + 0.1, var) > soft and bellman(mean, 1.2 * var) > soft


@pytest.fixture(scope="module")
def trained():
    tuner = build(learning_rate=0.05, value_learning_rate=0.1, decay_steps=1200, batch=512)
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(blank()), 1200, chunk=600)
    return tuner, state


@pytest.mark.slow
def test_values_and_policy_of_the_linear_quadratic_world(trained):
    """Values within 1 %, means and variances of the policy within 2 %."""
    tuner, state = trained
    c, a, k, v = riccati(SPEED)
    value = jax.tree.map(lambda p: np.asarray(p, float), state.params["value"])
    x = np.linspace(-2, 2, 11)
    for i in range(3):
        learnt = value["c"][i] + value["q"][i] * x + value["p"][i] * x**2
        np.testing.assert_allclose(learnt, c[i] + 0.5 * a[i] * (x - M) ** 2, rtol=0.01, atol=0.004)
    network = state.params["policy"]["network"]
    np.testing.assert_allclose(1 + network["w"], k, rtol=0.02)
    np.testing.assert_allclose(network["b"], (1 - k) * M, rtol=0.02, atol=0.004)
    np.testing.assert_allclose(POLICY.sigma(state.params["policy"]) ** 2, v, rtol=0.02)


@pytest.mark.slow
def test_one_optimal_step_of_values_is_a_fixed_point(trained):
    """At the exact optimum targets equal values: the regression's loss is the variance of V(y) alone, and the policy's gradient vanishes."""
    tuner, state = trained
    c, a, k, v = (jnp.asarray(part, jnp.float32) for part in riccati(SPEED))
    policy = {"network": {"w": k - 1, "b": (1 - k) * M}, "log_sigma": _inverse(jnp.sqrt(v))}
    value = {"c": c + 0.5 * a * M**2, "q": -a * M, "p": 0.5 * a}
    params = {"policy": policy, "value": value}
    paths = tuner.rollout(jax.random.key(3), policy, 100_000)
    gradient = jax.jit(jax.grad(tuner.policy_loss))(policy, jax.random.key(4), params, paths, jnp.asarray(SPEED), 0)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 2e-3
    bent = policy | {"log_sigma": policy["log_sigma"] + 0.2}
    gradient = jax.jit(jax.grad(tuner.policy_loss))(bent, jax.random.key(4), params, paths, jnp.asarray(SPEED), 0)
    assert float(jnp.abs(gradient["log_sigma"]).min()) > 0.02


def _inverse(sigma):
    """The parameter whose bounded standard deviation is sigma."""
    return POLICY.start + POLICY.reach * jnp.arctanh((jnp.log(sigma) - POLICY.start) / POLICY.reach)


@pytest.mark.parametrize("expectation", ["exact", pytest.param("sampled", marks=pytest.mark.slow)])
def test_the_policys_gradient_in_magnitude(expectation):
    """Against the derivative of the loss written out for affine steps and parabolic values, away from the optimum."""
    tuner = build(ablation={"expectation": expectation, "every_move": True})
    random = np.random.default_rng(1)
    network = {k: jnp.asarray(0.3 * random.standard_normal(3), jnp.float32) for k in "wb"}
    policy = POLICY.init(network) | {"log_sigma": POLICY.start + jnp.float32([0.6, -0.6, 0.4])}
    value = {k: jnp.asarray(random.standard_normal(3), jnp.float32) for k in "cqp"}
    params = {"policy": policy, "value": value}
    paths = tuner.rollout(jax.random.key(3), policy, 200_000)
    got = jax.jit(jax.grad(tuner.policy_loss))(policy, jax.random.key(4), params, paths, jnp.asarray(SPEED), 0)

    def exact(policy):
        old, total = jax.lax.stop_gradient(policy), 0.0
        mean, var = jnp.float32(0), jnp.float32(1)
        for i in range(3):
            w, b, sigma = policy["network"]["w"][i], policy["network"]["b"][i], POLICY.sigma(policy)[i]
            y_mean, y_var = (1 + w) * mean + b, (1 + w) ** 2 * var + sigma**2
            q, p = (value["q"][i + 1], value["p"][i + 1]) if i < 2 else (-A * M, 0.5 * A)
            moved = w**2 * var + (w * mean + b) ** 2 + sigma**2
            step = q * y_mean + p * (y_mean**2 + y_var) + TAU * (moved / (2 * SPEED[i]) - jnp.log(sigma))
            total = total + step / 3
            w, b, sigma = old["network"]["w"][i], old["network"]["b"][i], POLICY.sigma(old)[i]
            mean, var = (1 + w) * mean + b, (1 + w) ** 2 * var + sigma**2
        return total

    want = jax.grad(exact)(policy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.01)
    assert float(jnp.abs(want["log_sigma"]).min()) > 0.03


def test_costs_are_the_kl_to_the_auxiliary_step():
    """tau KL(N(mean, sigma^2) | N(x, s^2)) where both weights are tau, D = 3; sampled ones agree in the mean."""
    from rgdiff.kernels import Gaussian

    tuner, x = build(), jax.random.normal(jax.random.key(0), (1, 3))
    kernel = Gaussian(jnp.tile(x + 0.4, (50_000, 1)), jnp.full((50_000, 1), 0.7))
    x, speed = jnp.tile(x, (50_000, 1)), jnp.float32(0.35)
    want = TAU * kernel.kl(Gaussian(x, jnp.sqrt(speed)))
    y = kernel.sample(jax.random.key(1))
    np.testing.assert_allclose(tuner.cost(kernel, x, y, speed), want, rtol=1e-5)
    sampled = build(ablation={"expectation": "sampled"}).cost(kernel, x, y, speed)
    assert sampled.std() > 0.05
    assert abs(float(sampled.mean() - want[0])) < 4 * float(sampled.std()) / np.sqrt(50_000)


@pytest.mark.slow
def test_speeds_follow_the_chain_and_the_running_cost_is_a_half():
    """s^2 tends to E|x' - x|^2 per dimension at the rate of its decay, and E|x' - x|^2 / 2 s^2 to 1/2."""
    tuner = build(learning_rate=0.0, speed=4 * SPEED, velocity_decay=0.9, batch=20_000)
    params = blank()
    params["policy"]["network"] = {"w": jnp.float32([-0.4, 0.2, 0.3]), "b": jnp.float32([0.5, -0.3, 0.1])}
    mean, var, want = 0.0, 1.0, []
    for w, b, sigma in zip([-0.4, 0.2, 0.3], [0.5, -0.3, 0.1], [0.8, 0.5, 0.4], strict=True):
        want.append(w**2 * var + (w * mean + b) ** 2 + sigma**2)
        mean, var = (1 + w) * mean + b, (1 + w) ** 2 * var + sigma**2
    state = tuner.init(params)
    infos = []
    for steps in (5, 10, 60):
        state = tuners.fit(tuner, jax.random.key(0), state, steps, chunk=5, on_chunk=lambda s, i: infos.append(i))
        expected = np.array(want) + 0.9**steps * (4 * SPEED - np.array(want))
        np.testing.assert_allclose(state.extra.speed, expected, rtol=0.01)
    assert abs(float(infos[-1]["running_cost"][-1]) - 0.5) < 0.01
    first = build(speed=None).init(params).extra.speed  # of 4,096 chains
    np.testing.assert_allclose(first, want, rtol=0.08)


@pytest.mark.slow
def test_where_gaussian_policies_contain_it_the_tilted_law_is_reached():
    """With tau / a + sum s^2 = 1 and m = 0 the auxiliary chain leads from exp(r / tau) back to the prior: no gap, and V_0 says log Z."""
    speed = np.array([0.3, 0.25, 0.15])
    var = 1 - speed.sum()
    reward = Parabola(jnp.float32(TAU / var), jnp.float32(0.0))
    tuner = build(reward, speed=speed, learning_rate=0.05, value_learning_rate=0.1, decay_steps=1000)
    state = tuners.fit(tuner, jax.random.key(1), tuner.init(blank()), 1000, chunk=500)
    sampler = samplers.ancestral(PROCESS, POLICY(state.params["policy"]))
    x = np.asarray(samplers.sample(sampler, jax.random.key(2), 100_000, PROCESS.times()).x0, float)
    assert abs(x.var() / var - 1) < 0.03 and abs(x.mean()) < 0.02
    prior = jax.random.normal(jax.random.key(3), (100_000, 1))
    log_z, entropy = 0.5 * np.log(2 * np.pi * var), 0.5 * np.log(2 * np.pi * np.e)
    togo = float(tuner.togo(state.params)(prior, jnp.float32(1)).mean())
    assert abs(togo / TAU - (entropy - log_z)) < 0.02


@pytest.mark.slow
def test_gauss_seidel_learns_from_values_just_learnt_and_jacobi_from_old_ones():
    """Plain gradient steps from zero values, d/dc (c - y)^2 = 2 (c - y): chained targets in one sweep, or those of two sweeps.

    T steps of the optimiser a sweep or one, and none of the policy during the warm-up.
    """
    rate, cost = 0.1, jnp.float32([1.0, 2.0, 4.0])
    optimizer = optax.scale_by_schedule(lambda count: 1.0)
    zero = {
        "temperature": 0.0,
        "learning_rate": 0.0,
        "value_learning_rate": rate,
        "time_cost": cost,
        "optimizer": optimizer,
        "batch": 64,
    }
    reward = lambda x0, cond=None: jnp.full(x0.shape[0], -8.0)  # noqa: E731
    ends = {}
    for sweep, sweeps in (("gauss_seidel", 1), ("jacobi", 2)):
        tuner = tuners.dxdp(
            POLICY, PROCESS, reward, _constant, ablation={"sweep": sweep, "sweeps": sweeps}, warmup=2 - sweeps, **zero
        )
        params = {"policy": blank()["policy"], "value": jnp.zeros(3)}
        state, _ = jax.jit(tuner.step)(jax.random.key(0), tuner.init(params))
        ends[sweep] = np.asarray(state.params["value"], float)
        assert int(state.opt_state["value"].count) == (3 if sweep == "gauss_seidel" else 2)
        assert int(state.opt_state["policy"].count) == sweeps - 1
    third = 2 * rate * (8 + 4)
    second = 2 * rate * (third + 2)
    np.testing.assert_allclose(ends["gauss_seidel"], [2 * rate * (second + 1), second, third], rtol=1e-5)
    old = 2 * rate * np.array([1.0, 2.0, 12.0])
    new = old + 2 * rate * (np.array([1 + old[1], 2 + old[2], 12.0]) - old)
    np.testing.assert_allclose(ends["jacobi"], new, rtol=1e-5)


def _constant(params):
    return denoisers.from_function(_constants, params)


def _constants(params, x, t, cond=None):
    i = jnp.minimum(jnp.round((1 - t) * 3).astype(jnp.int32), 2)
    return jnp.broadcast_to(params[i], x.shape[:1])


@pytest.mark.slow
def test_jacobi_is_gauss_seidel_for_one_move():
    process = policies.few_step(policies.variances((0.6,)), (1,))
    policy = policies.policy(process, affine_model)
    params = {"policy": policy.init({k: jnp.zeros(1) for k in "wb"}), "value": {k: jnp.zeros(1) for k in "cqp"}}
    states = []
    for sweep in ("gauss_seidel", "jacobi"):
        tuner = tuners.dxdp(policy, process, REWARD, value_model, temperature=TAU, ablation={"sweep": sweep}, batch=32)
        states.append(tuners.fit(tuner, jax.random.key(0), tuner.init(params), 20, chunk=20))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


@pytest.mark.slow
def test_target_network_and_averages():
    """Targets of a network that never moves leave V one step from the reward; the average is that of the library."""
    tuner = build(
        target_decay=1.0,
        ema_decay=0.5,
        learning_rate=0.0,
        value_learning_rate=0.05,
        temperature=0.0,
        batch=512,
        decay_steps=400.0,
    )
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(blank()), 400)
    value = jax.tree.map(np.asarray, state.params["value"])
    assert abs(value["p"][2] - 0.5 * A) < 0.05  # learnt from the reward
    np.testing.assert_allclose(
        [value["p"][0], value["p"][1]], 0.0, atol=0.02
    )  # learnt from a target that is still zero
    np.testing.assert_array_equal(state.extra.target["value"]["p"], 0.0)
    np.testing.assert_allclose(state.best["value"]["p"], value["p"], atol=0.02)


def test_the_learning_rate_decays_as_a_cosine():
    """Gradient descent on the policy's log sigma alone, in closed form: at half of decay_steps the rate is half."""
    tuner = build(decay_steps=100.0)
    rates = [float(tuner._rate(jnp.float32(0.2), jnp.int32(n))) for n in (0, 50, 100, 500)]
    np.testing.assert_allclose(rates, [0.2, 0.1, 0.0, 0.0], atol=1e-7)


@pytest.mark.slow
def test_a_double_well_against_the_best_gaussian_policies_by_quadrature():
    """T = 2, r(x) = -(x^2 - 1)^2: the lowest cost of policies N(mean(x), sigma_t^2), by dynamic programming on a grid, is reached to 2 %."""
    from scipy.optimize import minimize

    from rgdiff import nets

    tau, speed, steps = 0.5, np.array([0.6, 0.4]), 2
    grid = np.linspace(-6, 6, 601)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    means = np.linspace(-3, 3, 481)
    prior = np.exp(-0.5 * grid**2)
    prior /= prior.sum()

    def backwards(log_sigma, policy=None):
        """Costs on the grid at every time, and the best means (or those of a given policy)."""
        value, chosen = (grid**2 - 1) ** 2, []
        for i in reversed(range(steps)):
            sigma = np.exp(log_sigma[i])
            at = means if policy is None else policy[i]
            ahead = np.interp(at[:, None] + sigma * nodes, grid, value) @ weights
            fixed = tau * (0.5 * (sigma**2 / speed[i] - 1) - log_sigma[i] + 0.5 * np.log(speed[i]))
            if policy is None:
                total = ahead[None] + tau * (at[None] - grid[:, None]) ** 2 / (2 * speed[i])
                best = total.argmin(1)
                value = total[np.arange(len(grid)), best] + fixed
                chosen.append(means[best])
            else:
                value = ahead + tau * (at - grid) ** 2 / (2 * speed[i]) + fixed
        return float(prior @ value), chosen[::-1]

    best = minimize(
        lambda s: backwards(s)[0], np.log([0.5, 0.3]), method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-5}
    )
    process = policies.few_step(policies.variances((0.8, 0.5)), (1,))
    net, critic = nets.MLP((64, 64)), nets.ValueMLP((64, 64))
    policy = policies.policy(process, lambda p: denoisers.from_linen(net, p), reach=20.0)
    x = jnp.zeros((1, 1))
    params = {
        "policy": policy.init(net.init(jax.random.key(0), x, jnp.float32(1))["params"]),
        "value": critic.init(jax.random.key(1), x, jnp.float32(1))["params"],
    }
    reward = lambda x0, cond=None: -((x0[:, 0] ** 2 - 1) ** 2)  # noqa: E731
    tuner = tuners.dxdp(
        policy, process, reward, lambda p: denoisers.from_linen(critic, p), temperature=tau, speed=speed, velocity_decay=1.0,
        learning_rate=3e-3, decay_steps=3000, batch=256, clip=1.0,
    )  # fmt: skip
    state = tuners.fit(tuner, jax.random.key(2), tuner.init(params), 3000, chunk=500)
    learnt = state.best["policy"]
    points, times = jnp.asarray(grid[:, None], jnp.float32), process.times()
    maps = [np.asarray(policy(learnt)(points, times[i]).mean[:, 0], float) for i in range(steps)]
    reached, _ = backwards(np.log(np.asarray(policy.sigma(learnt), float)), maps)
    assert reached > best.fun - 0.005 and reached - best.fun < 0.02 * abs(best.fun) + 0.005, (reached, best.fun)
    np.testing.assert_allclose(policy.sigma(learnt), np.exp(best.x), rtol=0.08)
    said = float(prior @ np.asarray(tuner.togo(state.best)(points, times[0]), float))
    assert abs(said - reached) < 0.02 * abs(reached) + 0.01


# ---------------------------------------------------------------- the contract


def test_numbers_change_without_another_program():
    traces = []

    def counting(params, x, t, cond=None):
        traces.append(1)
        return quadratic(params, x, t)

    model = lambda p: denoisers.from_function(counting, p)  # noqa: E731
    make = lambda **numbers: tuners.dxdp(  # noqa: E731
        POLICY, PROCESS, REWARD, model, batch=16, **({"decay_steps": 100, "target_decay": 0.9} | numbers)
    )
    first = make()
    tuners.fit(first, jax.random.key(0), first.init(blank()), 6, chunk=3)
    assert traces
    traces.clear()
    other = make(
        temperature=0.3, velocity_temperature=0.2, learning_rate=3e-3, sigma_learning_rate=1e-4, value_learning_rate=2e-3, decay_steps=7, warmup=2, clip=3.0,
        time_cost=0.1, velocity_decay=0.9, ema_decay=0.5, target_decay=0.3, limit=3.0,
    )  # fmt: skip
    tuners.fit(other, jax.random.key(1), other.init(blank()), 6, chunk=3)
    assert not traces


@pytest.mark.slow
def test_jit_equals_no_jit_and_continued_equals_uninterrupted():
    tuner = build(batch=16, ema_decay=0.9, target_decay=0.9)
    state = tuner.init(blank())
    plain, jitted = tuner.step(jax.random.key(0), state), jax.jit(tuner.step)(jax.random.key(0), state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, jitted)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), plain[0]) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    whole = tuners.fit(tuner, jax.random.key(1), tuner.init(blank()), 6, chunk=3)
    half = tuners.fit(tuner, jax.random.key(1), tuner.init(blank()), 3, chunk=3)
    again = tuners.fit(tuner, jax.random.key(1), half, 6, chunk=3)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_refusals():
    with pytest.raises(ValueError, match="ends with a projection"):
        tuners.dxdp(POLICY, processes.gaussian(schedules.linear_vp(), (1,)), REWARD, value_model)
    with pytest.raises(ValueError, match="one number or one per move"):
        build(time_cost=jnp.ones(2))
    with pytest.raises(ValueError, match="did you mean 'jacobi'"):
        build(ablation={"sweep": "jacobian"})
    with pytest.raises(ValueError, match="speed must have shape"):
        build(speed=jnp.ones(2))
    with pytest.raises(ValueError, match="temperature must be a finite number >= 0"):
        build(temperature=-1.0)
    assert dataclasses.is_dataclass(build())
