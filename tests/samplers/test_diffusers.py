"""Chains of this library are those of diffusers' schedulers: grids, DDIM, DDPM, DPM-Solver++, against written-down numbers.

The numbers are diffusers 0.42.1's under torch 2.13.0, printed by tests/worlds/diffusers_golden.py; the networks are one closed
form. diffusers computes its tables in float32, so that both are right to about 2e-5.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import denoisers, processes, samplers, schedules
from tests.worlds.worlds import GaussianWorld, slope

LEADING = [852, 710, 568, 426, 284, 142, 0]
LEADING_OFFSET = [853, 711, 569, 427, 285, 143, 1]
LINSPACE = [999, 832, 666, 500, 333, 166, 0]
TRAILING = [999, 856, 713, 570, 428, 285, 142]
SOLVERS_LINSPACE = [999, 856, 714, 571, 428, 285, 143]
KARRAS = [999, 890, 746, 549, 299, 90, 12, 0]
KARRAS_SIGMAS = [14.614647, 7.902945, 4.027746, 1.910363, 0.828872, 0.321122, 0.107199, 0.029168]
CHAINS = {
    "ddim": [[2.4197683, -0.6972188, -0.0529106], [-7.0696891, 0.5945912, 12.5511245]],
    "ddim, clip_sample": [[0.8007219, -0.3076261, 0.0029632], [-0.7080727, 0.5945912, 0.8084728]],
    "ddim, clip_sample, eta": [[0.1299632, -0.2680441, 0.2448404], [-0.3159867, 0.5364528, 0.5189839]],
    "ddim, use_clipped_model_output": [[1.0, -0.5223059, -0.0335447], [-1.0, 0.5945912, 1.0]],
    "ddim, zero terminal SNR": [[0.1474025, -0.1682591, -0.0690997], [-0.5329823, 0.0194063, 0.7594873]],
    "ddpm, fixed_small": [[-0.087777, -0.886579, 0.0358709], [-10.9678793, 0.375683, 44.1817029]],
    "ddpm, fixed_large": [[-0.4501435, -0.936014, 0.4289153], [-10.6971827, 0.3923408, 44.0223466]],
    "ddpm, fixed_large, clip_sample": [[-0.3309422, -0.3612666, 0.3199474], [0.0735726, 0.07961, -0.1168127]],
    "dpm-solver++": [[4.1230429, -0.695448, -0.0016657], [-11.0836977, 0.8928447, 20.3771165]],
    "dpm-solver++, karras": [[3.6389764, -0.6508623, 0.0371165], [-10.7459974, 0.744835, 19.8019421]],
}

SCALED = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
START = jnp.asarray([[1.3, -0.4, 0.2], [-2.1, 0.7, 3.0]], jnp.float32)


def network(x, t, cond=None):
    step = jnp.round(1000 * t) - 1
    return jnp.tanh(0.7 * x + 0.3 * jnp.sin(0.01 * step)) + 0.1 * x


def process_of(table, **options):
    """A process whose chains begin at START."""
    process = processes.gaussian(schedules.tabulated(table), (3,), **options)
    return processes.started_from(process, lambda key, batch: START)


def drawn(process, denoiser, times):
    """The chain's x0 with the golden script's noise in place of draws."""
    x = START
    for i in range(len(times) - 1):
        kernel: Any = process.reverse(x, times[i], times[i + 1], denoiser(x, times[i]))
        x = kernel.mean + kernel.std * jnp.sin(3 * START + i) if process.stochastic else kernel.point
    return process.finalize(x, times[-1], denoiser(x, times[-1]))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (schedules.leading_times(7), LEADING),
        (schedules.leading_times(7, offset=1), LEADING_OFFSET),
        (schedules.linspace_times(7), LINSPACE),
        (schedules.trailing_times(7), TRAILING),
        (schedules.tabulated(SCALED).times(7), TRAILING),
        (schedules.linspace_times(8)[:-1], SOLVERS_LINSPACE),
        (schedules.karras_times(schedules.tabulated(SCALED), 8), KARRAS),
    ],
)
def test_spacings(times, expected):
    """Step i of 1,000 is at t = (i + 1) / 1000; Karras times lie between steps, and diffusers rounds them for the network."""
    np.testing.assert_array_equal(np.round(np.asarray(times, float) * 1000 - 1), expected)
    if expected is not KARRAS:
        np.testing.assert_allclose(times, (np.asarray(expected) + 1) / 1000, rtol=1e-7)


def test_karras_sigmas():
    schedule = schedules.tabulated(SCALED)
    times = schedules.karras_times(schedule, 8)
    sigmas = np.exp(-0.5 * np.asarray(schedule.log_snr(times), float))
    np.testing.assert_allclose(sigmas, KARRAS_SIGMAS, rtol=5e-5)  # theirs from 1 - alpha_bar in float32
    exact = np.linspace(*(((1 - SCALED[i]) / SCALED[i]) ** (1 / 14) for i in (-1, 0)), 8) ** 7
    np.testing.assert_allclose(sigmas, exact, rtol=5e-6)


def golden(name, x0):
    np.testing.assert_allclose(x0, CHAINS[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_ddim_and_its_clip_sample():
    """`clip` of the process keeps eps as the network has it; `clip_x0` derives it anew, as use_clipped_model_output does."""
    times = schedules.leading_times(10)
    for name, options, clips in (
        ("ddim", {}, False),
        ("ddim, clip_sample", {"clip": (-1, 1)}, False),
        ("ddim, use_clipped_model_output", {}, True),
    ):
        process = process_of(SCALED, eta=0.0, **options)
        denoiser = denoisers.predicts("eps", network, process.schedule)
        denoiser = denoisers.clip_x0(denoiser) if clips else denoiser
        sampler = samplers.ancestral(process, denoiser)
        golden(name, samplers.sample(sampler, jax.random.key(0), 2, times).x0)
    process = process_of(SCALED, eta=0.6, clip=(-1, 1))
    golden("ddim, clip_sample, eta", drawn(process, denoisers.predicts("eps", network, process.schedule), times))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_and_its_variances(variance):
    process, times = process_of(LINEAR, variance=variance), schedules.leading_times(10)
    denoiser = denoisers.predicts("eps", network, process.schedule)
    golden(f"ddpm, {variance}", drawn(process, denoiser, times))
    if variance == "fixed_large":
        golden("ddpm, fixed_large, clip_sample", drawn(process, denoisers.clip_x0(denoiser), times))


def test_zero_terminal_snr_with_a_network_of_v():
    process = process_of(schedules.zero_terminal_snr(SCALED), eta=0.0)
    sampler = samplers.ancestral(process, denoisers.predicts("v", network, process.schedule))
    golden("ddim, zero terminal SNR", samplers.sample(sampler, jax.random.key(0), 2, process.times(5)).x0)


def test_dpm_solver_on_two_grids():
    process = process_of(SCALED, eta=0.0)
    sampler = samplers.dpm_solver(process, denoisers.predicts("eps", network, process.schedule))
    for name, times in (
        ("dpm-solver++", schedules.trailing_times(8)),
        ("dpm-solver++, karras", schedules.karras_times(process.schedule, 8)),
    ):
        golden(name, samplers.sample(sampler, jax.random.key(0), 2, times).x0)


# ---------------------------------------------------------------- beyond parity


@pytest.mark.first(1)
@pytest.mark.parametrize("schedule", ["linear_vp", "karras_ve", "flow"])
def test_the_solvers_error_falls_as_one_over_steps_squared(schedule):
    """Against the exact flow of Gaussian data, x0 = m + sqrt(C / (alpha^2 C + sigma^2)) (x_T - alpha m): DDIM's falls as 1 / T."""
    steps, errors = [16, 32, 64, 128], {"solver": [], "ddim": []}
    for n in steps:
        world = GaussianWorld([0.5], [[0.3]], schedule=schedule, eta=0.0)
        times = schedules.karras_times(world.schedule, n)
        t = float(times[0])
        alpha, sigma = world.reference.alpha(t), world.reference.sigma(t)
        start = np.linspace(-2, 2, 9)[:, None] * np.sqrt(0.3 * alpha**2 + sigma**2) + alpha * 0.5
        process = processes.started_from(world.process, lambda key, batch, x=start: jnp.asarray(x, jnp.float32))
        exact = 0.5 + np.sqrt(0.3 / (alpha**2 * 0.3 + sigma**2)) * (start - alpha * 0.5)
        for name, sampler in (
            ("solver", samplers.dpm_solver(process, world.denoiser)),
            ("ddim", samplers.ancestral(process, world.denoiser)),
        ):
            x0 = samplers.sample(sampler, jax.random.key(0), 9, times).x0
            errors[name].append(np.abs(x0 - exact).max())
    assert -2.7 < slope(steps, errors["solver"]) < -1.7, errors
    assert -1.2 < slope(steps, errors["ddim"]) < -0.8, errors


def test_the_larger_variance_is_exact_for_standard_normal_data():
    """DDPM, §3.2: with the denoiser alpha x of N(0, I) data every state of the chain is N(0, 1) under fixed_large."""
    schedule = schedules.linear_vp()
    process = processes.gaussian(schedule, (1,), variance="fixed_large")
    times = process.times(5)
    for t, s in zip(times[:-1], times[1:], strict=True):
        kernel: Any = process.reverse(jnp.ones((1, 1)), t, s, jnp.full((1, 1), schedule.alpha(t)))
        np.testing.assert_allclose(kernel.mean**2 + kernel.std**2, 1.0, rtol=1e-5)
        forward = process.renoise(jnp.ones((1, 1)), s, t)
        np.testing.assert_allclose(kernel.std, forward.std, rtol=1e-6)


def test_karras_times_of_every_schedule():
    """The levels are evenly spaced in their 7th root, between ends that a schedule without ends must be given."""
    np.testing.assert_allclose(
        schedules.karras_times(schedules.karras_ve(), 9), schedules.karras_ve().times(9), atol=2e-7
    )
    for build in (schedules.linear_vp, schedules.cosine_vp, schedules.flow):
        schedule = build()
        times = schedules.karras_times(schedule, 6, sigma_min=0.01, sigma_max=50.0, rho=3.0)
        root = np.exp(-np.asarray(schedule.log_snr(times), float) / 6)
        np.testing.assert_allclose(root, np.linspace(50 ** (1 / 3), 0.01 ** (1 / 3), 6), rtol=1e-4)
        default = schedules.karras_times(schedule, 4)
        ends = [1.0 if build is schedules.linear_vp else 0.999, 0.001]
        np.testing.assert_allclose(default[jnp.asarray([0, -1])], ends, rtol=1e-6)


def test_refusals():
    schedule = schedules.linear_vp()
    points, law = (processes.gaussian(schedule, (1,), eta=eta) for eta in (0.0, 1.0))
    identity = lambda x, t, cond=None: x  # noqa: E731
    masked = processes.masked(schedules.cosine_mask(), 3, 3)
    solver = samplers.dpm_solver(points, identity)
    for call, words in (
        (lambda: samplers.dpm_solver(law, identity), "points and no draws; build the process with eta=0"),
        (lambda: samplers.dpm_solver(masked, identity), "ODE of a Gaussian process, got MaskedProcess"),
        (lambda: samplers.dpm_solver(schedule, identity), "needs a process, got LinearVP"),
        (lambda: samplers.smc(solver.process, identity, identity), "needs a reverse kernel with a law"),
        (lambda: processes.gaussian(schedule, (1,), variance="fixed_larg"), "did you mean 'fixed_large'"),
        (lambda: processes.gaussian(schedule, (1,), variance="fixed_large", eta=0.5), "of ancestral steps, eta = 1"),
        (lambda: processes.gaussian(schedule, (1,), clip=(1.0, -1.0)), "clip is a range"),
        (lambda: schedules.leading_times(11, 10), "at most that many steps, got 11"),
        (lambda: schedules.leading_times(10, 10, offset=1), "offset must leave the first of the steps among the 10"),
        (lambda: schedules.linspace_times(0), "steps must be an integer"),
        (lambda: schedules.karras_times(schedule, 5, sigma_max=1e4), "sigma_max must lie within"),
        (lambda: schedules.karras_times(law, 5), "karras_times needs a Gaussian noise schedule"),
        (lambda: schedules.karras_times(schedule, 1), "steps must be an integer of at least 2"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
