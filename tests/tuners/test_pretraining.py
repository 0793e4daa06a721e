"""Pre-training: losses at exact denoisers are Bayes errors, bounds are likelihoods, and small runs reach them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, tuners, values
from rgdiff.tuners._pretraining import stratified_times
from tests.worlds.worlds import (
    SCHEDULES,
    CategoricalWorld,
    GaussianWorld,
    TableDenoiser,
    assert_mean,
    correlated,
    factorised,
)

SGD = optax.sgd(1e-3)
f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
EARLIEST = 1e-3


def world(schedule="linear_vp"):
    return GaussianWorld([0.7, -0.4], [[0.5, 0.3], [0.3, 0.9]], schedule=schedule)


def fixed(denoiser):
    return lambda params: denoiser


def average_loss(tuner, x0, seeds=20):
    loss = jax.jit(lambda key: tuner.loss(f32(0.0), key, x0))
    return np.array([float(loss(jax.random.key(s))) for s in range(seeds)])


def weight(reference, t, target, weighting):
    alpha, sigma = reference.alpha(t), reference.sigma(t)
    snr = alpha**2 / sigma**2
    if weighting == "min_snr":
        return min(snr, 5.0)
    return {"x0": 1.0, "eps": snr, "v": (alpha**2 + sigma**2) ** 2 / sigma**2}[target]


def bayes_error(w, target, weighting="uniform"):
    """E_t weight(t) * mean posterior variance of x0 given x_t: t uniform, by the midpoint rule."""
    latest = 0.992 if target == "eps" else 1.0
    t = EARLIEST + (latest - EARLIEST) * (np.arange(4000) + 0.5) / 4000
    total = 0.0
    for u in t:
        alpha, sigma = w.reference.alpha(u), w.reference.sigma(u)
        gain = alpha * w.c @ np.linalg.inv(alpha**2 * w.c + sigma**2 * np.eye(2))
        total += weight(w.reference, u, target, weighting) * np.trace(w.c - alpha * gain @ w.c) / 2
    return total / len(t)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("target", "weighting"), [("x0", "uniform"), ("eps", "uniform"), ("v", "uniform"), ("x0", "min_snr")]
)
@pytest.mark.first(1)
def test_gaussian_loss_at_the_exact_denoiser_is_the_bayes_error(schedule, target, weighting):
    w = world(schedule)
    x0 = w.m + np.random.default_rng(0).normal(size=(20_000, 2)) @ np.linalg.cholesky(w.c).T
    tuner = tuners.pretraining(fixed(w.denoiser), w.process, SGD, target=target, weighting=weighting)
    np.testing.assert_allclose(average_loss(tuner, f32(x0), 5).mean(), bayes_error(w, target, weighting), rtol=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.slow
def test_the_weighted_error_of_x0_is_the_error_of_the_target(schedule, target):
    """For any denoiser, the loss equals E |target - its prediction|^2 computed directly from the noise by NumPy."""
    w = world(schedule)
    wrong = GaussianWorld([0.0, 0.5], np.eye(2), schedule=schedule)
    rng = np.random.default_rng(1)
    x0 = rng.normal(size=(40_000, 2))
    latest = 0.992 if target == "eps" else 1.0
    t = EARLIEST + (latest - EARLIEST) * (np.arange(40_000) + 0.5) / 40_000
    alpha, sigma = (np.array([f(u) for u in t])[:, None] for f in (w.reference.alpha, w.reference.sigma))
    eps = rng.normal(size=x0.shape)
    x = alpha * x0 + sigma * eps
    guess = np.asarray(wrong.denoiser(f32(x), f32(t)), float)
    eps_guess = (x - alpha * guess) / sigma
    error = eps - eps_guess if target == "eps" else (alpha * eps - sigma * x0) - (alpha * eps_guess - sigma * guess)
    direct = (error**2).mean(1)
    tuner = tuners.pretraining(fixed(wrong.denoiser), w.process, SGD, target=target)
    losses = average_loss(tuner, f32(x0), 5)
    tolerance = 4 * direct.std() / np.sqrt(40_000) * np.sqrt(1 + 1 / 5)
    np.testing.assert_allclose(losses.mean(), direct.mean(), atol=tolerance)


def test_conditions_are_dropped_with_their_probability():
    w, seen = world(), []
    model = fixed(lambda x, t, cond: (seen.append(cond), x)[1])
    for drop, null in ((0.3, 7), (0.3, None)):
        tuner = tuners.pretraining(model, w.process, SGD, drop=drop, null=null)
        tuner.loss(f32(0.0), jax.random.key(0), jnp.zeros((20_000, 2)), jnp.arange(20_000) % 3)
    assert_mean(np.asarray(seen[0]) == 7, 0.3)
    np.testing.assert_array_equal(seen[1], np.arange(20_000) % 3)


def test_stratified_times_are_uniform_and_one_to_a_stratum():
    t = np.asarray(jax.vmap(lambda k: stratified_times(k, 8))(jax.random.split(jax.random.key(0), 20_000)), float)
    unit = (t - EARLIEST) / (1 - EARLIEST)
    np.testing.assert_array_equal(
        np.sort(np.floor(unit * 8 + 1e-4).astype(int) % 8, 1), np.tile(np.arange(8), (20_000, 1))
    )
    assert_mean(unit, np.full(8, 0.5))
    assert_mean(unit**2, np.full(8, 1 / 3))


# ---------------------------------------------------------------- masked


def exact_bound(w, table):
    """- sum over m of E over masks of size m of (1/m) sum over masked log p(x0_i | rest), for every x0, by enumeration."""
    out = np.zeros(len(w.data))
    place = w.classes + 1
    radix = place ** np.arange(w.length)[::-1]
    masks = np.array([[(n >> i) & 1 for i in range(w.length)] for n in range(1, 2**w.length)], bool)
    for n, x0 in enumerate(w.data):
        for m in range(1, w.length + 1):
            same = masks[masks.sum(1) == m]
            for mask in same:
                row = np.where(mask, w.classes, x0) @ radix
                out[n] -= np.log(table[row, mask.nonzero()[0], x0[mask]]).sum() / m / len(same)
    return out


def test_masked_bound_is_the_likelihood_for_exact_conditionals():
    w = correlated()
    x0 = jax.nn.one_hot(w.data, w.classes)
    np.testing.assert_allclose(
        exact_bound(w, w.table), -np.log(w.joint.reshape(-1)), rtol=1e-9
    )  # chain rule in any order
    keys = jax.random.split(jax.random.key(0), 5000)
    draws = jax.vmap(lambda k: tuners.masked_bound(k, w.process, w.denoiser, x0))(keys)
    assert_mean(draws, -np.log(w.joint.reshape(-1)), slack=1e-4)


def test_masked_bound_is_unbiased_for_a_wrong_denoiser_and_above_the_likelihood():
    rng = np.random.default_rng(5)
    w = correlated(schedule="cosine")
    table = rng.dirichlet(np.ones(3), size=(len(w.states), 3)) * 0.9 + 0.1 / 3
    x0 = jax.nn.one_hot(w.data, w.classes)
    expected = exact_bound(w, table)
    denoiser = TableDenoiser(f32(np.log(table)), 3)
    draws = jax.vmap(lambda k: tuners.masked_bound(k, w.process, denoiser, x0))(
        jax.random.split(jax.random.key(0), 5000)
    )
    assert_mean(draws, expected, slack=1e-4)
    # a bound on the negative log-likelihood of the finest chain (many moves: almost never two tokens in one)
    chain = CategoricalWorld(w.joint, steps=512, table=table).law()
    assert np.all(expected > -np.log(chain) - 0.01)


@pytest.mark.parametrize("schedule", ["log_linear", "cosine"])
@pytest.mark.slow
def test_masked_loss_is_the_bound_whatever_the_schedule(schedule):
    """E_t hazard(t) * masked cross-entropy = the bound: entropy of the data at the exact denoiser (t from 1e-3)."""
    for make in (factorised, correlated):
        w = make(schedule=schedule)
        p = w.joint.reshape(-1)
        entropy = -np.sum(p * np.log(p))
        x0 = jax.nn.one_hot(w.data[np.random.default_rng(0).choice(len(p), 20_000, p=p)], 3)
        losses = average_loss(tuners.pretraining(fixed(w.denoiser), w.process, SGD), x0, 10)
        np.testing.assert_allclose(losses.mean(), entropy, rtol=0.02)


# ---------------------------------------------------------------- small runs


@pytest.mark.slow
def test_a_tiny_run_reaches_the_bayes_error_and_samples_the_data():
    """1-D Gaussian data, a network affine in x with polynomial coefficients in t, predicting v on the flow schedule."""
    w = GaussianWorld([0.8], [[0.25]], schedule="flow", steps=64)

    def network(params, x, t, cond=None):
        powers = jnp.broadcast_to(t, x.shape[:1])[:, None] ** jnp.arange(7)
        return (powers @ params["slope"])[:, None] * x + (powers @ params["offset"])[:, None]

    def model(params):
        return denoisers.predicts("v", denoisers.from_function(network, params), w.schedule)

    rng = np.random.default_rng(0)
    data = {"x0": f32(0.8 + 0.5 * rng.normal(size=(20_000, 1)))}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 3000))
    tuner = tuners.pretraining(model, w.process, optimizer, target="v", ema_decay=0.99)
    state = tuner.init({"slope": jnp.zeros(7), "offset": jnp.zeros(7)})
    state = tuners.fit(tuner, jax.random.key(0), state, 3000, data=data, batch=256, chunk=1000)
    test = f32(0.8 + 0.5 * rng.normal(size=(40_000, 1)))
    keys = [jax.random.key(s) for s in range(5)]
    trained = np.mean([tuner.loss(state.best, k, test) for k in keys])
    exact = tuners.pretraining(fixed(w.denoiser), w.process, SGD, target="v")
    bayes = np.mean([exact.loss(f32(0.0), k, test) for k in keys])
    assert bayes * 0.999 < trained < bayes * 1.02 and int(state.skipped) == 0, (trained, bayes)


@pytest.mark.slow
def test_the_average_follows_its_formula():
    """average <- d average + (1 - d) params with d = min(decay, (1 + n) / (10 + n)), n = 0, 1, ..."""
    w = world()
    tuner = tuners.pretraining(
        lambda p: denoisers.from_function(lambda p, x, t, c: p * x, p), w.process, optax.sgd(0.1), ema_decay=0.2
    )  # noqa: E501
    state = tuner.init(f32(0.5))
    average = 0.5
    for n in range(6):
        state, _ = tuner.step(jax.random.key(n), state, {"x0": jnp.ones((16, 2))})
        d = min(0.2, (1 + n) / (10 + n))
        average = d * average + (1 - d) * float(state.params)
        np.testing.assert_allclose(state.average, average, rtol=1e-6)
        assert int(state.step) == n + 1
    assert state.best is state.average


# ---------------------------------------------------------------- values


@pytest.mark.slow
def test_value_regression_reaches_the_posterior_mean_of_a_linear_reward():
    """E[<b, x0> | x_t] = <b, G x_t + g>: the loss at it is the posterior variance, its gradient zero, and a fit finds it."""
    w = GaussianWorld([0.5], [[0.6]], schedule="flow", b=[2.0])
    rng = np.random.default_rng(0)
    x0 = f32(0.5 + np.sqrt(0.6) * rng.normal(size=(50_000, 1)))
    data = {"x0": x0, "reward": 2 * x0[:, 0]}

    def features(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])[:, None]
        powers = t ** jnp.arange(7)
        return jnp.concatenate([powers, powers * x], 1)

    def network(params, x, t, cond=None):  # the exact value plus a correction to be found zero
        return w.denoiser(x, t) @ f32(w.b) + features(x, t) @ params

    def plain(params, x, t, cond=None):
        return features(x, t) @ params

    model = lambda f: lambda p: values.learned(denoisers.from_function(f, p))  # noqa: E731
    exact = tuners.value_regression(model(network), w.process, SGD)
    loss, g = jax.vmap(jax.value_and_grad(exact.loss), (None, 0, None))(
        jnp.zeros(14), jax.random.split(jax.random.key(0), 20), data
    )
    t = EARLIEST + (1 - EARLIEST) * (np.arange(2000) + 0.5) / 2000
    variance = 0.6 * t**2 / ((1 - t) ** 2 * 0.6 + t**2)
    np.testing.assert_allclose(loss.mean(), 4 * variance.mean(), rtol=0.02)
    assert_mean(g, np.zeros(14), errors=5)
    tuner = tuners.value_regression(
        model(plain), w.process, optax.adam(optax.cosine_decay_schedule(0.05, 3000)), ema_decay=0.99
    )
    state = tuners.fit(tuner, jax.random.key(1), tuner.init(jnp.zeros(14)), 3000, data=data, batch=512, chunk=1000)
    for t in (0.1, 0.4, 0.8):
        x = (1 - t) * 0.5 + np.linspace(-1.5, 1.5, 7)[:, None] * np.sqrt((1 - t) ** 2 * 0.6 + t**2)
        expected = w.denoiser(f32(x), f32(t)) @ f32(w.b)
        np.testing.assert_allclose(plain(state.best, f32(x), f32(t)), expected, atol=0.12)


def test_value_regression_leaves_infeasible_examples_out():
    w = world()
    tuner = tuners.value_regression(lambda p: lambda x, t, cond=None: jnp.full(x.shape[0], p), w.process, SGD)
    reward = f32([1.0, np.nan, 3.0, np.nan])
    batch = {"x0": jnp.zeros((4, 2)), "reward": reward}
    loss, g = jax.value_and_grad(tuner.loss)(f32(0.0), jax.random.key(0), batch)
    np.testing.assert_allclose([loss, g], [(1 + 9) / 2, -(1 + 3)], rtol=1e-6)


def test_half_precision_keeps_a_float32_master():
    """Parameters in bfloat16 follow, rounded, those of the same optimiser in float32; alone, small steps are lost in them."""
    gradients = jax.random.normal(jax.random.key(0), (200, 5)) + 0.5
    first = jnp.linspace(0.5, 2.0, 5)

    def run(optimizer, dtype):
        state = tuners.start(first.astype(dtype), optimizer)
        step = lambda state, g: (tuners.update(state, g.astype(dtype), optimizer)[0], None)  # noqa: E731
        return jax.lax.scan(step, state, gradients.astype(jnp.bfloat16).astype(jnp.float32))[0]

    adam = optax.adam(1e-3)
    exact, alone = run(adam, jnp.float32).params, run(adam, jnp.bfloat16).params
    begin = first.astype(jnp.bfloat16).astype(jnp.float32) - first
    state = run(tuners.float32_master(adam), jnp.bfloat16)
    assert state.params.dtype == jnp.bfloat16 and {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} == {
        "float32",
        "int32",
    }
    np.testing.assert_allclose(state.opt_state.params, exact + begin, rtol=1e-5)
    np.testing.assert_array_equal(state.params, state.opt_state.params.astype(jnp.bfloat16))
    assert np.abs(alone.astype(jnp.float32) - exact).max() > 0.05
    with pytest.raises(ValueError, match="must be an optax transformation"):
        tuners.float32_master(3)


@pytest.mark.slow
def test_moments_as_one_vector_are_the_same_moments():
    """The clip is of the norm over all parameters, and decay of each: updates are those of a tree, over clipped and skipped gradients."""
    params = {"a": jnp.linspace(0.5, 2.0, 6).reshape(2, 3), "b": jnp.float32(-1.0)}
    gradients = {
        "a": jax.random.normal(jax.random.key(0), (50, 2, 3)),
        "b": jnp.linspace(-3.0, 3.0, 50).at[7].set(jnp.nan),
    }

    def run(flat):
        optimizer = tuners.adamw(0.05, warmup=5, decay_steps=50, clip=1.5, weight_decay=0.1, flat=flat)
        step = lambda state, g: tuners.update(state, g, optimizer)  # noqa: E731
        return jax.lax.scan(step, tuners.start(params, optimizer), gradients)[0]

    tree, vector = run(False), run(True)
    assert int(vector.skipped) == 1 and np.abs(vector.params["a"] - params["a"]).max() > 0.3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree.params, vector.params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(vector.opt_state)}
    assert shapes == {(), (7,)}
