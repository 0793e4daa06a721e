"""Low-rank adapters against explicit matrix products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff.nets import MLP, LoRAModel, lora_init, lora_merge, lora_sum

KEY = jax.random.key(0)
PARAMS = {
    "conv": {"kernel": jax.random.normal(KEY, (3, 3, 2, 4)), "bias": jnp.ones(4)},
    "dense": {"kernel": jax.random.normal(KEY, (5, 4)), "bias": jnp.ones(4)},
    "table": {"embedding": jnp.ones((3, 4))},
}


def adapter(seed, rank=2, **options):
    """An adapter whose b is not zero."""
    made = lora_init(jax.random.key(seed), PARAMS, rank, **options)
    return jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(seed + 1), p.shape), made)


def close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b)


def test_init_has_the_right_leaves_and_changes_nothing():
    made = lora_init(KEY, PARAMS, 3)
    assert jax.tree.map(jnp.shape, made) == {
        "conv/kernel": {"a": (18, 3), "b": (3, 4)},
        "dense/kernel": {"a": (5, 3), "b": (3, 4)},
    }
    merged = lora_merge(PARAMS, made)
    jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)
    big = lora_init(KEY, {"kernel": jnp.zeros((4000, 2))}, 4)["kernel"]["a"]
    assert abs(jnp.std(big) - 1 / 4) < 0.01
    conv, dense = made["conv/kernel"]["a"], made["dense/kernel"]["a"]
    assert not np.allclose(conv[:5], dense)  # independent draws


def test_target_is_a_pattern_or_a_predicate():
    assert set(lora_init(KEY, PARAMS, 1, target="dense")) == {"dense/kernel"}
    assert set(lora_init(KEY, PARAMS, 1, target=lambda path: True)) == {
        "conv/kernel",
        "dense/kernel",
        "table/embedding",
    }


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lora_init(KEY, PARAMS, 1, target="attention"), "conv/kernel"),
        (lambda: lora_init(KEY, PARAMS, 1, target="bias"), "two or more axes"),
        (lambda: lora_init(KEY, PARAMS, 0), "rank"),
        (lambda: lora_merge({"other": jnp.ones((2, 2))}, adapter(1)), "conv/kernel"),
        (lambda: lora_sum([]), "at least one"),
    ],
)
def test_refusals_are_clear(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_merge_is_the_explicit_product():
    made = adapter(1)
    merged = lora_merge(PARAMS, made, 0.5)
    a, b = (np.asarray(made["conv/kernel"][k], np.float64) for k in "ab")
    want = np.asarray(PARAMS["conv"]["kernel"]) + 0.5 * (a @ b).reshape(3, 3, 2, 4)
    np.testing.assert_allclose(merged["conv"]["kernel"], want, rtol=1e-5, atol=1e-6)
    # the reshape is that of the layer: an adapted convolution is itself plus b of the convolution by a
    x = jax.random.normal(KEY, (1, 6, 6, 2))
    layer = lambda w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    low = layer(made["conv/kernel"]["a"].reshape(3, 3, 2, 2)) @ made["conv/kernel"]["b"]
    change = layer(merged["conv"]["kernel"]) - layer(PARAMS["conv"]["kernel"])
    np.testing.assert_allclose(change, 0.5 * low, rtol=1e-4, atol=1e-4)
    close(lora_merge(PARAMS, made, 0.0), PARAMS, 0.0)
    np.testing.assert_array_equal(merged["table"]["embedding"], PARAMS["table"]["embedding"])


def test_sum_of_adapters_is_the_sum_of_their_changes():
    one, two, part = adapter(1, 2), adapter(5, 3), adapter(9, 1, target="dense")
    total = lora_sum([(one, 0.7), (two, -1.2), (part, 2.0)])
    assert total["conv/kernel"]["a"].shape == (18, 5) and total["dense/kernel"]["b"].shape == (6, 4)
    want = PARAMS
    for each, scale in [(one, 0.7), (two, -1.2), (part, 2.0)]:
        want = lora_merge(want, each, scale)
    close(lora_merge(PARAMS, total), want)


def test_vmap_over_adapters_is_the_loop_and_scale_is_dynamic():
    adapters = [adapter(seed) for seed in (1, 3, 5)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *adapters)
    scales = jnp.array([1.0, 0.0, -2.0])
    many = jax.vmap(lora_merge, (None, 0, 0))(PARAMS, stacked, scales)
    loop = [lora_merge(PARAMS, each, scale) for each, scale in zip(adapters, scales, strict=True)]
    close(many, jax.tree.map(lambda *a: jnp.stack(a), *loop))
    traces = []

    @jax.jit
    def merge(adapter, scale):
        traces.append(1)
        return lora_merge(PARAMS, adapter, scale)

    merge(adapters[0], 0.1)
    merge(adapters[1], 0.7)
    assert len(traces) == 1


NET = MLP((8, 8))
X = jax.random.normal(KEY, (4, 3))
TIME = jnp.array(0.3)
BASE: Any = NET.init(KEY, X, 0.5)["params"]
BASE["out"]["kernel"] = jax.random.normal(KEY, BASE["out"]["kernel"].shape)


def denoiser(params):
    def call(x, t, cond=None) -> Any:
        return NET.apply({"params": params}, x, t, cond)

    return call


def test_model_maps_adapters_to_denoisers():
    model = LoRAModel(BASE, denoiser, 2.0)
    start = lora_init(KEY, BASE, 2)
    np.testing.assert_array_equal(model(start)(X, TIME), denoiser(BASE)(X, TIME))

    @jax.jit  # the model is one argument: base and scale are data, the function is structure
    def loss(model, adapter):
        return jnp.sum(model(adapter)(X, TIME) ** 2)

    grads = jax.jit(jax.grad(loss, argnums=1))(model, start)
    assert jax.tree.structure(grads) == jax.tree.structure(start)
    # by hand: d loss / d b = scale a^T dW, d loss / d a = scale dW b^T = 0 at the start
    full = jax.grad(lambda p: jnp.sum(denoiser(p)(X, TIME) ** 2))(BASE)
    for name in ("dense0", "out"):
        want = 2.0 * start[f"{name}/kernel"]["a"].T @ full[name]["kernel"]
        np.testing.assert_allclose(grads[f"{name}/kernel"]["b"], want, rtol=2e-4, atol=1e-5)
        np.testing.assert_array_equal(grads[f"{name}/kernel"]["a"], 0.0)


@pytest.mark.slow
def test_model_is_a_pytree_whatever_its_inner_model_is():
    made = jax.tree.map(lambda p: p + 0.1, lora_init(KEY, BASE, 2))
    plain = LoRAModel(BASE, denoiser)
    nested = LoRAModel(BASE, jax.tree_util.Partial(denoiser))
    want = denoiser(lora_merge(BASE, made))(X, TIME)  # without jit
    for model in (plain, nested, jax.tree.map(lambda leaf: leaf, plain)):
        np.testing.assert_allclose(jax.jit(lambda m, a: m(a)(X, TIME))(model, made), want, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(plain) == jax.tree.structure(LoRAModel(BASE, denoiser, 3.0))
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), made)
    both = jax.vmap(lambda a: plain(a)(X, TIME))(stacked)
    np.testing.assert_allclose(both[0], want, rtol=1e-4, atol=1e-5)
