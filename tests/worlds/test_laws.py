"""Samplers in worlds where the law of their samples is known: the chain's own law, its limit, and SVDD's 1/M."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import samplers, values
from tests.worlds.worlds import (
    CategoricalWorld,
    GaussianWorld,
    MixedWorld,
    MixtureWorld,
    assert_mean,
    correlated,
    factorised,
    slope,
)

GAUSSIANS = [
    ("linear_vp", 1.0), ("cosine_vp", 0.0), ("karras_ve", 1.0), ("flow", 0.3),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("linear_vp", 0.0), ("linear_vp", 0.3), ("cosine_vp", 1.0), ("karras_ve", 0.0), ("flow", 0.0), ("flow", 1.0),
    )),
]  # fmt: skip
C2 = [[0.5, 0.3], [0.3, 0.9]]


@pytest.mark.first(2)
@pytest.mark.parametrize(("schedule", "eta"), GAUSSIANS)
def test_gaussian_chain_has_the_law_of_the_recursion(schedule, eta):
    world = GaussianWorld([0.7, -0.4], C2, schedule=schedule, eta=eta)
    x0 = samplers.sample(samplers.ancestral(world.process, world.denoiser), jax.random.key(0), 200_000, world.times).x0
    mean, cov = world.law()
    assert_mean(x0, mean, slack=1e-5)
    centred = np.asarray(x0, float) - mean
    assert_mean(centred[:, :, None] * centred[:, None, :], cov, slack=1e-5)


@pytest.mark.parametrize(
    ("schedule", "eta"), [("linear_vp", 0.0), ("linear_vp", 1.0), ("flow", 1.0), ("karras_ve", 1.0)]
)
def test_the_chain_tends_to_the_data_as_one_over_steps(schedule, eta):
    """First order in the step: the recursion's covariance tends to the data's (VE: up to the prior's sigma_max^-2)."""
    steps, errors = [128, 256, 512, 1024], []
    for n in steps:
        world = GaussianWorld([0.0], [[0.6]], schedule=schedule, eta=eta, steps=n)
        errors.append(abs(world.law()[1][0, 0] - 0.6))
    assert -1.35 < slope(steps, errors) < -0.8, errors
    assert errors[-1] < 0.01


@pytest.mark.parametrize(("dim", "schedule", "eta"), [(1, "linear_vp", 1.0), (1, "cosine_vp", 0.0), (2, "flow", 1.0)])
@pytest.mark.first(1)
def test_mixture_chain_has_the_law_of_the_quadrature(dim, schedule, eta):
    world = MixtureWorld(dim=dim, schedule=schedule, eta=eta)
    x0 = samplers.sample(samplers.ancestral(world.process, world.denoiser), jax.random.key(1), 200_000, world.times).x0
    along = np.asarray(x0, float) @ world.direction
    for f in (lambda u: u, lambda u: u**2, lambda u: np.cos(2 * u), lambda u: np.tanh(4 * u)):
        assert_mean(f(along), world.expect(f), slack=1e-4)
    if dim == 2:
        across = np.asarray(x0, float) @ np.array([-world.direction[1], world.direction[0]])
        assert_mean(across, 0.0)
        assert_mean(across**2, world.across() ** 2, slack=1e-5)
        assert_mean(across * np.tanh(4 * along), 0.0)


def test_mixture_quadrature_tends_to_the_data():
    """The quadrature's own check: E tanh(4u) of the chain against the mixture's, first order in the step."""
    u = np.linspace(-6, 6, 4001)
    world = MixtureWorld()
    density = (world.weights * np.exp(-0.5 * ((u[:, None] - world.centres) / world.spread) ** 2)).sum(1)
    exact = (density / density.sum()) @ np.tanh(4 * u)
    errors = [abs(MixtureWorld(schedule="flow", steps=n).expect(lambda v: np.tanh(4 * v)) - exact) for n in (8, 16, 32)]
    assert -1.2 < slope([8, 16, 32], errors) < -0.7 and errors[2] < 0.03, errors


@pytest.mark.first(1)
@pytest.mark.parametrize("make", [factorised, correlated], ids=["factorised", "correlated"])
@pytest.mark.parametrize("schedule", ["log_linear", pytest.param("cosine", marks=pytest.mark.slow)])
def test_masked_chain_has_the_law_of_the_enumeration(make, schedule):
    world = make(schedule=schedule)
    x0 = samplers.sample(samplers.ancestral(world.process, world.denoiser), jax.random.key(2), 200_000, world.times).x0
    assert set(np.unique(np.asarray(x0))) == {0.0, 1.0} and np.all(np.asarray(x0).sum(-1) == 1)
    law = world.law()
    error = np.sqrt(law * (1 - law) / 200_000)
    assert np.all(np.abs(world.frequencies(x0) - law) < 4 * error), world.frequencies(x0) - law
    chi2 = 200_000 * np.sum((world.frequencies(x0) - law) ** 2 / law)
    assert chi2 < len(law) + 4 * np.sqrt(2 * len(law))


def test_masked_chain_tends_to_the_data_as_one_over_moves():
    """A factorised chain is exact at any T; a correlated one loses O(1/T): two tokens of one move ignore each other."""
    world = factorised(steps=1)
    np.testing.assert_allclose(world.law(), world.joint.reshape(-1), rtol=1e-12)
    moves = [16, 32, 64, 128]
    errors = [0.5 * np.abs((w := correlated(steps=n)).law() - w.joint.reshape(-1)).sum() for n in moves]
    assert -1.1 < slope(moves, errors) < -0.9, errors


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.slow
def test_mixed_chain_has_the_law_of_the_quadrature(eta):
    world = MixedWorld(eta=eta)
    x0 = samplers.sample(samplers.ancestral(world.process, world.denoiser), jax.random.key(3), 200_000, world.times).x0
    moments = world.moments()
    token, x = np.asarray(x0["c"])[:, 0], np.asarray(x0["x"], float)
    assert token.shape == (200_000, 3) and np.all(token.sum(-1) == 1)
    for power in range(3):
        assert_mean(token * x**power, moments[power], slack=1e-4)


def test_product_of_masked_parts_runs_to_zero():
    """A mixed state without a Gaussian part ends at t = 0 and drops its masks."""
    from rgdiff import processes, schedules

    process = processes.product(
        a=processes.masked(schedules.log_linear_mask(), 1, 2), b=processes.masked(schedules.cosine_mask(), 2, 3)
    )
    p = {"a": jnp.log(jnp.array([0.2, 0.8])), "b": jnp.log(jnp.array([0.5, 0.4, 0.1]))}

    def denoiser(x, t, cond=None):
        return {name: jnp.broadcast_to(p[name], x[name][..., :-1].shape) for name in p}

    x0 = samplers.sample(samplers.ancestral(process, denoiser), jax.random.key(0), 20_000, process.times(3)).x0
    for name in p:
        assert_mean(x0[name], jnp.broadcast_to(jnp.exp(p[name]), x0[name].shape[1:]))


# ---------------------------------------------------------------- path KL


@pytest.mark.parametrize(("schedule", "eta"), [("linear_vp", 1.0), ("flow", 0.3)])
def test_gaussian_path_kl_has_its_closed_form(schedule, eta):
    world = GaussianWorld([0.7, -0.4], C2, schedule=schedule, eta=eta)
    other = GaussianWorld([0.2, 0.1], np.eye(2) * 0.8, schedule=schedule, eta=eta)
    sampler = samplers.ancestral(world.process, world.denoiser, reference=other.denoiser)
    kl = samplers.total_path_kl(
        samplers.sample(sampler, jax.random.key(4), 100_000, world.times, keep=samplers.path_kl)
    )
    assert kl.shape == (100_000,) and float(kl.min()) >= 0
    assert_mean(kl, world.path_kl(world.theta, other), slack=1e-4)


@pytest.mark.slow
def test_masked_path_kl_by_enumeration_and_of_factorised_laws():
    world, other = correlated(), factorised(steps=4)
    sampler = samplers.ancestral(world.process, world.denoiser, reference=other.denoiser)
    kl = samplers.total_path_kl(
        samplers.sample(sampler, jax.random.key(5), 200_000, world.times, keep=samplers.path_kl)
    )
    assert_mean(kl, world.path_kl(other.table))
    q = np.array([0.2, 0.3, 0.5])
    flat = CategoricalWorld(np.einsum("i,j,k->ijk", q, q, q), steps=4)
    sampler = samplers.ancestral(other.process, other.denoiser, reference=flat.denoiser)
    kl = samplers.total_path_kl(
        samplers.sample(sampler, jax.random.key(6), 200_000, other.times, keep=samplers.path_kl)
    )
    p = other.joint.reshape(-1)
    assert_mean(kl, float(np.sum(p * np.log(p / flat.joint.reshape(-1)))))  # path KL = KL of the data laws


# ---------------------------------------------------------------- SVDD


def gaussian_svdd_world():
    return GaussianWorld([0.5], [[0.8]], schedule="flow", steps=4, eta=0.6, b=[1.2], q=[[0.4]], temperature=0.8)


def masked_svdd_world():
    return correlated(length=2, steps=3, temperature=1.0)


def test_exact_soft_values_agree_with_the_tilted_law():
    """log Z by the backward recursion equals log Z of the chain's law of x0: two ways through each world."""
    world = gaussian_svdd_world()
    mean, cov = world.law()
    x = mean[0] + np.sqrt(cov[0, 0]) * np.linspace(-10, 10, 20_001)
    density = np.exp(-0.5 * (x - mean[0]) ** 2 / cov[0, 0])
    weight = density / density.sum() * np.exp((world.b[0] * x - 0.5 * world.q[0, 0] * x**2) / world.temperature)
    np.testing.assert_allclose(world.log_z(), np.log(weight.sum()), rtol=1e-8)
    np.testing.assert_allclose(world.tilted()[0][0], (weight @ x) / weight.sum(), rtol=1e-8)
    masked = masked_svdd_world()
    np.testing.assert_allclose(masked.log_z(), np.log(masked.law() @ np.exp(masked.rewards / masked.temperature)))


@pytest.mark.parametrize(
    "make", [gaussian_svdd_world, pytest.param(masked_svdd_world, marks=pytest.mark.slow)], ids=["gaussian", "masked"]
)
@pytest.mark.slow
def test_svdd_error_falls_as_one_over_candidates(make):
    """With the exact soft value, E f(x0) tends to the tilted law's as 1/M."""
    world = make()
    counts, errors, noise = [2, 4, 8, 16, 32], [], []
    for m in counts:
        sampler = samplers.svdd(
            world.process, world.denoiser, world.value, temperature=world.temperature, candidates=m, select_initial=True
        )
        draws = np.asarray(world.statistic(samplers.sample(sampler, jax.random.key(m), 60_000, world.times).x0), float)
        errors.append(draws.mean() - world.tilted_statistic())
        noise.append(draws.std() / np.sqrt(draws.size))
    errors, noise = np.abs(errors), np.array(noise)
    assert np.all(errors[:4] > 5 * noise[:4]), (errors, noise)  # the Monte-Carlo error is well below the bias
    assert -1.3 < slope(counts, errors) < -0.75, (errors, noise)
    assert errors[-1] < 0.05


@pytest.mark.slow
def test_svdd_without_initial_selection_starts_from_the_prior():
    """select_initial=False tends to prior(x_T) x tilted moves, which differs: E = E_prior of the tilted conditional mean."""
    world = gaussian_svdd_world()
    mean, cov = world.prior()
    for i, (_, h, p) in enumerate(world.log_value()[1:]):  # tilt each move's Gaussian by the value after it
        matrix, offset, std = world.move(world.grid[i], world.grid[i + 1], world.theta)
        inverse = np.linalg.inv(np.eye(1) + std**2 * p)
        matrix, offset = inverse @ matrix, inverse @ (offset + std**2 * h)
        mean, cov = matrix @ mean + offset, matrix @ cov @ matrix.T + std**2 * inverse
    expected = world.project((mean, cov), world.theta)[0][0]
    assert abs(expected - world.tilted_statistic()) > 0.1
    draws = []
    for m in (8, 16):
        sampler = samplers.svdd(world.process, world.denoiser, world.value, temperature=world.temperature, candidates=m)
        draws.append(np.asarray(samplers.sample(sampler, jax.random.key(m), 100_000, world.times).x0[:, 0], float))
    extrapolated = 2 * draws[1].mean() - draws[0].mean()  # Richardson: removes the 1/M term
    error = np.sqrt((4 * draws[1].var() + draws[0].var()) / 100_000)
    assert abs(extrapolated - expected) < 4 * error + 0.01, (extrapolated, expected, error)


@pytest.mark.slow
def test_svdd_with_one_candidate_or_a_constant_value_is_the_prior():
    world = factorised()
    law = world.joint.reshape(-1)
    for m, value in ((1, world.value), (5, lambda x, t, cond=None: jnp.zeros(x.shape[0]))):
        sampler = samplers.svdd(world.process, world.denoiser, value, candidates=m)
        x0 = samplers.sample(sampler, jax.random.key(1), 50_000, world.times).x0
        assert np.all(np.abs(world.frequencies(x0) - law) < 4 * np.sqrt(law / 50_000))


def test_svdd_argmax_ignores_the_temperature_and_takes_the_best():
    world = GaussianWorld([0.0], [[1.0]], b=[1.0], eta=1.0)
    value = values.posterior_mean(world.reward, world.process, world.denoiser)
    outs = []
    for temperature in (0.1, 10.0):
        sampler = samplers.svdd(
            world.process, world.denoiser, value, temperature=temperature, candidates=6, selection="argmax"
        )
        run = samplers.sample(sampler, jax.random.key(0), 50, world.times, keep=_values)
        np.testing.assert_array_equal(run.kept[0], run.kept[1].max(1))
        outs.append(run.x0)
    np.testing.assert_array_equal(*outs)


def _values(carry, info):
    return info["value"], info["values"]


@pytest.mark.slow
def test_svdd_shares_the_denoisers_prediction():
    """posterior_mean of the sampler's own denoiser, and of an equal copy of it, give the same samples."""
    for world in (GaussianWorld([0.3], [[0.7]], b=[2.0]), factorised()):
        soft = world.reward if isinstance(world, GaussianWorld) else _linear_tokens
        copy = jax.tree.map(lambda leaf: leaf, world.denoiser)
        runs = []
        for denoiser in (world.denoiser, copy):
            value = values.posterior_mean(soft, world.process, denoiser)
            sampler = samplers.svdd(world.process, world.denoiser, value, candidates=4, temperature=0.2)
            runs.append(samplers.sample(sampler, jax.random.key(0), 64, world.times).x0)
        np.testing.assert_allclose(*runs, atol=1e-5)


def _linear_tokens(x0, cond=None):
    return x0[..., 0].sum(-1)


def test_posterior_mean_of_tokens_is_the_expected_linear_reward():
    """For a reward linear in the tokens, v(x_t) is E[r(x0) | x_t] by enumeration; `mode` is r at the likeliest tokens."""
    world = correlated()
    states = jax.nn.one_hot(world.states, world.classes + 1)
    value = values.posterior_mean(_linear_tokens, world.process, world.denoiser)
    known = np.where(world.states[..., None] == np.arange(world.classes), 1.0, 0.0)
    masked = (world.states == world.classes)[..., None]
    expected = (known + masked * world.table)[..., 0].sum(-1)
    np.testing.assert_allclose(value(states, jnp.float32(0.5)), expected, rtol=1e-5)
    mode = values.posterior_mean(_linear_tokens, world.process, world.denoiser, plug_in="mode")
    likeliest = np.eye(world.classes)[world.table.argmax(-1)]
    np.testing.assert_allclose(mode(states, jnp.float32(0.5)), (known + masked * likeliest)[..., 0].sum(-1), rtol=1e-5)


@pytest.mark.slow
def test_learned_value_ends_at_the_reward():
    """For masked chains the last selection is by the reward itself, and with M large the best x0 of the last move wins."""
    world = factorised()
    zero = lambda x, t, cond=None: jnp.zeros((x.shape[0], 1))  # noqa: E731
    value = values.learned(zero, world.reward, world.process)
    states = jax.nn.one_hot(world.states[world.unmasked], world.classes + 1)
    np.testing.assert_allclose(value(states, jnp.float32(0)), world.rewards, rtol=1e-6)
    np.testing.assert_array_equal(value(states, jnp.float32(0.4)), 0.0)
    # steps=1: one move from all-masked to data, so selecting by the reward is self-normalised importance sampling of x0
    sampler = samplers.svdd(world.process, world.denoiser, value, temperature=1.5, candidates=64)
    x0 = samplers.sample(sampler, jax.random.key(0), 20_000, world.process.times(1)).x0
    tilted = world.joint.reshape(-1) * np.exp(world.rewards / 1.5)
    assert np.abs(world.frequencies(x0) - tilted / tilted.sum()).max() < 0.015
