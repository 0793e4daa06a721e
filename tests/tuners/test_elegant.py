"""ELEGANT: the bias of a frozen initial law is the predicted one, and gone where x_T is tuned as well; closed forms throughout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies.exact_initial import ALPHA, affine, drawn, gaussian, tune_initial, tune_main
from rgdiff import processes, schedules, tuners
from tests.worlds import controlled
from tests.worlds.worlds import GaussianWorld, assert_mean, slope

f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


def assert_law(x, law, mean=0.02, variance=0.03):
    """Mean and covariance as predicted, within 4 standard errors and what optimisation leaves (in units of the spread)."""
    spread = np.sqrt(np.diag(law.cov))
    assert_mean(x / spread, law.mean / spread, slack=mean)
    z = (x - x.mean(0)) / spread
    assert_mean(
        (z[:, :, None] * z[:, None]).reshape(len(z), -1), (law.cov / np.outer(spread, spread)).ravel(), slack=variance
    )


# ---------------------------------------------------------------- the closed forms themselves


@pytest.mark.parametrize("quadratic", [False, True])
def test_the_tilted_chain_from_the_tilted_start_is_the_tilted_law(quadratic):
    """Two derivations of one law: kernels tilted one by one from x_T tilted by its value; and p(x0) exp(r/alpha)/Z."""
    w = gaussian(quadratic=quadratic, dim=2)
    value, chain = controlled.tilt(controlled.moves(w, ALPHA), controlled.end(w), ALPHA)
    law = controlled.push(controlled.tilted(controlled.prior(w), value, ALPHA), chain)
    for got, expected in zip(law, w.tilted(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)
    c, h, p = w.log_value()[0]  # the worlds' own soft value of x_T
    for got, expected in zip(value, (c, h, p), strict=True):
        np.testing.assert_allclose(got, ALPHA * np.asarray(expected), rtol=1e-8, atol=1e-10)


def test_the_best_shifts_are_the_maximum_and_tend_to_the_tilt():
    """Any other shifts are worth less; the gap to the tilted law is of order 1/T for a quadratic reward."""
    w = gaussian(quadratic=True)
    chain, end = controlled.moves(w, ALPHA), controlled.end(w)
    value, best = controlled.control(chain, end)
    start = controlled.prior(w)

    def worth(shifts):
        law = controlled.push(start, shifts)
        return w.expected_reward(law) - ALPHA * controlled.path_kl(start, chain, shifts, ALPHA)

    top = worth(best)
    assert top == pytest.approx(value.c + value.h @ start.mean - 0.5 * np.trace(value.p @ start.cov), rel=1e-9)
    for i, (matrix, offset, std) in enumerate(best):
        for da, dd in ((1e-2, 0), (-1e-2, 0), (0, 1e-2), (0, -1e-2)):
            other = [*best[:i], (matrix + da, offset + dd, std), *best[i + 1 :]]
            assert worth(other) < top
    gaps = []
    for steps in (64, 128, 256):
        w = gaussian(steps=steps, quadratic=True)
        gaps.append(abs(controlled.best(w, ALPHA).cov - controlled.frozen(w, ALPHA).cov)[0, 0])
    assert -1.3 < slope([64, 128, 256], gaps) < -0.7


# N(0, 1), r = 2x - x^2, alpha = 1, linear_vp, eta = 1. T: mean and variance of the best shifts, then of p(x0) exp(r)/Z; KL
SHORT = {10: (0.571, 0.221, 0.523, 0.262, 0.0109), 100: (0.649, 0.330, 0.648, 0.324, 0.0001)}


def short_world(steps):
    return GaussianWorld([0.0], [[1.0]], steps=steps, b=[2.0], q=[[2.0]])


@pytest.mark.parametrize("steps", SHORT)
def test_moves_of_fixed_variance_stop_short_of_the_tilt(steps):
    """The numbers that the docstrings state, by optimal control; the distance is there although x_T says nothing of x0."""
    mean, variance, tilted_mean, tilted_variance, kl = SHORT[steps]
    w = short_world(steps)
    best, target = controlled.best(w, 1.0), controlled.Law(*w.tilted())
    np.testing.assert_allclose([best.mean[0], best.cov[0, 0]], [mean, variance], atol=5e-4)
    np.testing.assert_allclose([target.mean[0], target.cov[0, 0]], [tilted_mean, tilted_variance], atol=5e-4)
    own = w.law()[1][0, 0]  # of the prior's own chain, of mean 0
    np.testing.assert_allclose(target.cov[0, 0], 1 / (1 / own + 2), rtol=1e-9)
    np.testing.assert_allclose(target.mean[0], 2 * target.cov[0, 0], rtol=1e-9)
    assert controlled.divergence(best, target) == pytest.approx(kl, abs=1e-4)
    np.testing.assert_allclose(controlled.frozen(w, 1.0).cov, target.cov, rtol=1e-3)


@pytest.mark.parametrize(("steps", "variance"), [(10, 0.117), (100, 0.288)])
def test_a_chain_of_the_tilted_denoiser_is_narrower_than_the_tilt(steps, variance):
    """What reward-weighted regression ends at: the denoiser of p exp(r)/Z, whose own chain of T moves loses variance."""
    target = short_world(steps).tilted()
    mean, cov = GaussianWorld(*target, steps=steps).law()
    np.testing.assert_allclose([mean[0], cov[0, 0]], [target[0][0], variance], atol=5e-4)


# ---------------------------------------------------------------- tuned chains


def test_tuning_ends_at_the_best_shifts_not_at_the_tilt():
    mean, variance = SHORT[10][:2]
    w = short_world(10)
    tuner, params = tune_main(w, affine(w), alpha=1.0)
    x = drawn(tuner.process, tuner.model(params), w.times)
    assert_law(x, controlled.Law(np.array([mean]), np.array([[variance]])))


@pytest.mark.slow
def test_the_tuned_chain_has_the_predicted_bias_with_a_frozen_start():
    w = gaussian()
    biased, target = controlled.frozen(w, ALPHA), w.tilted()
    assert abs(biased.mean - target[0])[0] > 0.3 * np.sqrt(target[1][0, 0])  # x_T does tell of x0 here
    tuner, params = tune_main(w, affine(w))
    x = drawn(tuner.process, tuner.model(params), w.times)
    assert_law(x, controlled.best(w, ALPHA))
    assert abs(x.mean() - target[0][0]) > 0.25 * np.sqrt(target[1][0, 0])
    info = jax.jit(tuner.gradients)(params, jax.random.key(1))[1]
    chain = controlled.moves(w, ALPHA)
    best = controlled.control(chain, controlled.end(w))[1]
    exact = controlled.path_kl(controlled.prior(w), chain, best, ALPHA)
    assert float(info["kl"]) == pytest.approx(exact, rel=0.05)


@pytest.mark.slow
def test_elegant_removes_it():
    w = gaussian()
    draw, _, alphas = tune_initial(w, affine(w))
    x_start = np.asarray(draw(jax.random.key(3), 200_000), float)
    assert_law(x_start, controlled.initial(w, ALPHA, alphas), mean=0.04, variance=0.05)
    tuner, params = tune_main(w, affine(w), draw)
    x = drawn(tuner.process, tuner.model(params), w.times)
    target = controlled.Law(*w.tilted())
    assert_law(x, target, mean=0.05, variance=0.05)
    assert abs(x.mean() - target.mean[0]) < 0.15 * abs(controlled.frozen(w, ALPHA).mean - target.mean)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 2])
def test_elegant_with_a_quadratic_reward(dim):
    """Mean and covariance of the best shifts from the best start, which is near the tilted law, not at it (1/T)."""
    w = gaussian(steps=16, quadratic=True, dim=dim)
    draw, _, alphas = tune_initial(w, affine(w), moves=20)
    tuner, params = tune_main(w, affine(w), draw, steps=800)
    x = drawn(tuner.process, tuner.model(params), w.times)
    start = controlled.initial(w, ALPHA, alphas)
    assert_law(x, controlled.best(w, ALPHA, start), mean=0.05, variance=0.06)
    reached, target = controlled.Law(x.mean(0), np.cov(x.T).reshape(dim, dim)), controlled.Law(*w.tilted())
    left = controlled.divergence(controlled.best(w, ALPHA), target)  # with a frozen start
    assert controlled.divergence(reached, target) < 0.6 * left


@pytest.mark.slow
def test_the_value_of_the_start_is_the_soft_value():
    """By regression on rollouts: v(x_T) = alpha log E[exp(r(x0)/alpha) | x_T], a quadratic form in closed form."""
    w = gaussian(quadratic=True)
    learnt = tune_initial(w, affine(w), steps=500)[1]
    value = controlled.tilt(controlled.moves(w, ALPHA), controlled.end(w), ALPHA)[0]
    x = np.linspace(-2, 2, 9)
    got = np.asarray(learnt(f32(x[:, None]), w.times[0]))
    expected = value.c + value.h[0] * x - 0.5 * value.p[0, 0] * x**2
    assert np.abs(got - expected).max() < 0.1 * np.ptp(expected)


# ---------------------------------------------------------------- the chain that draws x_T


@pytest.mark.parametrize("schedule", ["karras_ve", "flow"])
def test_the_untuned_initial_chain_draws_the_prior(schedule):
    """Every move leaves N(0, 1) as it is, at any number of moves; x_T has the main chain's standard deviation."""
    main = GaussianWorld([0.0, 0.0], np.eye(2), schedule=schedule, steps=4).process
    process = processes.initial_law(main, schedules.linear_vp())
    times = process.times(3)
    x = drawn(process, tuners.standard_normal(process), times)
    std = float(main.schedule.prior_std)
    assert_mean(x / std, [0.0, 0.0])
    assert_mean((x / std) ** 2, [1.0, 1.0])
    assert_mean(x[:, 0] * x[:, 1] / std**2, 0.0)


def test_main_chains_start_where_they_are_told():
    w = gaussian()
    draw = jax.tree_util.Partial(lambda key, batch: jnp.full((batch, 1), 2.5))
    tuner, _ = tune_main(w, affine(w), draw, steps=1, batch=8)
    np.testing.assert_array_equal(tuner.process.prior(8).sample(jax.random.key(0)), 2.5)
    x = drawn(tuner.process, tuner.model(affine(w).main[1]), w.times)
    law = w.project(w.push((np.array([2.5]), np.zeros((1, 1))), 0, len(w.grid) - 1, w.theta), w.theta)
    assert_law(x, controlled.Law(*law), mean=0.0, variance=0.0)
