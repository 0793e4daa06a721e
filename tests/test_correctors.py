"""Correctors: the Langevin step, the laws that it leaves, and that samplers know the law of a corrected move exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import correctors, graphs, processes, samplers, schedules, values

D, VARIANCE = 24, 1.0


@pytest.fixture(scope="module")
def world():
    """N(0, 1) in D dimensions, its exact denoiser, and the variances with which a chain's law is exact at every step."""
    process = processes.gaussian(schedules.linear_vp(), (D,), variance="fixed_large")

    def denoiser(x, t, cond=None):
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        return x * alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)

    return process, denoiser


def reward(x0, cond=None):
    return x0.sum(-1) / jnp.sqrt(D)


def test_a_correction_is_langevins_step(world):
    process, denoiser = world
    t, x = jnp.float32(0.4), jax.random.normal(jax.random.key(0), (3, D))
    z = jax.random.normal(jax.random.key(1), (3, D)) * jnp.array([[1.0], [2.0], [3.0]])
    score = np.asarray(-x / (process.schedule.alpha(t) ** 2 * VARIANCE + process.schedule.sigma(t) ** 2))
    norm = lambda leaf: np.linalg.norm(leaf, axis=-1, keepdims=True)  # noqa: E731
    ratios = {
        "sigma": float(process.schedule.sigma(t)),
        "per_sample": norm(z) / norm(score),
        "batch_mean": norm(z).mean() / norm(score).mean(),
    }
    for name, ratio in ratios.items():
        _, made = correctors.corrected(process, denoiser, snr=0.3, scale=0.7, step_size=name)
        at = made({"state": x, "noise": {"0": z}}, t)["at"]
        step = 2 * (0.3 * ratio) ** 2
        np.testing.assert_allclose(at, x + step * score + 0.7 * np.sqrt(2 * step) * z, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 8])
def test_the_law_of_samples_is_left_right(world, steps):
    process, denoiser = world
    times = process.times(64)
    plain = samplers.sample(samplers.ancestral(process, denoiser), jax.random.key(0), 2048, times).x0
    made = correctors.corrected(process, denoiser, steps=steps, snr=0.05)
    out = samplers.sample(samplers.ancestral(*made), jax.random.key(0), 2048, times).x0
    assert out.shape == (2048, D)
    # 2,048 x 24 numbers: a standard error of 0.004 of their variance
    assert abs(float(out.var()) - VARIANCE) < max(0.016, abs(float(plain.var()) - VARIANCE) + 0.008)
    assert abs(float(out.mean())) < 0.016


@pytest.mark.slow
def test_a_step_by_norms_widens_the_law_by_a_few_parts_in_its_dimension(world):
    """The invariant density of a step e(x) is p / e, and noise whose size follows |z| adds as much: 2 / D to 4 / D of the variance."""
    for step_size, excess in (("per_sample", 4 / D), ("sigma", 0.0)):
        made = correctors.corrected(*world, steps=8, snr=0.05, step_size=step_size)
        out = samplers.sample(samplers.ancestral(*made), jax.random.key(0), 2048, world[0].times(64)).x0
        assert abs(float(out.var()) - VARIANCE - 0.75 * excess) < 0.016 + 0.25 * excess


@pytest.mark.slow
def test_corrections_mend_a_chain_that_is_too_coarse(world):
    process, denoiser = processes.gaussian(schedules.linear_vp(), (D,)), world[1]
    expected, errors = float(process.schedule.alpha(0.4)) ** 2, []  # of the projection of N(0, 1)
    for made in ((process, denoiser), correctors.corrected(process, denoiser, steps=8, snr=0.3)):
        out = samplers.sample(samplers.ancestral(*made), jax.random.key(0), 1024, jnp.array([1.0, 0.7, 0.4])).x0
        errors.append(abs(float(out.var()) - expected))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("corrections", [1, 3])
def test_svdd_and_smc_aim_at_the_tilted_law_as_without_a_corrector(world, corrections):
    """r is N(0, v) under the prior: E r = v / tau under the target, log Z = v / (2 tau^2); the posterior mean is its soft value."""
    process, denoiser = world
    made = correctors.corrected(process, denoiser, steps=corrections, snr=0.05)
    means, log_zs = [], []
    for law, net in ((process, denoiser), made):
        value = values.posterior_mean(reward, law, net)
        steered = samplers.svdd(law, net, value, candidates=8, select_initial=True)
        means.append(float(reward(samplers.sample(steered, jax.random.key(1), 768, law.times(16)).x0).mean()))
        particles = samplers.smc(law, net, value)
        log_zs.append(float(samplers.sample(particles, jax.random.key(2), 2048, law.times(16)).info["log_z"]))
    assert abs(means[0] - means[1]) < 4 * np.sqrt(2 * VARIANCE / 768)
    assert abs(means[1] - VARIANCE) < 0.2  # 1/M of it is missing at M = 8
    assert abs(log_zs[0] - log_zs[1]) < 0.12
    assert abs(log_zs[1] - VARIANCE / 2) < 0.12


@pytest.mark.slow
def test_the_kl_of_a_corrected_move_is_the_mean_of_its_log_ratio(world):
    process, denoiser = world
    tuned = lambda x, t, cond=None: denoiser(x, t) + 0.1  # noqa: E731
    law, ours = correctors.corrected(process, tuned, corrector=denoiser)
    _, theirs = correctors.corrected(process, denoiser)
    t, s = jnp.float32(0.5), jnp.float32(0.4)
    x = law.prior(1).sample(jax.random.key(0))
    p, q = (law.reverse(x, t, s, net(x, t)) for net in (ours, theirs))
    y = jax.vmap(p.sample)(jax.random.split(jax.random.key(1), 4000))
    ratio = np.asarray(jax.vmap(p.log_prob)(y) - jax.vmap(q.log_prob)(y))
    assert abs(ratio.mean() - float(p.kl(q)[0])) < 4 * ratio.std() / np.sqrt(4000)
    sampler = samplers.ancestral(law, ours, reference=theirs)
    kept = samplers.sample(sampler, jax.random.key(0), 4, law.times(4), keep=samplers.path_kl)
    plain = samplers.sample(
        samplers.ancestral(process, tuned, reference=denoiser),
        jax.random.key(0),
        4,
        process.times(4),
        keep=samplers.path_kl,
    )
    # a constant shift costs the same wherever the chain is
    np.testing.assert_allclose(samplers.total_path_kl(kept), samplers.total_path_kl(plain), rtol=1e-3)


@pytest.mark.slow
def test_parts_of_a_graph_are_corrected_apart_and_absent_entries_are_left():
    nodes = processes.gaussian(schedules.linear_vp(0.1, 1.0), (3, 2))
    edges = processes.gaussian(schedules.geometric_ve(0.2, 1.0), (3,))
    process = graphs.process(nodes, edges, [1, 2])
    denoiser = lambda x, t, cond=None: {n: 0.5 * x[n] for n in ("nodes", "edges")}  # noqa: E731
    law, made = correctors.corrected(process, denoiser, step_size="per_sample")
    x = law.prior(8).sample(jax.random.key(0))
    at = made(x, jnp.float32(0.5))["at"]
    for name, where in graphs.there(x["state"]["mask"]).items():
        there = np.broadcast_to(where, at[name].shape)
        assert not np.asarray(at[name])[~there].any() and np.isfinite(at[name]).all()
        assert (np.asarray(at[name]) != np.asarray(x["state"][name]))[there].all()
    assert np.isfinite(law.prior(8).log_prob(x)).all()
    noised = law.forward(graphs.packed(x["state"]), jnp.float32(0.5)).sample(jax.random.key(1))
    assert jax.tree.structure(noised) == jax.tree.structure(x)


@pytest.mark.slow
def test_a_product_of_gaussians_has_a_corrector():
    process = processes.product(
        a=processes.gaussian(schedules.linear_vp(), (2,)), b=processes.gaussian(schedules.flow(), (3,))
    )
    made = correctors.corrected(process, lambda x, t, cond=None: jax.tree.map(lambda leaf: 0.1 * leaf, x))
    out = samplers.sample(samplers.ancestral(*made), jax.random.key(0), 2, 0.9 * process.times(3))
    assert {name: leaf.shape for name, leaf in out.x0.items()} == {"a": (2, 2), "b": (2, 3)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"snr": 0.0}, "snr must be a finite number > 0"),
        ({"scale": -1.0}, "scale must be a finite number >= 0"),
        ({"step_size": "mean"}, "step_size must be one of"),
    ],
)
def test_bad_settings_are_refused(world, options, said):
    with pytest.raises(ValueError, match=said):
        correctors.corrected(*world, **options)


def test_tokens_have_no_score():
    process = processes.masked(schedules.log_linear_mask(), 3, 2)
    with pytest.raises(ValueError, match="needs a process with a score"):
        correctors.corrected(process, lambda x, t, cond=None: x)
    with pytest.raises(ValueError, match="needs a process with a score"):
        correctors.corrected(processes.product(a=process), lambda x, t, cond=None: x)
