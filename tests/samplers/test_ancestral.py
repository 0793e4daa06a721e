"""Ancestral sampling: the projection as one more move of the loop is the projection after it, for every schedule and kind of state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import correctors, graphs, processes, samplers, schedules, tuners
from rgdiff.samplers import roll
from rgdiff.tuners._chain import along_state

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


def gaussian(schedule=None, shape=(2,)):
    return processes.gaussian(schedule or schedules.linear_vp(), shape, eta=1.0)


def product():
    return processes.product(a=gaussian(), b=gaussian(schedules.cosine_vp(), (3,)))


def graph():
    """Of two or three nodes, so that some entries are absent."""
    nodes, edges = gaussian(schedules.linear_vp(0.1, 1.0), (3, 2)), gaussian(schedules.geometric_ve(0.2, 1.0), (3,))
    return graphs.process(nodes, edges, [2, 3])


STATES = {
    "product": product,
    "graph": graph,
    "corrected vector": gaussian,
    "corrected product": product,
    "corrected graph": graph,
}
QUICK = ["linear VP", "graph"]  # in the default suite
CHAINS = [law if law in QUICK else pytest.param(law, marks=pytest.mark.slow) for law in [*LAWS, *STATES]]


def plain(w):
    def one(x, t):
        return jnp.tanh(w * x + t) / (1 + t)

    return lambda x, t, cond=None: (
        {name: one(leaf, t) for name, leaf in x.items() if name != "mask"} if isinstance(x, dict) else one(x, t)
    )


def chain(law):
    """Return a process, a grid of times, and w -> denoiser."""
    if law in LAWS:
        schedule, times = LAWS[law]
        process = gaussian(schedule)
        return process, process.times(5) if times is None else times, plain
    process = STATES[law]()
    times = process.times(5)
    if not law.startswith("corrected"):
        return process, times, plain
    step_size = "per_sample" if law.endswith("graph") else "sigma"
    process, corrected = correctors.corrected(process, plain(0.5), steps=2, step_size=step_size)
    return process, times, correctors.CorrectedModel(plain, corrected)


def total(x0, cond=None):
    return sum(leaf.reshape(leaf.shape[0], -1).sum(-1) for leaf in jax.tree.leaves(x0))


@pytest.mark.parametrize("law", CHAINS)
def test_the_projection_is_one_more_move(law):
    """x0, the KL of every move, and gradients of both, beside a loop of moves and a projection after it."""
    process, times, denoiser = chain(law)
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

    def both(f):
        return jax.jit(lambda w: (f(w), jax.jacrev(f)(w)))(jnp.float32(0.7))

    (merged, gradients), (exact, exact_gradients) = both(one), both(apart)
    assert build(0.7).merged() is not None and merged[1].shape == (moves, 4)
    for a, b in zip(*map(jax.tree.leaves, (merged, exact)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (gradients, exact_gradients)), strict=True):
        assert np.isfinite(b).all() and np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * np.abs(b).max())
    pieces, whole = (samplers.sample(build(0.7), key, 4, times, keep=samplers.path_kl, chunk=n) for n in (2, None))
    jax.tree.map(np.testing.assert_array_equal, tuple(pieces), tuple(whole))


@pytest.mark.first(1)
@pytest.mark.parametrize("law", CHAINS)
def test_draft_through_the_last_call_as_a_move(law):
    """The gradient of E r(x0) - KL through the tuner's own loop is that of sampling and differentiating."""
    process, times, denoiser = chain(law)
    key = jax.random.key(1)
    tuner = tuners.draft(
        denoiser, process, total, times, tuners.adamw(1e-3), batch=4, reference=denoiser(0.5), temperature=0.3
    )  # fmt: skip
    got = jax.jit(lambda w: tuner.gradients(w, key)[0])(jnp.float32(0.7))

    def objective(w):
        sampler = samplers.ancestral(process, denoiser(w), reference=denoiser(0.5))
        x = sampler.init(jax.random.fold_in(jax.random.split(key)[0], 0), 4, times[0])
        x, kept = roll(sampler, jax.random.split(key)[0], x, times, keep=samplers.path_kl)
        x0, info = sampler.final(x, times[-1])
        return -(total(x0) - 0.3 * (kept.sum(0) + info["kl"])).mean()

    exact = jax.jit(jax.grad(objective))(jnp.float32(0.7))
    assert np.isfinite(exact) and abs(exact) > 1e-3
    np.testing.assert_allclose(got, exact, rtol=2e-4)


def test_guides_and_repeated_moves_project_after_the_loop():
    process, _, denoiser = chain("linear VP")
    guided = samplers.ancestral(process, denoiser(0.7), guide=lambda kernel, move: kernel)
    assert guided.merged() is None
    assert samplers.ancestral(process, denoiser(0.7), time_travel=2).merged() is None


@pytest.mark.first(1)
@pytest.mark.parametrize("law", STATES)
def test_a_call_without_a_gradient_predicts_constant_noise(law):
    """Where a call keeps no gradient, the predicted noise of every part does not move with the state, and a corrected state moves as it."""
    process, times, denoiser = chain(law)
    x, t = process.prior(4).sample(jax.random.key(0)), times[2]

    def noise(process, x, prediction):
        if isinstance(process, correctors.CorrectedProcess):
            return noise(process.process, prediction["at"], prediction["prediction"])
        parts = getattr(process, "parts", None)
        return {n: p.eps(x[n], t, prediction[n]) for n, p in parts.items()} if parts else process.eps(x, t, prediction)

    def held(x):
        constant = jax.lax.stop_gradient(denoiser(0.7)(x, t))
        return noise(process, x, along_state(process, x, t, constant)), constant

    for leaf in jax.tree.leaves(jax.jacrev(lambda x: held(x)[0])(x)):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-5)
    if "at" in held(x)[1]:
        moved = lambda x: total(along_state(process, x, t, held(x)[1])["at"]).sum()  # noqa: E731
        for leaf in jax.tree.leaves(jax.grad(moved)(x)["state"]):
            np.testing.assert_array_equal(leaf, 1.0)


@pytest.mark.slow
def test_a_plain_function_is_the_model_of_a_corrected_chain():
    process, times, denoiser = chain("corrected graph")
    tuner = tuners.draft(denoiser, process, total, times, tuners.adamw(1e-3), batch=4)
    state = tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.float32(0.7)), 2)
    assert state.params > 0.7


@pytest.mark.first(1)
@pytest.mark.parametrize("law", CHAINS)
def test_one_loop_of_calls_with_and_without_a_gradient_has_the_gradient_of_two(law):
    process, times, denoiser = chain(law)

    def gradient(dynamic):
        tuner = tuners.draft_k(
            denoiser, process, total, times, tuners.adamw(1e-3), k=2, dynamic=dynamic, batch=4, reference=denoiser(0.5), temperature=0.3
        )  # fmt: skip
        return jax.jit(lambda w: tuner.gradients(w, jax.random.key(1))[0])(jnp.float32(0.7))

    exact = gradient(False)
    assert abs(exact) > 1e-3
    np.testing.assert_allclose(gradient(True), exact, rtol=2e-4)
