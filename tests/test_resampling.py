"""Resampling: unbiased copies for every scheme, ordered variances, and the edges: one weight, no weight, rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import resampling

each_scheme = pytest.mark.parametrize("name", list(resampling.SCHEMES))
LOG_W = jnp.asarray([0.3, -jnp.inf, 1.7, -2.0, 0.3, 2.4, -0.5])


def copies(name, log_weights, runs=20_000):
    keys = jax.random.split(jax.random.key(0), runs)
    index = jax.vmap(lambda key: resampling.SCHEMES[name](key, log_weights))(keys)
    return np.asarray(jax.nn.one_hot(index, log_weights.shape[0]).sum(1), float)


@each_scheme
@pytest.mark.first(2)
def test_expected_copies_are_the_weights(name):
    weights = np.exp(np.asarray(LOG_W, float))
    expected = len(weights) * weights / weights.sum()
    drawn = copies(name, LOG_W + 50.0)  # unnormalised
    error = drawn.std(0) / np.sqrt(len(drawn))
    np.testing.assert_array_less(np.abs(drawn.mean(0) - expected), 4.5 * error + 1e-5)
    assert (drawn[:, 1] == 0).all() and (drawn.sum(1) == len(weights)).all()


def test_variances_are_those_of_the_schemes():
    """Multinomial: n w (1 - w). Systematic and residual never leave floor or ceil (residual: below floor) of n w."""
    weights = np.exp(np.asarray(LOG_W, float))
    weights /= weights.sum()
    n = len(weights)
    np.testing.assert_allclose(copies("multinomial", LOG_W).var(0), n * weights * (1 - weights), rtol=0.05, atol=1e-3)
    drawn = copies("systematic", LOG_W)
    assert (drawn >= np.floor(n * weights)).all() and (drawn <= np.ceil(n * weights)).all()
    assert (copies("residual", LOG_W) >= np.floor(n * weights)).all()
    total = {name: copies(name, LOG_W).var(0).sum() for name in resampling.SCHEMES}
    assert total["systematic"] <= total["stratified"] < total["residual"] < total["multinomial"]


@each_scheme
@pytest.mark.first(2)
def test_equal_weights_and_one_weight(name):
    one = resampling.SCHEMES[name](jax.random.key(0), jnp.full(5, -jnp.inf).at[3].set(-700.0))
    np.testing.assert_array_equal(one, 3)
    if name != "multinomial" and name != "stratified":
        np.testing.assert_array_equal(
            jnp.sort(resampling.SCHEMES[name](jax.random.key(0), jnp.zeros(48))), np.arange(48)
        )


@each_scheme
@pytest.mark.parametrize("bad", [-jnp.inf, jnp.nan])
@pytest.mark.slow
def test_weights_without_a_positive_one_are_equal(name, bad):
    drawn = copies(name, jnp.full(4, bad), 4000)
    np.testing.assert_allclose(drawn.mean(0), 1.0, atol=0.06)
    np.testing.assert_allclose(resampling.ess(jnp.full(4, bad)), 4.0, rtol=1e-6)


@each_scheme
@pytest.mark.first(2)
def test_a_cumulated_sum_below_one_never_reaches_a_dead_particle(name):
    """100,000 float32 weights do not add up to one; the dead tail is never drawn."""
    log_weights = jax.random.normal(jax.random.key(1), (100_000,)).at[-500:].set(-jnp.inf)
    for seed in range(4):
        assert int(resampling.SCHEMES[name](jax.random.key(seed), log_weights).max()) < 99_500


@pytest.mark.slow
def test_the_standard_error_of_lineages():
    x = jnp.asarray([1.0, 4.0, 2.0, 7.0, 3.0])
    independent = resampling.standard_error(x, jnp.arange(5))
    np.testing.assert_allclose(independent, np.std(x, ddof=1) / np.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(
        resampling.standard_error(x.at[1].set(jnp.nan), jnp.arange(5)), np.std([1, 2, 7, 3], ddof=1) / 2, rtol=1e-6
    )
    # Two lineages of weights 1/4 and 3/4 and means 3 and 5: the mean is 4.5, deviations 1.5 / 4 and 3 * 0.5 / 4.
    weights = jnp.log(jnp.asarray([1.0, 1.0, 2.0, 4.0])) + 60
    two = resampling.standard_error(jnp.asarray([2.0, 4.0, 7.0, 4.0]), jnp.asarray([9, 9, 3, 3]), weights)
    np.testing.assert_allclose(two, np.sqrt(2 * (1.5 / 4) ** 2 / (1 - 1 / 16 - 9 / 16)), rtol=1e-5)
    assert np.isnan(resampling.standard_error(x, jnp.full(5, 2)))


def test_ess():
    np.testing.assert_allclose(resampling.ess(jnp.zeros(9)), 9, rtol=1e-6)
    np.testing.assert_allclose(resampling.ess(jnp.asarray([800.0, -800.0])), 1, rtol=1e-6)
    weights = np.exp(np.asarray(LOG_W, float))
    np.testing.assert_allclose(resampling.ess(LOG_W), weights.sum() ** 2 / (weights**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(resampling.log_mean_exp(LOG_W), np.log(weights.mean()), rtol=1e-5)
