"""Guides on the kernel: exact tilts where the value is linear, per example, in nats; one-hot and Gaussian alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import guides, processes, samplers, schedules
from rgdiff.guides.tilt import tilt
from rgdiff.typing import Move
from tests.worlds.worlds import GaussianWorld, correlated


def linear(weights):
    return lambda x, t, cond=None: x.reshape(x.shape[0], -1) @ weights


def moved(world, value, scale, tilts="token"):
    x = world.process.prior(4).sample(jax.random.key(0))
    t, s = world.times[1], world.times[2]
    prediction = world.denoiser(x, t)
    kernel = world.process.reverse(x, t, s, prediction)
    return kernel, guides.gradient_guide(value, scale, tilts=tilts)(kernel, Move(x, t, s, None, prediction))


def test_gaussian_tilt_is_the_kernel_times_exp():
    """log q(y) - log k(y) - scale <g, y> is one constant for all y."""
    world = GaussianWorld([0.5, -1.0], [[0.8, 0.2], [0.2, 0.5]])
    g = jnp.asarray([1.5, -0.4])
    kernel, tilted = moved(world, linear(g), 2.0)
    y = kernel.sample(jax.random.key(1))
    ratio = lambda y: tilted.log_prob(y) - kernel.log_prob(y) - 2.0 * y @ g  # noqa: E731
    np.testing.assert_allclose(ratio(y), ratio(y + 0.3), rtol=1e-4, atol=1e-3)


@pytest.mark.first(1)
@pytest.mark.parametrize("tilts", ["token", "token_and_rate"])
def test_masked_tilt_by_enumeration(tilts):
    """The whole kernel times exp<g, y> renormalised, or the same given which positions move."""
    world = correlated(length=2, classes=3, steps=4)
    g = jax.random.normal(jax.random.key(2), (8,))
    kernel, tilted = moved(world, linear(g), 0.7, tilts)
    states = jax.nn.one_hot(jnp.asarray(world.states), 4)
    log_k, log_q = (
        np.stack([np.asarray(k.log_prob(jnp.broadcast_to(y, (4, 2, 4)))) for y in states]) for k in (kernel, tilted)
    )
    weight = np.exp(log_k) * np.exp(0.7 * np.asarray(states.reshape(-1, 8) @ g))[:, None]
    np.testing.assert_allclose(np.exp(log_q).sum(0), 1, rtol=1e-5)
    if tilts == "token_and_rate":
        np.testing.assert_allclose(np.exp(log_q), weight / weight.sum(0), rtol=1e-4, atol=1e-6)
        return
    moves = (world.states < 3) @ np.array([2, 1])  # which positions carry a token
    for pattern in range(4):
        rows = moves == pattern
        np.testing.assert_allclose(np.exp(log_q[rows]).sum(0), np.exp(log_k[rows]).sum(0), rtol=1e-5)
        ratio = np.exp(log_q[rows]) / weight[rows]
        np.testing.assert_allclose(ratio, ratio[:1].repeat(rows.sum(), 0), rtol=1e-4)


@pytest.mark.first(1)
@pytest.mark.parametrize("discrete", [False, True])
def test_guidance_of_an_example_does_not_depend_on_its_batch(discrete):
    world = correlated(length=2, steps=4) if discrete else GaussianWorld([0.5, 1.0], np.eye(2))
    value = lambda x, t, cond=None: (x.reshape(x.shape[0], -1) ** 2).sum(-1) * (1 + t)  # noqa: E731
    guide = guides.gradient_guide(value, 3.0)
    x = world.process.forward(jax.nn.one_hot(jnp.zeros((5, 2), int), 3) if discrete else jnp.ones((5, 2)), 0.5)
    x = x.sample(jax.random.key(0))
    whole, alone = guide.direction(x, jnp.float32(0.5)), guide.direction(x[:1], jnp.float32(0.5))
    np.testing.assert_allclose(whole[:1], alone, rtol=1e-6)
    np.testing.assert_allclose(whole, 3.0 * 2 * 1.5 * x, rtol=1e-5)  # the gradient itself, not its batch mean


def test_chain_adds_directions_and_infinite_gradients_do_not_guide():
    world = GaussianWorld([0.5, 1.0], np.eye(2))
    kernel, once = moved(world, linear(jnp.asarray([1.0, 2.0])), 1.0)
    bad = guides.gradient_guide(lambda x, t, cond=None: jnp.sqrt(jnp.abs(x[:, 0] * 0.0)) + x[:, 1], 1.0)
    move = Move(jnp.zeros((4, 2)), world.times[1], world.times[2], None, None)
    out = guides.chain(bad, bad)(kernel, move)
    expected = kernel.mean + kernel.std**2 * jnp.asarray([0.0, 2.0])
    np.testing.assert_allclose(out.mean, expected, rtol=1e-5)
    assert not np.allclose(once.mean, kernel.mean)


def test_mixed_states_are_tilted_part_by_part():
    process = processes.product(
        tokens=processes.masked(schedules.log_linear_mask(), 3, 2), x=processes.gaussian(schedules.cosine_vp(), (2,))
    )
    x = process.prior(4).sample(jax.random.key(0))
    kernel = process.reverse(x, 0.8, 0.6, {"tokens": jnp.zeros((4, 3, 2)), "x": jnp.zeros((4, 2))})
    direction = {"tokens": jnp.ones((4, 3, 3)).at[..., 0].set(3.0), "x": jnp.ones((4, 2))}
    out = tilt(kernel, direction, "token")
    np.testing.assert_allclose(
        out.parts["x"].mean - kernel.parts["x"].mean, kernel.parts["x"].std ** 2 + jnp.zeros((4, 2)), rtol=1e-4
    )
    np.testing.assert_allclose(jnp.diff(out.parts["tokens"].logits), -2.0, rtol=1e-5)
    np.testing.assert_allclose(out.parts["tokens"].log_move, kernel.parts["tokens"].log_move)


def test_a_point_mass_is_refused():
    world = GaussianWorld([0.5], [[0.8]], eta=0.0)
    with pytest.raises(ValueError, match="eta > 0"):
        moved(world, linear(jnp.ones(1)), 1.0)


@pytest.mark.slow
def test_guided_svdd_with_one_candidate_is_guided_sampling():
    """Of one candidate the proposal decides: the mean moves by the sum of the propagated tilts, linear in the scale."""
    world = GaussianWorld([0.0], [[1.0]], steps=6)
    means = []
    for scale in (0.0, 1.0, 2.0):
        guide = guides.gradient_guide(linear(jnp.ones(1)), scale)
        sampler = samplers.svdd(world.process, world.denoiser, world.value, candidates=1, proposal=guide)
        means.append(float(samplers.sample(sampler, jax.random.key(0), 2000, world.times).x0.mean()))
    np.testing.assert_allclose(means[2] - means[0], 2 * (means[1] - means[0]), rtol=1e-3)
    assert means[1] - means[0] > 0.2
