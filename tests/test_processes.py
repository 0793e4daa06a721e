"""Processes: forward and reverse laws are consistent, by linear-Gaussian conditioning and by Bayes' rule over tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import checks, processes
from rgdiff.kernels import Gaussian, PointMass
from tests.worlds.worlds import MASK_SCHEDULES, SCHEDULES

PAIRS = [(0.9, 0.6), (0.5, 0.45), (0.3, 0.02)]
f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_match_their_float64_definition(name):
    reference, schedule = SCHEDULES[name], SCHEDULES[name].build()
    for t in (0.001, 0.01, 0.2, 0.5, 0.9, 0.99):
        alpha, sigma = reference.alpha(t), reference.sigma(t)
        np.testing.assert_allclose(schedule.alpha(f32(t)), alpha, rtol=1e-5)
        np.testing.assert_allclose(schedule.sigma(f32(t)), sigma, rtol=1e-4)
        np.testing.assert_allclose(schedule.log_snr(f32(t)), np.log(alpha**2 / sigma**2), atol=2e-4)
    assert schedule.alpha(f32(0.5)).dtype == jnp.float32
    np.testing.assert_allclose(schedule.prior_std, reference.prior_std)
    process = processes.gaussian(schedule, (2,))
    for steps in (2, 7, 100):
        times = checks.times(process.times(steps), process)
        assert times.shape == (steps,) and times.dtype == jnp.float32


@pytest.mark.parametrize("name", MASK_SCHEDULES)
def test_mask_schedules_and_their_hazard(name):
    build, rate = MASK_SCHEDULES[name]
    schedule = build()
    np.testing.assert_allclose(schedule.rate(f32([0.0, 1.0])), [0, 1], atol=1e-7)
    for t in (1e-3, 0.1, 0.5, 0.999):
        np.testing.assert_allclose(schedule.rate(f32(t)), rate(t), rtol=1e-5)
        step = 1e-6
        hazard = (rate(t + step) - rate(t - step)) / (2 * step) / rate(t)
        np.testing.assert_allclose(schedule.hazard(f32(t)), hazard, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_reverse_at_eta_one_is_the_exact_posterior(name):
    """q(x_s | x_t, x0) by conditioning the joint Gaussian of (x_s, x_t) given x0, x_t = (alpha_t/alpha_s) x_s + noise."""
    reference = SCHEDULES[name]
    process = processes.gaussian(reference.build(), (1,), eta=1.0)
    x0, x_t = 0.8, -0.35
    for t, s in PAIRS:
        (at, st), (a, ss) = ((reference.alpha(u), reference.sigma(u)) for u in (t, s))
        joint = np.array([[ss**2, at / a * ss**2], [at / a * ss**2, st**2]])  # of (x_s, x_t) given x0
        mean = a * x0 + joint[0, 1] / joint[1, 1] * (x_t - at * x0)
        std = np.sqrt(joint[0, 0] - joint[0, 1] ** 2 / joint[1, 1])
        kernel = process.reverse(f32([[x_t]]), f32(t), f32(s), f32([[x0]]))
        np.testing.assert_allclose(kernel.mean, [[mean]], rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(kernel.std, std, rtol=2e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.5])
def test_reverse_keeps_the_marginals_for_every_eta(name, eta):
    """From x_t ~ q(x_t | x0), the reverse kernel with the true x0 leads to q(x_s | x0)."""
    reference = SCHEDULES[name]
    process = processes.gaussian(reference.build(), (1,), eta=eta)
    for t, s in PAIRS:
        x_t = f32([[0.0], [1.0], [reference.alpha(t) * 0.8]])
        kernel = process.reverse(x_t, f32(t), f32(s), jnp.full((3, 1), 0.8))
        assert isinstance(kernel, Gaussian if eta else PointMass)
        at_0, at_1, centre = np.asarray(kernel.mean if eta else kernel.point, float)[:, 0]
        slope, std = at_1 - at_0, float(kernel.std) if eta else 0.0
        np.testing.assert_allclose(centre, reference.alpha(s) * 0.8, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose((slope * reference.sigma(t)) ** 2 + std**2, reference.sigma(s) ** 2, rtol=1e-3)


def test_forward_and_prior():
    process = processes.gaussian(SCHEDULES["karras_ve"].build(), (2, 3))
    x0 = jnp.ones((4, 2, 3)) * 0.5
    t = f32([0.1, 0.4, 0.7, 1.0])
    kernel = process.forward(x0, t)
    assert kernel.mean.shape == x0.shape and kernel.std.shape == (4, 1, 1)
    np.testing.assert_allclose(kernel.std[:, 0, 0], [SCHEDULES["karras_ve"].sigma(float(u)) for u in t], rtol=1e-4)
    prior = process.prior(5)
    assert prior.mean.shape == (5, 2, 3)
    np.testing.assert_allclose(prior.std, 20.0)


def test_times_per_example_equal_scalar_times():
    """A vector of times [B] is B scalar times, for every process."""
    key = jax.random.key(1)
    gaussian = processes.gaussian(SCHEDULES["linear_vp"].build(), (2, 3), eta=0.7)
    masked = processes.masked(MASK_SCHEDULES["cosine"][0](), (2,), 3)
    product = processes.product(x=gaussian, c=masked)
    x = {"x": jax.random.normal(key, (2, 2, 3)), "c": masked.prior(2).sample(key)}
    prediction = {"x": jnp.ones((2, 2, 3)), "c": jax.random.normal(key, (2, 2, 3))}
    x0 = {"x": jnp.ones((2, 2, 3)), "c": jax.nn.one_hot(jnp.array([[0, 1], [2, 2]]), 3)}
    t, s = f32([0.9, 0.4]), f32([0.5, 0.1])
    row = lambda i, tree: jax.tree.map(lambda leaf: leaf[i : i + 1], tree)  # noqa: E731
    at = product.forward(x0, t).sample(key)
    together = product.reverse(x, t, s, prediction).log_prob(at), product.forward(x0, t).log_prob(at)
    for i in range(2):
        alone = product.reverse(row(i, x), t[i], s[i], row(i, prediction)).log_prob(row(i, at))
        np.testing.assert_allclose(together[0][i], alone[0], rtol=1e-5)
        np.testing.assert_allclose(together[1][i], product.forward(row(i, x0), t[i]).log_prob(row(i, at))[0], rtol=1e-5)


@pytest.mark.parametrize("name", MASK_SCHEDULES)
def test_masked_reverse_is_bayes_rule(name):
    """With the true x0, sum over x_t of q(x_t|x0) p(x_s|x_t) is q(x_s|x0), and p(x_s|x_t) the posterior q(x_s|x_t, x0)."""
    build, rate = MASK_SCHEDULES[name]
    process = processes.masked(build(), 1, 3)
    states, x0 = jnp.eye(4)[:, None], jax.nn.one_hot(jnp.array([[1]]), 3)
    logits = jnp.log(x0)
    law = lambda kernel: np.exp([float(kernel.log_prob(y[None])[0]) for y in states])  # noqa: E731
    for t, s in [*PAIRS, (1.0, 0.5), (0.4, 0.0)]:
        q_t, q_s = law(process.forward(x0, f32(t))), law(process.forward(x0, f32(s)))
        np.testing.assert_allclose(q_t, [0, 1 - rate(t), 0, rate(t)], atol=1e-6)
        reverse = np.stack([law(process.reverse(x[None], f32(t), f32(s), logits)) for x in states])
        np.testing.assert_allclose(q_t @ reverse, q_s, atol=1e-6)
        stay = rate(s) / rate(t)  # Bayes: q(x_t = mask | x_s = mask) q(x_s = mask | x0) / q(x_t = mask | x0)
        np.testing.assert_allclose(reverse[3], [0, 1 - stay, 0, stay], atol=1e-6)
        np.testing.assert_allclose(reverse[1], [0, 1, 0, 0], atol=1e-6)


def test_masked_mean_and_finalize():
    process = processes.masked(MASK_SCHEDULES["log_linear"][0](), 2, 3)
    x = jax.nn.one_hot(jnp.array([[1, 3]]), 4)
    mean = process.mean(x, f32(0.5), jnp.log(f32([[[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]])))
    np.testing.assert_allclose(mean, [[[0, 1, 0], [0.7, 0.2, 0.1]]], rtol=1e-5)
    np.testing.assert_array_equal(process.finalize(x[:, :1], f32(0.0), None), [[[0, 1, 0]]])
    np.testing.assert_array_equal(process.prior(1).sample(jax.random.key(0)), jax.nn.one_hot(jnp.array([[3, 3]]), 4))


def test_product_with_a_gaussian_part_takes_the_mode_of_what_is_still_masked():
    process = processes.product(
        x=processes.gaussian(SCHEDULES["flow"].build(), (1,)),
        c=processes.masked(MASK_SCHEDULES["log_linear"][0](), 2, 3),
    )
    assert process.projects and process.stochastic and process.times(4)[-1] > 0
    x = {"x": jnp.zeros((1, 1)), "c": jax.nn.one_hot(jnp.array([[1, 3]]), 4)}
    prediction = {"x": jnp.full((1, 1), 0.3), "c": f32([[[5.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])}
    out = process.finalize(x, f32(0.25), prediction)
    np.testing.assert_allclose(out["x"], [[0.3]])
    np.testing.assert_array_equal(out["c"], [[[0, 1, 0], [0, 0, 1]]])
