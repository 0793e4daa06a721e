"""Few-step policies: noise levels in float64, kernels against the processes they are made of, and gradients of log sigma."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import checks, denoisers, policies, processes, samplers, schedules, tuners, values
from rgdiff.typing import Move
from tests.worlds.worlds import GaussianWorld


def affine(params, x, t, cond=None):
    """x -> w_i x + b_i of move i, [B, 1]."""
    i = jnp.round((1 - t) * params["w"].shape[0]).astype(jnp.int32)
    w, b = params["w"][i], params["b"][i]
    return (w * x.T + b).T if jnp.ndim(t) else w * x + b


def affine_model(params):
    return denoisers.from_function(affine, params)


def chain(stds=(0.8, 0.5, 0.4), seed=0, **options):
    """A policy y = x + w x + b + sigma z on the line, and parameters."""
    process = policies.few_step(policies.variances(stds), (1,))
    random = np.random.default_rng(seed)
    network = {k: jnp.asarray(0.3 * random.standard_normal(len(stds)), jnp.float32) for k in "wb"}
    policy = policies.policy(process, affine_model, **options)
    return process, policy, policy.init(network)


def law(params, sigma):
    """Mean and variance of the chain's end, float64."""
    mean, variance = 0.0, 1.0
    for w, b, s in zip(*(np.asarray(a, float) for a in (params["w"], params["b"], sigma)), strict=True):
        mean, variance = (1 + w) * mean + b, (1 + w) ** 2 * variance + s**2
    return mean, variance


# ---------------------------------------------------------------- levels


def test_variances_are_those_of_ddpm():
    stds = np.array([0.8, 0.7, 0.6, 0.45, 0.3])
    levels = policies.variances(tuple(stds))
    kept = np.cumprod(1 - stds[::-1] ** 2)[::-1]
    np.testing.assert_allclose(levels.alphas[:-1] ** 2, kept, rtol=1e-6)
    np.testing.assert_allclose(levels.alphas**2 + levels.sigmas**2, 1.0, rtol=1e-6)
    before = np.append(kept[1:], 1.0)  # DDPM's posterior, arXiv 2006.11239, eq. 7
    np.testing.assert_allclose(levels.of_x0, np.sqrt(before) * stds**2 / (1 - kept), rtol=1e-5)
    np.testing.assert_allclose(levels.of_x, np.sqrt(1 - stds**2) * (1 - before) / (1 - kept), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps, left", [(4, 0.343), (5, 0.220), (10, 0.0208)])
def test_fast_dpm_with_the_released_cap(steps, left):
    """What the released schedule leaves of the data: the numbers are of the authors' code, run in float64."""
    assert abs(float(policies.fast_dpm(steps).alphas[0]) ** 2 / left - 1) < 0.003


@pytest.mark.parametrize("steps", [6, 10, 50])
def test_fast_dpm_without_the_cap_reaches_its_end(steps):
    """sqrt(beta) is linear in the step from 0.01, and 1 - beta multiplies to what 1,000 steps of DDPM leave: float64, from the definition."""
    levels = policies.fast_dpm(steps, cap=2.0)
    target = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)))
    kept = np.asarray(levels.alphas, float)[::-1] ** 2
    assert abs(kept[-1] / target - 1) < 1e-3
    assert abs(kept[1] - (1 - 1e-4)) < 1e-6
    root = np.sqrt(1 - kept[2:] / kept[1:-1])  # without the first, which float32 does not resolve
    np.testing.assert_allclose(np.diff(root), np.diff(root)[0], rtol=2e-3)


def test_fast_dpm_calls_a_priors_network_where_its_signal_to_noise_ratio_is_the_levels():
    schedule = schedules.linear_vp()
    levels = policies.fast_dpm(10, schedule, cap=2.0)
    clock = np.asarray(levels.clock, float)
    log_alpha = -0.5 * (0.1 * clock + 0.5 * 19.9 * clock**2)
    assert clock[0] == 1  # 4.04e-5 is left of the data, less than this schedule ever leaves
    np.testing.assert_allclose(np.exp(2 * log_alpha)[1:], np.asarray(levels.alphas[1:-1], float) ** 2, rtol=1e-4)


def test_karras_levels_and_edms_ancestral_step():
    """arXiv 2206.00364 eq. 5; the step is Euler's to sigma_down and noise sigma_up, as k-diffusion has it."""
    steps, low, high, rho = 6, 0.01, 20.0, 5.0
    levels = policies.karras(steps, low=low, high=high, rho=rho)
    i = np.arange(steps)
    sigma = (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(levels.sigmas, np.append(sigma, 0.0), rtol=1e-5)
    for k, (t, s) in enumerate(itertools.pairwise(np.append(sigma, 0.0))):
        up = s * np.sqrt(1 - (s / t) ** 2)
        down = np.sqrt(s**2 - up**2)
        np.testing.assert_allclose(levels.of_x[k], down / t, rtol=1e-4, atol=1e-9)  # x0 + (down / t) (x - x0)
        np.testing.assert_allclose(levels.of_x0[k], 1 - down / t, rtol=1e-4)
        np.testing.assert_allclose(levels.stds[k], up if s else low, rtol=1e-4)


@pytest.mark.parametrize("make", ["karras", "fast_dpm"])
@pytest.mark.parametrize("schedule", ["linear_vp", "karras_ve"])
@pytest.mark.slow
def test_a_priors_network_is_asked_at_its_own_scale(make, schedule):
    """E[x0 | x] of N(m, C) under the *levels*' noise, of a denoiser that knows the prior's schedule alone."""
    mean, cov = np.array([0.5, -1.0]), np.array([[0.6, 0.2], [0.2, 0.9]])
    world = GaussianWorld(mean, cov, schedule=schedule, steps=4)
    within = {"low": 0.02, "high": 10.0} if make == "karras" else {"first": 0.02}
    levels = getattr(policies, make)(4, world.schedule, **within)
    process = policies.few_step(levels, (2,))
    policy = policies.policy(process, world.model, form="denoiser")
    denoiser = policy(policy.init(jnp.float32([0.0, 1.0])))
    x = np.random.default_rng(0).normal(size=(5, 2)) * 3
    for i, t in enumerate(np.asarray(process.times())[:-1]):
        alpha, sigma = float(levels.alphas[i]), float(levels.sigmas[i])
        gain = alpha * cov @ np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(2))
        got = process.mean(
            jnp.asarray(x, jnp.float32), jnp.float32(t), denoiser(jnp.asarray(x, jnp.float32), jnp.float32(t))
        )
        np.testing.assert_allclose(got, mean + (x - alpha * mean) @ gain.T, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- kernels


@pytest.mark.first(1)
@pytest.mark.parametrize("schedule", ["linear_vp", "karras_ve", "flow"])  # flow's first level has alpha = 0
def test_a_policy_from_a_prior_makes_the_priors_own_moves(schedule):
    """Every move but the last is the prior's ancestral step, the last has its projection as mean: the exact denoiser of N(m, C)."""
    world = GaussianWorld([0.5, -1.0], [[0.6, 0.2], [0.2, 0.9]], schedule=schedule, steps=4)
    levels = policies.levels(world.schedule, 4, last=0.05)
    process = policies.few_step(levels, (2,))
    policy = policies.policy(process, world.model, form="denoiser")
    denoiser = policy(policy.init(jnp.float32([0.1, 0.9])))
    x, times, prior = jax.random.normal(jax.random.key(0), (5, 2)), world.times, world.model(jnp.float32([0.1, 0.9]))
    for i in range(4):
        ours = process.reverse(x, process.times()[i], process.times()[i + 1], denoiser(x, process.times()[i]))
        x0 = prior(x, times[i])
        if i < 3:
            theirs: Any = world.process.reverse(x, times[i], times[i + 1], x0)
            np.testing.assert_allclose(ours.mean, theirs.mean, rtol=2e-4, atol=2e-4)
            np.testing.assert_allclose(ours.std[:, 0], np.broadcast_to(theirs.std, 5), rtol=1e-4)
        else:
            np.testing.assert_allclose(ours.mean, x0, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(ours.std, 0.05, rtol=1e-6)
        np.testing.assert_allclose(process.mean(x, process.times()[i], ours), x0, rtol=2e-3, atol=2e-3)
    mixed = denoiser(x[:4], process.times()[:4])  # every row at its own time
    each = [denoiser(x[i : i + 1], process.times()[i]).mean[0] for i in range(4)]
    np.testing.assert_allclose(mixed.mean, jnp.stack(each), rtol=1e-5, atol=1e-6)


def test_standard_deviations_are_bounded_and_start_with_slope_one():
    _, policy, params = chain(reach=4.0)
    slope = jax.jacobian(lambda p: jnp.log(policy.sigma({"log_sigma": p})))(params["log_sigma"])
    np.testing.assert_allclose(slope, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(policy.sigma(params), [0.8, 0.5, 0.4], rtol=1e-6)
    far = {"log_sigma": jnp.float32([1e3, -1e3, 1e3])}
    np.testing.assert_allclose(policy.sigma(far), [3.2, 0.125, 1.6], rtol=1e-5)


def test_pretraining_in_residual_form_finds_the_posterior_of_gaussian_data():
    """DDPM's loss at the T times: for data N(m, v) the optimal residual step is affine, and exact at every level."""
    process, policy, params = chain((0.8, 0.6, 0.3))
    m, v = 0.7, 0.4
    tuner = tuners.pretraining(
        policy.denoising, process.denoising, optax.adam(optax.cosine_decay_schedule(0.03, 800)), grid=3
    )
    data = {"x0": m + np.sqrt(v) * jax.random.normal(jax.random.key(5), (20_000, 1))}
    state = tuners.fit(tuner, jax.random.key(1), tuner.init(params["network"]), 800, data=data, batch=512, chunk=400)
    m, v = float(data["x0"].mean()), float(data["x0"].var())
    levels = jax.tree.map(lambda a: np.asarray(a, float), process.levels)
    alpha, sigma = levels.alphas[:-1], levels.sigmas[:-1]
    gain = alpha * v / (alpha**2 * v + sigma**2)
    w = levels.of_x0 * gain + levels.of_x - 1
    b = levels.of_x0 * (1 - gain * alpha) * m
    np.testing.assert_allclose(state.params["w"], w, atol=0.015)
    np.testing.assert_allclose(state.params["b"], b, atol=0.015)


# ---------------------------------------------------------------- what the rest of the library makes of them


def test_samplers_and_path_kl():
    """The end of a chain has the law of the linear recursion; the path KL to another sigma is the sum of its steps'."""
    process, policy, params = chain()
    other = params | {"log_sigma": params["log_sigma"] + jnp.float32([0.2, -0.1, 0.3])}
    sampler = samplers.ancestral(process, policy(params), reference=policy(other))
    out = samplers.sample(sampler, jax.random.key(0), 100_000, process.times(), keep=samplers.path_kl)
    mean, variance = law(params["network"], policy.sigma(params))
    assert abs(float(out.x0.mean()) - mean) < 4 * np.sqrt(variance / 1e5)
    assert abs(float(out.x0.var()) / variance - 1) < 4 * np.sqrt(2 / 1e5)
    a, b = (np.asarray(policy.sigma(p), float) for p in (params, other))
    np.testing.assert_allclose(samplers.total_path_kl(out), np.sum(0.5 * (a**2 / b**2 - 1) - np.log(a / b)), rtol=1e-4)


@pytest.mark.slow
def test_svdd_and_smc_steer_a_policy():
    """Both raise a linear reward's mean by about its gradient times the posterior's variance; SMC's log Z is the Gaussian integral's."""
    process, policy, params = chain()
    reward = lambda x0, cond=None: x0[:, 0]  # noqa: E731
    mean, variance = law(params["network"], policy.sigma(params))
    value = values.learned(_ToGo(params["network"]["w"], params["network"]["b"], jnp.float32(0)))
    smc = samplers.smc(process, policy(params), value, temperature=1.0)
    out = samplers.sample(smc, jax.random.key(0), 20_000, process.times())
    assert abs(float(out.info["log_z"]) - (mean + variance / 2)) < 0.05
    svdd = samplers.svdd(process, policy(params), value, temperature=1.0, candidates=8)
    x0 = samplers.sample(svdd, jax.random.key(1), 4000, process.times()).x0
    assert float(reward(x0).mean()) > mean + 0.5 * float(policy.sigma(params)[-1]) ** 2


class _ToGo:
    """E[x_end | x_t] of an affine chain."""

    def __init__(self, w, b, zero):
        self.w, self.b = np.asarray(w, float), np.asarray(b, float)

    def __call__(self, x, t, cond=None):
        steps = len(self.w)
        table = [(1.0, 0.0)]
        for w, b in zip(self.w[::-1], self.b[::-1], strict=True):
            g, h = table[-1]
            table.append((g * (1 + w), g * b + h))
        g, h = (jnp.asarray(a, jnp.float32) for a in zip(*table[::-1], strict=True))
        i = jnp.round((1 - t) * steps).astype(jnp.int32)
        return g[i] * x[:, 0] + h[i]


@pytest.mark.parametrize("method", [pytest.param("draft", marks=pytest.mark.slow), "ddpo"])
@pytest.mark.slow
def test_reward_gradients_reach_the_network_and_the_standard_deviations(method):
    """E[-(x - 1)^2] of an affine chain is -(mean - 1)^2 - variance: its gradient in w, b and log sigma, in magnitude."""
    process, policy, params = chain()
    reward = lambda x0, cond=None: -((x0[:, 0] - 1) ** 2)  # noqa: E731

    def exact(params):
        sigma, p = policy.sigma(params), params["network"]
        mean, variance = jnp.float32(0), jnp.float32(1)
        for i in range(3):
            mean, variance = (1 + p["w"][i]) * mean + p["b"][i], (1 + p["w"][i]) ** 2 * variance + sigma[i] ** 2
        return -((mean - 1) ** 2) - variance

    want = jax.grad(exact)(params)
    batch = 200_000
    if method == "draft":
        tuner = tuners.draft(policy, process, reward, process.times(), optax.sgd(1.0), batch=batch)
        got = jax.tree.map(lambda g: -g, jax.grad(lambda p: tuner.loss(p, jax.random.key(0))[0])(params))
        tolerance = 0.02
    else:
        online = tuners.ddpo(policy, process, process.times(), optax.sgd(1.0), batch=batch)
        state = online.init(params)
        experience = jax.jit(online.rollout)(jax.random.key(0), state)
        got, _ = jax.jit(online.gradients)(jax.random.key(1), state, experience, reward(experience.x0))
        got = jax.tree.map(lambda g: -g, got)
        tolerance = 0.12
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)
    assert np.abs(want["log_sigma"]).min() > 0.2  # the tolerance is below what is asked for


@pytest.mark.slow
def test_sft_pg_tunes_a_policy():
    """The critic's gradient passes the last step, which is a draw and no projection; standard deviations move too."""
    process, policy, params = chain()
    critic = lambda p: lambda x0, cond=None: jnp.tanh(x0 @ p)[:, 0]  # noqa: E731
    tuner = tuners.sft_pg(
        policy, process, process.times(), optax.adam(1e-2), batch=64, critic=critic, critic_params=jnp.ones((1, 1)),
        critic_optimizer=optax.adam(1e-2),
    )  # fmt: skip
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(params), 3, data={"x0": jnp.ones((50, 1))}, batch=64)
    assert int(state.skipped) == 0
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).min()), state.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_guidance_by_a_cost_goes_downhill_by_the_gaussian_tilt():
    """For V = a (y - m)^2 / 2 the mean moves by -scale sigma^2 a (mean - m), and at scale 1 / tau it is the tilt to first order in sigma^2."""
    process, policy, params = chain()
    a, m, scale = 3.0, 0.7, 0.5
    cost = lambda x, t, cond=None: 0.5 * a * (x[:, 0] - m) ** 2 * (1 - t)  # noqa: E731
    guide = policies.value_guidance(cost, scale)
    x, t, s = jnp.float32([[0.3], [-1.0]]), process.times()[1], process.times()[2]
    kernel = policy(params)(x, t)
    guided = guide(kernel, move_of(x, t, s, kernel))
    sigma = float(policy.sigma(params)[1])
    shift = -scale * sigma**2 * a * (np.asarray(kernel.mean) - m) * (1 - float(s))
    np.testing.assert_allclose(guided.mean - kernel.mean, shift, rtol=1e-4)
    small = policies.value_guidance(cost, 1e-3)
    exact = 1 / (1 + 1e-3 * a * (1 - float(s)) * sigma**2)
    moved = (np.asarray(small(kernel, move_of(x, t, s, kernel)).mean) - m) / (np.asarray(kernel.mean) - m)
    np.testing.assert_allclose(moved, exact, rtol=1e-5)


def move_of(x, t, s, prediction):
    return Move(x, t, s, None, prediction)


def test_refusals():
    process, _, _ = chain()
    with pytest.raises(ValueError, match="between 0 and 1"):
        policies.variances((0.5, 1.2))
    with pytest.raises(ValueError, match="these levels are of 3 steps"):
        process.times(4)
    with pytest.raises(ValueError, match="makes its 3 moves and no others"):
        checks.times(jnp.float32([1.0, 0.5, 0.0]), process)
    with pytest.raises(ValueError, match="needs a few-step process"):
        policies.policy(processes.gaussian(schedules.linear_vp(), (1,)), affine_model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reach is a factor above 1"):
        policies.policy(process, affine_model, reach=1.0)
    with pytest.raises(ValueError, match="form must be one of"):
        policies.policy(process, affine_model, form="residuals")
    with pytest.raises(ValueError, match="0 < low < high"):
        policies.karras(4, low=3.0, high=2.0)
