"""Denoisers: every kind of prediction is the same x0, and every kind of network the same denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import denoisers, processes, samplers, schedules
from rgdiff.typing import pytree
from tests.worlds.worlds import SCHEDULES, GaussianWorld, MixtureWorld

f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731


KINDS = [(name, prediction) for name in SCHEDULES for prediction in ("eps", "v", "score")] + [("flow", "velocity")]


@pytest.mark.parametrize(("name", "prediction"), KINDS)
def test_predictions_become_x0(name, prediction):
    """From the definitions of eps, v, score and velocity at one (x0, eps), the denoiser gives x0 back."""
    reference = SCHEDULES[name]
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
    for t in (0.05, 0.5, 0.9):
        alpha, sigma = reference.alpha(t), reference.sigma(t)
        x = alpha * x0 + sigma * eps
        output = {"eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma, "velocity": eps - x0}[prediction]
        denoiser = denoisers.predicts(prediction, lambda x, t, cond, out=output: f32(out), reference.build())
        np.testing.assert_allclose(denoiser(f32(x), f32(t)), x0, atol=2e-4 * max(1, 1 / alpha), rtol=1e-3)
        np.testing.assert_allclose(denoiser(f32(x), jnp.full(5, t)), x0, atol=2e-4 * max(1, 1 / alpha), rtol=1e-3)


@pytest.mark.parametrize("name", ["linear_vp", "karras_ve", "flow"])
def test_the_score_of_a_mixture_is_its_denoiser(name):
    """Tweedie: (x + sigma^2 grad log p_t) / alpha is E[x0 | x_t], with the score by autodiff of the log-density."""
    world = MixtureWorld(dim=2, schedule=name)
    log_density = world.denoiser.log_density
    score = lambda x, t, cond=None: jax.grad(lambda x: log_density(x, t).sum())(x)  # noqa: E731
    denoiser = denoisers.predicts("score", score, world.schedule)
    x = jax.random.normal(jax.random.key(0), (50, 2))
    for t in (0.1, 0.4, 0.7):
        np.testing.assert_allclose(denoiser(x, f32(t)), world.denoiser(x, f32(t)), atol=2e-3)


def test_edm_preconditioning_is_table_one():
    """With the ideal F, x0 comes back; F's target and its input have unit variance for data of deviation sigma_data."""
    schedule = SCHEDULES["karras_ve"].build()
    rng, data = np.random.default_rng(0), 0.5
    for t in (0.1, 0.5, 0.9):
        sigma = SCHEDULES["karras_ve"].sigma(t)
        x0 = data * rng.normal(size=(100_000, 1))
        x = x0 + sigma * rng.normal(size=x0.shape)
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / np.sqrt(sigma**2 + data**2)
        target = (x0 - skip * x) / out
        seen = []
        network = lambda z, t, cond: (seen.append(z), f32(target))[1]  # noqa: B023, E731
        denoiser = denoisers.edm_preconditioned(network, schedule, sigma_data=data)
        np.testing.assert_allclose(denoiser(f32(x), f32(t)), x0, atol=2e-4)
        np.testing.assert_allclose([np.var(target), np.var(seen[0])], 1, rtol=0.02)


def test_classifier_free_guidance_is_that_of_scores():
    """p(x|c)^w p(x)^(1-w): the guided x0 is Tweedie's of the combined score; 1 is conditional, 0 unconditional; 2B rows."""
    conditional, marginal = (GaussianWorld([m], [[c]]) for m, c in ((1.0, 0.3), (0.0, 1.0)))
    rows = []

    def network(x, t, cond):
        rows.append(x.shape[0])
        return jnp.where((cond == 1)[:, None], conditional.denoiser(x, t), marginal.denoiser(x, t))

    x, cond, t = jax.random.normal(jax.random.key(0), (6, 1)), jnp.ones(6, jnp.int32), 0.4
    alpha, sigma = conditional.reference.alpha(t), conditional.reference.sigma(t)
    log_p = lambda x, m, c: -0.5 * (x - alpha * m) ** 2 / (alpha**2 * c + sigma**2)  # noqa: E731
    for scale in (0.0, 1.0, 2.5):
        score = jax.grad(lambda x, w=scale: (w * log_p(x, 1.0, 0.3) + (1 - w) * log_p(x, 0.0, 1.0)).sum())(x)
        out = denoisers.classifier_free(network, scale, 0)(x, f32(t), cond)
        np.testing.assert_allclose(out, (x + sigma**2 * score) / alpha, atol=2e-4)
    assert rows == [12] * 3
    with pytest.raises(ValueError, match="needs cond"):
        denoisers.classifier_free(network, 1.0, 0)(x, f32(t))


@pytest.mark.parametrize("name", ["classifier_free", "annealed"])
def test_forbidden_tokens_stay_forbidden(name):
    """Logits of -inf: p(c)^w p^(1 - w) over the tokens that no law with a weight forbids; w = 1 and 0 are the laws themselves."""
    given, free = np.array([0.4, 0.3, 0.3, 0.0, 0.0]), np.array([0.1, 0.4, 0.0, 0.5, 0.0])
    logits = jnp.log(f32([given, free]))
    network = lambda x, t, cond: logits[cond][:, None]  # noqa: E731
    one = lambda i: lambda x, t, cond: network(x, t, jnp.full(1, i))  # noqa: E731
    x = jnp.zeros((1, 1, 6))
    for w in (0.0, 0.5, 1.0, 2.0):
        allowed = ((given > 0) | (w == 0)) & ((free > 0) | (w == 1))
        expected = np.zeros(5)
        expected[allowed] = given[allowed] ** w * free[allowed] ** (1 - w)
        expected /= expected.sum()
        if name == "classifier_free":
            guided = lambda w: denoisers.classifier_free(network, w, 1)(x, f32(0.5), jnp.zeros(1, int))  # noqa: E731
        elif w <= 1:  # at t = w: the weight of the base
            guided = lambda w: denoisers.annealed(one(1), one(0))(x, w)  # noqa: E731
        else:
            continue
        np.testing.assert_allclose(jax.nn.softmax(guided(f32(w)))[0, 0], expected, atol=1e-6)
        assert np.isfinite(jax.grad(lambda w: jax.nn.softmax(guided(w))[0, 0, 0])(f32(w)))  # noqa: B023


def test_wrappers_take_plain_functions_into_compiled_programs():
    """As constructors do: the samples are those of the same function bound by `from_function`."""
    process = processes.gaussian(schedules.cosine_vp(), (2,))
    network = lambda x, t, cond=None: 0.3 * x  # noqa: E731
    bound = denoisers.from_function(lambda params, x, t, cond: network(x, t), {})
    wrappers = {
        "x0": lambda net: denoisers.predicts("x0", net),
        "v": lambda net: denoisers.predicts("v", net, process.schedule),
        "edm": lambda net: denoisers.edm_preconditioned(net, process.schedule),
        "classifier_free": lambda net: denoisers.classifier_free(net, 2.0, 0),
        "annealed": lambda net: denoisers.annealed(net, net),
        "clip": denoisers.clip_x0,
        "threshold": denoisers.dynamic_threshold,
    }
    cond, key = jnp.ones(3, int), jax.random.key(0)
    draw = jax.jit(lambda d, x: d(x, f32(0.4), cond))
    x = jax.random.normal(key, (3, 2))
    for name, wrap in wrappers.items():
        np.testing.assert_allclose(draw(wrap(network), x), draw(wrap(bound), x), rtol=1e-6, err_msg=name)
    sampler = samplers.ancestral(process, wrappers["v"](network))
    assert np.all(np.isfinite(samplers.sample(sampler, key, 3, process.times(3)).x0))


def test_clip_and_dynamic_threshold():
    out = f32([[0.2, -0.4, 0.5, 1.0], [0.5, -3.0, 1.0, 4.0]])
    constant = lambda x, t, cond=None: out  # noqa: E731
    x, t = jnp.zeros((2, 4)), f32(0.5)
    np.testing.assert_array_equal(denoisers.clip_x0(constant, -0.3, 0.4)(x, t), np.clip(out, -0.3, 0.4))
    thresholded = denoisers.dynamic_threshold(constant, 50.0)(x, t)
    size = np.maximum(np.percentile(np.abs(out), 50, axis=1, keepdims=True), 1.0)  # per example, at least 1
    np.testing.assert_allclose(thresholded, np.clip(out, -size, size) / size, rtol=1e-6)
    np.testing.assert_allclose(thresholded[0], out[0], rtol=1e-6)  # within [-1, 1]: untouched


def test_linen_nnx_and_plain_functions_give_identical_samples():
    from flax import linen, nnx

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x, t, cond=None):
            return linen.Dense(2, name="dense")(x) * (1 - t)

    class Nnx(nnx.Module):
        def __init__(self, kernel, bias):
            self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)

        def __call__(self, x, t, cond=None):
            return (x @ self.kernel[...] + self.bias[...]) * (1 - t)

    def plain(params, x, t, cond=None):
        return (x @ params["kernel"] + params["bias"]) * (1 - t)

    world = GaussianWorld([0.0, 0.0], np.eye(2))
    params = Linen().init(jax.random.key(0), jnp.zeros((1, 2)), f32(0.5))
    dense = params["params"]["dense"]
    doors = [
        denoisers.from_linen(Linen(), params),
        denoisers.from_linen(Linen(), params["params"]),
        denoisers.from_nnx(Nnx(dense["kernel"], dense["bias"])),
        denoisers.from_function(plain, dense),
        Plain(dense),
    ]
    outs = [samplers.sample(samplers.ancestral(world.process, d), jax.random.key(1), 8, world.times).x0 for d in doors]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], atol=1e-6)
    half = denoisers.from_function(lambda p, x, t, c: x.astype(jnp.bfloat16), {})
    assert half(jnp.ones((2, 2)), f32(0.5)).dtype == jnp.float32


@pytree
class Plain:
    """A callable pytree as a denoiser."""

    params: dict

    def __call__(self, x, t, cond=None):
        return (x @ self.params["kernel"] + self.params["bias"]) * (1 - t)


def test_rebuilding_the_same_linen_module_does_not_recompile():
    from flax import linen

    from rgdiff.samplers._loop import _whole

    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x, t, cond=None):
            return linen.Dense(2)(linen.Dense(self.width)(x))

    world = GaussianWorld([0.0, 0.0], np.eye(2))
    params = Net(3).init(jax.random.key(0), jnp.zeros((1, 2)), f32(0.5))
    draw = lambda net: samplers.sample(  # noqa: E731
        samplers.ancestral(world.process, denoisers.from_linen(net, params)), jax.random.key(1), 3, world.times
    )
    draw(Net(3))
    before = _whole._cache_size()
    draw(Net(3))
    assert _whole._cache_size() == before
