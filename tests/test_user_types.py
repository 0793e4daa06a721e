# pyright: basic
"""What a user writes is accepted by a type checker as it is by the library: functions of any names, with and without a condition, NumPy's arrays.

Pyright reads this file with all rules on; here it runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rgdiff
from rgdiff import guides, processes, samplers, schedules, tuners, values
from rgdiff.typing import Array

PROCESS = processes.gaussian(schedules.cosine_vp(), (2,))
TIMES = PROCESS.times(3)


def exact(x: Array, t: Array) -> Array:
    """Of N(0, I), without a condition."""
    return PROCESS.schedule.alpha(t) * x


def named(sample: Array, label=None) -> Array:
    return sample[:, 0]


def learned(state: Array, time: Array, cond: None = None) -> Array:
    return state.sum(-1)


def test_functions_of_any_names_are_rewards_values_and_denoisers():
    for reward in (named, lambda x0: x0[:, 0], lambda x0, cond: x0[:, 0]):
        value = values.posterior_mean(reward, PROCESS, exact)
        for sampler in (samplers.svdd(PROCESS, exact, value, candidates=2), samplers.smc(PROCESS, exact, learned)):
            assert samplers.sample(sampler, jax.random.key(0), 4, TIMES).x0.shape == (4, 2)
        guided = guides.dps(exact, PROCESS, reward)
        assert guided(jnp.zeros((1, 2)), jnp.float32(0.5)).shape == (1, 2)


def test_measurements_are_of_lists_and_numpy_arrays():
    for matrix, y in ((np.eye(2), np.ones(2)), ([[1.0, 0.0]], [2.0])):
        guided = guides.pigdm(exact, PROCESS, guides.linear(matrix, y, sigma=0.5))
        assert guided(jnp.zeros((1, 2)), jnp.float32(0.5)).shape == (1, 2)
    assert guides.inpainting([1, 0], np.zeros(2), sigma=0.1).residual(jnp.ones((1, 2))).shape == (1, 2)


def test_a_corrected_process_is_a_process():
    process, denoiser = rgdiff.correctors.corrected(PROCESS, exact)
    out = samplers.sample(samplers.ancestral(process, denoiser), jax.random.key(0), 2, process.times(2))
    assert out.x0.shape == (2, 2)


def test_a_model_is_a_function_of_parameters():
    model = lambda params: lambda x, t, cond=None: exact(x, t) + params  # noqa: E731
    tuner = tuners.draft(model, PROCESS, named, TIMES, optax.sgd(0.1), batch=2)
    assert tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(2)), 1).params.shape == (2,)
