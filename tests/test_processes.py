"""Processes: forward and reverse laws are consistent, by linear-Gaussian conditioning and by Bayes' rule over tokens."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import checks, denoisers, guides, policies, processes, samplers, schedules, tuners
from rgdiff.kernels import Gaussian, PointMass
from rgdiff.typing import pytree
from tests.worlds.worlds import MASK_SCHEDULES, SCHEDULES, GaussianWorld, assert_mean, ddim

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


@pytest.mark.slow
def test_between_the_levels_of_a_table_log_snr_is_linear():
    """At 1/T, ..., 1 the levels, to the last bit whatever a time's rounding; between them linear; before the first, the first."""
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    schedule, expected = schedules.tabulated(table), np.log(table) - np.log1p(-table)
    times = np.arange(1, 1001) / 1000
    for grid in (f32(times), f32(np.linspace(1, 0.001, 1000))[::-1], schedule.times(1000)[::-1]):
        np.testing.assert_array_equal(schedule.log_snr(grid), expected.astype(np.float32))
    between = np.random.default_rng(0).uniform(0.001, 1, 100)
    np.testing.assert_allclose(
        schedule.log_snr(f32(between)), np.interp(between, times, expected), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(schedule.log_snr(f32([0.0, 0.0005])), expected[0], rtol=1e-6)


ZERO_SNR = {  # alpha and sigma at t in float64, of schedules with alpha(1) = 0
    "cosine": (schedules.cosine_vp, lambda t: np.sin(np.pi / 2 * (1 - t)), lambda t: np.sin(np.pi / 2 * t)),
    "flow": (schedules.flow, lambda t: 1 - t, lambda t: t),
    "table": (
        lambda: schedules.tabulated(TABLE),
        lambda t: np.sqrt(TABLE[round(10 * t) - 1]),
        lambda t: np.sqrt(1 - TABLE[round(10 * t) - 1]),
    ),
}
TABLE = np.append(np.linspace(0.97, 0.1, 9), 0.0)


@pytest.mark.parametrize("name", ZERO_SNR)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.first(1)
def test_chains_from_zero_terminal_snr(name, eta):
    """A chain from alpha(1) = 0 has the law of the float64 recursion of N(m, c) data, with networks of x0 and v; and a mean of 2."""
    build, alpha, sigma = ZERO_SNR[name]
    schedule, grid, m, c = build(), np.arange(10, 0, -1) / 10, 2.0, 0.25
    process = processes.gaussian(schedule, (1,), eta=eta)
    gain = lambda t: alpha(t) * c / (alpha(t) ** 2 * c + sigma(t) ** 2)  # noqa: E731
    mean, variance = 0.0, 1.0
    for t, s in itertools.pairwise(grid):
        fraction = eta * np.sqrt(1 - (alpha(t) * sigma(s) / (alpha(s) * sigma(t))) ** 2)
        a, b = alpha(s), sigma(s) * np.sqrt(1 - fraction**2) / sigma(t)
        slope = a * gain(t) + b * (1 - alpha(t) * gain(t))
        mean = slope * mean + (a - b * alpha(t)) * (m - gain(t) * alpha(t) * m)
        variance = slope**2 * variance + (sigma(s) * fraction) ** 2
    last = gain(grid[-1])
    mean, variance = m + last * (mean - alpha(grid[-1]) * m), last**2 * variance
    exact = GaussianDenoiser(schedule, f32(m), f32(c))
    networks = {"x0": exact, "v": VelocityOf(exact)}
    for kind, network in networks.items():
        sampler = samplers.ancestral(process, denoisers.predicts(kind, network, schedule))
        x0 = samplers.sample(sampler, jax.random.key(0), 100_000, f32(grid)).x0
        assert_mean(x0, mean, slack=1e-5)
        assert_mean((x0 - mean) ** 2, variance, slack=1e-5)
    assert abs(mean - 2) < 0.05, mean
    back = process.renoise(f32([[0.3]]), f32(0.5), f32(1.0))  # noising to t = 1 forgets
    np.testing.assert_allclose([back.mean.item(), back.std], [0.0, 1.0], atol=1e-6)


@pytree
class GaussianDenoiser:
    """E[x0 | x_t] of N(m, c) data."""

    schedule: Any
    m: jax.Array
    c: jax.Array

    def __call__(self, x, t, cond=None):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return self.m + alpha * self.c / (alpha**2 * self.c + sigma**2) * (x - alpha * self.m)


@pytree
class VelocityOf:
    """v = alpha eps - sigma x0 of a denoiser's prediction."""

    denoiser: Any

    def __call__(self, x, t, cond=None):
        alpha, sigma = self.denoiser.schedule.alpha(t), self.denoiser.schedule.sigma(t)
        x0 = self.denoiser(x, t)
        return alpha * (x - alpha * x0) / sigma - sigma * x0


def test_zero_terminal_snr_shifts_and_scales_the_root():
    """Algorithm 1 of arXiv 2305.08891: the first sqrt(alpha_bar) stays, the last is 0, what is between is affine."""
    table = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    root = np.sqrt(schedules.zero_terminal_snr(table))
    np.testing.assert_allclose([root[0], root[-1]], [np.sqrt(table[0]), 0.0], rtol=1e-12, atol=0)
    np.testing.assert_allclose(
        np.diff(root) / np.diff(np.sqrt(table)), root[0] / (root[0] - np.sqrt(table[-1])), rtol=1e-9
    )
    assert schedules.tabulated(schedules.zero_terminal_snr(table)).alpha(f32(1.0)) == 0


@pytest.mark.parametrize("kind", ["eps", "score"])
def test_a_grid_from_zero_terminal_snr_is_refused_for_what_says_nothing_there(kind):
    network = lambda x, t, cond=None: x  # noqa: E731
    words = rf"times begin at 1, where nothing of x0 is left \(alpha = 0\) and a prediction of {kind} does not"
    for build, _, _ in ZERO_SNR.values():
        schedule = build()
        process = processes.gaussian(schedule, (1,))
        denoiser = denoisers.predicts(kind, network, schedule)
        wrapped = denoisers.clip_x0(denoisers.classifier_free(denoiser, 2.0, 0))
        times, sgd = f32(np.arange(10, 0, -1) / 10), optax.sgd(0.1)
        model = lambda p, d=wrapped: d  # noqa: E731
        for call in (
            lambda: samplers.sample(samplers.ancestral(process, wrapped), jax.random.key(0), 2, times),  # noqa: B023
            lambda: samplers.drawing(samplers.ancestral(process, denoiser), times),  # noqa: B023
            lambda: tuners.draft(model, process, first, times, sgd, batch=2).init(jnp.zeros(1)),  # noqa: B023
            lambda: tuners.ddpo(model, process, times, sgd, batch=2).init(jnp.zeros(1)),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=words) as error:
                call()
            assert "\n" not in str(error.value)
        samplers.sample(samplers.ancestral(process, denoiser), jax.random.key(0), 2, times[1:])
    table = processes.gaussian(schedules.tabulated(TABLE), (1,))
    training = tuners.pretraining(lambda p: denoisers.predicts(kind, network, table.schedule), table, sgd, grid=10)
    with pytest.raises(ValueError, match=words):
        training.init(jnp.zeros(1))


def first(x0, cond=None):
    return x0[:, 0]


def test_a_gaussian_grid_without_noise_in_a_move_is_refused_everywhere():
    """To t = 0, or between two times of one level, a move is a point: KL would be NaN, importance weights 0."""
    world = GaussianWorld([0.0], [[1.0]])
    one_level = processes.gaussian(schedules.tabulated(TABLE), (1,))
    mixed = processes.product(x=world.process, c=processes.masked(schedules.log_linear_mask(), 2, 3))
    to_zero, sgd = f32(np.linspace(1, 0, 11)), optax.sgd(0.1)
    words = r"must end above 0, where no noise is left.*leave that time out \(times\[:-1\]\)"
    value = guides.likelihood(world.denoiser, world.process, guides.linear([[1.0]], [1.0], 0.5))
    for call in (
        lambda: checks.times(to_zero, world.process),
        lambda: checks.times(to_zero, mixed),
        lambda: samplers.sample(samplers.tds(world.process, world.denoiser, value), jax.random.key(0), 2, to_zero),
        lambda: tuners.ddpo(world.model, world.process, to_zero, sgd, batch=2),
        lambda: tuners.draft(
            world.model, world.process, first, to_zero, sgd, batch=2, reference=world.denoiser, temperature=0.1
        ),
        lambda: tuners.value_regression(world.model, world.process, sgd, times=to_zero),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="one level at the times 0.1 and 0.05; use process.times"):
        checks.times(f32([1.0, 0.5, 0.1, 0.05]), one_level)
    variance_exploding = processes.gaussian(schedules.karras_ve(), (1,))  # at t = 0 its noise is sigma_min
    few = policies.few_step(policies.levels(schedules.flow(), 3), (1,))
    for process in (variance_exploding, processes.initial_law(world.process, schedules.linear_vp()), few):
        assert checks.times(few.times() if process is few else to_zero, process)[-1] == 0
    # without the last time it is the own grid, whose path KL is known
    w = GaussianWorld([0.3], [[0.5]], steps=10)
    w.times = to_zero[:-1]
    w.grid = np.asarray(w.times, float)
    sampler = samplers.ancestral(w.process, w.model(f32([0.5, 1.0])), reference=w.denoiser)
    out = samplers.sample(sampler, jax.random.key(0), 1000, w.times, keep=samplers.path_kl)
    np.testing.assert_allclose(samplers.total_path_kl(out), kl_between(w, 0.5), rtol=1e-3)


def kl_between(w, shift):
    """Path KL of two denoisers that differ by `shift` everywhere: sum of (c_i shift / std_i)^2 / 2, and SNR shift^2 / 2 at the end."""
    total = 0.5 * (w.reference.alpha(w.grid[-1]) / w.reference.sigma(w.grid[-1]) * shift) ** 2
    for t, s in itertools.pairwise(w.grid):
        a, c, std = ddim(w.reference, t, s, w.eta)
        total += 0.5 * ((a - c * w.reference.alpha(t) / w.reference.sigma(t)) * shift / std) ** 2
    return total


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


@pytest.mark.slow
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
@pytest.mark.first(1)
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


def test_predictions_of_tokens_have_a_logit_for_each_token_and_none_for_the_mask():
    """K + 1 logits would leave positions without a token; whoever asks a masked process for a kernel or a mean is told."""
    masked = processes.masked(schedules.log_linear_mask(), 3, 4)
    hitting, mixed = processes.first_hitting(masked), processes.product(c=masked)
    x, key, sgd = masked.prior(2).sample(jax.random.key(0)), jax.random.key(0), optax.sgd(0.1)
    net = lambda width: lambda x, t, cond=None: jnp.zeros((x.shape[0], 3, width))  # noqa: E731
    words = r"a denoiser of 4 tokens must return logits \[2, 3, 4\], got \[2, 3, 5\], without one for the mask"
    for call in (
        lambda: samplers.sample(samplers.ancestral(masked, net(5)), key, 2, masked.times(2)),
        lambda: samplers.sample(samplers.ancestral(hitting, net(5)), key, 2, hitting.times()),
        lambda: masked.mean(x, f32(0.5), net(5)(x, 0.5)),
        lambda: mixed.reverse({"c": x}, f32(0.5), f32(0.2), {"c": net(5)(x, 0.5)}),
        lambda: tuners.draft(lambda p: net(5), masked, lambda x0, c: x0[:, 0, 0], masked.times(2), sgd, batch=2).loss(
            jnp.zeros(1), key
        ),
        lambda: tuners.pretraining(lambda p: net(5), masked, sgd).loss(jnp.zeros(1), key, x[..., :-1]),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for shape in ((2, 3, 3), (3, 4), (2, 1, 4)):
        with pytest.raises(ValueError, match=r"must return logits \[2, 3, 4\]"):
            masked.reverse(x, f32(0.5), f32(0.2), jnp.zeros(shape))
    x0 = samplers.sample(samplers.ancestral(masked, net(4)), key, 50, masked.times(2)).x0
    np.testing.assert_array_equal(x0.sum(-1), 1.0)


def test_a_network_of_probabilities_is_taken_by_its_logarithm():
    """p = (.7, .2, .1, 0): drawn in these shares and a 0 never; as logits they would be nearly uniform."""
    p = f32([0.7, 0.2, 0.1, 0.0])
    denoiser = denoisers.predicts("probabilities", lambda x, t, cond=None: jnp.broadcast_to(p, (x.shape[0], 3, 4)))
    process = processes.masked(schedules.log_linear_mask(), 3, 4)
    x0 = samplers.sample(samplers.ancestral(process, denoiser), jax.random.key(0), 20_000, process.times(2)).x0
    assert_mean(x0.reshape(-1, 4)[:, :3], p[:3])
    assert x0[..., 3].sum() == 0
    x, t = process.prior(1).sample(jax.random.key(0)), f32(1.0)
    np.testing.assert_allclose(process.mean(x, t, denoiser(x, t))[0, 0], p, atol=1e-6)


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
