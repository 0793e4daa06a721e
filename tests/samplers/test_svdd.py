"""SVDD's options: the law with copies evaluated once is the law; proposals are paid for; partial resampling; bad rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rgdiff
from rgdiff import guides, samplers, values
from rgdiff.typing import pytree
from tests.samplers.test_smc import BAD
from tests.worlds.worlds import CategoricalWorld, GaussianWorld, correlated, factorised, slope


def world_of_copies() -> CategoricalWorld:
    """Twelve moves for three tokens: in most nothing happens."""
    return correlated(length=3, classes=3, steps=12, temperature=0.7)


def build(world, value=None, **options):
    value = values.posterior_mean(world.reward, world.process, world.denoiser) if value is None else value
    return samplers.svdd(
        world.process, world.denoiser, value, temperature=world.temperature, **({"candidates": 6} | options)
    )


def everything(carry, info):
    return {name: info[name] for name in ("values", "candidates", "log_weights", "kl", "infeasible")}


@pytest.mark.parametrize(
    ("timeless", "learned", "options"),
    [
        (False, False, {}),
        (True, False, {"select_initial": True, "chunk": 3}),
        (True, True, {"selection": "argmax", "replace": 0.25}),
    ],
    ids=["pm", "pm timeless", "mc timeless"],
)
@pytest.mark.first(1)
def test_evaluating_the_distinct_changes_nothing_but_the_cost(timeless, learned, options):
    """Same keys, same candidates, same values, same winners; fewer evaluations, and none where nothing is new."""
    world = world_of_copies()
    # Reads no time, as `timeless` promises, and is the reward at the end.
    value = values.posterior_mean(world.reward, world.process, world.denoiser)
    if learned:
        value = values.learned(lambda x, t, cond=None: jnp.sin(x.reshape(x.shape[0], -1) @ jnp.arange(12.0)))
    plain = build(world, value, **(options | {"chunk": None}))  # all candidates at once, which its info has
    lazy = build(world, value, **options, distinct=True, timeless=timeless)
    for batch in (1, 16) if timeless and not learned else (16,):
        key = jax.random.key(batch)
        a = samplers.sample(plain, key, batch, world.times, keep=everything)
        b = samplers.sample(
            lazy, key, batch, world.times, keep=lambda c, i: everything(c, i) | {"evaluations": i["evaluations"]}
        )
        evaluations = np.asarray(b.kept.pop("evaluations"))
        np.testing.assert_array_equal(a.x0, b.x0)
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5), a.kept, b.kept)
        states = np.asarray(a.kept["candidates"]).argmax(-1)  # [T, M, B, L]
        for move in range(states.shape[0] - 1):
            for i in range(batch):
                kinds = {tuple(s) for s in states[move, :, i]}
                assert timeless or evaluations[move, i] == len(kinds)
                assert not timeless or len(kinds) - 1 <= evaluations[move, i] <= len(kinds)
        if timeless and batch == 16:
            assert (evaluations[:-1] == 0).any() and evaluations.sum() < 0.4 * evaluations.size * 6


def test_distinct_compiles_once_when_the_temperature_changes():
    world, traces = world_of_copies(), []

    def reward(x0, cond=None):
        traces.append(1)
        return x0[..., 0].sum(-1)

    denoiser = world.denoiser
    for temperature in (0.2, 2.0):
        value = values.posterior_mean(reward, world.process, denoiser)
        sampler = samplers.svdd(
            world.process, denoiser, value, temperature=temperature, candidates=4, distinct=True, timeless=True
        )
        samplers.sample(sampler, jax.random.key(0), 8, world.times)
        count = len(traces) if temperature == 0.2 else count  # noqa: F821
    assert len(traces) == count


def test_conditions_reach_the_distinct():
    world = world_of_copies()
    reward = lambda x0, cond=None: x0[..., 0].sum(-1) * cond  # noqa: E731
    value = values.posterior_mean(reward, world.process, world.denoiser)
    cond = jnp.where(jnp.arange(400) < 200, 4.0, -4.0)
    out = samplers.sample(build(world, value, distinct=True, timeless=True), jax.random.key(0), 400, world.times, cond)
    zeros = np.asarray(out.x0)[..., 0].sum(-1)
    assert zeros[:200].mean() > zeros[200:].mean() + 0.5


@pytest.mark.parametrize("make", ["gaussian", pytest.param("masked", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_guided_proposal_leaves_the_target(make):
    """Candidates from a tilted kernel, weighted by kernel/proposal: the error still falls as 1/M towards the same law."""
    if make == "gaussian":
        world = GaussianWorld([0.5], [[0.8]], schedule="flow", steps=4, eta=0.6, b=[1.2], q=[[0.4]], temperature=0.8)
    else:
        world = correlated(length=2, steps=3, temperature=1.0)
    off = guides.gradient_guide(lambda x, t, cond=None: -x.reshape(x.shape[0], -1)[:, 0], 1.0, tilts="token_and_rate")
    counts, errors = [4, 8, 16, 32], []
    for m in counts:
        sampler = build(world, world.value, candidates=m, select_initial=True, proposal=off)
        draws = np.asarray(world.statistic(samplers.sample(sampler, jax.random.key(m), 40_000, world.times).x0), float)
        errors.append(abs(draws.mean() - world.tilted_statistic()))
    assert errors[0] > 0.03 and errors[-1] < 0.03, errors
    assert slope(counts, errors) < -0.6, errors


@pytest.mark.slow
def test_partial_resampling_moves_the_lowest_of_the_batch():
    """SVDD-R: with M = 1 and the exact value, the whole batch replaced each move is a particle filter: E r rises to the tilted one."""
    world = factorised(steps=6, temperature=0.5)
    prior = float(world.law() @ world.rewards)
    means = []
    for replace in (0.0, 0.05, 0.5):
        sampler = build(world, world.value, candidates=1, replace=replace)
        out = samplers.sample(sampler, jax.random.key(0), 4000, world.times, keep=everything)
        means.append(float(world.reward(out.x0).mean()))
    assert abs(means[0] - prior) < 0.05 < means[1] - prior and means[2] > means[1] + 0.1


def test_moves_outside_the_window_are_the_priors():
    """N(0, 1) and r = x: every move that selects adds (alpha_s std)^2 / tau to E x0, of its kernel's standard deviation; the others nothing."""
    process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,))
    asked = []

    def denoiser(x, t, cond=None):
        jax.debug.callback(lambda: asked.append(x.shape[0]))
        return x * process.schedule.alpha(t)

    value = values.posterior_mean(lambda x0, cond=None: x0[:, 0], process, denoiser)
    times, batch = process.times(20), 4000
    for first in (0, 8, 14):  # moves that begin later than these select
        window = (0.0, float(times[first]))
        sampler = samplers.svdd(process, denoiser, value, temperature=0.8, candidates=32, window=window)
        asked.clear()
        out = samplers.sample(sampler, jax.random.key(0), batch, times, keep=lambda carry, info: info["value"])
        jax.effects_barrier()
        assert sum(asked) / batch == sampler.network_calls(19) == 1 + first + 32 * (19 - first)
        assert sampler.value_calls(19) == 32 * (19 - first)
        assert np.isnan(out.kept[:first]).all() and np.isfinite(out.kept[first:]).all()
        steps = zip(times[first:-1], times[first + 1 :], strict=True)
        std = [
            float(process.schedule.alpha(s))
            * float(jnp.max(process.reverse(jnp.zeros((1, 1)), t, s, jnp.zeros((1, 1))).std))
            for t, s in steps
        ]
        exact = sum(one**2 for one in std) / 0.8
        assert abs(float(out.x0.mean()) - exact) < 4 * float(out.x0.std()) / np.sqrt(batch) + exact / 32, first
    plain = samplers.sample(
        samplers.svdd(process, denoiser, value, temperature=0.8, candidates=32), jax.random.key(0), 64, times
    )
    every = samplers.svdd(process, denoiser, value, temperature=0.8, candidates=32, window=(0.0, 1.0))
    np.testing.assert_allclose(samplers.sample(every, jax.random.key(0), 64, times).x0, plain.x0, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_batch_of_one_and_a_single_candidate():
    world = world_of_copies()
    for options in ({}, {"distinct": True, "timeless": True}, {"replace": 0.5}):
        out = samplers.sample(build(world, candidates=1, **options), jax.random.key(0), 1, world.times)
        assert out.x0.shape == (1, 3, 3)
    draws = samplers.sample(
        build(world, candidates=1, distinct=True, timeless=True), jax.random.key(0), 20_000, world.times
    ).x0
    np.testing.assert_allclose(world.frequencies(draws), world.law(), atol=0.02)


@pytest.mark.slow
def test_the_initial_selection_can_be_looked_at():
    """One move alone: what it began with is among the initial candidates, the one of the carry."""
    world = GaussianWorld([0.5], [[0.8]], schedule="flow", steps=5, eta=0.8)
    value = values.posterior_mean(world.reward, world.process, world.denoiser)
    sampler = samplers.svdd(
        world.process, world.denoiser, value, temperature=0.5, candidates=6, select_initial=True, selection="argmax"
    )
    key = jax.random.key(3)
    carry, info = sampler.initial(jax.random.fold_in(key, 0), 4, world.times[0])
    assert info["candidates"].shape == (6, 4, 1) and info["values"].shape == info["log_weights"].shape == (6, 4)
    best = np.asarray(info["values"]).argmax(0)
    np.testing.assert_array_equal(carry.x, np.asarray(info["candidates"])[best, np.arange(4)])
    np.testing.assert_array_equal(carry.x, sampler.init(jax.random.fold_in(key, 0), 4, world.times[0]).x)
    out = samplers.sample(sampler, key, 4, world.times[:1])  # a chain of no move ends where it began
    np.testing.assert_allclose(out.x0, sampler.final(carry, world.times[0])[0], rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"selection": "argmax"}, {"select_initial": True}, {"replace": 0.25}, {"learned": True}, {"proposal": True}],
    ids=lambda options: "".join(options) or "soft",
)
@pytest.mark.first(1)
def test_the_running_winner_is_the_winner(options):
    """Candidates in pieces: the same samples, values and selection's KL as of all at once, so that the law is the same."""
    world, options = world_of_copies(), dict(options)
    value = None
    if options.pop("learned", False):
        value = values.learned(lambda x, t, cond=None: jnp.sin(x.reshape(x.shape[0], -1) @ jnp.arange(12.0)))
    if options.get("proposal"):
        options["proposal"] = guides.gradient_guide(lambda x, t, cond=None: -x.reshape(x.shape[0], -1)[:, 0], 1.0)
    keep = lambda carry, info: {name: info[name] for name in ("values", "value", "log_weights", "kl", "infeasible")}  # noqa: E731
    runs = [
        samplers.sample(build(world, value, **options, chunk=chunk), jax.random.key(3), 500, world.times, keep=keep)
        for chunk in (None, 1, 3)
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.x0, runs[0].x0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run.kept, runs[0].kept)


@pytest.mark.slow
def test_the_memory_of_a_chunk_does_not_depend_on_the_candidates():
    """The exponent of temporaries in M, fitted: 1 at once, 0 in pieces."""
    world = GaussianWorld(np.zeros(256), np.eye(256), steps=3)

    def temporaries(many, chunk):
        value = values.posterior_mean(lambda x0, cond=None: x0.sum(-1), world.process, world.denoiser)
        sampler = samplers.svdd(world.process, world.denoiser, value, candidates=many, chunk=chunk)
        run = jax.jit(lambda key: samplers.sample(sampler, key, 64, world.times).x0)
        return run.lower(jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    counts = [8, 64]
    assert abs(slope(counts, [temporaries(many, 2) for many in counts])) < 0.1
    assert slope(counts, [temporaries(many, None) for many in counts]) > 0.8


@pytest.mark.parametrize("reward", BAD)
@pytest.mark.parametrize("options", [{}, {"selection": "argmax"}, {"replace": 0.1}, {"chunk": 2}])
@pytest.mark.first(2)
def test_bad_rewards_end_in_finite_samples(reward, options):
    world = GaussianWorld([0.5], [[0.8]], schedule="flow", steps=5, eta=0.8)
    value = values.posterior_mean(BAD[reward], world.process, world.denoiser)
    sampler = samplers.svdd(world.process, world.denoiser, value, temperature=0.5, candidates=8, **options)
    out = samplers.sample(sampler, jax.random.key(0), 32, world.times, keep=lambda carry, info: info["infeasible"])
    assert np.isfinite(out.x0).all()
    if reward == "some infeasible" and set(options) <= {"chunk"}:
        assert int(out.kept.sum()) > 0 and float((np.asarray(out.x0) <= 0.5).mean()) > 0.9


@pytree
class Wrong:
    """A value that is minus the reward to go."""

    value: object

    def __call__(self, x, t, cond=None):
        return -self.value(x, t, cond)


def test_a_value_that_is_wrong_everywhere_lowers_the_reward_and_nothing_else():
    world = factorised(steps=6, temperature=0.5)
    out = samplers.sample(build(world, Wrong(world.value)), jax.random.key(0), 4000, world.times)
    assert np.isfinite(out.x0).all() and float(world.reward(out.x0).mean()) < float(world.law() @ world.rewards) - 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replace": 1.0}, "fraction of the batch"),
        ({"timeless": True}, "needs distinct=True"),
        ({"distinct": True, "chunk": 4}, "must divide"),
        ({"window": (0.1,)}, "window is a pair"),
        ({"window": (0.0, 0.5), "replace": 0.1}, "without timeless or replace"),
    ],
)
def test_bad_settings_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        build(world_of_copies(), **options)


def test_distinct_needs_a_masked_process():
    world = GaussianWorld([0.5], [[0.8]])
    with pytest.raises(ValueError, match="masked process"):
        samplers.svdd(world.process, world.denoiser, world.value, distinct=True)


@pytest.mark.first(1)
@pytest.mark.parametrize("rows", [None, 1, 5])
def test_event_driven_sampling_is_ancestral_sampling_draw_for_draw(rows):
    world = world_of_copies()
    plain = samplers.ancestral(world.process, world.denoiser)
    lazy = samplers.event_driven(world.process, world.denoiser, rows=rows)
    key = jax.random.key(3)
    a = samplers.sample(plain, key, 32, world.times, keep=lambda x, info: x)
    b = samplers.sample(lazy, key, 32, world.times, keep=lambda c, info: (c.x, info["evaluations"]))
    np.testing.assert_array_equal(a.kept, b.kept[0])
    np.testing.assert_array_equal(a.x0, b.x0)
    evaluations = np.asarray(b.kept[1]).sum(0)
    states = np.asarray(a.kept).argmax(-1)
    before = np.concatenate([np.full_like(states[:1], 3), states[:-1]])
    events = ((states != before).any(-1) & (states == 3).any(-1)).sum(0)
    np.testing.assert_array_equal(evaluations, events)
    assert evaluations.max() <= 2 and lazy.network_calls(12) == 3


def test_event_driven_needs_a_masked_process():
    with pytest.raises(ValueError, match="masked process"):
        samplers.event_driven(GaussianWorld([0.5], [[0.8]]).process, lambda x, t, cond: x)
