"""DRAKES: gradients of every estimator against the exact one, by enumeration of all partly masked states; optima reached."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, processes, schedules, tuners
from rgdiff.exact import enumeration
from rgdiff.tuners._drakes import SoftAbsorbing
from tests.worlds.worlds import GaussianWorld, correlated

L, K, ALPHA = 3, 3, 0.3
SGD = optax.sgd(1e-3)
MASKED = processes.masked(schedules.log_linear_mask(), L, K)
EVENTS = processes.first_hitting(MASKED)
STATES = np.array(list(itertools.product(range(K + 1), repeat=L)))
TABLE = np.random.default_rng(1).normal(size=(K,) * L)
f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


def reward(x0, cond=None):
    """Multilinear in the tokens."""
    return jnp.einsum("bi,bj,bk,ijk->b", x0[:, 0], x0[:, 1], x0[:, 2], f32(TABLE))


def linear(params, x, t, cond=None):
    return (x.reshape(x.shape[0], -1) @ params["w"] + params["b"]).reshape(-1, L, K)


def tabular(params, x, t, cond=None):
    return params[jnp.argmax(x, -1) @ jnp.asarray([(K + 1) ** i for i in reversed(range(L))])]


def free(params, x, t, cond=None):
    return jnp.broadcast_to(params, (x.shape[0], *params.shape))


def uniform(x, t, cond=None):
    return jnp.zeros((x.shape[0], L, K))


def away(scale=0.7):
    rng = np.random.default_rng(2)
    return {"w": f32(scale * rng.normal(size=(L * (K + 1), L * K))), "b": f32(scale * rng.normal(size=L * K))}


PRIOR = jax.tree.map(jnp.zeros_like, away())


def objective(params, network, alpha=ALPHA, reference=uniform):
    """E[r] - alpha * path KL of the first-hitting chain: its law over all states, pushed forward event by event."""
    x = f32(np.eye(K + 1)[STATES])
    log_p, log_q = (
        jax.nn.log_softmax(f(x)) for f in (lambda x: network(params, x, None), lambda x: reference(x, None))
    )
    apart = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    masked = STATES == K
    place = {tuple(state): n for n, state in enumerate(STATES)}
    to = np.array([[[place[(*s[:i], a, *s[i + 1 :])] for a in range(K)] for i in range(L)] for s in map(tuple, STATES)])
    law, kl = jnp.zeros(len(STATES)).at[-1].set(1.0), 0.0
    for left in range(L, 0, -1):
        moved = law[:, None] * masked / left
        kl += (moved * apart).sum()
        law = jnp.zeros(len(STATES)).at[to].add(moved[..., None] * jnp.exp(log_p))
    return law[(STATES < K).all(1)] @ f32(TABLE.ravel()) - alpha * kl


def tuner_of(estimator, network=linear, process=EVENTS, batch=30_000, alpha=ALPHA, **options):
    return tuners.drakes(
        lambda p: denoisers.from_function(network, p), process, reward, process.times(L), SGD, batch=batch,
        reference=uniform, temperature=alpha, estimator=estimator, remat="none", **options,
    )  # fmt: skip


def gradient(tuner, params, seeds=2):
    """Of the objective, averaged over keys, as one vector."""
    one = jax.jit(lambda p, k: tuner.gradients(p, k)[0])  # parameters as constants would be folded, slowly
    return -np.mean([flat(one(params, jax.random.key(s))) for s in range(seeds)], 0)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(float)


def gumbel_share(classes, temperature, draws=400_000):
    """E[d softmax((z + G)/tau)/dz] over d softmax(z)/dz at z = 0, by its trace; NumPy."""
    noisy = np.random.default_rng(0).gumbel(size=(draws, classes)) / temperature
    y = np.exp(noisy - noisy.max(1, keepdims=True))
    y /= y.sum(1, keepdims=True)
    return float((1 - (y**2).sum(1)).mean() / temperature / (1 - 1 / classes))


# ---------------------------------------------------------------- gradients


SLOW = (("log_variance", 1.0), ("score_function", 1.0), ("reinmax", 1.0), ("gumbel", 1.0), ("gumbel", 0.5))


@pytest.mark.parametrize(
    ("estimator", "temperature"),
    [("straight_through", 1.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
@pytest.mark.slow
def test_gradient_at_the_prior_has_its_magnitude(estimator, temperature):
    """All are unbiased there but gumbel, which passes the share that its own relaxation has (0.70 for 4 letters at 1)."""
    exact = flat(jax.grad(lambda p: objective(p, linear))(PRIOR))
    expected = gumbel_share(K, temperature) * exact if estimator == "gumbel" else exact
    unbiased = estimator in ("score_function", "log_variance")
    batch, seeds, tolerance = (100_000, 4, 0.03) if unbiased else (30_000, 2, 0.015)
    got = gradient(tuner_of(estimator, batch=batch, gumbel_temperature=temperature), PRIOR, seeds=seeds)
    assert abs(np.linalg.norm(got) / np.linalg.norm(expected) - 1) < tolerance
    assert np.linalg.norm(got - expected) < 1.5 * tolerance * np.linalg.norm(expected)


def test_gumbel_passes_what_others_found():
    """research/drakes_exact.md, section 4, measured on SIX6 by a prototype: 0.702 and 0.887 of the gradient for 4 letters."""
    np.testing.assert_allclose([gumbel_share(4, 1.0), gumbel_share(4, 0.5)], [0.702, 0.887], atol=0.01)


@pytest.mark.slow
def test_gradients_away_from_the_prior():
    """The score functions stay unbiased; the pathwise estimators do not, which shows that the test can tell.

    Which of the two errs less is no law: with these weights it is straight-through.
    """
    params = away(1.5)
    exact = flat(jax.grad(lambda p: objective(p, linear))(params))
    assert np.linalg.norm(exact) > 0.1
    error = lambda got: np.linalg.norm(got - exact) / np.linalg.norm(exact)  # noqa: E731
    for estimator in ("score_function", "log_variance"):
        got = gradient(tuner_of(estimator, batch=100_000), params, seeds=4)
        assert abs(np.linalg.norm(got) / np.linalg.norm(exact) - 1) < 0.03, estimator
        assert error(got) < 0.05, estimator
    bias = {
        name: error(gradient(tuner_of(name, batch=100_000), params, seeds=4))
        for name in ("reinmax", "straight_through")
    }
    assert min(bias.values()) > 0.05, bias


@pytest.mark.slow
def test_reported_reward_and_kl_are_the_exact_ones():
    params = away()
    exact = float(objective(params, linear, alpha=0.0))
    kl = (exact - float(objective(params, linear))) / ALPHA
    for estimator in ("reinmax", "log_variance"):
        info = jax.jit(tuner_of(estimator).gradients)(params, jax.random.key(3))[1]
        np.testing.assert_allclose([info["reward"], info["kl"]], [exact, kl], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_truncation_takes_its_share_of_the_reward_and_leaves_the_kl_whole(k):
    """Independent tokens, the last k of L events live: k/L of the reward's gradient, all of the KL's."""
    b = f32(np.random.default_rng(4).normal(size=(L, K)))
    both, alone = (flat(jax.grad(lambda p, a=a: objective(p, free, alpha=a))(b)) for a in (ALPHA, 0.0))
    got = gradient(tuner_of("straight_through", free, truncation=k), b)
    expected = k / L * alone + both - alone
    assert np.linalg.norm(both - alone) > 0.2 * np.linalg.norm(alone)
    np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(expected), rtol=0.02)
    assert np.linalg.norm(got - expected) < 0.03 * np.linalg.norm(expected)


def optimum(prior=None):
    """The tilted law and the tabular logits of its conditionals: the optimal policy, exactly."""
    p = (np.full((K,) * L, K**-L) if prior is None else prior) * np.exp(TABLE / ALPHA)
    p /= p.sum()
    data = np.array(list(itertools.product(range(K), repeat=L)))
    logits = np.zeros((len(STATES), L, K))
    for n, state in enumerate(STATES):
        known = state < K
        fits = (data[:, known] == state[known]).all(1) * p.ravel()
        for i in np.flatnonzero(~known):
            logits[n, i] = np.log(np.bincount(data[:, i], fits, K) / fits.sum())
    return p, f32(logits)


@pytest.mark.slow
def test_log_variance_has_no_noise_at_the_optimum():
    """Every path is worth alpha log Z there: each batch's gradient is 0, where the score function's is noise of mean 0."""
    params = optimum()[1]
    assert np.linalg.norm(flat(jax.grad(lambda p: objective(p, tabular))(params))) < 1e-6
    norm = {}
    for estimator in ("log_variance", "score_function"):
        tuner = tuner_of(estimator, tabular, batch=64)
        norm[estimator] = np.linalg.norm(gradient(tuner, params, seeds=1))
    assert norm["log_variance"] < 1e-5 < 1e-2 < norm["score_function"]


# ---------------------------------------------------------------- the published scheme


def published_share(classes, moves, temperature=1.0, draws=200_000, step=0.05):
    """d E[x_0]/d logit over d softmax/d logit of one relaxed position, by differences with common noise; NumPy."""
    rng = np.random.default_rng(0)
    ends = []
    noise = rng.gumbel(size=(moves, draws, classes + 1))
    for sign in (1, -1):
        p = np.exp(sign * step * np.eye(classes)[0])
        p /= p.sum()
        x = np.tile(np.eye(classes + 1)[classes], (draws, 1))
        for j, t in enumerate(range(moves, 0, -1)):
            q = np.append((1 - (t - 1) / t) * p, (t - 1) / t)
            with np.errstate(divide="ignore"):
                y = np.exp((np.log(q) + noise[j]) / temperature)
            y /= y.sum(1, keepdims=True)
            c = 1 - x[:, -1:]
            x = c * x + (1 - c) * y
        ends.append(x[:, 0].mean())
    return (ends[0] - ends[1]) / (2 * step) / ((classes - 1) / classes**2)


@pytest.mark.slow
def test_published_gradient_at_the_prior_is_attenuated():
    """Eight relaxed moves at temperature 1 pass what an independent simulation of one position says."""
    b = jnp.zeros((L, K))
    exact = flat(jax.grad(lambda p: objective(p, free))(b))
    tuner = tuners.drakes_published(
        lambda p: denoisers.from_function(free, p), MASKED, reward, MASKED.times(8), SGD, batch=50_000,
        reference=uniform, temperature=ALPHA, truncation=8, remat="none",
    )  # fmt: skip
    got = gradient(tuner, b)
    share = published_share(K, 8)
    assert share < 0.7
    np.testing.assert_allclose(np.linalg.norm(got) / np.linalg.norm(exact), share, rtol=0.03)
    assert np.linalg.norm(got - share * exact) < 0.05 * np.linalg.norm(share * exact)


def test_published_kl_is_zero_on_hard_states_and_its_formula_on_soft_ones():
    rng = np.random.default_rng(0)
    z, z2, rate = rng.normal(size=(2, L, K)), rng.normal(size=(2, L, K)), 0.4
    move, stay = (f32(np.full((2, L), np.log(m))) for m in (0.3, 0.7))
    step = lambda x, z: SoftAbsorbing(f32(x), f32(z), move, stay, f32(rate), f32(1.0))  # noqa: E731
    hard = np.eye(K + 1)[rng.integers(0, K + 1, (2, L))]
    np.testing.assert_array_equal(step(hard, z).kl(step(hard, z2)), 0.0)
    soft = rng.dirichlet(np.ones(K + 1), (2, L))
    soft[0] = soft[0][..., ::-1] * 0.2 + 0.8 * np.eye(K + 1)[K]  # undecided: the mask outweighs every token
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (z, z2))
    each = (soft[..., :-1] * (q - p + p * np.log(p / q))).sum(-1) * (1 - soft[..., -1]) / rate
    expected = np.where(soft.argmax(-1) == K, each, 0.0).sum(-1)
    np.testing.assert_allclose(step(soft, z).kl(step(soft, z2)), expected, rtol=1e-5)
    assert expected[0] != 0


# ---------------------------------------------------------------- mixed states


@pytest.mark.slow
def test_mixed_states_have_the_gradient_of_reward_and_kl():
    """A number and two tokens, independent, r = x <w, c_1> + <w, c_2>: closed form of E[r] and of the path KL."""
    w, alpha = np.array([0.5, -1.0, 2.0]), 0.4
    number = GaussianWorld([0.7], [[0.5]], schedule="flow", steps=5, eta=1.0)
    process = processes.product(x=number.process, c=processes.masked(schedules.log_linear_mask(), 2, K))
    times = process.times(5)
    grid = np.asarray(times, float)
    theta, b = np.array([0.2, 0.9]), np.random.default_rng(3).normal(size=(2, K))
    exact_prior = number.model(f32([0.0, 1.0]))

    def network(params, x, t, cond=None):
        return {"x": number.model(params["x"])(x["x"], t), "c": free(params["c"], x["c"], t)}

    def reference(x, t, cond=None):
        return {"x": exact_prior(x["x"], t), "c": jnp.zeros((x["x"].shape[0], 2, K))}

    def reward_of(s, cond=None):
        return s["x"][:, 0] * (s["c"][:, 0] @ f32(w)) + s["c"][:, 1] @ f32(w)

    mode, left = np.eye(K)[b.argmax(-1)], grid[-1]  # tokens still masked at the end take the mode

    def expected(vector, alpha):
        theta, b = vector[:2], vector[2:].reshape(2, K)
        p = np.exp(b) / np.exp(b).sum(-1, keepdims=True)
        token = (1 - left) * p + left * mode
        kl = (p * np.log(p * K)).sum() * (1 - left + left * (1 - left))  # moves, and the projection noised back
        worth = number.law(theta)[0][0] * (token[0] @ w) + token[1] @ w
        return worth - alpha * (number.path_kl(theta, number) + kl)

    vector = np.concatenate([theta, b.ravel()])
    steps = np.eye(vector.size) * 1e-5
    exact, alone = (
        np.array([(expected(vector + s, a) - expected(vector - s, a)) / 2e-5 for s in steps]) for a in (alpha, 0.0)
    )
    assert np.linalg.norm(exact - alone) > 0.1 * np.linalg.norm(exact)  # the KL counts
    tuner = tuners.drakes(
        lambda p: denoisers.from_function(network, p), process, reward_of, times, SGD, batch=30_000,
        reference=reference, temperature=alpha, estimator="straight_through", remat="none",
    )  # fmt: skip
    step = jax.jit(tuner.gradients)
    grads = [step({"x": f32(theta), "c": f32(b)}, jax.random.key(s))[0] for s in range(4)]
    got = -np.mean([np.concatenate([np.ravel(g["x"]), np.ravel(g["c"])]) for g in grads], 0)
    np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(exact), rtol=0.02)
    assert np.linalg.norm(got - exact) < 0.03 * np.linalg.norm(exact), (got, exact)


# ---------------------------------------------------------------- optima


def train(tuner, params, steps):
    return tuners.fit(tuner, jax.random.key(0), tuner.init(params), steps, chunk=steps)


@pytest.mark.slow
def test_training_reaches_the_exact_optimum():
    """A correlated prior, ReinMax and then the log-variance gradient: the law of x0 is p(x0) exp(r/alpha)/Z."""
    world = correlated(L, K)
    process = processes.first_hitting(world.process)
    tilt = enumeration.tilted(world.joint.ravel(), TABLE.ravel(), ALPHA)
    params = jnp.array(world.denoiser.table)
    worth = []
    for estimator, rate in (("reinmax", 0.1), ("log_variance", 0.05)):
        tuner = tuners.drakes(
            lambda p: denoisers.from_function(tabular, p), process, reward, process.times(),
            optax.adam(optax.cosine_decay_schedule(rate, 300)), batch=256, reference=world.denoiser, temperature=ALPHA,
            estimator=estimator, remat="none",
        )  # fmt: skip
        params = train(tuner, params, 300).params
        law, kl = enumeration.chain_law_and_kl(process, tuner.model(params), process.times(), world.denoiser)
        worth.append(law @ TABLE.ravel() - ALPHA * kl)
    best = ALPHA * tilt.log_z
    assert worth[0] < best + 1e-5 and best - worth[1] < 2e-3 * best, (worth, best)
    assert 0.5 * np.abs(law - tilt.probabilities).sum() < 0.01
    assert abs(kl - tilt.kl) < 0.01 * tilt.kl


@pytest.mark.slow
def test_the_default_estimator_converges():
    """Three tokens of four letters, by enumeration: 0.746 of 0.747, where ReinMax stops at 0.52."""
    table = np.random.default_rng(1).normal(size=(4,) * 3)
    world = correlated(3, 4)
    process, prior = processes.first_hitting(world.process), jnp.array(world.denoiser.table)
    reward = lambda x0, cond=None: jnp.einsum("bi,bj,bk,ijk->b", x0[:, 0], x0[:, 1], x0[:, 2], f32(table))  # noqa: E731
    network = lambda params, x, t, cond=None: params[jnp.argmax(x, -1) @ jnp.asarray([25, 5, 1])]  # noqa: E731
    best = ALPHA * enumeration.tilted(world.joint.ravel(), table.ravel(), ALPHA).log_z
    worth = []
    for options in ({}, {"estimator": "reinmax"}):
        tuner = tuners.drakes(
            lambda p: denoisers.from_function(network, p), process, reward, process.times(),
            optax.adam(optax.cosine_decay_schedule(0.05, 600)), batch=256, reference=world.denoiser, temperature=ALPHA,
            remat="none", **options,
        )  # fmt: skip
        params = train(tuner, prior + 0, 600).params
        law, kl = enumeration.chain_law_and_kl(process, tuner.model(params), process.times(), world.denoiser)
        worth.append(float(law @ table.ravel() - ALPHA * kl))
    assert best == pytest.approx(0.7470, abs=1e-4)
    assert 0.995 * best < worth[0] < best + 1e-5, worth
    assert worth[1] < 0.8 * best, worth


# ---------------------------------------------------------------- the door


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tuner_of("st"), "estimator must be one of"),
        (lambda: tuner_of("reinmax", process=processes.gaussian(schedules.flow(), (2,))), "masked process"),
        (lambda: tuner_of("log_variance", process=processes.product(c=MASKED)), "log_variance"),
        (lambda: tuner_of("log_variance", truncation=2), 'estimator="log_variance" takes the whole chain'),
        (
            lambda: tuners.drakes_published(
                lambda p: p,
                EVENTS,
                reward,
                EVENTS.times(),
                SGD,
                batch=2,
                reference=uniform,
                temperature=1.0,
                truncation=1,
            ),
            "published scheme needs a masked process",
        ),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
