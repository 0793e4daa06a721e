"""Energies: Langevin training against its closed form, log Z against known constants, GCD's gradient against a linear chain's."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import metrics, policies, tuners
from rgdiff.domains.planar import data as planar
from rgdiff.kernels import Gaussian
from rgdiff.recipes.methods.few_step import density_figures
from rgdiff.runtime.folder import RunFolder
from rgdiff.runtime.run import Run
from rgdiff.tuners._gcd import gcd
from rgdiff.tuners.energy_model import Langevin, langevin_energy, log_partition


def quadratic(params):
    return lambda x, cond=None: 0.5 * jnp.sum(jnp.exp(params["log_precision"]) * (x - params["mean"]) ** 2, -1)


def learnt(step_size, variance, **options):
    """The precision and mean that Langevin training finds for data of exactly this mean and variance."""
    z = np.random.default_rng(0).normal(size=(4096, 1))
    x = 0.7 + math.sqrt(variance) * (z - z.mean()) / z.std()
    options = {"batch": 1024, "moves": 10, "chains": 2048, "restart": 0.0, "gamma": 0.0, "ema_decay": 0.98} | options
    tuner = langevin_energy(quadratic, (1,), tuners.adamw(0.03, decay_steps=400), step_size=step_size, **options)
    state = tuner.init({"log_precision": jnp.zeros(1), "mean": jnp.zeros(1)})
    state = tuners.fit(tuner, jax.random.key(0), state, 400, data={"x0": jnp.asarray(x, jnp.float32)}, batch=4096)
    assert int(state.skipped) == 0
    return float(jnp.exp(state.best["log_precision"][0])), float(state.best["mean"][0])


@pytest.mark.slow
@pytest.mark.parametrize("step_size", [0.02, 0.05])
def test_langevin_training_learns_a_gaussian_and_the_bias_of_its_step(step_size):
    """Chains of step h have variance 1 / (a (1 - h a / 2)), so the data's variance s^2 is met at a = (1 - sqrt(1 - 2 h / s^2)) / h."""
    variance = 0.25
    precision, mean = learnt(step_size, variance)
    expected = (1 - math.sqrt(1 - 2 * step_size / variance)) / step_size  # 4.17 and 4.51; 4 is the Gaussian's
    assert abs(precision / expected - 1) < 0.02 and abs(mean - 0.7) < 0.02


def test_langevin_moves_have_their_mean_and_variance():
    sampler = Langevin(lambda x, cond=None: 0.5 * jnp.sum(x**2, -1) / 0.25, jnp.float32(0.01))
    y, _ = sampler.step(jax.random.key(0), jnp.full((20_000, 1), 2.0), jnp.float32(1), jnp.float32(0))
    assert abs(float(y.mean()) - 2 * (1 - 0.01 / 0.25)) < 4 * math.sqrt(0.02 / 20_000)
    assert abs(float(y.var()) / 0.02 - 1) < 0.04


@pytest.mark.slow
def test_chains_begin_anew_and_a_lost_one_returns():
    """With restart 1 all chains moved end within one Langevin stretch of the noise; a chain at infinity is replaced."""
    tuner = langevin_energy(
        quadratic, (1,), tuners.adamw(1e-6), batch=64, chains=64, moves=1, step_size=1e-8, restart=1.0, spread=3.0
    )
    step = jax.jit(lambda tuner, *rest: tuner.step(*rest))
    state = tuner.init({"log_precision": jnp.zeros(1), "mean": jnp.zeros(1)})
    after, info = step(
        tuner, jax.random.key(1), state._replace(extra=jnp.full((64, 1), jnp.inf)), {"x0": jnp.ones((8, 1))}
    )
    assert np.isfinite(after.extra).all() and int(info["skipped"]) == 0
    assert 1.5 < float(after.extra.std()) < 4.5
    kept = langevin_energy(
        quadratic, (1,), tuners.adamw(1e-6), batch=64, chains=64, moves=1, step_size=1e-8, restart=0.0
    )
    again, _ = step(kept, jax.random.key(1), kept.init(state.params), {"x0": jnp.ones((8, 1))})
    start = kept.init(state.params).extra
    np.testing.assert_allclose(np.sort(again.extra.ravel()), np.sort(start.ravel()), atol=1e-3)
    lost, info = step(
        kept,
        jax.random.key(1),
        kept.init(state.params)._replace(extra=start.at[3].set(jnp.inf)),
        {"x0": jnp.ones((8, 1))},
    )
    assert np.isfinite(lost.extra).all() and int(info["skipped"]) == 1  # the update is left out, the chain begins anew


def test_gamma_holds_energies_at_zero():
    """A constant energy c has loss 2 gamma c^2 and nothing else: the gradient is 4 gamma c, whatever the chains."""
    tuner = langevin_energy(
        lambda c: lambda x, cond=None: jnp.broadcast_to(c, x.shape[:1]), (1,), optax.sgd(0.1), gamma=0.3
    )
    slope = jax.grad(lambda c: tuner.loss(c, jnp.ones((5, 1)), jnp.zeros((7, 1)))[0])(jnp.float32(2))
    assert abs(float(slope) - 4 * 0.3 * 2) < 1e-5


@pytest.mark.slow
def test_log_partition_of_a_gaussian_in_many_dimensions():
    """32 dimensions, log Z 60 nats below that of the Gaussian it starts from; the spread falls with the steps."""
    size, std = 32, 0.15
    energy = lambda x, cond=None: 0.5 * jnp.sum((x - 0.2) ** 2, -1) / std**2  # noqa: E731
    exact = 0.5 * size * math.log(2 * math.pi * std**2)
    spreads = []
    for steps in (20, 80):
        options = {"scale": 1.0, "detail": std, "particles": 128, "runs": 8}
        estimate = log_partition(jax.random.key(steps), energy, (size,), steps=steps, **options)
        assert abs(float(estimate.log_z) - exact) < max(4 * float(estimate.spread) / 8**0.5, 0.1)
        spreads.append(float(estimate.spread))
    assert spreads[1] < 0.7 * spreads[0] and spreads[1] < 0.5


@pytest.mark.slow
def test_figures_of_an_energy_as_a_density(tmp_path):
    """N(m, s^2 I) on the plane: log Z = log(2 pi s^2) both ways, data of the law have -log(2 pi e s^2); outside the box nothing counts."""
    run = Run(RunFolder.create(tmp_path / "run", {}), 0, tmp_path / "cache")
    m, s = jnp.float32([0.5, -1.0]), 0.6
    energy = lambda x: jnp.where(jnp.abs(x).max(-1) < 4, jnp.sum((x - m) ** 2, -1) / (2 * s**2), -100.0)  # noqa: E731
    data = m + s * jax.random.normal(jax.random.key(0), (20_000, 2))
    figures = density_figures(run, "law", energy, data, 4.0)
    volume = np.log(2 * np.pi * s**2)
    assert abs(figures["energy_log_z_quadrature"] - volume) < 1e-3 and abs(figures["energy_log_z"] - volume) < 0.05
    assert abs(figures["energy_log_likelihood"] + volume + 1) < 0.03


@pytest.mark.slow
def test_log_partition_of_a_mixture_with_and_without_a_gradient():
    law = planar.eight_gaussians()
    energy = lambda x, cond=None: -law.log_prob(x) - 3.0  # noqa: E731
    for twist in (1.0, None):
        options = {"scale": 3.0, "detail": 0.3, "steps": 30, "particles": 512, "twist": twist}
        estimate = log_partition(jax.random.key(0), energy, (2,), **options)
        assert abs(float(estimate.log_z) - 3.0) < 0.15 and float(estimate.spread) < 0.3


def test_an_exact_energy_has_the_ideal_auroc():
    """Two unit Gaussians d apart, scored by their log ratio: AUROC = Phi(d / sqrt 2)."""
    keys = jax.random.split(jax.random.key(0))
    inside, outside = (jax.random.normal(k, (20_000,)) + d for k, d in zip(keys, (0.0, 1.5), strict=True))
    expected = 0.5 * (1 + math.erf(1.5 / 2))
    assert abs(metrics.auroc(outside, inside) - expected) < 0.006


def linear_chain(tau):
    """T = 2 moves x <- (1 + theta) x + sigma_t z from N(0, 1) and energy k x^2 / 2, as a GCD tuner with its parameters."""
    process = policies.few_step(policies.variances((0.6, 0.5)), (1,))
    policy = policies.policy(process, lambda theta: lambda x, t, cond=None: theta * x, reach=1e6)
    value = lambda k: lambda x, t, cond=None: 0.5 * k * jnp.sum(x**2, -1)  # noqa: E731
    tuner = gcd(policy, process, value, decay_steps=jnp.inf, temperature=tau, batch=65_536, ema_decay=None)
    return tuner, {"policy": policy.init(jnp.float32(-0.3)), "value": jnp.float32(2.0)}


def test_gcd_gradient_of_a_linear_chain_in_closed_form():
    tau = 0.7
    tuner, params = linear_chain(tau)
    paths = tuner.rollout(jax.random.key(0), params["policy"], tuner.batch)
    loss = lambda policy: tuner.policy_loss(policy, jax.random.key(1), params, paths, None, None)  # type: ignore[arg-type]  # noqa: E731
    value, slope = jax.value_and_grad(loss)(params["policy"])
    a, k, (s1, s2) = 0.7, 2.0, np.square([0.6, 0.5])
    variance = a**4 + s1 * a**2 + s2
    entropy = 0.5 * math.log(2 * math.pi * math.e * s2)
    assert abs(float(value) - (0.5 * k * variance - tau * entropy)) < 0.02
    np.testing.assert_allclose(slope["network"], 0.5 * k * (4 * a**3 + 2 * s1 * a), rtol=0.02)
    np.testing.assert_allclose(slope["log_sigma"], [k * s1 * a**2, k * s2 - tau], rtol=0.03, atol=0.01)


@pytest.mark.slow
def test_gcd_learns_a_gaussian():
    """Energy k x^2 / 2 and a linear chain on data N(0, 0.5^2): at rest the chain has the data's variance."""
    process = policies.few_step(policies.variances((0.6, 0.5)), (1,))
    policy = policies.policy(process, lambda theta: lambda x, t, cond=None: theta * x)
    value = lambda k: lambda x, t, cond=None: 0.5 * k * jnp.sum(x**2, -1)  # noqa: E731
    tuner = gcd(policy, process, value, temperature=0.2, gamma=0.02, learning_rate=1e-2, batch=1024, decay_steps=500)
    assert tuner.network_calls() == 4
    state = tuner.init({"policy": policy.init(jnp.float32(0.0)), "value": jnp.float32(0.2)})
    data = {"x0": 0.5 * jax.random.normal(jax.random.key(5), (8192, 1))}
    state = tuners.fit(tuner, jax.random.key(0), state, 500, data=data, batch=1024)
    samples = tuner.rollout(jax.random.key(1), state.best["policy"], 20_000).x[-1]
    assert int(state.skipped) == 0 and abs(float(samples.std()) / 0.5 - 1) < 0.1
    assert isinstance(tuner.process.prior(2), Gaussian) and float(state.best["value"]) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: langevin_energy(quadratic, (1,), None, chains=10), "chains must be an integer of at least 256"),
        (lambda: langevin_energy(quadratic, (1,), None, restart=1.5), "restart is a probability, got 1.5"),
        (lambda: langevin_energy(quadratic, (1,), None, step_size=0.0), "step_size must be a finite number > 0"),
        (lambda: langevin_energy(3, (1,), None), "must be callable"),
        (lambda: log_partition(jax.random.key(0), lambda x, c: x, (1,), detail=2.0), "at most scale"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
