"""Kernels against scipy, quadrature and enumeration of all outcomes; draws against their own probabilities."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rgdiff.kernels import (
    RELAXATIONS,
    Absorbing,
    Categorical,
    Drawn,
    FirstHitting,
    Gaussian,
    PointMass,
    Product,
    draw_token,
)
from tests.worlds.worlds import assert_mean

KEY = jax.random.key(0)
MEAN = np.array([[0.3, -1.0], [2.0, 0.1], [0.0, 0.5]])
STDS = {"scalar": np.float64(0.7), "per example": np.array([[0.5], [1.0], [2.0]]), "full": np.abs(MEAN) + 0.4}
f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


# ---------------------------------------------------------------- Gaussian


@pytest.mark.parametrize("name", STDS)
def test_gaussian_against_scipy(name):
    kernel, std = Gaussian(f32(MEAN), f32(STDS[name])), np.broadcast_to(STDS[name], MEAN.shape)
    x = MEAN + 0.6
    np.testing.assert_allclose(kernel.log_prob(f32(x)), stats.norm.logpdf(x, MEAN, std).sum(1), rtol=1e-5)
    np.testing.assert_allclose(kernel.entropy(), stats.norm.entropy(MEAN, std).sum(1), rtol=1e-5)
    draws = np.asarray(jax.vmap(kernel.sample)(jax.random.split(KEY, 100_000)), float)
    assert_mean(draws, MEAN)
    assert_mean((draws - MEAN) ** 2, std**2)


def test_gaussian_kl_and_tilt_by_quadrature():
    x = np.linspace(-25, 25, 20_001)
    p, q, d = Gaussian(f32([[0.4]]), f32(0.8)), Gaussian(f32([[-0.5]]), f32(1.3)), 0.9
    log_p, log_q = stats.norm.logpdf(x, 0.4, 0.8), stats.norm.logpdf(x, -0.5, 1.3)
    weight = np.exp(log_p) * (x[1] - x[0])
    np.testing.assert_allclose(p.kl(q), [weight @ (log_p - log_q)], rtol=1e-5)
    log_z = np.log(weight @ np.exp(d * x))
    at = np.array([[1.7]])
    np.testing.assert_allclose(
        p.tilt(f32([[d]])).log_prob(f32(at)), stats.norm.logpdf(at[:, 0], 0.4, 0.8) + d * at[:, 0] - log_z, rtol=1e-5
    )
    both = Gaussian(f32(MEAN), f32(0.7)).kl(Gaussian(f32(MEAN + 1), f32(0.9)))  # sums over coordinates
    one = Gaussian(f32([[0.0]]), f32(0.7)).kl(Gaussian(f32([[1.0]]), f32(0.9)))
    np.testing.assert_allclose(both, 2 * jnp.repeat(one, 3), rtol=1e-5)


def test_sample_has_no_gradient_and_rsample_the_pathwise_one():
    draw = lambda how: lambda m: getattr(Gaussian(m * jnp.ones((2, 3)), m), how)(KEY).sum()  # noqa: E731
    assert jax.grad(draw("sample"))(2.0) == 0
    np.testing.assert_allclose(jax.grad(draw("rsample"))(2.0), 6 + jax.random.normal(KEY, (2, 3)).sum(), rtol=1e-5)


def test_point_mass_has_no_law():
    point = PointMass(jnp.ones((2, 3)))
    np.testing.assert_array_equal(point.sample(KEY), 1.0)
    for call in (lambda: point.log_prob(point.point), lambda: point.kl(point), point.entropy, lambda: point.tilt(0)):
        with pytest.raises(ValueError, match="eta > 0"):
            call()


def test_a_law_of_samples_can_only_be_drawn_from():
    """Its draws are those of the function, `rsample` with its gradient; it has no density, and says so."""

    def law(scale):
        return Drawn(jax.tree_util.Partial(lambda key, batch: scale * jax.random.normal(key, (batch, 2))), 5)

    expected = 3.0 * jax.random.normal(KEY, (5, 2))
    np.testing.assert_array_equal(law(3.0).sample(KEY), expected)
    np.testing.assert_array_equal(law(3.0).rsample(KEY), expected)
    assert jax.grad(lambda s: law(s).sample(KEY).sum())(3.0) == 0
    np.testing.assert_allclose(jax.grad(lambda s: law(s).rsample(KEY).sum())(3.0), expected.sum() / 3, rtol=1e-5)
    for call in (law(1.0).log_prob, law(1.0).kl, law(1.0).tilt):
        with pytest.raises(ValueError, match="another chain's samples"):
            call(expected)
    with pytest.raises(ValueError, match="another chain's samples"):
        law(1.0).entropy()


# ---------------------------------------------------------------- discrete: everything by enumeration


def one_hot(tokens, classes):
    return f32(np.eye(classes)[np.asarray(tokens)])


LOGITS = np.array([[[0.2, -1.0, 0.7], [1.5, 0.0, -np.inf]]])  # [1, L=2, K=3]
OTHER = np.array([[[-0.3, 0.4, 0.1], [0.0, 1.0, -0.5]]])
DIRECTION = np.array([[[0.5, -0.2, 1.0, 0.3], [-1.0, 0.4, 0.6, -0.7]]])


def categorical_case():
    return Categorical(f32(LOGITS)), Categorical(f32(OTHER)), DIRECTION[..., :3], 3


def absorbing_case(masked=(True, True), move=0.3, other_move=0.45):
    """All positions masked, or the second one already token 1."""
    x = np.where(np.array(masked)[None, :, None], np.eye(4)[3], np.eye(4)[1])
    with np.errstate(divide="ignore"):
        make = lambda logits, m: Absorbing(f32(x), f32(logits), f32(np.log(m)), f32(np.log1p(-m)))  # noqa: E731
        return make(LOGITS, np.float64(move)), make(OTHER, np.float64(other_move)), DIRECTION, 4


def first_hitting_case(masked=(True, True), where=(0.3, -0.9)):
    """One of the masked positions takes a token; which one is not uniform, unless `where` is 0."""
    x = np.where(np.array(masked)[None, :, None], np.eye(4)[3], np.eye(4)[1])
    where, other = (f32([where]), f32([[-0.2, 0.5]])) if isinstance(where, tuple) else (0.0, 0.0)
    return FirstHitting(f32(x), f32(LOGITS), where), FirstHitting(f32(x), f32(OTHER), other), DIRECTION, 4


def probabilities(kernel, classes):
    """States [N, L, K'] and the kernel's probabilities of them [N]."""
    states = one_hot(list(itertools.product(range(classes), repeat=2)), classes)
    return states, np.exp(np.array([float(kernel.log_prob(s[None])[0]) for s in states]))


CASES = {
    "categorical": categorical_case,
    "absorbing": absorbing_case,
    "absorbing, one unmasked": lambda: absorbing_case((True, False)),
    "absorbing, all move": lambda: absorbing_case(move=1.0),
    "first hitting": first_hitting_case,
    "first hitting, uniform": lambda: first_hitting_case(where=0.0),
    "first hitting, one unmasked": lambda: first_hitting_case((False, True)),
    "first hitting, none masked": lambda: first_hitting_case((False, False)),
    "absorbing, none moves": lambda: absorbing_case(move=0.0, other_move=0.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.first(1)
def test_discrete_kernels_by_enumeration(case):
    kernel, other, direction, classes = case()
    states, p = probabilities(kernel, classes)
    q = probabilities(other, classes)[1]
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
    some = p > 0
    np.testing.assert_allclose(kernel.entropy()[0], -np.sum(p[some] * np.log(p[some])), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kernel.kl(other)[0], np.sum(p[some] * np.log(p[some] / q[some])), rtol=1e-4, atol=1e-6)
    weight = p * np.exp((np.asarray(states) * direction).sum((1, 2)))
    np.testing.assert_allclose(
        probabilities(kernel.tilt(f32(direction)), classes)[1], weight / weight.sum(), rtol=1e-4, atol=1e-7
    )
    for how in ("sample", "rsample"):
        draws = np.asarray(jax.vmap(getattr(kernel, how))(jax.random.split(KEY, 100_000)))[:, 0]
        matches = (np.abs(draws[:, None] - np.asarray(states)) < 1e-6).all((2, 3))
        assert matches.sum(1).min() == 1  # every draw is one of the states
        assert np.all(np.abs(matches.mean(0) - p) <= 4 * np.sqrt(p * (1 - p) / 100_000) + 1e-7), how


def test_absorbing_probabilities_from_the_definition():
    kernel, _, _, _ = absorbing_case((True, False))
    token = np.exp(LOGITS[0, 0]) / np.exp(LOGITS[0, 0]).sum()
    for first in range(4):
        expected = 0.7 if first == 3 else 0.3 * token[first]
        np.testing.assert_allclose(np.exp(kernel.log_prob(one_hot([[first, 1]], 4))[0]), expected, rtol=1e-5)
    assert kernel.log_prob(one_hot([[0, 2]], 4))[0] == -jnp.inf  # an unmasked token never changes


def test_first_hitting_probabilities_from_the_definition():
    kernel, _, _, _ = first_hitting_case()
    where = np.exp([0.3, -0.9]) / np.exp([0.3, -0.9]).sum()
    token = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum(-1, keepdims=True)
    for i, letter in itertools.product(range(2), range(3)):
        state = [3, 3]
        state[i] = letter
        np.testing.assert_allclose(
            np.exp(kernel.log_prob(one_hot([state], 4))[0]), where[i] * token[i, letter], rtol=1e-5, atol=1e-7
        )
    for state in ([3, 3], [0, 1]):  # none moved, two moved
        assert kernel.log_prob(one_hot([state], 4))[0] == -jnp.inf


def test_first_hitting_tilt_of_the_token_keeps_which_position_moves():
    kernel, _, direction, _ = first_hitting_case()
    tilted = kernel.tilt_token(f32(direction[..., :3]))
    np.testing.assert_allclose(tilted.log_position, kernel.log_position, rtol=1e-6)
    states, p = probabilities(kernel, 4)
    q = probabilities(tilted, 4)[1]
    for i in range(2):  # the states in which position i has moved
        moved = (np.asarray(states)[:, 1 - i, 3] == 1) & (np.asarray(states)[:, i, 3] == 0)
        weight = p[moved] * np.exp((np.asarray(states)[moved, i, :3] * direction[0, i, :3]).sum(1))
        np.testing.assert_allclose(q[moved], weight / weight.sum() * p[moved].sum(), rtol=1e-4, atol=1e-7)


def test_tilt_of_the_token_keeps_the_rate_of_unmasking():
    kernel, _, direction, _ = absorbing_case()
    states, p = probabilities(kernel, 4)
    tilted = probabilities(kernel.tilt_token(f32(direction[..., :3])), 4)[1]
    stays = np.asarray(states)[..., 3]
    for pattern in itertools.product((0, 1), repeat=2):
        same = (stays == pattern).all(1)
        np.testing.assert_allclose(tilted[same].sum(), p[same].sum(), rtol=1e-5)
        weight = p[same] * np.exp((np.asarray(states)[same, :, :3] * direction[..., :3]).sum((1, 2)))
        np.testing.assert_allclose(tilted[same], weight / weight.sum() * p[same].sum(), rtol=1e-4, atol=1e-7)


def test_categorical_kl_is_infinite_off_the_support():
    p, q = Categorical(f32([[[0.0, 0.0]]])), Categorical(f32([[[0.0, -np.inf]]]))
    assert p.kl(q)[0] == jnp.inf
    np.testing.assert_allclose(q.kl(p), [np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.first(1)
def test_impossible_tokens_are_never_drawn_and_gradients_stay_finite(relaxation):
    logits = f32([[0.5, -np.inf, 0.1]])
    draw = lambda key, z: draw_token(key, jnp.where(jnp.isinf(logits), logits, z), relaxation, 0.7)  # noqa: E731
    keys = jax.random.split(KEY, 200)
    draws = jax.vmap(draw, (0, None))(keys, logits)
    assert np.all(np.isfinite(draws)) and np.all(np.asarray(draws)[..., 1] == 0)
    np.testing.assert_allclose(draws.sum(-1), 1, rtol=1e-5)
    gradients = jax.grad(lambda z: (jax.vmap(draw, (0, None))(keys, z) @ f32([1.0, 2.0, 4.0])).sum())(logits)
    assert np.all(np.isfinite(gradients)) and np.abs(gradients[0, 0]) > 1


def _mean_gradient(relaxation, f, temperature=0.5, draws=400_000):
    z = f32([0.4, -0.3, 0.9])
    tokens = lambda z: draw_token(KEY, jnp.broadcast_to(z, (draws, 3)), relaxation, temperature)  # noqa: E731
    return jax.grad(lambda z: jax.vmap(f)(tokens(z)).mean())(z), jax.grad(
        lambda z: jax.nn.softmax(z) @ jax.vmap(f)(jnp.eye(3))
    )(z)


@pytest.mark.slow
def test_straight_through_is_unbiased_for_linear_and_reinmax_for_quadratic_functions():
    q = f32([[2.0, 0.5, 0.0], [0.5, -1.0, 0.3], [0.0, 0.3, 0.7]])
    linear, quadratic = (lambda y: y @ f32([1.0, -2.0, 0.5])), (lambda y: y @ q @ y + y @ f32([0.3, 0.0, -1.0]))
    for relaxation, f in (("straight_through", linear), ("reinmax", linear), ("reinmax", quadratic)):
        got, exact = _mean_gradient(relaxation, f)
        np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(exact), rtol=0.01)
        np.testing.assert_allclose(got, exact, atol=0.01 * float(jnp.linalg.norm(exact)))
    got, exact = _mean_gradient("straight_through", quadratic)
    assert np.linalg.norm(got - exact) > 0.1 * np.linalg.norm(exact)  # the quadratic can tell them apart


@pytest.mark.slow
def test_gumbel_straight_through_tends_to_its_relaxed_gradient():
    """The hard draw of `gumbel` has the gradient of `relaxed` with the same noise, for a linear function exactly."""
    w = f32([1.0, -2.0, 0.5])
    for temperature in (0.3, 1.0):
        hard = _mean_gradient("gumbel", lambda y: y @ w, temperature, 1000)[0]
        soft = _mean_gradient("relaxed", lambda y: y @ w, temperature, 1000)[0]
        np.testing.assert_allclose(hard, soft, rtol=1e-4, atol=1e-6)


def test_absorbing_copies_carry_the_whole_gradient():
    """d<w, y>/dx is w on unmasked positions, and 0 on a masked one that moves: copies stand outside the draw."""
    kernel, _, _, _ = absorbing_case((True, False), move=1.0)
    w = f32(np.arange(1.0, 9.0).reshape(1, 2, 4))
    place = lambda x: Absorbing(x, kernel.logits, kernel.log_move, kernel.log_stay).rsample(KEY)  # noqa: E731
    gradient = jax.grad(lambda x: (w * place(x)).sum())(kernel.x)
    np.testing.assert_array_equal(gradient, w * np.array([0, 1])[None, :, None])


def test_first_hitting_copies_carry_the_whole_gradient():
    """d<w, y>/dx is w on unmasked positions and 0 on the one that moves; the token's is the straight-through one."""
    kernel, _, _, _ = first_hitting_case((True, False))
    w = f32(np.arange(1.0, 9.0).reshape(1, 2, 4))
    draw = lambda x, z: (w * FirstHitting(x, z).rsample(KEY)).sum()  # noqa: E731
    gradient, token = jax.grad(draw, (0, 1))(kernel.x, kernel.logits)
    np.testing.assert_array_equal(gradient, w * np.array([0, 1])[None, :, None])
    p = np.exp(LOGITS[0, 0]) / np.exp(LOGITS[0, 0]).sum()
    np.testing.assert_allclose(token[0, 0], p * ([1, 2, 3] - p @ [1, 2, 3]), rtol=1e-5)
    np.testing.assert_array_equal(token[0, 1], 0)


# ---------------------------------------------------------------- Product


def test_product_sums_over_independent_parts():
    gaussian, gaussian_2 = Gaussian(f32([[0.4]]), f32(0.8)), Gaussian(f32([[-0.5]]), f32(1.3))
    discrete, discrete_2, direction, _ = absorbing_case()
    p, q = Product({"x": gaussian, "c": discrete}), Product({"x": gaussian_2, "c": discrete_2})
    state = {"x": f32([[0.1]]), "c": one_hot([[0, 3]], 4)}
    np.testing.assert_allclose(p.log_prob(state), gaussian.log_prob(state["x"]) + discrete.log_prob(state["c"]))
    np.testing.assert_allclose(p.kl(q), gaussian.kl(gaussian_2) + discrete.kl(discrete_2))
    np.testing.assert_allclose(p.entropy(), gaussian.entropy() + discrete.entropy())
    d = {"x": f32([[0.9]]), "c": f32(direction)}
    expected = gaussian.tilt(d["x"]).log_prob(state["x"]) + discrete.tilt(d["c"]).log_prob(state["c"])
    np.testing.assert_allclose(p.tilt(d).log_prob(state), expected)
    draws = jax.vmap(p.sample)(jax.random.split(KEY, 50_000))
    x, stays = np.asarray(draws["x"], float)[:, 0, 0], np.asarray(draws["c"], float)[:, 0, :, 3]
    assert_mean(x, 0.4)
    assert_mean(stays, [0.7, 0.7])
    assert_mean((x - 0.4)[:, None] * (stays - 0.7), [0.0, 0.0])  # parts are independent
    assert (
        np.abs(np.asarray(jax.tree.leaves(p.rsample(KEY))[0]) - np.asarray(jax.tree.leaves(p.sample(KEY))[0])).max()
        == 0
    )
