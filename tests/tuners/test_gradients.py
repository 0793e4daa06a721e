"""Reward gradients: magnitudes against exact gradients of the objective they claim, in worlds where it has a closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, processes, samplers, schedules, tuners
from tests.worlds.worlds import GaussianWorld, codes

SGD = optax.sgd(1e-3)
THETA = np.array([0.2, 0.9])  # shift and scale of the denoiser
f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


def world(eta, **options):
    return GaussianWorld(
        [0.7, -0.4], [[0.5, 0.3], [0.3, 0.9]], schedule="flow", steps=5, eta=eta, b=[1.0, 0.5],
        q=[[0.6, 0.1], [0.1, 0.3]], theta=THETA, **options,
    )  # fmt: skip


def numeric(f, theta=THETA, step=1e-5):
    theta = np.asarray(theta, float)
    unit = np.eye(theta.size) * step
    return np.array([(f(theta + u) - f(theta - u)) / (2 * step) for u in unit])


def gradient(tuner, params=THETA, seeds=4):
    """Gradient of the objective (minus the loss), averaged over keys."""
    grad = jax.jit(jax.grad(lambda p, k: tuner.loss(p, k)[0]))
    return -np.mean([np.asarray(grad(f32(params), jax.random.key(s)), float) for s in range(seeds)], 0)


def value_and_grad(tuner, params, key):
    return jax.jit(jax.value_and_grad(lambda p: tuner.loss(p, key)[0]))(params)


def assert_magnitude(got, exact, tolerance):
    got, exact = np.asarray(got), np.asarray(exact)
    ratio = np.linalg.norm(got) / np.linalg.norm(exact)
    assert abs(ratio - 1) < tolerance, (ratio, got, exact)
    assert np.linalg.norm(got - exact) < 1.5 * tolerance * np.linalg.norm(exact), (got, exact)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.first(1)
def test_truncated_reward_gradient(eta):
    """K = 1, 3 and all T calls: d/dtheta E r(x0), earlier states held constant, by the linear-Gaussian recursion."""
    w = world(eta)
    exact = {k: numeric(lambda theta, k=k: w.truncated(THETA, theta, k)) for k in (1, 3, 5)}
    assert np.linalg.norm(exact[1]) < 0.95 * np.linalg.norm(exact[5])  # truncation matters here
    for k, expected in exact.items():
        tuner = tuners.draft_k(w.model, w.process, w.reward, w.times, SGD, k=k, batch=50_000)
        assert_magnitude(gradient(tuner), expected, 0.02)
    np.testing.assert_allclose(exact[5], numeric(lambda theta: w.expected_reward(w.law(theta))), rtol=1e-6)


@pytest.mark.slow
def test_draft_k_of_all_calls_is_draft():
    for process, reward, model, params in (gaussian_case(), masked_case()):
        times = process.times(4)
        calls = times.shape[0] - 1 + process.projects
        full = tuners.draft(model, process, reward, times, SGD, batch=64)
        same = tuners.draft_k(model, process, reward, times, SGD, k=calls, batch=64)
        key = jax.random.key(0)
        for a, b in zip(value_and_grad(full, params, key), value_and_grad(same, params, key), strict=True):
            np.testing.assert_array_equal(a, b)
        assert full.network_calls() == calls


def gaussian_case():
    w = world(1.0)
    return w.process, w.reward, w.model, f32(THETA)


def masked_case():
    process = processes.masked(schedules.log_linear_mask(), 3, 3)
    params = f32(np.random.default_rng(0).normal(size=(3, 3)))
    return process, linear_tokens, free_logits, params


def free_logits(params):
    return denoisers.from_function(_free, params)


def _free(params, x, t, cond=None):
    return jnp.broadcast_to(params, (x.shape[0], *params.shape))


def linear_tokens(x0, cond=None):
    return (x0 @ f32([1.0, -0.5, 2.0])).sum(-1)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.first(1)
def test_the_dead_head_has_exactly_no_gradient(k):
    """With one parameter per call, the calls before the cut get zero, not merely a small number."""
    w = world(1.0)
    calls = w.times.shape[0]

    def model(params):
        return denoisers.from_function(
            lambda p, x, t, c: w.denoiser(x, t) + p[jnp.argmin(jnp.abs(w.times - t[0]))], params
        )

    tuner = tuners.draft_k(model, w.process, w.reward, w.times, SGD, k=k, batch=100)
    g = value_and_grad(tuner, jnp.zeros(calls), jax.random.key(0))[1]
    np.testing.assert_array_equal(g[: calls - k], 0.0)
    assert np.all(np.abs(g[calls - k :]) > 1e-3)


@pytest.mark.parametrize("case", [gaussian_case, masked_case])
@pytest.mark.slow
def test_remat_changes_no_gradient(case):
    process, reward, model, params = case()
    grads = []
    for remat in ("none", "everything", "dots"):
        tuner = tuners.draft(model, process, reward, process.times(4), SGD, batch=32, remat=remat)
        grads.append(value_and_grad(tuner, params, jax.random.key(1))[1])
    for g in grads[1:]:
        np.testing.assert_allclose(g, grads[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.first(1)
def test_draft_lv_gradient_and_its_switches(eta):
    """DRaFT-1's gradient plus n times that of one denoising of re-noised final samples, both in closed form."""
    w = world(eta)
    one = numeric(lambda theta: w.truncated(THETA, theta, 1))
    again = numeric(lambda theta: w.renoised(THETA, theta))
    assert np.linalg.norm(one - again) > 0.05 * np.linalg.norm(one)  # the two terms can be told apart
    cases = [
        (True, "sum", 2, one + 2 * again),
        (True, "mean", 2, (one + 2 * again) / 3),
        (False, "sum", 3, 3 * again),
        (False, "mean", 3, again),
    ]
    for on, reduce, n, expected in cases if eta else cases[:1]:
        tuner = tuners.draft_lv(
            w.model, w.process, w.reward, w.times, SGD, n=n, on_trajectory=on, reduce=reduce, batch=30_000
        )
        assert_magnitude(gradient(tuner), expected, 0.02)
        assert tuner.network_calls() == w.times.shape[0] + n


@pytest.mark.parametrize("k", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_kl_regularised_gradient_and_its_value(k):
    """- weight * path KL, to the reference's own chain; moves before the cut through their kernels, not their states."""
    w = world(1.0)
    other = GaussianWorld([0.2, 0.1], np.eye(2) * 0.8, schedule="flow", steps=5, eta=1.0)
    cut, weight = 5 - k, 0.3

    def objective(theta):
        return w.truncated(THETA, theta, k) - weight * w.path_kl(theta, other, THETA, cut)

    tuner = tuners.draft_k(
        w.model, w.process, w.reward, w.times, SGD, k=k, batch=50_000, reference=other.denoiser, temperature=weight
    )
    exact = numeric(objective)
    reward_only = numeric(lambda theta: w.truncated(THETA, theta, k))
    assert np.linalg.norm(exact - reward_only) > 0.3 * np.linalg.norm(exact)
    assert_magnitude(gradient(tuner), exact, 0.02)
    info = tuner.loss(f32(THETA), jax.random.key(0))[1]
    np.testing.assert_allclose(info["kl"], w.path_kl(THETA, other), rtol=0.02)
    np.testing.assert_allclose(info["reward"], w.expected_reward(w.law()), atol=0.03)


# ---------------------------------------------------------------- masked


@pytest.mark.parametrize("moves", [8, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_masked_reward_gradient_has_its_magnitude(moves):
    """Independent tokens, a reward with interactions: straight-through tokens and copies outside the draw are unbiased.

    E r = sum over sequences of prod_i softmax(theta_i) r, for every T; a draw with copies inside it gives 1/T of it.
    """
    rng = np.random.default_rng(1)
    params, table = f32(rng.normal(size=(3, 3))), f32(rng.normal(size=(3, 3, 3)))
    process = processes.masked(schedules.log_linear_mask(), 3, 3)
    reward = lambda x0, cond=None: jnp.einsum("bi,bj,bk,ijk->b", x0[:, 0], x0[:, 1], x0[:, 2], table)  # noqa: E731
    exact = jax.grad(lambda p: jnp.einsum("i,j,k,ijk->", *jax.nn.softmax(p), table))(params)
    tuner = tuners.draft(free_logits, process, reward, process.times(moves), SGD, batch=40_000)
    assert_magnitude(gradient(tuner, params, seeds=2).ravel(), np.ravel(exact), 0.03)


@pytest.mark.parametrize(
    ("moves", "relaxation"),
    [
        (8, "straight_through"),
        pytest.param(32, "straight_through", marks=pytest.mark.slow),
        pytest.param(8, "reinmax", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_masked_reward_gradient_through_the_network(moves, relaxation):
    """Two dependent tokens: gradients also flow from the second token's logits into the first. By enumeration of the chain.

    p(x_2 | x_1) is linear in the one-hot x_1. With an additive reward so is E[r | x_1], and the straight-through
    gradient is unbiased; with an interaction E[r | x_1] is quadratic, which takes ReinMax.
    """
    classes = 3
    rng = np.random.default_rng(2)
    params, table = f32(1.2 * rng.normal(size=(classes, classes))), f32(rng.normal(size=(classes, classes)))
    if relaxation == "straight_through":
        table = table[:, :1] + table[:1, :]
    process = processes.masked(schedules.log_linear_mask(), 2, classes, relaxation=relaxation)
    times = process.times(moves)
    grid = np.asarray(times)

    def parts(params):
        joint = jax.nn.softmax(params.ravel()).reshape(classes, classes)
        first, second = joint.sum(1), joint.sum(0)
        return first, second, joint / first[:, None], (joint / second).T  # p1, p2, p(2|1), p(1|2)

    def network(params, x, t, cond=None):
        first, second, second_given, first_given = parts(params)
        p1 = x[:, 1, :-1] @ first_given + x[:, 1, -1:] * first
        p2 = x[:, 0, :-1] @ second_given + x[:, 0, -1:] * second
        return jnp.log(jnp.stack([p1, p2], 1))

    def expected(params):
        """E r over the T-move chain: the law of (both masked, one known, both known), moved exactly."""
        first, second, second_given, first_given = parts(params)
        none, known1, known2, both = 1.0, jnp.zeros(classes), jnp.zeros(classes), jnp.zeros((classes, classes))
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            move, stay = (t - s) / t, s / t
            both = (
                both
                + move**2 * none * jnp.outer(first, second)
                + move * known1[:, None] * second_given
                + move * (known2[:, None] * first_given).T
            )
            known1, known2 = (
                stay * known1 + move * stay * none * first,
                stay * known2 + move * stay * none * second,
            )
            none = stay**2 * none
        return (both * table).sum()

    if relaxation == "straight_through":  # additive off the corners of the simplex too
        reward = lambda x0, cond=None: x0[:, 0] @ table[:, 0] + x0[:, 1] @ (table[0] - table[0, 0])  # noqa: E731
    else:
        reward = lambda x0, cond=None: jnp.einsum("bi,bj,ij->b", x0[:, 0], x0[:, 1], table)  # noqa: E731
    model = lambda params: denoisers.from_function(network, params)  # noqa: E731
    tuner = tuners.draft(model, process, reward, times, SGD, batch=100_000)
    exact = jax.jit(jax.grad(expected))(params)
    x0 = samplers.sample(samplers.ancestral(process, model(params)), jax.random.key(9), 100_000, times).x0
    r = np.asarray(table).ravel()[np.asarray(codes(x0))]
    assert abs(r.mean() - float(expected(params))) < 4 * r.std() / np.sqrt(r.size)
    assert_magnitude(gradient(tuner, params, seeds=2).ravel(), np.ravel(exact), 0.03)


@pytest.mark.slow
def test_masked_truncation_holds_earlier_states_constant():
    """K = 1 of T = 2 moves, independent tokens: only tokens unmasked by the last move count, half of them."""
    process, reward, model, params = masked_case()
    exact = jax.grad(lambda p: linear_tokens(jax.nn.softmax(p)[None])[0])(params)
    for k, share in ((1, 0.5), (2, 1.0)):
        tuner = tuners.draft_k(model, process, reward, process.times(2), SGD, k=k, batch=50_000)
        assert_magnitude(gradient(tuner, params, seeds=1).ravel(), share * np.ravel(exact), 0.03)


def test_training_by_reward_reaches_the_optimum():
    """DRaFT with a quadratic reward minus weight * KL on shift and scale ends where the closed-form objective is stationary."""
    w = world(1.0)
    other = GaussianWorld(w.m, w.c, schedule="flow", steps=5, eta=1.0)
    tuner = tuners.draft(
        w.model, w.process, w.reward, w.times, optax.adam(optax.cosine_decay_schedule(0.05, 300)), batch=512,
        reference=other.denoiser, temperature=0.5,
    )  # fmt: skip
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(f32([0.0, 1.0])), 300, chunk=100)
    objective = lambda theta: w.expected_reward(w.law(theta)) - 0.5 * w.path_kl(theta, other)  # noqa: E731
    end = np.asarray(state.params, float)
    at_start, at_end = numeric(objective, [0.0, 1.0]), numeric(objective, end)
    assert np.linalg.norm(at_end) < 0.03 * np.linalg.norm(at_start), (end, at_start, at_end)
    assert int(state.skipped) == 0
