"""Chains on a file's scheduler are diffusers': the numbers are diffusers 0.42.1's, printed by tests/pretrained/schedulers_golden.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import denoisers, processes, samplers, schedules
from rgdiff.pretrained import schedulers

START = jnp.asarray([[1.3, -0.4, 0.2], [-2.1, 0.7, 3.0]], jnp.float32)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM = {"_class_name": "DDIMScheduler", **SD, "clip_sample": False}
EULER = {"_class_name": "EulerDiscreteScheduler", **SD}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
# name: (config, eta, its timesteps, x)
CASES: dict[str, Any] = {
    "ddim of SD 1": (
        DDIM | {"set_alpha_to_one": False, "steps_offset": 1}, 0.0,
        [853, 711, 569, 427, 285, 143, 1], [[2.0629759, -0.7006909, -0.0708379], [-5.9174438, 0.5462701, 10.3010225]],
    ),
    "ddim, zero terminal SNR, v": (
        DDIM | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 0.0,
        [999, 799, 599, 399, 199], [[0.1474025, -0.1682592, -0.0690997], [-0.5329823, 0.0194062, 0.7594874]],
    ),
    "euler, leading": (
        EULER | {"timestep_spacing": "leading", "steps_offset": 1}, 0.0,
        [853, 711, 569, 427, 285, 143, 1], [[2.031641, -0.6856385, -0.0692889], [-5.8734994, 0.5340921, 10.246129]],
    ),
    "euler, trailing, v": (
        EULER | {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 0.0,
        [999, 856, 713, 570, 428, 285, 142], [[0.2240472, -0.1904187, -0.0586803], [-0.6636514, 0.058309, 0.9665427]],
    ),
    "euler ancestral": (
        EULER | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1}, 1.0,
        [853, 711, 569, 427, 285, 143, 1], [[0.1664293, -0.2423009, 0.0803191], [-1.2237428, -0.1730842, 5.2510781]],
    ),
    "flow": (
        FLOW, 0.0,
        [1000.0, 937.7104, 857.6923, 751.1211, 602.1506, 379.1946, 8.9286],
        [[0.6446506, -0.1267279, 0.1306606], [-1.0956404, 0.3488599, 1.8191979]],
    ),
    "flow, stochastic": (  # all noise drawn anew: any eta at which a step's std is sigma
        FLOW, 1e6,
        [1000.0, 937.7104, 857.6923, 751.1211, 602.1506, 379.1946, 8.9286],
        [[0.3962077, 0.3041297, -0.2489873], [-0.0829669, -0.1414502, 0.077483]],
    ),
    "flow, dynamic shift": (
        FLOW | {"use_dynamic_shifting": True}, 0.0,
        [1000.0, 918.4716, 824.3774, 714.5696, 584.7535, 428.9122, 238.3477],
        [[0.6087779, -0.2020575, 0.0638651], [-1.1422448, 0.2947176, 1.8169153]],
    ),
}  # fmt: skip


def network(x, step, cond=None):
    step = step.reshape(-1, 1)
    return jnp.tanh(0.7 * x + 0.3 * jnp.sin(0.01 * step)) + 0.1 * x


def denoiser_of(scheduler):
    first = 0 if scheduler.prediction == "velocity" else 1
    scaled = schedulers.scaled_time(network, scheduler.levels, first)
    return denoisers.predicts(scheduler.prediction, scaled, scheduler.schedule)


def chain(scheduler, times, eta, start=START):
    """The chain's end with the golden script's noise in place of draws."""
    process, denoiser = scheduler.process((3,), eta), denoiser_of(scheduler)
    x = start
    for i in range(len(times) - 1):
        kernel: Any = process.reverse(x, times[i], times[i + 1], denoiser(x, times[i]))
        x = kernel.mean + kernel.std * jnp.sin(3 * START + i) if process.stochastic else kernel.point
    return process.finalize(x, times[-1], denoiser(x, times[-1]))


@pytest.mark.parametrize("name", CASES)
def test_chains(name):
    config, eta, steps, expected = CASES[name]
    scheduler = schedulers.read_scheduler(config, tokens=1024, even="use_dynamic_shifting" in config)
    times = scheduler.schedule.times(len(steps))
    np.testing.assert_allclose(times * 1000 - (scheduler.prediction != "velocity"), steps, atol=1e-3)
    start = START * scheduler.schedule.sigma(times[0]) if name == "euler, trailing, v" else START  # as released
    np.testing.assert_allclose(chain(scheduler, times, eta, start), expected, rtol=1e-4, atol=1e-5)


def test_euler_between_levels():
    """Evenly spaced steps lie between levels: diffusers interpolates sigma there, and we log SNR. It begins at sigma times noise."""
    scheduler = schedulers.read_scheduler(EULER)
    times = (jnp.asarray([999, 832.5, 666, 499.5, 333, 166.5, 0]) + 1) / 1000
    start = START * scheduler.schedule.sigma(times[0])
    expected = [[4.9626017, -0.5883494, 0.2268529], [-11.6912193, 1.423561, 21.4246254]]
    np.testing.assert_allclose(chain(scheduler, times, 0.0, start), expected, rtol=1e-4, atol=1e-5)


def test_ddpm_clips_x0_and_its_noise_follows():
    """DDPM's file clips predictions before the step; DDIM's clips x0 in the step and keeps the network's eps."""
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "clip_sample": True}
    scheduler = schedulers.read_scheduler(config)
    assert scheduler.clip is None and scheduler.clip_x0 == (-1.0, 1.0)
    times, x = scheduler.schedule.times(7), START
    denoiser = denoisers.clip_x0(denoiser_of(scheduler), *scheduler.clip_x0)
    process = processes.gaussian(scheduler.schedule, (3,), variance="fixed_large")
    for i in range(6):
        kernel: Any = process.reverse(x, times[i], times[i + 1], denoiser(x, times[i]))
        x = kernel.mean + kernel.std * jnp.sin(3 * START + i)
    x = denoiser(x, times[6])
    expected = [[0.3477857, 0.5600745, -0.6200213], [-0.2984207, -0.2440091, 0.1724792]]
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
    assert schedulers.read_scheduler(config | {"_class_name": "DDIMScheduler"}).clip == (-1.0, 1.0)


def test_dpm_solver():
    config = EULER | {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
    scheduler = schedulers.read_scheduler(config)
    process = processes.started_from(scheduler.process((3,)), lambda key, batch: START)
    sampler = samplers.dpm_solver(process, denoiser_of(scheduler))
    x0 = samplers.sample(sampler, jax.random.key(0), 2, scheduler.schedule.times(20)).x0
    expected = [[3.7927036, -0.6812096, 0.015418], [-10.8999748, 0.8074917, 20.0291996]]
    np.testing.assert_allclose(x0, expected, rtol=1e-4, atol=1e-5)


def test_an_end_above_zero_is_a_ddim_step_to_it():
    """x0 = 3 exactly: the chain's end is alpha 3 + sigma eps; from the end itself nothing moves."""
    schedule = schedules.linear_vp()
    process = processes.gaussian(schedule, (1,), eta=0.0, end=0.1)
    x, t = jnp.array([[2.0]]), jnp.float32(0.5)
    eps = (x - 3 * schedule.alpha(t)) / schedule.sigma(t)
    expected = 3 * schedule.alpha(0.1) + schedule.sigma(0.1) * eps
    np.testing.assert_allclose(process.finalize(x, t, jnp.array([[3.0]])), expected, rtol=1e-6)
    np.testing.assert_allclose(process.finalize(x, jnp.float32(0.1), jnp.array([[3.0]])), x, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "KarrasVeScheduler"}, "the scheduler's _class_name"),
        ({"prediction_type": "score"}, "the scheduler's prediction_type"),
        ({"beta_schedule": "cubic"}, "beta_schedule"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is a grid of its own"),
        ({"timestep_spacing": "even"}, "the scheduler's timestep_spacing"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message) as error:
        schedulers.read_scheduler(EULER | change)
    assert "\n" not in str(error.value)


def test_a_dynamic_shift_needs_the_images_size():
    with pytest.raises(ValueError, match="give tokens="):
        schedulers.read_scheduler(FLOW | {"use_dynamic_shifting": True})
    with pytest.raises(ValueError, match="end is a time in"):
        processes.gaussian(schedules.flow(), (1,), end=0.0)
