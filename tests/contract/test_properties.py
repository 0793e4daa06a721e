"""Properties under rewards of any kind: tables with NaN, infinities, 1e30, ties, all the same, as hypothesis finds them.

Every sampler of values ends in valid sequences, weights are weights, the best of N is the best that is feasible.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rgdiff import guides, resampling, samplers, values
from rgdiff.samplers._svdd import log_soft_weights
from tests.worlds.worlds import TableReward, correlated

ANY = st.sampled_from([0.0, 1.0, -2.5, 1e-30, 1e30, -1e30, np.inf, -np.inf, np.nan])
FEW = settings(max_examples=40, deadline=None, derandomize=True)
SIZE, LENGTH, BATCH = 3, 2, 4


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@functools.cache
def world():
    return correlated(length=LENGTH, classes=SIZE, steps=3, temperature=0.7)


def guide(value):
    return guides.gradient_guide(value, 1.0)


PARTICLES = {
    "difference": {},
    "max": {"potential": "max", "resampling": "multinomial"},
    "sum": {"potential": "sum", "resampling": "residual"},
    "terminal": {"potential": "terminal", "resampling": "stratified"},
    "adaptive": {"adaptive": 0.6, "ess_threshold": 0.7},
    "twisted": {"twist": 1.0, "ess_threshold": 1.0},
}
CANDIDATES = {
    "soft": {"select_initial": True},
    "argmax": {"selection": "argmax"},
    "chunks": {"chunk": 2},
    "distinct": {"distinct": True, "timeless": True},
    "replace": {"replace": 0.3},
    "proposal": {"proposal": guide},
}


@functools.cache
def drawn(kind: str, name: str):
    """A compiled function (table, seed) -> x0, its rewards, log-weights."""
    w = world()

    @jax.jit
    def draw(table, seed):
        reward = TableReward(table)
        value = values.posterior_mean(reward, w.process, w.denoiser)
        if kind == "particles":
            sampler = samplers.smc(w.process, w.denoiser, value, temperature=0.5, **PARTICLES[name])
        elif kind == "candidates":
            options = {k: v(value) if k == "proposal" else v for k, v in CANDIDATES[name].items()}
            sampler = samplers.svdd(w.process, w.denoiser, value, temperature=0.5, candidates=4, **options)
        else:
            sampler = samplers.best_of_n(samplers.ancestral(w.process, w.denoiser), reward, 4)
        out = samplers.sample(sampler, jax.random.key(seed), BATCH, w.times)
        return out.x0, reward(out.x0), out.info

    return draw


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("particles", "adaptive"),
        *(pytest.param("particles", name, marks=pytest.mark.slow) for name in PARTICLES if name != "adaptive"),
        ("candidates", "distinct"),
        *(pytest.param("candidates", name, marks=pytest.mark.slow) for name in CANDIDATES if name != "distinct"),
        ("best of", "4"),
    ],
)
@FEW
@given(arrays(np.float32, SIZE**LENGTH, elements=ANY), st.integers(0, 2**16))
def test_any_table_of_rewards_ends_in_valid_sequences(kind, name, table, seed):
    x0, rewards, info = drawn(kind, name)(jnp.asarray(table), seed)
    x0 = np.asarray(x0)
    assert ((x0 == 0) | (x0 == 1)).all() and (x0.sum(-1) == 1).all() and x0.shape == (BATCH, LENGTH, SIZE)
    if kind == "particles":
        weights = np.exp(np.asarray(info["log_weights"], float))
        np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-4)
        assert not np.isnan(info["log_z"])
        rewards = np.asarray(rewards)
        if (weights[np.isnan(rewards) | np.isneginf(rewards)] > 1e-6).any():
            assert np.isneginf(info["log_z"]) or not np.isfinite(table).any()
    if kind == "best of":
        every = np.asarray(info["rewards"])
        met = np.isfinite(every).any(1) | np.isposinf(every).any(1)
        assert not np.isnan(np.asarray(rewards)[met]).any()
        np.testing.assert_array_equal(np.asarray(rewards)[met], np.nanmax(every[met], 1))


@FEW
@given(arrays(np.float32, (5, 3), elements=ANY), st.sampled_from([1e-3, 0.5, 10.0]))
def test_soft_weights(candidates, temperature):
    log_weights = np.asarray(log_soft_weights(jnp.asarray(candidates), temperature))
    assert not np.isnan(log_weights).any() and (log_weights.max(0) == 0).all()
    for column, weights in zip(candidates.T, log_weights.T, strict=True):
        some = ~np.isnan(column)
        assert not some.any() or np.isneginf(weights[~some]).all()
        order = np.argsort(column[some])
        assert (np.diff(np.exp(weights[some][order])) >= 0).all()  # a higher value never has less weight
        ties = column[some][:, None] == column[some][None]
        assert (weights[some][:, None] == weights[some][None])[ties].all()


@pytest.mark.first(2)
@pytest.mark.parametrize("scheme", list(resampling.SCHEMES))
@FEW
@given(arrays(np.float32, 7, elements=ANY), st.integers(0, 2**16))
def test_ancestors(scheme, log_weights, seed):
    """Never one of weight zero, unless all are; copies within one (systematic, residual's floor) or two of N w."""
    log_weights = np.where(log_weights == np.inf, 50.0, log_weights)
    normal = np.asarray(resampling.log_normalize(jnp.asarray(log_weights)), float)
    assert not np.isnan(normal).any() and abs(np.exp(normal).sum() - 1) < 1e-5
    assert 1 - 1e-4 < float(resampling.ess(jnp.asarray(log_weights))) < 7 + 1e-4
    chosen = np.asarray(resampling.SCHEMES[scheme](jax.random.key(seed), jnp.asarray(log_weights)))
    assert chosen.shape == (7,) and (chosen >= 0).all() and (chosen < 7).all()
    assert (np.exp(normal)[chosen] > 0).all()
    copies, expected = np.bincount(chosen, minlength=7), 7 * np.exp(normal)
    if scheme == "systematic":
        assert (np.abs(copies - expected) < 1 + 1e-4).all()
    if scheme == "stratified":
        assert (np.abs(copies - expected) < 2 + 1e-4).all()
    if scheme == "residual":
        assert (copies >= np.floor(expected - 1e-4)).all()
