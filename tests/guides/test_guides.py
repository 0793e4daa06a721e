"""Guides on the prediction against closed forms: their affine maps, the laws of their chains, their published biases."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rgdiff import denoisers, guides, processes, samplers, schedules, values
from rgdiff.runtime.mesh import data_mesh
from rgdiff.samplers._loop import _whole
from rgdiff.shards import on_mesh, shards_of
from rgdiff.typing import pytree
from tests.samplers.test_smc import BAD
from tests.worlds.mixtures import A23, C3, M3, Y2, Measured, grid_of_nine, lattice, ring_of_eight, swiss_roll
from tests.worlds.worlds import SCHEDULES, GaussianWorld, assert_mean, correlated, eps_world, factorised, slope


def states(rows=6, dim=3, seed=0):
    return 1.5 * jax.random.normal(jax.random.key(seed), (rows, dim))


apply = jax.jit(lambda denoiser, x, t, cond=None: denoiser(x, jnp.asarray(t, jnp.float32), cond))


def close(a, b, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a, float), b, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- the affine maps and their chains


@pytest.mark.first(4)
@pytest.mark.parametrize("schedule", ["linear_vp", "karras_ve", "flow"])
@pytest.mark.parametrize("guide", ["dps", "pigdm", "tmpd", "dtmpd"])
def test_a_guided_prediction_is_its_affine_map(guide, schedule):
    """Size and direction of the guide at every time, for any schedule, with one time per example and with a scalar one."""
    world, x = Measured(A23, Y2, 0.5, guide=guide, v=0.7, schedule=schedule), states()
    guided, times = world.guided(), [0.9, 0.5, 0.2, 0.02, 0.6, 0.4]
    expected = []
    for row, t in zip(np.asarray(x, float), times, strict=True):
        matrix, offset = world.gain(t)
        expected.append(matrix @ row + offset)
        if schedule == "linear_vp":
            close(apply(guided, jnp.asarray(row[None], jnp.float32), t)[0], expected[-1], rtol=1e-3, atol=1e-4)
    close(apply(guided, x, jnp.asarray(times)), np.stack(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.first(1)
@pytest.mark.parametrize(("guide", "eta"), [("tmpd", 1.0), ("dps", 0.5), ("pigdm", 0.0)])
def test_a_guided_chain_has_the_law_of_the_recursion(guide, eta):
    world = Measured(A23, Y2, 0.6, guide=guide, eta=eta, steps=12)
    x0 = samplers.sample(samplers.ancestral(world.process, world.guided()), jax.random.key(0), 60_000, world.times).x0
    mean, cov = world.law()
    assert_mean(x0, mean, slack=1e-4)
    centred = np.asarray(x0, float) - mean
    assert_mean(centred[:, :, None] * centred[:, None, :], cov, slack=1e-4)


EXACT = [
    ("tmpd", 0.0, {}), ("tmpd", 1.0, {}), ("tmpd", 1.0, {"schedule": "flow"}),
    ("pigdm", 1.0, {"c": np.eye(3), "v": 1.0}), ("pigdm", 0.0, {"c": 0.3 * np.eye(3), "v": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("guide", "eta", "options"), EXACT)
def test_exact_guides_tend_to_the_posterior_as_one_over_steps(guide, eta, options):
    """TMPD for any Gaussian data, PiGDM where its variance is the data's; the chain's only error is of the steps."""
    steps, errors = [128, 256, 512, 1024], []
    for n in steps:
        world = Measured(A23, Y2, 0.5, guide=guide, eta=eta, steps=n, **options)
        (mean, cov), (true_mean, true_cov) = world.law(), world.posterior()
        errors.append(np.abs(cov - true_cov).max())
        assert np.abs(mean - true_mean).max() < 0.02  # DDIM carries what is left of the mean at t = 1 (alpha = 0.007)
    assert -1.2 < slope(steps, errors) < -0.8, errors
    assert errors[-1] < 0.02


def test_pigdm_with_another_variance_and_the_row_sums_are_not_exact():
    for options in ({"guide": "pigdm"}, {"guide": "dtmpd"}, {"guide": "dps"}):
        world = Measured(A23, Y2, 0.5, steps=2048, **options)
        assert np.abs(world.law()[0] - world.posterior()[0]).max() > 0.05


# research/gradient_guidance.md §4.2: DPS on N(0, 1) data with y = 1.5, by a continuous-time integration.
DPS_BIAS = {0.1: (1.5, 0.0050), 0.5: (1.47253, 0.12496), 1.0: (0.94818, 0.43233)}


@pytest.mark.first(1)
@pytest.mark.parametrize("noise", DPS_BIAS)
def test_dps_has_its_known_bias(noise):
    laws = [Measured(1.0, 1.5, noise, guide="dps", m=[0], c=[[1]], steps=n).law() for n in (4096, 8192)]
    mean, variance = (2 * b.item() - a.item() for a, b in zip(*laws, strict=True))  # to the limit of many steps
    assert abs(mean - DPS_BIAS[noise][0]) < 2e-4 and abs(variance - DPS_BIAS[noise][1]) < 1e-4, (mean, variance)
    exact = Measured(1.0, 1.5, noise, m=[0], c=[[1]]).posterior()
    close(exact[0], 1.5 / (1 + noise**2))
    assert abs(mean - exact[0].item()) > 0.01 and variance < 0.9 * exact[1].item()


@pytest.mark.parametrize(
    ("schedule", "eta"), [("linear_vp", 1.0), ("linear_vp", 0.0), ("cosine_vp", 0.5), ("karras_ve", 1.0), ("flow", 0.0)]
)
@pytest.mark.slow
def test_the_stable_scale_of_dps_is_where_a_move_reflects(schedule, eta):
    """At that scale the guided move, as a matrix, has the eigenvalue -1 along the coordinate seen best; unguided ones are above."""
    world = GaussianWorld([0.3, -0.2], 0.7 * np.eye(2), schedule=schedule, steps=8, eta=eta)
    turn = np.array([[0.6, 0.8], [-0.8, 0.6]])
    measurement = guides.linear(np.diag([2.0, 0.5]) @ turn, [1.0, -1.0], 0.2)
    scales = guides.dps_stable_scale(world.process, measurement, world.times, prior_variance=0.7)
    assert scales.shape == (7,)
    for i in range(7):
        t, s = world.times[i], world.times[i + 1]
        if not np.isfinite(scales[i]):
            assert schedule == "flow" and i == 0  # where x_t says nothing of x0, nothing is guided
            continue
        guided = guides.dps(world.denoiser, world.process, measurement, scales[i])

        def move(x):
            kernel: Any = world.process.reverse(x[None], t, s, guided(x[None], t))  # noqa: B023
            return (kernel.mean if eta else kernel.point)[0]

        matrix = jax.jit(jax.jacobian(move))(jnp.asarray([0.4, 0.1]))
        eigenvalues = np.sort(np.linalg.eigvals(np.asarray(matrix, float)).real)
        np.testing.assert_allclose(eigenvalues[0], -1.0, atol=2e-3)
        assert -1 < eigenvalues[1] < 1
    seen = guides.inpainting([1, 0], [0.5, 0.0], 0.2), guides.linear([[1.0, 0.0]], [0.5], 0.2)
    a, b = (guides.dps_stable_scale(world.process, m, world.times) for m in seen)
    close(a, b)


@pytest.mark.first(1)
@pytest.mark.parametrize(("noise", "steps", "stable"), [(0.1, 135, 1.0), (0.1, 50, 0.37), (0.03, 1510, 1.0)])
def test_dps_is_stable_below_its_stable_scale_and_diverges_above(noise, steps, stable):
    """The scale is 0.74 T noise^2 for N(0, 1) data; samples above are 1e6 and more, and `divergent` says so."""
    world = GaussianWorld([0.0], [[1.0]], steps=steps)
    seen = guides.linear([[1.0]], [1.5], noise)
    largest = guides.dps_stable_scale(world.process, seen, world.times).min()
    close(largest, 0.745 * steps * noise**2, rtol=0.02)
    assert stable < largest

    def draw(scale):
        guided = guides.dps(world.denoiser, world.process, seen, scale)
        return samplers.sample(samplers.ancestral(world.process, guided), jax.random.key(0), 200, world.times).x0

    x0 = draw(stable)
    assert abs(x0.mean() - 1.5) < 0.02 and not samplers.divergent(world.process, x0).any()
    x0 = draw(3 * stable)
    assert not (np.abs(x0) < 1e5).any() and samplers.divergent(world.process, x0).all()


def test_divergent_samples_by_part_and_scale():
    """Beyond 1,000 standard deviations of the prior, or not a number; tokens do not diverge; a mixed state by any part."""
    x0 = jnp.asarray([[0.5, -2.0], [999.0, 0.0], [1001.0, 0.0], [0.0, jnp.nan], [-jnp.inf, 0.0]])
    vp, ve = (processes.gaussian(s, (2,)) for s in (schedules.linear_vp(), schedules.karras_ve(0.01, 20.0)))
    np.testing.assert_array_equal(samplers.divergent(vp, x0), [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(samplers.divergent(vp, x0, limit=100.0), [0, 1, 1, 1, 1])
    np.testing.assert_array_equal(samplers.divergent(ve, x0), [0, 0, 0, 1, 1])
    tokens = jax.nn.one_hot(jnp.zeros((5, 3), int), 4)
    masked = processes.masked(schedules.log_linear_mask(), 3, 4)
    assert not samplers.divergent(masked, tokens).any()
    mixed = processes.product(x=vp, c=masked)
    np.testing.assert_array_equal(samplers.divergent(mixed, {"x": x0, "c": tokens}), [0, 0, 1, 1, 1])


@pytree
class Labelled:
    """E[x0 | x_t] of N(0, 1) data for label 0 and N(0, 2) for label 1, the null."""

    schedule: Any

    def __call__(self, x, t, cond=None):
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        v = 1.0 + cond[:, None]
        return alpha * v / (alpha**2 * v + sigma**2) * x


class ClassifierFreeWorld(GaussianWorld):
    """Classifier-free guidance of N(0, 1) given the label against N(0, 2): its chain is linear."""

    def __init__(self, w, **options):
        self.w = w
        super().__init__([0.0], [[1.0]], **options)

    def gain(self, t, theta=(0.0, 1.0)):
        alpha, sigma = self.reference.alpha(t), self.reference.sigma(t)
        given, free = (alpha * v / (alpha**2 * v + sigma**2) for v in (1.0, 2.0))
        return np.array([[free + self.w * (given - free)]]), np.zeros(1)


@pytest.mark.first(2)
@pytest.mark.parametrize("w", [2.0, 3.0, 5.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_classifier_free_guidance_has_its_exact_variance(w, eta):
    """DDIM 2^(1 - w), DDPM (2 - 2^(2 - 2w)) / (2w - 1), neither the tilted law's 2 / (w + 1): research page §4.2."""
    exact = 2 ** (1 - w) if eta == 0 else (2 - 2 ** (2 - 2 * w)) / (2 * w - 1)
    printed = {(2, 0): 0.5, (2, 1): 0.58333, (3, 0): 0.25, (3, 1): 0.3875, (5, 0): 0.0625, (5, 1): 0.22179}
    close(exact, printed[w, eta])
    steps = [512, 1024, 2048, 4096]
    found = [ClassifierFreeWorld(w, eta=eta, steps=n).law()[1].item() for n in steps]
    assert -1.2 < slope(steps, np.abs(np.array(found) - exact)) < -0.8, found
    assert abs(2 * found[-1] - found[-2] - exact) < 2e-4
    world, x = ClassifierFreeWorld(w, eta=eta), states(dim=1)
    guided = denoisers.classifier_free(Labelled(world.schedule), w, 1.0)
    for t in (0.9, 0.3, 0.05):
        close(apply(guided, x, t, jnp.zeros(6)), np.asarray(x, float) @ world.gain(t)[0], rtol=1e-4)


# ---------------------------------------------------------------- values and rewards


WORLDS = {
    "grid": grid_of_nine,
    "ring": ring_of_eight,
    "roll": swiss_roll,
    "8-d": lambda: lattice(8, 2),
    "80-d": lambda: lattice(80, 4),
}


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["roll", "8-d", "80-d"])
def test_the_likelihoods_gradient_makes_the_conditional_denoiser(name):
    """classifier_guidance with the exact log p(y | x_t) is E[x0 | x_t, y], in size and direction."""
    world, rng = WORLDS[name](), np.random.default_rng(0)
    guided = guides.classifier_guidance(world.denoiser, world.process, world.value)
    for t in (0.7, 0.4, 0.1):
        x0 = world.sample(rng, 20)
        x = world.reference.alpha(t) * x0 + world.reference.sigma(t) * rng.normal(size=x0.shape)
        x32 = jnp.asarray(x, jnp.float32)
        close(apply(guided, x32, t), world.denoise(np.asarray(x32, float), t, given_y=True), 1e-3, 1e-3)
    close(apply(world.value, x32, 0.1), world.log_value(np.asarray(x32, float), 0.1), rtol=1e-4, atol=1e-4)


def test_mixture_worlds_have_the_published_constants():
    """research/gradient_guidance.md §4.2 (own closed forms and importance sampling there)."""
    expected = {"grid": (-1.439687, -0.290720, 1e-6), "ring": (-2.967804, -1.340043, 1e-6), "roll": (-1.4536, -0.72481, 6e-4)}  # fmt: skip
    for name, (log_z, reward, tolerance) in expected.items():
        world = WORLDS[name]()
        assert abs(world.log_z - log_z) < tolerance and abs(world.expected_reward() - reward) < tolerance
    top = np.sort(ring_of_eight().blocks[0].posterior_w)[::-1]
    close(top[:2], [0.79865, 0.17653])


def quadratic(x0, cond=None):
    return x0 @ jnp.asarray([0.5, -1.0, 0.3]) - 0.4 * jnp.sum(x0**2, -1)


def test_reward_guidance_is_the_gradient_through_the_denoiser():
    """x0hat + scale (sigma^2 / alpha) G^T grad r(x0hat) for an affine denoiser; three ways to it."""
    world, x = GaussianWorld(M3, C3), states()
    for t in (0.8, 0.3):
        matrix, offset = world.gain(t, world.theta)
        x0 = np.asarray(x, float) @ matrix.T + offset
        weight = world.reference.sigma(t) ** 2 / world.reference.alpha(t)
        expected = x0 + 1.7 * weight * (np.array([0.5, -1.0, 0.3]) - 0.8 * x0) @ matrix
        value = values.posterior_mean(quadratic, world.process, world.denoiser)
        other = values.posterior_mean(quadratic, world.process, world.model(jnp.asarray([0.0, 1.0])))
        for guided in (
            guides.reward_guidance(world.denoiser, world.process, quadratic, 1.7),
            guides.classifier_guidance(world.denoiser, world.process, value, 1.7),
            guides.classifier_guidance(world.denoiser, world.process, other, 1.7),
        ):
            close(apply(guided, x, t), expected)


@pytest.mark.slow
def test_lgd_tends_to_the_smoothed_gradient_as_one_over_root_n():
    """For a linear measurement E exp(log p(y | x0hat + r_t e)) is Gaussian: the limit is PiGDM."""
    world, x, t = GaussianWorld(M3, C3), states(128), 0.5
    measurement = guides.linear(A23, Y2, 0.8)
    limit = guides.pigdm(world.denoiser, world.process, measurement, prior_variance=0.6)
    limit = apply(limit, x, t)
    size = float(jnp.sqrt(jnp.mean((limit - apply(world.denoiser, x, t)) ** 2)))
    counts, errors = [8, 32, 128], []
    for n in counts:
        guided = guides.lgd_mc(
            world.denoiser, world.process, measurement, jax.random.key(1), draws=n, prior_variance=0.6
        )
        errors.append(float(jnp.sqrt(jnp.mean((apply(guided, x, t) - limit) ** 2))) / size)
    assert -0.6 < slope(counts, errors) < -0.4, errors
    assert errors[-1] < 0.2, errors  # of the guide's own size
    once = guides.lgd_mc(world.denoiser, world.process, measurement, jax.random.key(1), draws=1, prior_variance=1e-9)
    close(apply(once, x, t), apply(guides.dps(world.denoiser, world.process, measurement), x, t), rtol=1e-3, atol=1e-3)


def test_lgd_scale_is_inside_the_exponential():
    world, x, t = GaussianWorld(M3, C3), states(), 0.4
    build = lambda reward, seed, **options: apply(  # noqa: E731
        guides.lgd_mc(world.denoiser, world.process, reward, jax.random.key(seed), draws=8, **options), x, t
    )
    twice = lambda x0, cond=None: 2.0 * quadratic(x0)  # noqa: E731
    one = build(quadratic, 0, scale=2.0)
    close(one, build(twice, 0))
    assert np.abs(one - build(quadratic, 1, scale=2.0)).max() > 1e-3


def test_infeasible_rewards_do_not_guide_and_do_not_spread():
    world, x, t = GaussianWorld(M3, C3), states(), 0.4
    plain = np.asarray(apply(world.denoiser, x, t))
    some = lambda x0, cond=None: jnp.where(x0[:, 0] > plain[:, 0].mean(), jnp.nan, quadratic(x0))  # noqa: E731
    bad = plain[:, 0] > plain[:, 0].mean()
    guided = guides.reward_guidance(world.denoiser, world.process, lambda x0, cond=None: jnp.sqrt(some(x0) - 9e9))
    close(apply(guided, x, t), plain)
    half = apply(guides.reward_guidance(world.denoiser, world.process, some), x, t)
    whole = apply(guides.reward_guidance(world.denoiser, world.process, quadratic), x, t)
    close(half[~bad], whole[~bad])
    noisy = apply(guides.lgd_mc(world.denoiser, world.process, some, jax.random.key(0), draws=4), x, t)
    assert np.all(np.isfinite(half)) and np.all(np.isfinite(noisy)) and np.abs(noisy - plain).max() > 1e-3


# ---------------------------------------------------------------- measurements


def test_measurements_are_log_likelihoods():
    rng = np.random.default_rng(0)
    x0, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    for variance in (0.0, 0.3):
        cov = variance * A23 @ A23.T + 0.4**2 * np.eye(2)
        expected = [scipy.stats.multivariate_normal(A23 @ x, cov).logpdf(Y2) for x in x0]
        close(guides.linear(A23, Y2, 0.4).log_prob(jnp.asarray(x0), variance), expected)
        each = [scipy.stats.multivariate_normal(A23 @ x, cov).logpdf(row) for x, row in zip(x0, y, strict=True)]
        close(guides.linear(A23, y, 0.4).log_prob(jnp.asarray(x0), jnp.full(4, variance)), each)
    image = guides.linear(A23, Y2, 0.4, shape=(3, 1))
    close(image(jnp.asarray(x0)[..., None]), guides.linear(A23, Y2, 0.4)(jnp.asarray(x0)))
    assert image.transpose(image.residual(jnp.asarray(x0)[..., None])).shape == (4, 3, 1)


@pytest.mark.first(1)
@pytest.mark.parametrize("guide", ["dps", "pigdm", "tmpd"])
def test_inpainting_is_the_linear_measurement_of_the_rows_seen(guide):
    world, x = GaussianWorld(M3, C3), states()
    build = getattr(guides, guide)
    seen = guides.inpainting([1, 0, 1], [0.7, jnp.nan, -0.2], 0.3)
    rows = guides.linear(np.eye(3)[[0, 2]], [0.7, -0.2], 0.3)
    close(seen(x), rows(x))
    for t in (0.8, 0.2):
        a, b = (apply(build(world.denoiser, world.process, m), x, t) for m in (seen, rows))
        close(a, b, rtol=1e-3)


def test_row_sums_are_enough_for_independent_coordinates():
    world = GaussianWorld(M3, np.diag([0.3, 0.8, 1.4]))
    seen = guides.inpainting([1, 0, 1], [0.7, 0.0, -0.2], 0.3)
    full, diagonal = (guides.tmpd(world.denoiser, world.process, seen, diagonal=d) for d in (False, True))
    close(apply(full, states(), 0.5), apply(diagonal, states(), 0.5))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dps_step_moves_the_mean_of_the_step_by_the_gradient_of_the_norm(eta):
    """The released form: x_s mean - zeta grad ||y - A x0hat||; its size does not grow with the residual."""
    world, x = GaussianWorld(M3, C3, eta=eta, steps=5), states()
    measurement = guides.linear(A23, Y2, 0.3)
    guided = guides.dps_step(world.denoiser, world.process, measurement, world.times, step=0.7)
    for t, s in itertools.pairwise([*world.grid, None]):
        matrix, offset = world.gain(t, world.theta)
        residual = Y2 - (np.asarray(x, float) @ matrix.T + offset) @ A23.T
        down = residual / np.linalg.norm(residual, axis=1, keepdims=True) @ A23 @ matrix
        t32 = jnp.float32(t)
        means = []
        for denoiser in (guided, world.denoiser):
            prediction = apply(denoiser, x, t32)
            kernel = None if s is None else world.process.reverse(x, t32, jnp.float32(s), prediction)
            means.append(prediction if kernel is None else kernel.mean if eta else kernel.point)
        close(means[0] - means[1], 0.7 * down, rtol=1e-3, atol=1e-4)
    zero = guides.linear(np.zeros((1, 3)), [0.0], 0.3)  # a residual of norm 0 does not guide
    close(
        apply(guides.dps_step(world.denoiser, world.process, zero, world.times), x, t32), apply(world.denoiser, x, t32)
    )


def test_likelihood_is_exact_for_the_data_it_assumes():
    """log N(y; A x0hat, r_t^2 A A^T + sigma^2 I) is log p(y | x_t) of N(m, v I) data."""
    world, x, t = GaussianWorld(M3, 0.6 * np.eye(3)), states(), 0.5
    value = guides.likelihood(world.denoiser, world.process, guides.linear(A23, Y2, 0.3), prior_variance=0.6)
    alpha, sigma = world.reference.alpha(t), world.reference.sigma(t)
    joint = 0.6 * alpha * A23
    given = 0.6 * A23 @ A23.T + 0.09 * np.eye(2) - joint @ joint.T / (alpha**2 * 0.6 + sigma**2)
    mean = A23 @ np.array(M3) + (np.asarray(x, float) - alpha * np.array(M3)) @ joint.T / (alpha**2 * 0.6 + sigma**2)
    close(apply(value, x, t), [scipy.stats.multivariate_normal(row, given).logpdf(Y2) for row in mean])


# ---------------------------------------------------------------- contract


def guides_of(denoiser, process, number=0.5):
    """Every guide on the prediction, by one dynamic number."""
    measurement = guides.linear(A23, Y2 * number, number)
    key = jax.random.key(3)
    return {
        "classifier": guides.classifier_guidance(denoiser, process, value_of, number),
        "reward": guides.reward_guidance(denoiser, process, quadratic, number),
        "lgd": guides.lgd_mc(denoiser, process, quadratic, key, draws=3, scale=number, prior_variance=number),
        "dps": guides.dps(denoiser, process, measurement, number),
        "dps_step": guides.dps_step(denoiser, process, measurement, process.times(4), step=number),
        "pigdm": guides.pigdm(denoiser, process, measurement, prior_variance=number),
        "tmpd": guides.tmpd(denoiser, process, measurement),
        "dtmpd": guides.tmpd(denoiser, process, measurement, diagonal=True),
    }


def value_of(x, t, cond=None):
    return jnp.sin(x).sum(-1) * (1 - 0.5 * t)


CALLS = []  # rows of every call of the network that runs
TRACES = []


@pytree
class Net:
    weights: Any

    def __call__(self, x, t, cond=None):
        TRACES.append(1)
        jax.debug.callback(lambda: CALLS.append(x.shape[0]))
        return jnp.tanh(x @ self.weights)


NET = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
PROCESS = processes.gaussian(schedules.linear_vp(), (3,))
NAMES = list(guides_of(GaussianWorld(M3, C3).denoiser, PROCESS))


@pytest.mark.first(3)
@pytest.mark.parametrize("name", NAMES)
def test_a_guide_does_not_see_the_batch(name):
    guided = guides_of(Net(jnp.asarray(NET)), PROCESS)[name]
    x, t = states(7), 0.6
    whole = apply(guided, x, t)
    close(apply(guided, x[:2], t), whole[:2], rtol=2e-6, atol=2e-6)
    if name != "lgd":  # whose noise goes by the row
        close(apply(guided, x[5:], t), whole[5:], rtol=2e-6, atol=2e-6)
    assert np.abs(whole - jnp.tanh(x @ NET)).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_guide_runs_the_network_forward_once_and_compiles_once(name):
    x = states(5)
    apply(guides_of(Net(jnp.asarray(NET)), PROCESS)[name], x, 0.6).block_until_ready()
    jax.effects_barrier()
    CALLS.clear()
    TRACES.clear()
    out = apply(guides_of(Net(jnp.asarray(2 * NET)), PROCESS, 0.3)[name], x, 0.3).block_until_ready()
    jax.effects_barrier()
    assert CALLS == [5] and TRACES == [] and np.all(np.isfinite(out))


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["lgd", "tmpd"])
def test_guided_sampling_on_eight_devices_needs_no_collectives(name):
    world = GaussianWorld(M3, C3)
    sampler = samplers.ancestral(world.process, guides_of(world.denoiser, world.process)[name])
    key, times = jax.random.key(0), world.process.times(4)
    one = samplers.sample(sampler, key, 16, times).x0
    parts = shards_of(data_mesh())
    split = on_mesh(sampler, parts)
    program = _whole.lower(split, key, times, None, 16, None, parts).compile()
    close(program(split, key, times, None)[0], one)
    for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert word not in program.as_text(), word


def test_where_the_state_says_nothing_nothing_is_guided():
    """The flow schedule at t = 1: alpha = 0."""
    world = GaussianWorld(M3, C3, schedule="flow")
    every = guides_of(world.denoiser, world.process)
    for guided in (every["reward"], every["dps_step"], every["tmpd"]):
        close(apply(guided, states(), 1.0), apply(world.denoiser, states(), 1.0))
    for guide in (guides.g, guides.g_loss):
        guided = guide(world.denoiser, world.process, jnp.ones((6, 3)), jnp.ones(6))
        close(apply(guided, states(), 1.0), apply(world.denoiser, states(), 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True])
def test_no_reward_guides_where_the_error_of_eps_is_divided_by_a_small_alpha(hidden):
    """r = b.x at scale 2 has the law N(2 b, I), by DPS; by the tilt that of the exact denoiser; under r = -|x - b|^2 DPS is too narrow."""
    process, denoiser = eps_world(hidden)
    b, times = jnp.array([1.0, -0.5]), process.times(100)

    def linear(x0, cond=None):
        return x0 @ b

    def quadratic(x0, cond=None):
        return -jnp.sum((x0 - b) ** 2, -1)

    def exact(x, t, cond=None):
        return process.schedule.alpha(t) * x

    def tilt(denoiser):
        return guides.gradient_guide(values.posterior_mean(linear, process, denoiser), scale=2.0)

    def draw(*args, **options):
        return samplers.sample(samplers.ancestral(process, *args, **options), jax.random.key(0), 4096, times).x0

    off = [abs(draw(guides.dps(denoiser, process, linear, scale=2.0)).mean(0) - 2 * b),
           abs(draw(denoiser, guide=tilt(denoiser)) - draw(exact, guide=tilt(exact))).mean(0)]  # fmt: skip
    spread = draw(guides.dps(denoiser, process, quadratic)).std(0)
    if hidden:
        assert all((part > 0.2).all() for part in off) and (spread > 1).all()
    else:
        assert all((part < 0.1).all() for part in off) and (spread < 3**-0.5).all()


@pytest.mark.parametrize("process", [processes.masked(schedules.log_linear_mask(), 3, 3), processes.product(x=PROCESS)])
def test_guides_on_the_prediction_refuse_what_has_no_score(process):
    net, measurement, times = Net(jnp.asarray(NET)), guides.linear(A23, Y2, 0.3), PROCESS.times(4)
    for build in (
        lambda: guides.classifier_guidance(net, process, value_of),
        lambda: guides.reward_guidance(net, process, quadratic),
        lambda: guides.lgd_mc(net, process, quadratic, jax.random.key(0), draws=2),
        lambda: guides.dps(net, process, measurement),
        lambda: guides.dps_step(net, process, measurement, times),
        lambda: guides.pigdm(net, process, measurement),
        lambda: guides.likelihood(net, process, measurement),
        lambda: guides.tmpd(net, process, measurement),
        lambda: guides.guided(net, process, lambda at: at.x),
    ):
        with pytest.raises(ValueError, match="score of a Gaussian process, got .*Process; use a guide on the kernel"):
            build()


def test_measurements_refuse_shapes_that_do_not_fit():
    for build, words in (
        (lambda: guides.linear(A23[0], Y2, 0.1), "matrix must have shape"),
        (lambda: guides.linear(A23, Y2[:1], 0.1), "y must have shape"),
        (lambda: guides.linear(A23, np.zeros((4, 3)), 0.1), "y must have shape"),
        (lambda: guides.linear(A23, Y2, 0.1, shape=(2, 2)), "3 columns, but states have shape"),
        (lambda: guides.linear(A23, Y2, 0.0), "sigma must be a finite number > 0"),
        (lambda: guides.inpainting([1, 0], [1, 2, 3], 0.1), "y must have shape"),
    ):
        with pytest.raises(ValueError, match=words):
            build()


# ---------------------------------------------------------------- guides on the kernel and time travel, in the ancestral sampler


@pytree
class Constant:
    """Tilts every kernel by one direction."""

    direction: jax.Array

    def __call__(self, kernel, move):
        assert move.prediction.shape == move.x.shape
        return kernel.tilt(jnp.broadcast_to(self.direction * move.t, move.x.shape))


def test_a_kernel_guide_tilts_every_step_and_its_path_kl_is_exact():
    world, d = GaussianWorld(M3, C3, steps=6, eta=0.8), np.array([1.0, -2.0, 0.5])
    sampler = samplers.ancestral(
        world.process, world.denoiser, guide=Constant(jnp.asarray(d, jnp.float32)), reference=world.denoiser
    )
    run = samplers.sample(sampler, jax.random.key(0), 50_000, world.times, keep=samplers.path_kl)
    mean, cov = world.prior()
    for i, (t, s) in enumerate(itertools.pairwise(world.grid)):
        matrix, offset, std = world.move(t, s, world.theta)
        mean, cov = matrix @ mean + offset + std**2 * t * d, matrix @ cov @ matrix.T + std**2 * np.eye(3)
        close(run.kept[i], np.full(50_000, 0.5 * std**2 * t**2 * d @ d), rtol=1e-3)
    mean, cov = world.project((mean, cov), world.theta)
    assert_mean(run.x0, mean, slack=1e-4)
    assert_mean((np.asarray(run.x0, float) - mean) ** 2, np.diag(cov), slack=1e-4)


def travelled(world, time_travel, window):
    """Mean and covariance of x0 when moves from times in the window are made `time_travel` times."""
    law = world.prior()
    for i, (t, s) in enumerate(itertools.pairwise(world.grid)):
        law = world.push(law, i, i + 1, world.theta)
        for _ in range(time_travel - 1 if window[0] <= t <= window[1] else 0):
            ratio = world.reference.alpha(t) / world.reference.alpha(s)
            noise = world.reference.sigma(t) ** 2 - ratio**2 * world.reference.sigma(s) ** 2
            law = ratio * law[0], ratio**2 * law[1] + noise * np.eye(world.dim)
            law = world.push(law, i, i + 1, world.theta)
    return world.project(law, world.theta)


@pytest.mark.first(1)
@pytest.mark.parametrize(("eta", "window"), [(1.0, (0.0, 1.0)), (0.0, (0.3, 0.7))])
def test_time_travel_has_the_law_of_the_recursion(eta, window):
    world = GaussianWorld(
        [0.7, -0.4], [[0.5, 0.3], [0.3, 0.9]], schedule="cosine_vp", eta=eta, steps=4, theta=(0.4, 0.8)
    )
    sampler = samplers.ancestral(world.process, world.denoiser, time_travel=4, window=window)
    x0 = samplers.sample(sampler, jax.random.key(0), 100_000, world.times).x0
    mean, cov = travelled(world, 4, window)
    assert np.abs(mean - travelled(world, 1, window)[0]).max() > 0.05  # it matters
    assert_mean(x0, mean, slack=1e-5)
    centred = np.asarray(x0, float) - mean
    assert_mean(centred[:, :, None] * centred[:, None, :], cov, slack=1e-5)


def test_time_travel_through_masks_by_enumeration():
    """Repeated moves let two tokens of one move see each other: the chain comes nearer to the data."""
    world, law = correlated(length=2, steps=2), None
    law = (world.states == world.classes).all(1).astype(float)
    for t, s in itertools.pairwise(world.grid):
        law = law @ world.transition(t, s)
        back = np.ones((len(world.states),) * 2)
        masks = (world.rate(t) - world.rate(s)) / (1 - world.rate(s))
        for i in range(world.length):
            token = np.eye(world.classes + 1)[world.states[:, i]]
            stays = np.where(world.states[:, i] == world.classes, 1.0, 1 - masks)
            to_mask = (world.states[:, i] == world.classes) * 1.0
            back *= stays[:, None] * token[:, world.states[:, i]] + (1 - stays)[:, None] * to_mask[None]
        close(back.sum(1), np.ones(len(back)), rtol=1e-12)
        law = law @ back @ world.transition(t, s)
    sampler = samplers.ancestral(world.process, world.denoiser, time_travel=2)
    x0 = samplers.sample(sampler, jax.random.key(0), 100_000, world.times).x0
    law = law[world.unmasked]
    assert np.all(np.abs(world.frequencies(x0) - law) < 4.5 * np.sqrt(law * (1 - law) / 100_000) + 1e-6)
    distance = [np.abs(p - world.joint.reshape(-1)).sum() for p in (law, world.law())]
    assert distance[0] < 0.9 * distance[1], distance


def test_time_travel_counts_its_calls_and_compiles_once():
    net, times = Net(jnp.asarray(NET)), PROCESS.times(5)
    for window in (None, (0.3, 0.7)):
        sampler = samplers.ancestral(PROCESS, net, time_travel=3, window=window)
        samplers.sample(sampler, jax.random.key(0), 8, times)
        jax.effects_barrier()
        CALLS.clear()
        TRACES.clear()
        samplers.sample(sampler, jax.random.key(1), 8, times).x0.block_until_ready()
        jax.effects_barrier()
        assert len(CALLS) == sampler.network_calls(4) == (13 if window is None else 9)
    samplers.sample(samplers.ancestral(PROCESS, net, time_travel=3, window=(0.1, 0.5)), jax.random.key(0), 8, times)
    assert TRACES == []
    early = jnp.linspace(1.0, 0.8, 5)
    assert sampler.network_calls(4, early) == 5 and samplers.ancestral(PROCESS, net).network_calls(4) == 5


def test_renoise_joins_the_forward_laws():
    """forward to s, then renoise to t, is forward to t; in moments and in probabilities."""
    for name in SCHEDULES:
        process = processes.gaussian(SCHEDULES[name].build(), (2,))
        s, t, x0 = jnp.float32(0.3), jnp.float32(0.8), states(3, 2)
        first, whole = process.forward(x0, s), process.forward(x0, t)
        second = process.renoise(first.mean, s, t)
        ratio = SCHEDULES[name].alpha(0.8) / SCHEDULES[name].alpha(0.3)
        close(second.mean, np.asarray(whole.mean, float))
        close(second.std**2 + ratio**2 * first.std**2, np.asarray(whole.std, float) ** 2)
    masked = factorised().process
    both = processes.product(tokens=masked, x=processes.gaussian(schedules.flow(), (2,)))
    x0 = {"tokens": jax.nn.one_hot(jnp.array([[0, 1, 2]]), 3), "x": states(1, 2)}
    at_s = jnp.concatenate([x0["tokens"], jnp.zeros((1, 3, 1))], -1).at[0, 1].set(jnp.array([0, 0, 0, 1.0]))
    law = both.renoise({"tokens": at_s, "x": x0["x"]}, jnp.float32(0.2), jnp.float32(0.6)).parts["tokens"]
    probability = np.exp(np.asarray(law.log_p, float))  # type: ignore[union-attr]
    close(probability[0], [[0.5, 0, 0, 0.5], [0, 0, 0, 1], [0, 0, 0.5, 0.5]], atol=1e-6)


def test_the_ancestral_sampler_refuses_what_has_no_meaning():
    flat = processes.gaussian(schedules.linear_vp(), (3,), eta=0.0)
    for build, words in (
        (
            lambda: samplers.ancestral(flat, value_of, guide=guides.gradient_guide(value_of)),
            "guide on the kernel needs",
        ),
        (lambda: samplers.ancestral(PROCESS, value_of, time_travel=2, reference=value_of), "no path KL"),
        (lambda: samplers.ancestral(PROCESS, value_of, time_travel=2, differentiable=True), "no gradient"),
        (lambda: samplers.ancestral(PROCESS, value_of, window=(0.2, 0.5)), "needs time_travel > 1"),
        (lambda: samplers.ancestral(PROCESS, value_of, time_travel=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            build()


@pytest.mark.parametrize("reward", BAD)
@pytest.mark.slow
def test_bad_rewards_end_in_finite_samples(reward):
    """Where the reward has no gradient nothing is guided: the chain is the prior's, number for number."""
    world = GaussianWorld([0.5], [[0.8]], schedule="linear_vp", steps=5, eta=1.0)
    process, prior, key = world.process, world.denoiser, jax.random.key(0)
    value = values.posterior_mean(BAD[reward], process, prior)
    guided = [
        samplers.ancestral(process, guides.classifier_guidance(prior, process, value, 2.0)),
        samplers.ancestral(process, guides.lgd_mc(prior, process, BAD[reward], key, draws=4, scale=2.0)),
        samplers.ancestral(process, prior, guide=guides.gradient_guide(value, 2.0)),
    ]
    plain = samplers.sample(samplers.ancestral(process, prior), key, 32, world.times).x0
    for sampler in guided:
        x0 = samplers.sample(sampler, key, 32, world.times).x0
        assert np.isfinite(x0).all()
        if reward in ("all infeasible", "constant", "infinite"):
            np.testing.assert_allclose(x0, plain, rtol=1e-5, atol=1e-6)
        else:
            assert float(jnp.abs(x0 - plain).max()) > 0.1
