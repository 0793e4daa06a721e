"""Ancestral sampling: the projection as one more move of the loop is the projection after it, for every schedule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import processes, samplers, schedules, tuners
from rgdiff.samplers import roll

LEVELS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LAWS = {
    "linear VP": (schedules.linear_vp(), None),
    "cosine VP": (schedules.cosine_vp(), None),
    "EDM": (schedules.karras_ve(), None),
    "flow": (schedules.flow(), None),
    "1,000 levels to the first": (
        schedules.tabulated(LEVELS),
        schedules.leading_times(5),
    ),  # no time before the last one
}


def chain(law):
    schedule, times = LAWS[law]
    process = processes.gaussian(schedule, (2,), eta=1.0)
    return process, process.times(5) if times is None else times


def denoiser(w):
    return lambda x, t, cond=None: jnp.tanh(w * x + t) / (1 + t)


@pytest.mark.parametrize("law", LAWS)
def test_the_projection_is_one_more_move(law):
    """x0, the KL of every move, and gradients of both, beside a loop of moves and a projection after it."""
    process, times = chain(law)
    key, moves = jax.random.key(0), times.shape[0] - 1

    def build(w):
        return samplers.ancestral(process, denoiser(w), reference=denoiser(0.5))

    def one(w):
        out = samplers.sample(build(w), key, 4, times, keep=samplers.path_kl)
        return out.x0, out.kept, out.info["kl"]

    def apart(w):
        sampler = build(w)
        x = sampler.init(jax.random.fold_in(key, 0), 4, times[0])
        x, kept = roll(sampler, key, x, times, keep=samplers.path_kl)
        x0, info = sampler.final(x, times[-1])
        return x0, kept, info["kl"]

    assert build(0.7).merged() is not None and one(0.7)[1].shape == (moves, 4)
    for a, b in zip(one(0.7), apart(0.7), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    gradients = [jax.jacrev(f)(jnp.float32(0.7)) for f in (one, apart)]
    for a, b in zip(*gradients, strict=True):
        assert np.isfinite(b).all() and np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * np.abs(b).max())
    pieces = samplers.sample(build(0.7), key, 4, times, keep=samplers.path_kl, chunk=2)
    jax.tree.map(
        np.testing.assert_array_equal,
        tuple(pieces),
        tuple(samplers.sample(build(0.7), key, 4, times, keep=samplers.path_kl)),
    )


@pytest.mark.parametrize("law", LAWS)
def test_draft_through_the_last_call_as_a_move(law):
    """The gradient of E r(x0) - KL through the tuner's own loop is that of sampling and differentiating."""
    process, times = chain(law)
    key = jax.random.key(1)
    tuner = tuners.draft(
        denoiser, process, lambda x0, cond=None: x0.sum(-1), times, tuners.adamw(1e-3), batch=4, reference=denoiser(0.5), temperature=0.3
    )  # fmt: skip
    got = tuner.gradients(jnp.float32(0.7), key)[0]

    def objective(w):
        sampler = samplers.ancestral(process, denoiser(w), reference=denoiser(0.5))
        x = sampler.init(jax.random.fold_in(jax.random.split(key)[0], 0), 4, times[0])
        x, kept = roll(sampler, jax.random.split(key)[0], x, times, keep=samplers.path_kl)
        x0, info = sampler.final(x, times[-1])
        return -(x0.sum(-1) - 0.3 * (kept.sum(0) + info["kl"])).mean()

    exact = jax.grad(objective)(jnp.float32(0.7))
    assert np.isfinite(exact) and abs(exact) > 1e-3
    np.testing.assert_allclose(got, exact, rtol=2e-4)


def test_guides_and_repeated_moves_project_after_the_loop():
    process, _ = chain("linear VP")
    guided = samplers.ancestral(process, denoiser(0.7), guide=lambda kernel, move: kernel)
    assert guided.merged() is None
    assert samplers.ancestral(process, denoiser(0.7), time_travel=2).merged() is None
