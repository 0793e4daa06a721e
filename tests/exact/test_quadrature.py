"""Quadrature of one-dimensional chains against closed forms, against another quadrature, and against its own refusals."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies.exact_initial import ALPHA, best_law, best_start, gaussian, mixture
from rgdiff import processes, schedules
from rgdiff.exact.quadrature import laws, line
from tests.worlds import controlled
from tests.worlds.worlds import GaussianWorld


def moments(x, p):
    mean = p @ x
    return mean, p @ (x - mean) ** 2


def of(law):
    return law.mean[0], law.cov[0, 0]


@pytest.mark.parametrize("quadratic", [False, True])
def test_gaussian_chains_have_their_closed_forms(quadratic):
    w = gaussian(quadratic=quadratic)
    got = laws(line(w.process, w.denoiser, w.times), w.reward, ALPHA)
    tilted, frozen, law = controlled.Law(*w.tilted()), controlled.frozen(w, ALPHA), controlled.Law(*w.law())
    for p, expected in ((got.prior, law), (got.tilted, tilted), (got.frozen, frozen)):
        assert p.sum() == pytest.approx(1, abs=1e-9)
        np.testing.assert_allclose(moments(got.x0, p), of(expected), rtol=2e-5)
    assert got.log_z == pytest.approx(w.log_z(), abs=1e-5)
    c, h, q = w.log_value()[0]
    x = np.linspace(-6, 6, len(got.value))
    middle = slice(300, 701)
    np.testing.assert_allclose(got.value[middle], (ALPHA * (c + h[0] * x - 0.5 * q[0, 0] * x**2))[middle], atol=1e-4)


def test_a_mixture_has_the_law_of_the_other_quadrature():
    w = mixture()
    got = laws(line(w.process, w.denoiser, w.times), w.reward, ALPHA)
    x0, p = w.points()
    np.testing.assert_allclose(moments(got.x0, got.prior), moments(x0, p), rtol=1e-5)
    r = np.asarray(w.reward(jnp.asarray(x0[:, None], jnp.float32)), float)
    assert got.log_z == pytest.approx(np.log(p @ np.exp(r / ALPHA)), abs=1e-5)


def test_the_best_shifts_are_those_of_optimal_control():
    """Dynamic programming on the grid against the closed form for a quadratic reward, from both starts."""
    w = gaussian(quadratic=True)
    chain = line(w.process, w.denoiser, w.times)
    np.testing.assert_allclose(moments(*best_law(w, chain, chain.start)), of(controlled.best(w, ALPHA)), rtol=2e-4)
    value = laws(chain, w.reward, ALPHA).value
    process = processes.initial_law(w.process, schedules.linear_vp())
    alphas = np.array([float(process.schedule.alpha(t)) for t in process.times(12)])
    start = best_start(w, value, chain.x, 12)
    np.testing.assert_allclose(moments(chain.x, start), of(controlled.initial(w, ALPHA, alphas)), rtol=2e-3)


def test_what_has_no_quadrature_is_refused():
    w = gaussian()
    with pytest.raises(ValueError, match=r"states \[B, 1\]"):
        two = gaussian(dim=2)
        line(two.process, two.denoiser, two.times)
    with pytest.raises(ValueError, match="give points="):
        line(w.process, w.denoiser, w.times, points=51)
    plain = GaussianWorld([0.0], np.eye(1), schedule="flow", steps=4, eta=0.0)
    with pytest.raises(ValueError, match="eta = 0"):
        line(plain.process, plain.denoiser, plain.times)
