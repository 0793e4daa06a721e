"""Adjoint matching: the lean adjoint, the fixed point and the law, against closed forms of linear-Gaussian chains.

One gain and one shift a call (`per_call`) represent every affine change of a chain, so that the best one is among them, and the
gradient to a shift is the adjoint itself: that of KL(k || prior.tilt(a)) at k = prior is -a times what the shift does to the mean.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.studies.exact_initial import per_call
from rgdiff import denoisers, nets, processes, schedules, tuners
from rgdiff.typing import Function
from tests.worlds import controlled
from tests.worlds.worlds import GaussianWorld, assert_mean, ddim, slope

ALPHA = 0.5
M, C, B, Q = [0.5, -0.3], [[0.6, 0.2], [0.2, 0.4]], [0.8, 0.4], [[1.0, 0.3], [0.3, 0.5]]
f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


def world(steps=5, schedule="linear_vp", quadratic=True, temperature=ALPHA):
    return GaussianWorld(M, C, schedule=schedule, steps=steps, b=B, q=Q if quadratic else None, temperature=temperature)


def changed(w):
    """params -> the world's denoiser plus gain_i x + shift_i at call i, and the parameters of no change."""
    change, params = per_call(w.times, w.dim)

    def network(params, x, t, cond=None):
        return w.denoiser(x, t) + change(params, x, t)

    network.scalar_time = True
    return Function(lambda params: denoisers.from_function(network, params)), params


def matching(w, make=tuners.adjoint_matching, *, optimizer=None, **options):
    model, params = changed(w)
    options = {"batch": 1, "reference": w.denoiser, "temperature": w.temperature} | options
    return make(model, w.process, w.reward, w.times, optimizer or optax.sgd(1.0), **options), params


def lifts(w):
    """What one unit of a prediction's shift does to the mean of each call, the projection last."""
    out = []
    for t, s in itertools.pairwise(w.grid):
        a, c, _ = ddim(w.reference, t, s, w.eta)
        out.append(a - c * w.reference.alpha(t) / w.reference.sigma(t))
    return np.array([*out, 1.0])


def parameters(w, chain):
    """Of `per_call`, for a chain of moves (matrix, offset, std)."""
    prior, lift = controlled.moves(w, w.temperature), lifts(w)
    gain = [(m[0] - p.matrix) / k for m, p, k in zip(chain, prior, lift, strict=True)]
    shift = [(m[1] - p.offset) / k for m, p, k in zip(chain, prior, lift, strict=True)]
    return {"gain": f32(np.stack(gain)), "shift": f32(np.stack(shift))}


def at_the_prior(w):
    """The gradient to every shift there, for a linear reward: what it does to the mean, times minus the adjoint A' ... G' b / alpha."""
    adjoint, out = w.b / ALPHA, []
    for move, lift in zip(controlled.moves(w, ALPHA)[::-1], lifts(w)[::-1], strict=True):
        out.append(-lift * adjoint)
        adjoint = move.matrix.T @ adjoint
    return np.stack(out[::-1])


def law(w, params):
    """Mean and covariance of x0 of the chain with these parameters: no samples."""
    prior, lift = controlled.moves(w, w.temperature), lifts(w)
    gain, shift = (np.asarray(params[name], float) for name in ("gain", "shift"))
    chain = [(p.matrix + k * g, p.offset + k * d, p.std) for p, k, g, d in zip(prior, lift, gain, shift, strict=True)]
    return controlled.push(controlled.prior(w), chain)


# ---------------------------------------------------------------- the lean adjoint


@pytest.mark.first(1)
@pytest.mark.parametrize("schedule", ["linear_vp", "flow"])
def test_the_lean_adjoint_is_the_product_of_the_priors_jacobians(schedule):
    """In closed form, and also where the tuned network's own Jacobian is another one."""
    w = world(schedule=schedule, quadratic=False)
    tuner, params = matching(w)
    params["gain"] = params["gain"].at[-1].set(f32([[0.7, -0.2], [0.1, 0.4]]))
    shift = np.asarray(jax.jit(tuner.gradients)(params, jax.random.key(0))[0]["shift"])
    np.testing.assert_allclose(shift[:-1], at_the_prior(w)[:-1], rtol=2e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_at_the_prior_the_gradient_is_that_of_the_reward_through_the_chain(micro_batches):
    """Any network, LoRA parameters, infeasible samples, micro-batches: draft's gradient over alpha, with the same draws."""
    module = nets.MLP((8,))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))["params"]
    rng = np.random.default_rng(0)
    base = jax.tree.map(lambda p: f32(0.5 * rng.normal(size=p.shape)), shapes)
    model = nets.LoRAModel(base, denoisers.LinenModel(module))
    adapter = nets.lora_init(jax.random.key(1), base, 2)
    process = processes.gaussian(schedules.flow(), (2,))
    reward = Function(lambda x0, cond=None: jnp.where(jnp.sin(20 * x0[:, 0]) > -0.7, jnp.sin(3 * x0).sum(-1), jnp.nan))
    parts = (model, process, reward, process.times(3), optax.sgd(1.0))
    more = {"batch": 64, "micro_batches": micro_batches}
    kl = {"reference": model(adapter), "temperature": 0.25}
    ours, info = jax.jit(tuners.adjoint_matching(*parts, **kl, **more).gradients)(adapter, jax.random.key(2))
    draft, other = jax.jit(tuners.draft(*parts, **more).gradients)(adapter, jax.random.key(2))
    assert jax.tree.structure(ours) == jax.tree.structure(adapter) and float(optax.tree.norm(ours)) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 0.25, rtol=1e-4, atol=1e-4), ours, draft)
    assert 0 < int(info["infeasible"]) == int(other["infeasible"]) < 64 and float(info["kl"]) < 1e-10
    np.testing.assert_allclose(info["reward"], other["reward"], rtol=1e-6)


# ---------------------------------------------------------------- the fixed point


@pytest.mark.first(1)
@pytest.mark.parametrize("schedule", ["flow", "linear_vp"])
def test_the_best_shifts_are_stationary_for_every_number_of_moves(schedule):
    """At the solution of the chain's Bellman equation the mean gradient is 0, in every direction; a little off it is not."""
    w = world(4, schedule)
    tuner, _ = matching(w, batch=4096)
    chain = controlled.control(controlled.moves(w, ALPHA), controlled.end(w))[1]
    best = parameters(w, chain)
    draws = jax.jit(
        lambda p: jax.lax.map(lambda key: tuner.gradients(p, key)[0], jax.random.split(jax.random.key(0), 32))
    )
    flat = lambda tree: np.concatenate([np.asarray(leaf).reshape(32, -1) for leaf in jax.tree.leaves(tree)], -1)  # noqa: E731
    gradients = flat(draws(best))
    assert_mean(gradients, np.zeros(gradients.shape[1]), errors=4.5, slack=1e-6)
    off = flat(draws(best | {"shift": best["shift"] + 0.05}))
    error = off.std(0) / np.sqrt(len(off))
    assert (np.abs(off.mean(0)) > 10 * error).mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear_vp", "flow"])
def test_the_gradient_at_the_tilted_denoiser_vanishes_as_one_over_t(schedule):
    """p exp(r/alpha)/Z of N(0, 1) and r = x is N(1/alpha, 1): at its exact denoiser the gradient is O(1/T)."""
    found, counts = [], (25, 50, 100, 200)
    for steps in counts:
        w = GaussianWorld([0.0], [[1.0]], schedule=schedule, steps=steps)
        alpha, sigma = w.schedule.alpha, w.schedule.sigma
        model = lambda m, w=w, a=alpha, s=sigma: (  # noqa: E731
            lambda x, t, cond=None: w.denoiser(x, t) + s(t) ** 2 / (a(t) ** 2 + s(t) ** 2) * m
        )
        parts = (model, w.process, w.reward, w.times, optax.sgd(1.0))
        tuner = tuners.adjoint_matching(*parts, batch=1, reference=w.denoiser, temperature=ALPHA)
        at = jax.jit(lambda m, tuner=tuner: tuner.gradients(m, jax.random.key(0))[0][0])
        found.append(float(at(jnp.full(1, 1 / ALPHA))))
        assert float(at(jnp.zeros(1))) == pytest.approx(-1 / ALPHA, rel=1e-3)  # the prior's, for scale
    assert -1.2 < slope(counts, found) < -0.9 and found[-1] < 0.1 / ALPHA


@pytest.mark.slow
def test_the_residual_at_the_tilted_denoiser_vanishes_as_one_over_t_for_a_quadratic_reward():
    """In the metric of the path KL: |mean residual of every call|, in standard deviations of its move, from gains and shifts."""
    sizes, counts = [], (64, 128, 256)
    for steps in counts:
        w = GaussianWorld([0.5], [[0.6]], steps=steps, b=[0.8], q=[[0.3]])
        c = 1 / (1 / 0.6 + 0.3)
        tilted = GaussianWorld([c * (0.5 / 0.6 + 0.8)], [[c]], steps=steps)
        params = parameters(w, [move[:3] for move in controlled.moves(tilted, 1.0)])
        tuner, _ = matching(w, batch=4096)
        draw = jax.jit(lambda key, params=params, tuner=tuner: tuner.gradients(params, key)[0]["shift"][:, 0])
        shift = np.mean([draw(key) for key in jax.random.split(jax.random.key(1), 8)], 0)
        weight = np.array([1 / move.price for move in controlled.moves(w, 1.0)])  # std^2, of a unit of mean
        sizes.append(float(np.sqrt(np.sum(weight * (shift / lifts(w)) ** 2))))
    assert -1.1 < slope(counts, sizes) < -0.8 and sizes[-1] < 0.05, sizes


# ---------------------------------------------------------------- the law


def adam(rate, steps):
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)


@pytest.mark.slow
def test_tuning_ends_at_the_best_shifts_of_a_short_chain():
    """N(0, 1), r = 2x - x^2, alpha = 1, T = 10: mean and variance of the docstrings, .571 and .221; p exp(r)/Z has .523 and .262."""
    w = GaussianWorld([0.0], [[1.0]], steps=10, b=[2.0], q=[[2.0]])
    tuner, params = matching(w, batch=256, optimizer=adam(0.02, 400))
    params = tuners.fit(tuner, jax.random.key(0), tuner.init(params), 400, chunk=400).best
    got = law(w, params)
    np.testing.assert_allclose([got.mean[0], got.cov[0, 0]], [0.571, 0.221], rtol=0.015)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear_vp", "cosine_vp", "flow"])
def test_a_tuned_chain_of_100_calls_has_the_tilted_law_within_one_per_cent(schedule):
    w = GaussianWorld([0.5], [[0.6]], schedule=schedule, steps=100, b=[0.8], q=[[0.3]])
    mean, cov = w.tilted()
    before = w.law()
    assert abs(mean - before[0])[0] > 0.4 * np.sqrt(cov[0, 0]) and cov[0, 0] < 0.9 * before[1][0, 0]  # it is far
    tuner, params = matching(w, batch=512, optimizer=adam(0.02, 1500))
    params = tuners.fit(tuner, jax.random.key(0), tuner.init(params), 1500, chunk=1500).best
    got = law(w, params)
    np.testing.assert_allclose([got.mean[0], got.cov[0, 0]], [mean[0], cov[0, 0]], rtol=0.01)


# ---------------------------------------------------------------- options


@pytest.mark.slow
def test_calls_outside_the_loss_have_no_gradient_and_drawn_ones_weigh_more():
    """late = 1 and one of four others: its gradient is four times that of the whole loss, so that the mean is the whole one."""
    w = world(quadratic=False)
    part, params = matching(w, late=1, drawn=1)
    gradients, whole, seen = jax.jit(part.gradients), at_the_prior(w), set()
    for key in jax.random.split(jax.random.key(3), 12):
        shift = np.asarray(gradients(params, key)[0]["shift"])
        np.testing.assert_allclose(shift[-1], whole[-1], rtol=2e-4)
        (chosen,) = np.flatnonzero(np.abs(shift[:-1]).sum(-1))
        np.testing.assert_allclose(shift[chosen], 4 * whole[chosen], rtol=2e-4, atol=1e-6)
        seen.add(chosen)
    assert seen == {0, 1, 2, 3} and part.network_calls() == 7


@pytest.mark.slow
def test_terms_above_the_limit_have_no_gradient():
    """At the prior the term of a call is std^2 |a|^2 / 2 nats."""
    w = world(quadratic=False)
    shift = at_the_prior(w)
    prices = np.array([move.price for move in controlled.moves(w, ALPHA)])
    terms = 0.5 * ALPHA / prices * ((shift / lifts(w)[:, None]) ** 2).sum(-1)
    limit = 1.01 * np.median(terms)
    kept = terms < limit
    tuner, params = matching(w, loss_limit=limit)
    gradients, info = jax.jit(tuner.gradients)(params, jax.random.key(0))
    assert kept.any() and not kept.all()
    np.testing.assert_allclose(gradients["shift"][kept], shift[kept], rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(gradients["shift"][~kept], 0)
    np.testing.assert_allclose(info["loss"], np.minimum(terms, limit).sum(), rtol=1e-3)


@pytest.mark.parametrize(("change", "line"), [
    ({"eta": 0.0}, "memoryless chain, eta = 1, got eta = 0"),
    ({"eta": 0.5}, "memoryless chain, eta = 1, got eta = 0.5"),
    ({"times": [0.5, 0.2]}, "an SNR of 0.086"),
    ({"process": processes.masked(schedules.log_linear_mask(), 2, 3)}, "for tokens see drakes"),
    ({"late": 0}, "late \\+ drawn must be within"),
    ({"late": 3, "drawn": 2}, "late \\+ drawn must be within"),
    ({"loss_limit": 0.0}, "loss_limit must be"),
    ({"temperature": 0.0}, "temperature must be"),
    ({"reference": [lambda x, t, cond=None: x] * 2, "temperature": 1.0}, "one for each|one reference"),
    ({"truncation": 2}, "unexpected keyword argument 'truncation'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(change, line):
    model = lambda w: lambda x, t, cond=None: w + 0 * x  # noqa: E731
    process = processes.gaussian(schedules.linear_vp(), (1,), eta=change.pop("eta", 1.0))
    process = change.pop("process", process)
    times = change.pop("times", process.times(4))
    options = {"batch": 2, "reference": model(0.0), "temperature": 1.0} | change
    with pytest.raises((ValueError, TypeError), match=line) as raised:
        tuners.adjoint_matching(model, process, lambda x0, cond=None: x0[:, 0], times, optax.sgd(1.0), **options)
    assert "\n" not in str(raised.value)
