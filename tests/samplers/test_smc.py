"""Particles: unbiased estimates of Z and of Z E f for every setting, whatever the value; rates; the edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import guides, resampling, samplers, values
from tests.worlds.worlds import GaussianWorld, correlated, eps_world, slope


def gaussian():
    return GaussianWorld([0.5], [[0.8]], schedule="flow", steps=5, eta=0.8, b=[1.2], q=[[0.4]], temperature=0.8)


def masked():
    return correlated(length=2, classes=3, steps=4, temperature=0.7)


WORLDS = {"gaussian": gaussian, "masked": masked}
SETTINGS = {
    "difference": {},
    "max": {"potential": "max", "resampling": "multinomial"},
    "sum": {"potential": "sum", "resampling": "stratified"},
    "terminal": {"potential": "terminal", "resampling": "residual"},
    "every move": {"ess_threshold": 1.0},
    "never": {"ess_threshold": 0.0},
    "interval": {"interval": 2},
    "tempered": {"tempering": jnp.asarray([0.0, 0.1, 0.3, 0.9, 1.0])},
    "twisted": {"twist": 0.7},
    "islands": {"islands": 2, "ess_threshold": 0.9},
    "tempered and twisted": {"tempering": jnp.asarray([0.0, 0.2, 0.2, 0.5, 0.5]), "twist": 1.0, "ess_threshold": 1.0},
}


def sloppy_value(world):
    """A value that is wrong everywhere and rough in x: nothing may depend on it but the variance."""
    return lambda x, t, cond=None: jnp.sin(3 * x.reshape(x.shape[0], -1)).sum(-1) * (0.5 + t)


def build(world, value, **options):
    return samplers.smc(
        world.process, world.denoiser, value, temperature=world.temperature, reward=world.reward, **options
    )


def problems(sampler, world, count, particles, seed=0):
    """Estimates [count] of Z / Z_exact and of Z E f / Z_exact, many problems at once."""

    def one(key):
        out = samplers.sample(sampler, key, particles, world.times)
        z = jnp.exp(out.info["log_z"] - world.log_z())
        return z, z * jnp.sum(jnp.exp(out.info["log_weights"]) * world.statistic(out.x0))

    keys = jax.random.split(jax.random.key(seed), count)
    return [np.asarray(part, float) for part in jax.jit(jax.vmap(one))(keys)]


def assert_unbiased(draws, expected):
    error = draws.std() / np.sqrt(draws.size)
    assert abs(draws.mean() - expected) < 4 * error, (draws.mean(), expected, error)
    assert error < 0.05, "the estimate says nothing"


@pytest.mark.parametrize(
    ("world", "setting"),
    [("gaussian", setting) for setting in SETTINGS]
    + [("masked", setting) for setting in ("difference", "max", "interval", "tempered and twisted")],
)
@pytest.mark.first(2)
def test_z_and_z_times_a_mean_are_unbiased(world, setting):
    world = WORLDS[world]()
    z, mean = problems(build(world, sloppy_value(world), **SETTINGS[setting]), world, 6000, 8)
    assert_unbiased(z, 1.0)
    assert_unbiased(mean, world.tilted_statistic())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.first(1)
def test_a_guided_proposal_is_paid_for(world):
    world = WORLDS[world]()
    guide = guides.gradient_guide(sloppy_value(world), 0.15, tilts="token_and_rate")
    z, mean = problems(build(world, sloppy_value(world), proposal=guide), world, 6000, 8)
    assert_unbiased(z, 1.0)
    assert_unbiased(mean, world.tilted_statistic())


def test_with_the_exact_value_the_weights_hardly_vary():
    """The potentials of the exact soft value have mean one at every move: log Z is known almost from the start."""
    world = gaussian()
    exact, _ = problems(build(world, world.value), world, 2000, 16)
    rough, _ = problems(build(world, sloppy_value(world)), world, 2000, 16)
    assert_unbiased(exact, 1.0)
    assert exact.var() < 0.25 * rough.var()


@pytest.mark.slow
def test_the_error_falls_as_one_over_the_root_of_particles():
    world = gaussian()
    value = values.posterior_mean(world.reward, world.process, world.denoiser)
    counts, errors = [16, 64, 256], []
    for particles in counts:
        z, mean = problems(build(world, value, ess_threshold=1.0), world, 500, particles)
        errors.append(np.sqrt(np.mean((mean / z - world.tilted_statistic()) ** 2)))
    assert -0.6 < slope(counts, errors) < -0.42, errors


def test_the_strength_keeps_the_conditional_ess():
    world = gaussian()
    sampler = build(world, sloppy_value(world), adaptive=0.7)
    reached, zeros = jnp.linspace(0, 20, 500), jnp.zeros(500)
    level = sampler._temper(zeros, zeros, reached, 0.7)
    assert 0.01 < float(level) < 1
    np.testing.assert_allclose(resampling.ess(level * reached), 350, rtol=1e-3)
    assert float(sampler._temper(zeros, zeros, reached / 100, 0.7)) == 1
    # Potentials as they were cost nothing, at any strength; above it the increments weigh weighted particles.
    weights, before = jax.random.normal(jax.random.key(0), (500,)), 0.02 * 50 * reached
    level = sampler._temper(weights, before, 50 * reached, 0.7)
    w, u = np.exp(np.asarray(weights, float)), np.exp((float(level) - 0.02) * 50 * np.asarray(reached, float))
    assert 0.02 < float(level) < 0.1
    np.testing.assert_allclose((w @ u) ** 2 / (w @ u**2) / w.sum(), 0.7, rtol=1e-3)
    # Where no strength keeps enough, it is the one that keeps most; it may fall.
    noise = 4 * jax.random.normal(jax.random.key(1), (500,))
    assert 0.015 < float(sampler._temper(zeros, before + noise, 50 * reached, 0.7)) < 0.025


@pytest.mark.parametrize("twist", [None, 1.0])
@pytest.mark.slow
def test_adaptive_tempering_where_the_first_state_says_little(twist):
    """A narrow measurement, y = 1 +- 0.1 of N(0, 1): at strength 1 the plug-in value ends all good lineages before t = 1/2."""
    world = GaussianWorld([0.0], [[1.0]], steps=30, b=[100.0], q=[[100.0]])
    value = values.posterior_mean(world.reward, world.process, world.denoiser)

    def run(key, **options):
        sampler = samplers.smc(world.process, world.denoiser, value, twist=twist, **options)
        return samplers.sample(sampler, key, 1000, world.times, keep=lambda carry, info: info["strength"])

    keys = jax.random.split(jax.random.key(0), 4)
    out = jax.jit(jax.vmap(lambda key: run(key, adaptive=0.5)))(keys)
    error = np.asarray(out.info["log_z"], float) - world.log_z()
    se = np.asarray(out.info["log_z_se"], float)
    assert (se < 0.15).all() and (np.abs(error) < 4 * se).all(), (error, se)
    strength = np.asarray(out.kept)
    assert (strength[:, :15] < 0.25).all() and (strength[:, -1] > 4 * strength[:, 15]).all()
    if twist is None:
        plain = jax.jit(run)(keys[0])
        assert abs(float(plain.info["log_z"]) - world.log_z()) > 2


@pytest.mark.parametrize("noise", [0.1, 0.01])
@pytest.mark.slow
def test_a_measurement_is_a_value_with_the_variance_of_x0(noise):
    """TDS of y = x0 + noise: Z is N(y; mu, v + noise^2) of the chain's own law N(mu, v), unbiased; the plain plug-in loses it."""
    world = GaussianWorld([0.0], [[1.0]], steps=50)
    seen = guides.linear([[1.0]], [1.5], noise)
    (mean, variance), y = (part.item() for part in world.law()), 1.5
    total = variance + noise**2
    log_z = -0.5 * ((y - mean) ** 2 / total + np.log(2 * np.pi * total))

    def estimates(sampler):
        draw = lambda key: samplers.sample(sampler, key, 256, world.times).info["log_z"]  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 64)), float)

    easy = samplers.tds(world.process, world.denoiser, seen)
    by_hand = samplers.tds(
        world.process, world.denoiser, guides.likelihood(world.denoiser, world.process, seen), reward=seen
    )
    found = estimates(easy)
    np.testing.assert_array_equal(found, estimates(by_hand))
    assert_unbiased(np.exp(found - log_z), 1.0)
    plain = values.posterior_mean(seen, world.process, world.denoiser)
    assert estimates(samplers.tds(world.process, world.denoiser, plain)).max() < log_z - 10
    assert samplers.smc(world.process, world.denoiser, seen).reward is seen
    assert samplers.das(world.process, world.denoiser, seen, world.times).reward is seen


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True])
def test_no_potential_is_taken_where_the_error_of_eps_is_divided_by_a_small_alpha(hidden):
    """Of N(0, I) and r = -|x - c|^2 / 2, log Z is that of Gaussians; the plug-in value of eps near t = 1 loses it by nats."""
    process, denoiser = eps_world(hidden)
    c, tau = jnp.array([1.5, -0.5]), 0.5
    reward = lambda x0, cond=None: -0.5 * jnp.sum((x0 - c) ** 2, -1)  # noqa: E731
    log_z = float(jnp.sum(0.5 * jnp.log(tau / (1 + tau)) - c**2 / (2 * (1 + tau))))
    value = values.posterior_mean(reward, process, denoiser)
    for options in ({}, {"potential": "max"}):
        sampler = samplers.smc(process, denoiser, value, temperature=tau, **options)
        draw = lambda key, s=sampler: samplers.sample(s, key, 1000, process.times(50)).info  # noqa: E731
        info = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4))
        error, se = (np.asarray(part, float) for part in (info["log_z"] - log_z, info["log_z_se"]))
        if hidden:
            assert (abs(error) > 1).all()
        else:  # the chain's own law, of 50 moves, is off by .07
            assert (se < 0.15).all() and (abs(error) < 4 * se + 0.1).all(), (error, se)


def test_settings_of_papers_are_what_their_papers_say():
    world = gaussian()
    value = values.posterior_mean(world.reward, world.process, world.denoiser)
    fk = samplers.fk_steering(world.process, world.denoiser, value)
    assert (fk.potential, fk.resampling, fk.twist) == ("max", "multinomial", None)
    tds = samplers.tds(world.process, world.denoiser, value)
    assert float(tds.twist) == 1 and float(tds.ess_threshold) == 1 and tds.resampling == "systematic"
    das = samplers.das(world.process, world.denoiser, value, jnp.linspace(1, 0, 101))
    assert das.tempering[0] == 0 and das.tempering[-1] == 1
    assert int(jnp.argmax(das.tempering >= 1)) == 87  # research/svdd_drakes.md §1.8: reaches 1 at i = 87


@pytest.mark.slow
def test_particles_carry_all_that_is_theirs():
    """After a resampling, values, predictions and gradients are those of the state they ride with."""
    world = gaussian()
    value = values.posterior_mean(world.reward, world.process, world.denoiser)
    sampler = build(world, value, ess_threshold=1.0, twist=1.0)
    carry = sampler.init(jax.random.key(0), 64, world.times[0])
    for i in range(3):
        carry, info = sampler.step(jax.random.key(1 + i), carry, world.times[i], world.times[i + 1])
    resampled, ancestors, needed = sampler._resample(jax.random.key(9), carry)
    assert bool(needed) and len(set(np.asarray(ancestors).tolist())) < 64
    again = sampler._evaluate(resampled.x, world.times[3], None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), resampled.evaluation, again)
    np.testing.assert_allclose(resampled.value, again.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(resampled.log_potential, again.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(resampled.lineages, carry.lineages[ancestors])
    np.testing.assert_allclose(resampled.gains.sum(), 0, atol=1e-5)  # shares sum to one


CUT = 0.3  # infeasible beyond


def half_infeasible(world):
    """The world with its reward infeasible beyond CUT: the reward, log Z and the tilted mean of x0, by quadrature."""
    reward = lambda x0, cond=None: jnp.where(x0[:, 0] > CUT, jnp.nan, world.reward(x0))  # noqa: E731
    mean, cov = (float(np.squeeze(part)) for part in world.law())
    x = np.linspace(mean - 9 * cov**0.5, CUT, 20_001)
    density = np.exp(-0.5 * (x - mean) ** 2 / cov + (world.b * x - 0.5 * world.q[0] * x**2) / world.temperature)
    z = np.trapezoid(density, x)
    return reward, float(np.log(z / np.sqrt(2 * np.pi * cov))), float(np.trapezoid(density * x, x) / z)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "setting",
    [
        "difference",
        "tempered and twisted",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("max", "sum", "interval")),
    ],
)
def test_lineages_through_infeasible_means_live_on(setting):
    """A posterior mean beyond the cut is no end: Z and Z E x0 are those of the chain's law, whatever the potentials."""
    world = gaussian()
    reward, log_z, mean = half_infeasible(world)
    value = values.posterior_mean(reward, world.process, world.denoiser)
    sampler = samplers.smc(
        world.process,
        world.denoiser,
        value,
        temperature=world.temperature,
        **{"ess_threshold": 1.0, **SETTINGS[setting]},
    )
    z, first = problems(sampler, world, 6000, 8)
    z, first = z * np.exp(world.log_z() - log_z), first * np.exp(world.log_z() - log_z)
    assert_unbiased(z, 1.0)
    assert_unbiased(first, mean)


@pytest.mark.slow
def test_without_resampling_infeasible_regions_are_importance_sampling():
    """N(0, 1) cut at 0: log Z = log 1/2 and the mean -sqrt(2 / pi) of the chain's deviation, at any potential."""
    world = GaussianWorld([0.0], [[1.0]], steps=8)
    reward = lambda x0, cond=None: jnp.where(x0[:, 0] > 0, jnp.nan, 0.0)  # noqa: E731
    value = values.posterior_mean(reward, world.process, world.denoiser)
    found = {}
    for potential in ("difference", "max", "terminal"):
        sampler = samplers.smc(world.process, world.denoiser, value, potential=potential, ess_threshold=0.0)
        out = samplers.sample(sampler, jax.random.key(0), 32_768, world.times)
        found[potential] = float(out.info["log_z"])
        mean = jnp.sum(jnp.exp(out.info["log_weights"]) * out.x0[:, 0])
        expected = -np.sqrt(2 / np.pi * world.law()[1][0, 0])
        assert abs(float(mean) - expected) < 4 * 0.6 / np.sqrt(16_000)
    np.testing.assert_allclose(list(found.values()), found["terminal"], atol=1e-4)
    assert abs(found["terminal"] - np.log(0.5)) < 4 / np.sqrt(32_768)


ERRORS = {
    "systematic": {"ess_threshold": 1.0},
    "multinomial": {"ess_threshold": 1.0, "resampling": "multinomial"},
    "when needed": {"resampling": "residual"},
    "adaptive": {"adaptive": 0.3, "ess_threshold": 0.8},
    "never": {"ess_threshold": 0.0},
    "islands": {"islands": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["systematic", *(pytest.param(s, marks=pytest.mark.slow) for s in ERRORS if s != "systematic")]
)
def test_standard_errors_are_those_of_repeated_runs(setting):
    """From one run: the spread of log Z and of a mean over 400 runs, and intervals that hold the exact values."""
    world = GaussianWorld([0.5], [[0.8]], steps=10, b=[1.2], q=[[0.4]], temperature=0.4)
    value = values.posterior_mean(world.reward, world.process, world.denoiser)
    sampler = build(world, value, **ERRORS[setting])

    def one(key):
        out = samplers.sample(sampler, key, 256, world.times)
        log_w, x = out.info["log_weights"], out.x0[:, 0]
        ordinary = resampling.standard_error(x, jnp.arange(256), log_w)
        se = resampling.standard_error(x, out.info["lineages"], log_w)
        return out.info["log_z"], out.info["log_z_se"], jnp.sum(jnp.exp(log_w) * x), se, ordinary

    keys = jax.random.split(jax.random.key(0), 400)
    log_z, log_z_se, mean, se, ordinary = (np.asarray(part, float) for part in jax.jit(jax.vmap(one))(keys))
    for estimate, error, exact in ((log_z, log_z_se, world.log_z()), (mean, se, world.tilted_statistic())):
        assert 0.85 < np.sqrt(np.mean(error**2)) / estimate.std() < 1.18  # the deviation itself is known to 3.5 %
        assert 0.88 < np.mean(np.abs(estimate - exact) < 1.96 * error) < 0.985
    if setting in ("systematic", "multinomial"):
        assert np.sqrt(np.mean(ordinary**2)) < 0.85 * mean.std()  # of particles as if independent


@pytest.mark.slow
def test_errors_of_samples_drawn_from_particles():
    """Samples of equal weight carry their lineages: the error of their mean is what 300 runs show."""
    world = GaussianWorld([0.5], [[0.8]], steps=8, b=[1.2], q=[[0.4]], temperature=0.4)
    value = values.posterior_mean(world.reward, world.process, world.denoiser)
    sampler = samplers.resampled(build(world, value, ess_threshold=1.0, resampling="multinomial"), 2)

    def one(key):
        out = samplers.sample(sampler, key, 128, world.times)
        return out.x0[:, 0].mean(), resampling.standard_error(out.x0[:, 0], out.info["lineages"])

    mean, se = (np.asarray(part, float) for part in jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 300)))
    assert 0.85 < np.sqrt(np.mean(se**2)) / mean.std() < 1.18


BAD = {
    "some infeasible": lambda x0, cond=None: jnp.where(x0[:, 0] > 0.5, jnp.nan, x0[:, 0]),
    "some at minus infinity": lambda x0, cond=None: jnp.where(x0[:, 0] > 0.5, -jnp.inf, x0[:, 0]),
    "all infeasible": lambda x0, cond=None: jnp.full(x0.shape[0], jnp.nan),
    "constant": lambda x0, cond=None: jnp.full(x0.shape[0], 3.0),
    "huge": lambda x0, cond=None: 1e30 * x0[:, 0],
    "infinite": lambda x0, cond=None: jnp.where(x0[:, 0] > 0.5, jnp.inf, 1e30),
}


@pytest.mark.first(2)
@pytest.mark.parametrize("reward", BAD)
@pytest.mark.parametrize("setting", [pytest.param("max", marks=pytest.mark.slow), "tempered and twisted"])
def test_bad_rewards_end_in_finite_samples(reward, setting):
    world = gaussian()
    value = values.posterior_mean(BAD[reward], world.process, world.denoiser)
    sampler = samplers.smc(world.process, world.denoiser, value, temperature=0.5, **SETTINGS[setting])
    out = samplers.sample(sampler, jax.random.key(0), 32, world.times)
    weights = np.exp(np.asarray(out.info["log_weights"], float))
    assert np.isfinite(out.x0).all() and np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-4)
    x = np.asarray(out.x0)[:, 0]
    if reward.startswith("some"):
        assert weights[x > 0.5].sum() == 0 and weights[x <= 0.5].sum() > 0.99
    if reward == "all infeasible":
        assert float(out.info["log_z"]) == -np.inf
    if reward == "constant":
        np.testing.assert_allclose(out.info["log_z"], 6.0, rtol=1e-4)  # exp(3 / 0.5), exactly, for any particles


@pytest.mark.parametrize("name", ["gaussian", pytest.param("masked", marks=pytest.mark.slow)])
def test_resampled_particles_have_the_tilted_law(name):
    """Equal weights: the mean of a statistic over B samples is that of the tilted law, not of the prior."""
    world = WORLDS[name]()
    sampler = samplers.resampled(build(world, world.value), 4)
    draw = jax.jit(jax.vmap(lambda key: samplers.sample(sampler, key, 64, world.times).x0))
    x0 = draw(jax.random.split(jax.random.key(1), 100))
    means = np.asarray(jax.vmap(world.statistic)(x0), float).mean(1)
    z, expected = problems(build(world, world.value), world, 400, 512, seed=2)
    error = np.hypot(means.std() / 10, (expected / z).std() / 20)
    assert abs(means.mean() - (expected / z).mean()) < 4 * error
    plain = samplers.sample(samplers.ancestral(world.process, world.denoiser), jax.random.key(3), 6400, world.times).x0
    assert abs(float(world.statistic(plain).mean()) - means.mean()) > 8 * error
    assert sampler.network_calls(5) == 4 * sampler.sampler.network_calls(5)
    with pytest.raises(ValueError, match="takes a particle sampler"):
        samplers.resampled(samplers.ancestral(world.process, world.denoiser))
    with pytest.raises(ValueError, match="share their condition"):
        sampler.init(jax.random.key(0), 4, world.times[0], jnp.zeros(4))


def test_one_particle_is_the_prior():
    world = gaussian()
    value = values.posterior_mean(world.reward, world.process, world.denoiser)
    keys = jax.random.split(jax.random.key(0), 20_000)
    sampler = build(world, value)
    draws = jax.vmap(lambda key: samplers.sample(sampler, key, 1, world.times).x0[0, 0])(keys)
    mean, cov = world.law()
    assert abs(float(draws.mean()) - mean[0]) < 4 * np.sqrt(cov[0, 0] / 20_000)


def test_best_of_n_has_the_law_of_a_maximum():
    """With p uniform on [0, 1] through the law of the chain, the best of N rewards is Beta(N, 1): mean N / (N + 1)."""
    world = gaussian()
    mean, cov = world.law()
    rank = lambda x0, cond=None: jax.scipy.stats.norm.cdf(x0[:, 0], mean[0], np.sqrt(cov[0, 0]))  # noqa: E731
    plain = samplers.ancestral(world.process, world.denoiser)
    for count in (1, 4, 9):
        out = samplers.sample(samplers.best_of_n(plain, rank, count), jax.random.key(count), 20_000, world.times)
        ranks = np.asarray(rank(out.x0), float)
        variance = count / ((count + 1) ** 2 * (count + 2))
        assert abs(ranks.mean() - count / (count + 1)) < 4 * np.sqrt(variance / 20_000)
        np.testing.assert_allclose(out.info["rewards"].max(1), ranks, rtol=1e-5)
        assert out.info["candidates"].shape == (20_000, count, 1)


def test_best_of_n_never_keeps_the_infeasible():
    world = gaussian()
    plain = samplers.ancestral(world.process, world.denoiser)
    out = samplers.sample(
        samplers.best_of_n(plain, BAD["some infeasible"], 30), jax.random.key(0), 200, world.times, jnp.zeros(200)
    )
    assert float(out.x0.max()) <= 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive": 0.5, "tempering": jnp.ones(6)}, "pass one of the two"),
        ({"ess_threshold": 1.5}, "fraction of the particles"),
        ({"tempering": jnp.asarray([0.0, 2.0])}, "strengths in"),
        ({"potential": "differences"}, "did you mean 'difference'"),
        ({"resampling": "sistematic"}, "did you mean 'systematic'"),
        ({"temperature": 0.0}, "temperature must be"),
    ],
)
def test_bad_settings_are_one_clear_line(options, message):
    world = gaussian()
    with pytest.raises(ValueError, match=message):
        samplers.smc(world.process, world.denoiser, world.value, **options)


def test_smc_needs_a_law():
    world = GaussianWorld([0.5], [[0.8]], eta=0.0)
    with pytest.raises(ValueError, match="eta"):
        samplers.smc(world.process, world.denoiser, world.value)
