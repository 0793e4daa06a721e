"""Denoisers: every kind of prediction is the same x0, and every kind of network the same denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rgdiff import denoisers, processes, samplers, schedules
from rgdiff.tuners import pretraining
from rgdiff.typing import callable_pytree, pytree
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
@pytest.mark.slow
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


@pytest.mark.first(1)
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
            return linen.Dense(2, name="dense")(x) * (1 - t)[:, None]

    class Nnx(nnx.Module):
        def __init__(self, kernel, bias):
            self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)

        def __call__(self, x, t, cond=None):
            return (x @ self.kernel[...] + self.bias[...]) * (1 - t)[:, None]

    def plain(params, x, t, cond=None):
        return (x @ params["kernel"] + params["bias"]) * (1 - t)[:, None]

    world = GaussianWorld([0.0, 0.0], np.eye(2))
    params = Linen().init(jax.random.key(0), jnp.zeros((1, 2)), jnp.ones(1))
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


def networks_with_state():
    """One network in Linen and in NNX, with BatchNorm's statistics, a Dropout and its keys: (module, variables), module."""
    from flax import linen, nnx

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x, t):
            h = linen.BatchNorm(use_running_average=True, name="norm")(linen.Dense(4, name="down")(x))
            return linen.Dense(2, name="up")(linen.Dropout(0.5, deterministic=True)(h))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.down, self.up = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
            self.norm, self.drop = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, t):
            return self.up(self.drop(self.norm(self.down(x))))

    module = Nnx(nnx.Rngs(0))
    module.norm.mean[...], module.norm.var[...] = f32([0.1, -0.2, 0.3, 0.0]), f32([0.5, 1.0, 2.0, 0.01])
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    statistics = {"norm": {"mean": module.norm.mean[...], "var": module.norm.var[...]}}
    return Linen(), {"params": params, "batch_stats": statistics}, module


def test_only_parameters_move():
    """A gradient step on an NNX model equals Linen's, and leaves running statistics, keys and counts where they are."""
    linen, variables, module = networks_with_state()
    module.eval()
    world = GaussianWorld([1.0, -1.0], np.eye(2))
    model, params = denoisers.nnx_model(module)
    params = jax.tree.map(lambda leaf: leaf + 0, params)  # tuners donate their state
    x, t = jax.random.normal(jax.random.key(1), (5, 2)), f32(0.5)

    def tuned(model, params):
        tuner = pretraining(model, world.process, optax.sgd(0.1))
        state = tuner.init(params)
        for i in range(3):
            state, _ = jax.jit(tuner.step)(
                jax.random.fold_in(jax.random.key(0), i), state, {"x0": 3 + jnp.ones((8, 2))}
            )
        return state.params

    there = tuned(denoisers.LinenModel(linen, {"batch_stats": variables["batch_stats"]}), variables["params"])
    here = tuned(model, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), here, there)
    assert np.abs(here["down"]["kernel"] - params["down"]["kernel"]).max() > 0.01
    statistics = variables["batch_stats"]["norm"]
    network = model(here)
    np.testing.assert_array_equal(network.rest["norm"]["var"], statistics["var"])
    assert set(network.rest) == {"norm", "drop"} and set(here) == {"down", "up", "norm"}
    theirs = denoisers.from_linen(linen, variables | {"params": here})
    np.testing.assert_allclose(network(x, t), theirs(x, t), rtol=1e-5)
    h = x @ here["down"]["kernel"] + here["down"]["bias"]
    h = (h - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * here["norm"]["scale"] + here["norm"]["bias"]
    np.testing.assert_allclose(network(x, t), h @ here["up"]["kernel"] + here["up"]["bias"], rtol=1e-4, atol=1e-5)


def test_a_network_that_changes_itself_is_refused():
    module = networks_with_state()[2]
    world = GaussianWorld([0.0, 0.0], np.eye(2))
    draw = lambda: samplers.sample(  # noqa: E731
        samplers.ancestral(world.process, denoisers.from_nnx(module)), jax.random.key(1), 3, world.times
    )
    module.train()
    with pytest.raises(ValueError, match=r"its own 'drop/rngs/count'.*call model.eval\(\)"):
        draw()
    with pytest.raises(ValueError, match="its own 'drop/rngs/count'"):
        denoisers.from_nnx(module)(jnp.zeros((3, 2)), f32(0.5))
    module.drop.deterministic = True
    with pytest.raises(ValueError, match="its own 'norm/mean'"):
        draw()
    module.norm.use_running_average = True
    assert draw().x0.shape == (3, 2)


DOORS = ("from_function", "from_linen", "from_nnx")


def through(door, function):
    """A function of (x, t[, more]) as a network of each kind, through its door."""
    from flax import linen, nnx

    if door == "from_function":
        more = {2: lambda p, x, t: function(x, t), 3: lambda p, x, t, cond: function(x, t, cond)}
        return denoisers.from_function(more[function.__code__.co_argcount], {})
    base = linen.Module if door == "from_linen" else nnx.Module
    call = {2: lambda self, x, t: function(x, t), 3: lambda self, x, t, cond=None: function(x, t, cond)}
    module = type("Net", (base,), {"__call__": call[function.__code__.co_argcount]})()
    return denoisers.from_nnx(module) if base is nnx.Module else denoisers.from_linen(module, {})


@pytest.mark.parametrize("door", DOORS)
def test_networks_see_a_time_per_example(door):
    """t is [B], float32, whether it came as one number or one per example; a network of (x, t) has no cond."""
    seen = []

    def function(x, t):
        seen.append((t.shape, t.dtype))
        return x * (1 - t)[:, None]

    network = through(door, function)
    x = jnp.ones((3, 2))
    np.testing.assert_allclose(network(x, f32(0.25)), 0.75 * np.ones((3, 2)))
    np.testing.assert_allclose(network(x, f32([0, 0.5, 1]))[:, 0], [1, 0.5, 0])
    np.testing.assert_allclose(network({"a": x}["a"], 0.25), 0.75 * np.ones((3, 2)))
    assert set(seen) == {((3,), jnp.dtype("float32"))}
    with pytest.raises(ValueError, match="takes no cond"):
        network(x, f32(0.25), jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"one per example \[3\], got shape \[2\]"):
        network(x, jnp.zeros(2))
    conditional = through(door, lambda x, t, cond: x * cond[:, None])
    np.testing.assert_allclose(conditional(x, f32(0.25), jnp.arange(3))[:, 0], [0, 1, 2])


def test_a_switch_is_no_condition():
    """A network of (x, t, train) is not handed cond in place of train."""
    network = denoisers.from_function(lambda params, x, t, train=False: x + 100 * train, {})
    np.testing.assert_array_equal(network(jnp.ones((2, 1)), f32(0.5)), np.ones((2, 1)))
    with pytest.raises(ValueError, match="takes no cond"):
        network(jnp.ones((2, 1)), f32(0.5), jnp.ones(2))


@pytest.mark.slow
def test_discrete_time_is_the_step_of_the_process():
    """On grids of a table the network sees the step whose alpha_bar the process uses; ten of 1,000 are diffusers' trailing ones."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    schedule = schedules.tabulated(alpha_bar)
    process = processes.gaussian(schedule, (2,))
    table = f32(alpha_bar)
    denoiser = denoisers.discrete_time(lambda x, i, cond: jnp.stack([table[i], i.astype(jnp.float32)], -1), 1000)
    read = lambda grid: denoiser(jnp.zeros((len(grid), 2)), grid).T  # noqa: E731
    for steps in (1000, 999, 50, 7, 1):
        grid = process.times(steps)
        used, index = read(grid)
        np.testing.assert_allclose(used, schedule.alpha(grid) ** 2, rtol=2e-5)
        assert len(set(np.asarray(index))) == steps
    np.testing.assert_array_equal(read(process.times(1000))[1], np.arange(999, -1, -1))
    np.testing.assert_array_equal(read(process.times(10))[1], np.arange(999, 0, -100))
    np.testing.assert_array_equal(read(f32([0.0, 0.0004, 1.0]))[1], [0, 0, 999])


@pytest.mark.first(1)
@pytest.mark.parametrize("door", DOORS)
def test_discrete_time_of_networks(door):
    """Samples of a chain are those of the same network called with t, in sampling ([]) and with a time per example."""
    schedule = schedules.tabulated(np.cumprod(1 - np.linspace(0.05, 0.5, 20)))
    process = processes.gaussian(schedule, (2,))
    kinds = set()

    def function(x, i):
        kinds.add((i.shape, i.dtype))
        return x * ((i + 1) / 20)[:, None]

    stepped = denoisers.predicts("eps", denoisers.discrete_time(through(door, function), 20), schedule)
    plain = denoisers.predicts("eps", callable_pytree(lambda x, t, cond: x * t, "a network"), schedule)
    draw = lambda d: samplers.sample(samplers.ancestral(process, d), jax.random.key(1), 8, process.times(20)).x0  # noqa: E731
    np.testing.assert_allclose(draw(stepped), draw(plain), rtol=1e-4, atol=1e-5)
    assert kinds == {((8,), jnp.dtype("int32"))}


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


def test_logits_of_a_half_precision_network_enter_the_kernel_as_float32():
    process = processes.masked(schedules.log_linear_mask(), (2,), 3)
    x = jnp.zeros((1, 2, 4)).at[..., 3].set(1.0)
    logits = jnp.asarray([[[0.1, 1.3, -0.7], [2.1, 0.3, 0.9]]])
    half = logits.astype(jnp.bfloat16)
    kernel = process.reverse(x, 0.5, 0.25, half)
    token = jnp.zeros((1, 2, 4)).at[:, :, 1].set(1.0)
    expected = process.reverse(x, 0.5, 0.25, half.astype(jnp.float32)).log_prob(token)
    np.testing.assert_array_equal(kernel.log_prob(token), expected)
    assert kernel.log_prob(token).dtype == jnp.float32
