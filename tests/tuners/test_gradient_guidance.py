"""Gradient guidance against its population chain: every round is linear and Gaussian, so laws are pushed by quadrature.

The oracle is NumPy float64, from the equations of arXiv 2404.14743: data u ~ N(0, I_d) on a subspace, reward
10 - (theta . x - 3)^2, theta = on e + off e' with e inside and e' outside. A round maps theta . x to a normal law whose
mean and variance follow from DDPM's steps (arXiv 2006.11239) in the plane (e, e'); all other directions are unguided.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import guides, processes, samplers, schedules, tuners
from rgdiff.domains.subspace import VectorJudge
from rgdiff.domains.subspace import data as subspace
from rgdiff.domains.subspace.tasks import Along, Parabola, along
from rgdiff.keys import unrolled
from rgdiff.typing import callable_pytree, pytree
from tests.worlds.worlds import MixtureDenoiser

NOISE = 0.1
f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


def alpha_bar(steps):
    u = (np.arange(steps + 1) / steps + 0.008) / 1.008
    curve = np.cos(u * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - curve[1:] / curve[:-1], 0.999))


class Population:
    """The law of (e . x, e' . x) after a round with gradient c theta and target y, and the Markov chain of theta . x."""

    def __init__(self, steps, look_ahead, on, off):
        self.table, self.look_ahead, self.theta = alpha_bar(steps), look_ahead, np.array([on, off])

    def round(self, c, y):
        """Means [..., 2] and covariances [..., 2, 2]."""
        c, y = np.broadcast_arrays(np.asarray(c, float), y)
        inside, on = np.diag([1.0, 0.0]), self.theta[0]
        steer = c[..., None] * self.theta * (np.array([1.0, 0.0]) if self.look_ahead else 1.0)
        mean, cov = np.zeros((*c.shape, 2)), np.broadcast_to(np.eye(2), (*c.shape, 2, 2))
        for i in reversed(range(len(self.table))):
            bar, before = self.table[i], self.table[i - 1] if i else 1.0
            h, beta = 1 - bar, 1 - bar / before
            gain = h / (NOISE**2 + h * (steer**2).sum(-1))
            look = np.sqrt(bar) * (inside - (gain * c * on)[..., None, None] * steer[..., None] * inside[0])
            first, second = beta * np.sqrt(before) / h, (1 - before) * np.sqrt(1 - beta) / h
            matrix, std = first * look + second * np.eye(2), np.sqrt(beta * (1 - before) / h)
            mean = np.einsum("...ij,...j->...i", matrix, mean) + first * (gain * y)[..., None] * steer
            cov = matrix @ cov @ np.swapaxes(matrix, -1, -2) + std**2 * np.eye(2)
        return mean, cov

    def rewards(self, delta, rounds, grid=None):
        """E r and Var r per round of the per-sample chain, by quadrature over u = theta . x; and what `off_support` needs."""
        u = np.linspace(-3.5, 9.5, 1301) if grid is None else grid
        c = -2 * (u - 3)
        mean, cov = self.round(c, delta + c * u)
        centre, std = mean @ self.theta, np.sqrt(np.einsum("i,nij,j->n", self.theta, cov, self.theta))
        kernel = np.exp(-0.5 * ((u - centre[:, None]) / std[:, None]) ** 2)
        kernel /= kernel.sum(1, keepdims=True)
        start = self.round(0.0, 0.0)[1]
        law = np.exp(-0.5 * u**2 / (self.theta @ start @ self.theta))
        law /= law.sum()
        reward, moments = 10 - (u - 3) ** 2, []
        for _ in range(rounds):
            moments.append((law @ reward, law @ reward**2 - (law @ reward) ** 2))
            law, previous = law @ kernel, law
        return np.array(moments), (previous, mean, cov, start[0, 0])


def off_support(parts, inner, draws=200_000):
    """E |x outside| / |x inside| after the last round, by draws from the exact law: `inner` subspace dimensions."""
    law, mean, cov, plain = parts
    rng = np.random.default_rng(0)
    at = rng.choice(len(law), draws, p=law)
    x = mean[at] + np.einsum("nij,nj->ni", np.linalg.cholesky(cov[at] + 1e-12 * np.eye(2)), rng.normal(size=(draws, 2)))
    return np.mean(np.abs(x[:, 1]) / np.sqrt(x[:, 0] ** 2 + plain * rng.chisquare(inner - 1, draws)))


def world(steps, dim=8, inner=4, on=0.3):
    """A subspace with theta of `on` inside: basis, theta, process, times, exact denoiser, reward."""
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(dim, dim)))[0].T
    theta = on * q[0] + np.sqrt(1 - on**2) * q[-1]
    schedule = schedules.cosine_ddpm(steps)
    process = processes.gaussian(schedule, (dim,))
    denoiser = subspace.SubspaceDenoiser(schedule, f32(q[:inner]))
    reward = Parabola(f32(theta), f32(10.0), f32(3.0))
    return q[:inner], theta, process, process.times(steps), denoiser, reward


@pytree
class Fixed:
    """A model without parameters."""

    denoiser: Any

    def __call__(self, params: Any) -> Any:
        return self.denoiser


def run(tuner, rounds, key=0, params=None, chunk=None):
    """All infos [rounds], and the final state."""
    rows = []
    state = tuner.init(jnp.zeros(()) if params is None else params)
    collect = lambda state, infos: rows.append(infos)  # noqa: E731
    state = tuners.fit(tuner, jax.random.key(key), state, rounds, chunk=chunk or rounds, on_chunk=collect)
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, state


# ---------------------------------------------------------------- the discrete schedule


def test_the_cosine_table_is_ddpm():
    schedule, table = schedules.cosine_ddpm(200), alpha_bar(200)
    times = schedule.times(200)
    np.testing.assert_allclose(times[::-1], np.arange(1, 201) / 200, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(schedule.alpha(times), float)[::-1] ** 2, table, rtol=2e-6)
    np.testing.assert_allclose(np.asarray(schedule.sigma(times), float)[::-1] ** 2, 1 - table, rtol=2e-6)
    # research/gradient_guidance.md §2.1 and §3: the last level, and the Bayes floor of the eps-error (d/D) mean alpha_bar
    np.testing.assert_allclose([table[-1], table.mean() / 4], [6.07e-8, 0.123394], rtol=1e-3)
    assert len(schedule.times(10)) == 10 and set(np.asarray(schedule.times(10))) <= set(np.asarray(times))


def test_reverse_kernels_on_the_table_are_ddpm_with_the_posterior_variance():
    table, process = alpha_bar(20), processes.gaussian(schedules.cosine_ddpm(20), (1,))
    times = process.times(20)
    for i in (19, 10, 1):
        t, s = times[19 - i], times[20 - i]
        beta = 1 - table[i] / table[i - 1]
        kernel: Any = process.reverse(f32([[0.7]]), t, s, f32([[-0.4]]))
        mean = (-0.4 * np.sqrt(table[i - 1]) * beta + 0.7 * np.sqrt(1 - beta) * (1 - table[i - 1])) / (1 - table[i])
        np.testing.assert_allclose(kernel.mean, [[mean]], rtol=1e-4)
        np.testing.assert_allclose(float(kernel.std) ** 2, beta * (1 - table[i - 1]) / (1 - table[i]), rtol=1e-4)


# ---------------------------------------------------------------- the guided denoisers


@pytest.mark.slow
def test_g_loss_is_the_exact_conditional_mean_and_g_its_published_formula():
    """For x0 ~ N(0, P) and y = g . x0 + noise: E[x0 | x_t, y] by the Gaussian conditioning formula."""
    basis, _, process, times, denoiser, _ = world(50)
    projection = basis.T @ basis
    rng = np.random.default_rng(2)
    x, g, y = rng.normal(size=(5, 8)), 2 * rng.normal(size=(5, 8)), rng.normal(size=5)
    g[0] = 0.0
    for t in (times[0], times[20], times[-1], times[jnp.array([3, 9, 20, 30, 49])]):
        bars = np.broadcast_to(np.asarray(process.schedule.alpha(t), float) ** 2, 5)
        tilted = guides.g_loss(denoiser, process, f32(g), f32(y))(f32(x), t)
        naive = guides.g(denoiser, process, f32(g), f32(y))(f32(x), t)
        for n, bar in enumerate(bars):
            rows = np.concatenate([np.sqrt(bar) * np.eye(8), g[n : n + 1]])
            noise = np.diag([1 - bar] * 8 + [NOISE**2])
            gain = projection @ rows.T @ np.linalg.inv(rows @ projection @ rows.T + noise)
            np.testing.assert_allclose(tilted[n], gain @ np.append(x[n], y[n]), rtol=2e-3, atol=2e-4)
            mean = np.sqrt(bar) * projection @ x[n]
            step = (1 - bar) / (NOISE**2 + (1 - bar) * g[n] @ g[n])
            np.testing.assert_allclose(naive[n], mean + step * (y[n] - g[n] @ mean) * g[n], rtol=2e-3, atol=2e-4)
        np.testing.assert_array_equal(tilted[0], denoiser(f32(x), t)[0])


@pytest.mark.slow
def test_g_loss_stays_in_the_subspace_for_data_that_are_not_gaussian():
    """Theorem 1: a mixture on the subspace; G moves out of it by exactly its own step."""
    basis, theta, process, times, _, _ = world(50)
    inner = MixtureDenoiser(process.schedule, jnp.log(f32([0.3, 0.7])), f32(np.eye(2, 4)) * 2, f32([0.5, 0.5]))
    denoiser = lambda x, t, cond=None: inner(x @ f32(basis.T), t) @ f32(basis)  # noqa: E731
    x, g, y = jax.random.normal(jax.random.key(0), (64, 8)), jnp.tile(f32(theta) * 3, (64, 1)), jnp.full(64, 2.0)
    outside = np.eye(8) - basis.T @ basis
    for t in times[jnp.array([5, 25, 45])]:
        plain = np.asarray(jax.jit(denoiser)(x, t), float)
        moved = [
            np.asarray(jax.jit(make(denoiser, process, g, y))(x, t), float) - plain
            for make in (guides.g_loss, guides.g)
        ]
        sizes = [np.linalg.norm(m @ outside, axis=1) / np.linalg.norm(m, axis=1) for m in moved]
        assert sizes[0].max() < 2e-5 and np.linalg.norm(moved[0], axis=1).min() > 1e-3
        np.testing.assert_allclose(sizes[1], np.sqrt(1 - 0.3**2), rtol=1e-4)


def test_scale_and_constant_beta():
    basis, theta, process, times, denoiser, _ = world(50)
    x, g, y, t = jnp.ones((3, 8)), jnp.tile(f32(theta), (3, 1)), jnp.full(3, 2.0), times[20]
    plain, schedule = np.asarray(denoiser(x, t), float), process.schedule
    h, alpha = float(schedule.sigma(t)) ** 2, float(schedule.alpha(t))
    half, whole = (np.asarray(guides.g_loss(denoiser, process, g, y, scale=s)(x, t)) - plain for s in (0.5, 1.0))
    np.testing.assert_allclose(2 * half, whole, rtol=1e-4)
    constant = np.asarray(guides.g_loss(denoiser, process, g, y, beta=0.3)(x, t), float) - plain
    residual = 2.0 - plain @ theta
    np.testing.assert_allclose(  # minus beta times the gradient of (y - v)^2, through h / alpha
        constant, h / alpha * 2 * 0.3 * residual[:, None] * alpha * (basis.T @ basis @ theta), rtol=1e-4
    )


# ---------------------------------------------------------------- algorithm 1


@pytest.mark.parametrize(("guidance", "delta"), [("g_loss", 0.4), ("g", 0.9)])
@pytest.mark.first(1)
def test_algorithm_1_follows_its_population_chain(guidance, delta):
    """E r of every round within 3 standard errors of the quadrature, and the distance from the subspace."""
    steps, rounds, batch = 40, 12, 2048
    basis, theta, process, times, denoiser, reward = world(steps)
    tuner = tuners.gradient_guidance(
        Fixed(denoiser), process, reward, times, batch=batch, guidance=guidance, target=guides.increment(delta),
        measure=subspace.SubspaceMeasure(f32(basis), f32(theta)),
    )  # fmt: skip
    infos, state = run(tuner, rounds)
    oracle = Population(steps, guidance == "g_loss", 0.3, np.sqrt(1 - 0.3**2))
    moments, parts = oracle.rewards(delta, rounds)
    errors = np.abs(infos["reward"] - moments[:, 0]) / np.sqrt(moments[:, 1] / batch)
    assert errors.max() < 3.3 and np.sqrt(np.mean(errors**2)) < 1.7, errors
    assert np.ptp(moments[:, 0]) > 40 * np.sqrt(moments[:, 1].max() / batch)  # the rounds differ by far more
    assert state.x0.shape == (batch, 8) and not infos["infeasible"].any()
    if guidance == "g_loss":
        assert infos["off_support"].max() < 1e-6
        np.testing.assert_allclose(infos["theta_x"], infos["theta_x_inside"], atol=1e-5)
    else:
        np.testing.assert_allclose(infos["off_support"][-1], off_support(parts, 4), rtol=0.06)


def batch_means(steps, basis, gradient, target, rounds):
    """The mean field of the batch-mean reading: z <- E[x0] of the round guided by gradient(z) towards target(g, z)."""
    z, out = np.zeros(basis.shape[1]), []
    for _ in range(rounds):
        g = gradient(z)
        inside = basis.T @ basis @ g
        size = np.linalg.norm(inside)
        mean, _ = Population(steps, True, size, 0.0).round(1.0, target(g, z))
        z = mean[0] * inside / size
        out.append(z)
    return np.array(out)


@pytest.mark.slow
def test_the_batch_mean_goes_to_the_regularised_optimum():
    """Its mean field ends at argmax of f - (lambda/2)|x|^2 in the subspace, lambda = noise^2 / delta."""
    on, delta = 0.5, 0.1
    basis, theta, process, times, denoiser, reward = world(40, on=on)
    tuner = tuners.gradient_guidance(
        Fixed(denoiser), process, reward, times, batch=1024, gradient_at="batch_mean", target=guides.increment(delta)
    )
    _, state = run(tuner, 41, chunk=41)
    gradient = lambda z: -2 * (theta @ z - 3) * theta  # noqa: E731
    target = lambda g, z: delta + g @ z  # noqa: E731
    expected = batch_means(40, basis, gradient, target, 40)[-1]
    np.testing.assert_allclose(np.asarray(state.x0).mean(0), expected, atol=5 / np.sqrt(1024))
    assert len(np.unique(np.asarray(state.gradient), axis=0)) == 1
    best = 6 * on / (NOISE**2 / delta + 2 * on**2)
    limit = batch_means(40, basis, gradient, target, 200)[-1]
    np.testing.assert_allclose(np.linalg.norm(limit), best, rtol=1e-5)


@pytree
class Proximal:
    """y = (noise^2 + |P g|^2) / strength: the choice of theorem 2, whose round is a proximal step."""

    basis: jax.Array
    strength: jax.Array

    def __call__(self, gradient, x0, reward):
        return (NOISE**2 + ((gradient @ self.basis.T) ** 2).sum(-1)) / self.strength


@pytest.mark.parametrize("ratio", [1.5, 3.0])
@pytest.mark.first(1)
def test_theorem_2_contracts_at_the_rate_of_curvature_over_strength(ratio):
    """Quadratic f of curvature L in the subspace, strength lambda = ratio L: errors shrink by at most 1 / ratio a round."""
    steps, rounds, batch = 40, 5, 1024
    basis, _, process, times, denoiser, _ = world(steps)
    rng = np.random.default_rng(4)
    root = rng.normal(size=(8, 8))
    hessian, centre = root @ root.T / 8, 60 * rng.normal(size=8)
    curvature = np.linalg.eigvalsh(basis @ hessian @ basis.T)[-1]
    reward = lambda x0, cond=None: -0.5 * jnp.sum(((x0 - f32(centre)) @ f32(hessian)) * (x0 - f32(centre)), -1)  # noqa: E731
    target = Proximal(f32(basis), f32(ratio * curvature))
    tuner = tuners.gradient_guidance(
        Fixed(denoiser), process, reward, times, batch=batch, gradient_at="batch_mean", target=target
    )
    state, means = tuner.init(jnp.zeros(())), []
    for _ in range(rounds):
        state = tuners.fit(tuner, jax.random.key(0), state, int(state.step) + 1, chunk=1)
        means.append(np.asarray(state.x0, float).mean(0))
    gradient = lambda z: -hessian @ (z - centre)  # noqa: E731
    y = lambda g, z: (NOISE**2 + ((basis @ g) ** 2).sum()) / (ratio * curvature)  # noqa: E731
    expected = batch_means(steps, basis, gradient, y, 60)
    np.testing.assert_allclose(means[1:], expected[: rounds - 1], atol=12 / np.sqrt(batch))
    gaps = np.linalg.norm(np.array(means) - expected[-1], axis=1)
    shrink = gaps[1:4] / gaps[:3]
    assert np.all(shrink < 1.03 / ratio) and shrink[-1] > 0.5 / ratio, shrink


# ---------------------------------------------------------------- algorithm 2


def affine(steps=20, **options):
    basis, theta, process, times, denoiser, reward = world(steps)
    family = subspace.AffineFamily(process.schedule, f32(basis))
    refit = tuners.pretraining(family, process, optax.adam(1e-2, b2=0.99), ema_decay=0.0, grid=steps)
    measure = subspace.SubspaceMeasure(f32(basis), f32(theta))
    tuner = tuners.gradient_guidance(family, process, reward, times, refit=refit, measure=measure, **options)
    return tuner, refit, {"shift": jnp.zeros((steps, 8))}


def test_the_affine_family_moves_the_noise_by_its_shift():
    tuner, _, params = affine(batch=4)
    process, x, t = tuner.process, jnp.ones((4, 8)), tuner.times[jnp.array([0, 5, 19, 19])]
    shift = jax.random.normal(jax.random.key(0), (20, 8))
    eps = [process.eps(x, t, tuner.model({"shift": s})(x, t)) for s in (params["shift"], shift)]
    np.testing.assert_allclose(eps[1] - eps[0], shift[jnp.array([19, 14, 0, 0])], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_round_refits_to_the_newest_batch_by_the_pretraining_loss():
    """One optimiser step on exactly the batch of the round before, from `refit_from` on; then sampling with the new parameters."""
    tuner, refit, params = affine(batch=16, refit_from=3)
    step, state = jax.jit(tuner.step), tuner.init(params)
    for k in range(3):
        state, info = step(jax.random.key(k), state)
        assert np.isnan(info["loss"]) and int(state.train.step) == 0
    np.testing.assert_array_equal(state.train.params["shift"], 0.0)
    train, x0, number = state.train, state.x0, 3
    after, info = step(jax.random.key(7), state)
    key_refit, key_chain = jax.random.split(jax.random.key(7))
    key_loss = jax.random.split(jax.random.split(key_refit, 1)[0])[1]
    expected, about = jax.jit(refit.step)(key_loss, train, {"x0": x0})
    np.testing.assert_allclose(after.train.params["shift"], expected.params["shift"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info["loss"], about["loss"], rtol=1e-5)
    assert np.abs(expected.params["shift"]).max() > 5e-3 and int(after.step) == number + 1
    guided = guides.g_loss(tuner.model(expected.params), tuner.process, state.gradient, state.target)
    again = samplers.sample(samplers.ancestral(tuner.process, guided), key_chain, 16, tuner.times).x0
    np.testing.assert_allclose(after.x0, again, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.slow
def test_older_batches_are_drawn_by_their_weight(decay):
    """Batches of rounds 0..4 in a memory of 3: rows of ages 0, 1, 2 come as decay^age; those forgotten never."""

    tuner, _, params = affine(batch=3000, memory=3, decay=decay)
    state, refit = tuner.init(params), tuner.refit
    assert refit is not None
    for k in range(5):
        state = state._replace(history=state.history.at[k % 3].set(float(k)), step=jnp.int32(k + 1))
        if k == 1:  # what is not there yet is not drawn
            assert set(np.unique(refit.draw(jax.random.key(0), state))) <= {0.0, 1.0}
    rows = np.asarray(refit.draw(jax.random.key(0), state))[:, 0]
    weights = np.array([decay**age if age or decay else 1.0 for age in (2, 1, 0)])
    shares = np.array([(rows == k).mean() for k in (2, 3, 4)])
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=4 * np.sqrt(0.25 / 3000))
    assert shares.sum() == 1.0


# ---------------------------------------------------------------- robustness and contract


@pytree
class Broken:
    """A reward multiplied by `factor` where x_0 > 0, and its gradient with it."""

    reward: Any
    factor: jax.Array

    def __call__(self, x0, cond=None):
        return self.reward(x0) * jax.lax.stop_gradient(jnp.where(x0[:, 0] > 0, self.factor, 1.0))


@pytest.mark.slow
def test_samples_without_a_usable_gradient_are_counted_and_redrawn_from_the_prior():
    """NaN, infinite and huge rewards: the next round is unguided there, and no sample is ever NaN."""
    _, _, process, times, denoiser, reward = world(20)
    step = jax.jit(lambda tuner, key, state: tuner.step(key, state))
    plain = samplers.sample(samplers.ancestral(process, denoiser), jax.random.split(jax.random.key(1))[1], 64, times)
    for bad in (jnp.nan, jnp.inf, 1e30):
        tuner = tuners.gradient_guidance(Fixed(denoiser), process, Broken(reward, f32(bad)), times, batch=64)
        first, info = step(tuner, jax.random.key(0), tuner.init(jnp.zeros(())))
        redrawn = np.asarray(first.x0[:, 0] > 0)
        assert int(info["infeasible"]) == redrawn.sum() > 10
        second, info = step(tuner, jax.random.key(1), first)
        assert np.isfinite(second.x0).all() and int(info["skipped"]) == 0
        np.testing.assert_allclose(second.x0[redrawn], plain.x0[redrawn], rtol=1e-4, atol=1e-5)
        assert np.abs(second.x0 - plain.x0)[~redrawn].max() > 0.1


def test_numbers_change_without_a_new_program_and_interruption_changes_nothing():
    traces = []
    basis, theta, process, times, denoiser, reward = world(10)

    def counted(x, t, cond=None):
        traces.append(1)
        return denoiser(x, t)

    model = Fixed(callable_pytree(counted, "a denoiser"))
    make = lambda delta, **more: tuners.gradient_guidance(  # noqa: E731
        model, process, reward, times, batch=8, target=guides.increment(delta), **more
    )
    whole, state = run(make(0.2), 6, chunk=3)
    traces.clear()
    _, half = run(make(0.2), 3, chunk=3)
    rest = tuners.fit(make(0.2), jax.random.key(0), half, 6, chunk=3)
    np.testing.assert_array_equal(rest.x0, state.x0)
    infos, _ = run(make(0.9, noise=0.3, scale=0.5), 6, chunk=3)
    assert traces == [] and np.abs(infos["reward"] - whole["reward"]).max() > 1e-2
    assert make(0.2).network_calls() == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": "gloss"}, "did you mean 'g_loss'"),
        ({"gradient_at": "mean"}, "must be one of"),
        ({"batch": 0}, "batch"),
        ({"memory": 0}, "memory"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\]"),
        ({"refit": 3}, "tuners.pretraining"),
        ({"noise": 0.0}, "noise"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(options, words):
    _, _, process, times, denoiser, reward = world(10)
    with pytest.raises(ValueError, match=words) as error:
        tuners.gradient_guidance(Fixed(denoiser), process, reward, times, **({"batch": 4} | options))
    assert "\n" not in str(error.value)


def test_masked_processes_and_odd_shapes_are_refused():
    masked: Any = processes.masked(schedules.log_linear_mask(), 3, 3)
    g, y = jnp.zeros((2, 8)), jnp.zeros(2)
    _, _, process, times, denoiser, reward = world(10)
    with pytest.raises(ValueError, match="MaskedProcess"):
        guides.g_loss(denoiser, masked, g, y)
    with pytest.raises(ValueError, match="MaskedProcess"):
        tuners.gradient_guidance(Fixed(denoiser), masked, reward, times, batch=2)
    with pytest.raises(ValueError, match=r"\[2, 8\] and \[3\]"):
        guides.g(denoiser, process, g, jnp.zeros(3))
    for table in ([0.5, 0.6], [1.0, 0.5], [0.5, 0.0, 0.0], [0.5, -0.1], [[0.5]], []):
        with pytest.raises(ValueError, match="decreases strictly"):
            schedules.tabulated(table)
    with pytest.raises(ValueError, match="10 noise levels"):
        schedules.cosine_ddpm(10).times(11)


# ---------------------------------------------------------------- the sphere


def test_bessel_ratio_is_scipys():
    from scipy.special import ive

    kappa = np.logspace(-3, 5, 300)
    for order, tolerance in ((0.5, 6e-5), (2.5, 6e-5), (32.0, 1e-5)):
        exact = ive(order, kappa) / ive(order - 1, kappa)
        known = np.isfinite(exact) & (exact > 0)
        np.testing.assert_allclose(subspace.bessel_ratio(order, f32(kappa))[known], exact[known], rtol=tolerance)


def test_the_denoiser_of_a_circle_is_the_posterior_mean_by_quadrature():
    schedule = schedules.cosine_ddpm(30)
    denoiser, angle = jax.jit(subspace.SphereDenoiser(schedule)), np.linspace(0, 2 * np.pi, 4001)[:-1]
    points = np.stack([np.cos(angle), np.sin(angle)], 1)
    x = np.random.default_rng(0).normal(size=(6, 2))
    for i in (0, 10, 25, 29):
        bar = alpha_bar(30)[i]
        log_weight = -0.5 * ((x[:, None] - np.sqrt(bar) * points) ** 2).sum(-1) / (1 - bar)
        weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
        mean = (weight / weight.sum(1, keepdims=True)) @ points
        np.testing.assert_allclose(denoiser(f32(x), jnp.float32((i + 1) / 30)), mean, atol=2e-4)


@pytest.mark.slow
def test_the_sphere_trades_reward_against_distance():
    """With the exact denoiser both guidances raise theta . x alike; G moves off the sphere, G_loss along it."""
    schedule = schedules.cosine_ddpm(40)
    process, theta = processes.gaussian(schedule, (16,)), f32(np.eye(16)[0])
    off = {}
    for guidance in ("g", "g_loss"):
        tuner = tuners.gradient_guidance(
            Fixed(subspace.SphereDenoiser(schedule)), process, Along(theta), process.times(40), batch=256,
            guidance=guidance, target=guides.increment(0.1), measure=subspace.SphereMeasure(theta),
        )  # fmt: skip
        infos, _ = run(tuner, 8)
        gained, off[guidance] = (infos[name][-1] - infos[name][0] for name in ("reward", "off_support"))
        assert gained > 0.4
    assert off["g"] > 5 * abs(off["g_loss"]), off


# ---------------------------------------------------------------- the paper's numbers


def paper(name="linear"):
    try:
        return getattr(subspace, name)()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_the_papers_constants():
    """research/gradient_guidance.md §2.1: theta_2's parts inside and outside, b_1's and b_2's."""
    domain = paper()
    split = lambda x: [float(np.linalg.norm(p)) for p in (x @ domain.basis.T, x - x @ domain.basis.T @ domain.basis)]  # noqa: E731
    for name, parts in {"theta_2": (0.110432, 0.993884), "b_1": (20.293, 24.743), "b_2": (15.354, 28.615)}.items():
        np.testing.assert_allclose(split(domain.constants[name]), parts, rtol=1e-4)
    np.testing.assert_allclose(split(domain.constants["theta_1"])[0], 1.0, rtol=1e-5)
    x = domain.data(jax.random.key(0), 1000)
    np.testing.assert_allclose(x @ domain.basis.T @ domain.basis, x, atol=1e-5)
    ball = paper("sphere")
    np.testing.assert_allclose(np.linalg.norm(ball.data(jax.random.key(0), 10), axis=1), 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["g_loss", "g"])
def test_algorithm_1_reproduces_the_published_simulation(guidance):
    """T = 200, theta_2. Population means of §3.1 within 3 standard errors; plateau 5.93, or G's stall at 1.90 and .034."""
    domain, steps, batch = paper(), 200, 512
    process, theta = processes.gaussian(schedules.cosine_ddpm(steps), (64,)), f32(domain.constants["theta_2"])
    tuner = tuners.gradient_guidance(
        Fixed(subspace.SubspaceDenoiser(process.schedule, domain.basis)), process,
        Parabola(theta, f32(10.0), f32(3.0)), process.times(steps), batch=batch, guidance=guidance,
        target=guides.increment(0.2 if guidance == "g_loss" else 0.9), measure=domain.measure(theta),
    )  # fmt: skip
    rounds = 201 if guidance == "g_loss" else 101
    infos, _ = run(tuner, rounds, chunk=67)
    oracle = Population(steps, guidance == "g_loss", 0.110432, 0.993884)
    moments, _ = oracle.rewards(0.2 if guidance == "g_loss" else 0.9, rounds)
    errors = np.abs(infos["reward"] - moments[:, 0]) / np.sqrt(moments[:, 1] / batch)
    assert errors.max() < 4.0 and np.mean(errors < 3) > 0.98, errors.max()
    if guidance == "g_loss":
        at = [1, 2, 5, 10, 20, 50, 100, 200]
        golden = [1.178, 1.368, 1.908, 2.715, 3.989, 5.634, 5.908, 5.913]  # 4,000 draws: §3.1, population chain
        slack = 3 * np.sqrt(moments[at, 1]) * np.sqrt(1 / batch + 1 / 4000)
        np.testing.assert_array_less(np.abs(infos["reward"][at] - golden), slack)
        assert abs(infos["reward"][150:].mean() - 5.93) < 0.05 and infos["off_support"].max() < 1e-6
    else:
        assert abs(infos["reward"][20:].mean() - 1.90) < 0.03
        assert abs(infos["off_support"][20:].mean() - 0.034) < 0.003


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["g_loss", "g"])
def test_algorithm_2_reproduces_the_published_simulation(guidance):
    """§3.2: bias of the affine score refitted, Adam 1e-2. G_loss passes 9.5 by round 1,200 in the subspace; G leaves it."""
    domain, steps = paper(), 200
    process, theta = processes.gaussian(schedules.cosine_ddpm(steps), (64,)), f32(domain.constants["theta_2"])
    family, params = domain.family(process.schedule, steps)
    refit = tuners.pretraining(family, process, optax.adam(1e-2, b2=0.99), ema_decay=0.0, grid=steps)
    tuner = tuners.gradient_guidance(
        family, process, Parabola(theta, f32(10.0), f32(3.0)), process.times(steps), batch=32,
        guidance=guidance, target=guides.increment(0.2 if guidance == "g_loss" else 0.9), refit=refit,
        refit_from=60 if guidance == "g_loss" else 40, measure=domain.measure(theta),
    )  # fmt: skip
    infos, _ = run(tuner, 1200, params=params, chunk=100)
    reward, off = infos["reward"][-100:].mean(), infos["off_support"][-100:].mean()
    if guidance == "g_loss":
        assert reward > 9.5 and off < 1e-3
        assert infos["inside"][-1] > 20  # §3.2: 25.15; the optimum needs 27.2
    else:
        assert off > 0.08 and 3.5 < reward < 6.5
        assert infos["theta_x"][-1] - infos["theta_x_inside"][-1] > infos["theta_x_inside"][-1]


@pytest.mark.slow
def test_unrolled_keys_give_jaxs_own_numbers():
    key, states = jax.random.key(3), jnp.zeros((4, 5))
    for draw in (
        lambda k: jax.random.normal(k, (3, 5)),
        lambda k: jax.random.categorical(k, states),
        lambda k: jax.random.permutation(k, 50),
        lambda k: jax.random.bits(k, (7,), "uint8"),
        lambda k: jax.random.key_data(jax.random.split(k, (2, 3))),
        lambda k: jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(k, i)))(jnp.arange(4)),
    ):
        np.testing.assert_array_equal(jax.jit(draw)(unrolled(key)), draw(key))
    other = jax.random.key(0, impl="rbg")
    assert unrolled(other) is other and unrolled(unrolled(key)).dtype == unrolled(key).dtype


@pytest.mark.slow
def test_the_u_net_takes_vectors_and_signals():
    from rgdiff.nets import UNet

    net, x = UNet((8, 16), attention=(1,)), jax.random.normal(jax.random.key(0), (3, 8))
    params = net.init(jax.random.key(1), x, jnp.float32(0.5))["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)
    assert params["conv_in"]["kernel"].shape == (3, 1, 8)
    out = net.apply({"params": params}, x, jnp.float32(0.5))
    signal = net.apply({"params": params}, x[..., None], jnp.float32(0.5))
    np.testing.assert_array_equal(out, signal[..., 0])
    moved = net.apply({"params": params}, x.at[1, 2].add(1.0), jnp.float32(0.5))
    np.testing.assert_array_equal(moved[jnp.array([0, 2])], out[jnp.array([0, 2])])
    assert out.shape == x.shape and np.abs(moved[1] - out[1]).max() > 1e-3


@pytest.mark.parametrize("kind", ["subspace", "sphere"])
def test_samples_are_drawn_by_their_distance_from_the_support_and_their_reward(kind):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 2)))[0].T.astype(np.float32) if kind == "subspace" else None
    theta = np.array([1.0, 0, 0, 0, 0, 0], np.float32)
    domain = subspace.VectorDomain({"theta_1": theta}, basis)
    judge, task = VectorJudge(domain, jax.random.key(0)), along(domain)
    inside = np.asarray(domain.data(jax.random.key(3), 200))
    out = np.linalg.qr(np.concatenate([basis, np.eye(6)]).T)[0][:, 2] if basis is not None else inside
    away = 0.5 * np.asarray(out, np.float32)
    shown = judge.show_all({"data": inside, "moved": inside + away}, task)
    np.testing.assert_allclose(shown["data"].points[:, 0], 0.0, atol=1e-5)
    np.testing.assert_allclose(shown["moved"].points[:, 0], 0.5, atol=1e-5)
    np.testing.assert_allclose(shown["moved"].points[:, 1], (inside + away) @ theta, atol=1e-5)
    assert shown["data"].extent == shown["moved"].extent and shown["data"].extent[1] > 0.5  # one scale
    assert len(judge.show_each(inside[:3])) == 3 and judge.references(task)["data"].shape == (1024, 6)
