"""MOOD's property networks against a twin in NumPy; as rewards and values they have the gradient of finite differences."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import correctors, graphs, guides
from rgdiff.pretrained import gdss, mood
from rgdiff.typing import Move
from tests.pretrained import gdss_twin

RELEASED = Path(os.environ.get("RGDIFF_DATA", "")) / "mood_property_networks.npz"
SHAPES = {
    "linears.0": (4, 3), "linears.1": (4, 4), "convs.0": (4, 4), "convs.1": (4, 4), "sigmoid_linear.0": (4, 11),
    "tanh_linear.0": (4, 11), "final_linear.0": (4, 4), "final_linear.3": (1, 4),
}  # fmt: skip


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def twin(p, x, a, mask):
    """The network once more, on whole adjacency matrices."""
    out, h = [x], x
    for i in range(sum(name.startswith("linears") for name in p) // 2):
        h = h @ p[f"linears.{i}.weight"].T + p[f"linears.{i}.bias"]
        h = np.tanh(gdss_twin.convolution(p, f"convs.{i}", h, a)) * mask[..., None]
        out.append(h)
    out = np.concatenate(out, -1)
    gate = sigmoid(out @ p["sigmoid_linear.0.weight"].T + p["sigmoid_linear.0.bias"])
    h = np.tanh((gate * np.tanh(out @ p["tanh_linear.0.weight"].T + p["tanh_linear.0.bias"])).sum(1))
    h = np.maximum(h @ p["final_linear.0.weight"].T + p["final_linear.0.bias"], 0)
    return sigmoid(h @ p["final_linear.3.weight"].T + p["final_linear.3.bias"])[:, 0]


def write(file, change=None):
    """Write a tiny file of random weights: one network of 5 nodes with 3 features."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in SHAPES.items():
        arrays[f"parp1/{name}.weight"] = rng.normal(size=shape).astype(np.float32)
        arrays[f"parp1/{name}.bias"] = rng.normal(size=shape[1 if "conv" in name else 0]).astype(np.float32)
    config = {"params": {"max_node_num": 5, "max_feat_num": 3, "depth": 2, "nhid": 4, "dropout": 0.1}}
    if change is not None:
        change(arrays, config["params"])
    np.savez(file, **arrays, **{"parp1/config": np.frombuffer(json.dumps(config).encode(), np.uint8)})
    return file


def state(count, features, batch=4):
    rng = np.random.default_rng(1)
    mask = (np.arange(count) < rng.integers(2, count + 1, batch)[:, None]).astype(np.float32)
    x = rng.normal(size=(batch, count, features)).astype(np.float32) * mask[..., None]
    a = np.triu(rng.normal(size=(batch, count, count)), 1).astype(np.float32)
    return x, (a + a.swapaxes(1, 2)) * mask[:, :, None] * mask[:, None], mask


def compare(file, name):
    held = mood.read(file, name)
    with np.load(file) as arrays:
        p = {n.removeprefix(f"{name}/"): arrays[n].astype(np.float64) for n in arrays if n.startswith(f"{name}/")}
    x, a, mask = state(*held.shape)
    parts = {"nodes": x, "edges": graphs.triangle(jnp.asarray(a)), "mask": jnp.asarray(mask)}
    expected = twin(p, *(part.astype(np.float64) for part in (x, a, mask)))
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(held.of(parts), expected, atol=1e-6)
    np.testing.assert_allclose(held(graphs.packed(parts)), expected, atol=1e-6)
    return held, parts


@pytest.mark.slow
def test_a_network_is_its_twin_and_its_gradient_that_of_finite_differences(tmp_path):
    held, parts = compare(write(tmp_path / "tiny.npz"), "parp1")
    x0 = graphs.packed(parts)
    along = jax.random.normal(jax.random.key(0), x0.shape)
    slope = jnp.sum(jax.grad(lambda x: held(x).sum())(x0) * along)
    step = (held(x0 + 1e-2 * along) - held(x0 - 1e-2 * along)).sum() / 2e-2
    np.testing.assert_allclose(slope, step, rtol=2e-2)


@pytest.mark.slow
def test_released_networks_are_their_twins():
    if not RELEASED.exists():
        pytest.skip(f"{RELEASED} is not there")
    for name in ("parp1", "fa7", "5ht1b", "braf", "jak2"):
        compare(RELEASED, name)


@pytest.mark.slow
def test_a_guide_tilts_the_corrected_state_by_the_networks_gradient_and_no_draw_of_a_correction(tmp_path):
    held = gdss.read(gdss_twin.write(tmp_path / "gdss.npz"))
    value = mood.GraphValue(mood.read(write(tmp_path / "tiny.npz"), "parp1"))
    process, denoiser = correctors.corrected(held.process([3, 5]), held.model(held.params))
    x, t, s = process.prior(2).sample(jax.random.key(0)), jnp.float32(0.5), jnp.float32(0.4)
    kernel = process.reverse(x, t, s, denoiser(x, t, None))
    tilted = guides.gradient_guide(value, 3.0)(kernel, Move(x, t, s, None, None))
    plain, moved = (k.parts["state"].parts["edges"] for k in (kernel, tilted))
    gradient = jax.grad(lambda e: value.graph_property.of(x["state"] | {"edges": e}).sum())(x["state"]["edges"])
    some = graphs.there(x["state"]["mask"])["edges"]
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(moved.mean, plain.mean + 3 * plain.std**2 * gradient * some, rtol=1e-5, atol=1e-6)
    for at in (
        value,
        lambda x, t, cond=None: value(denoiser(x, t, cond)["at"], t),
    ):  # the second through the correction
        noise = guides.gradient_guide(at)(kernel, Move(x, t, s, None, None)).parts["noise"].parts["0"]
        assert all(not np.asarray(part.mean).any() for part in noise.parts.values())


def _deeper(arrays, settings):
    settings["depth"] = 3


def _without(arrays, settings):
    del settings["nhid"]


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (_deeper, "parp1", "has no 'convs.2.bias'"),
        (_without, "parp1", "PropertyNetwork needs the setting nhid"),
        (None, "jak2", "the property network must be one of ..parp1"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, change, name, said):
    with pytest.raises(ValueError, match=said) as error:
        mood.read(write(tmp_path / "tiny.npz", change), name)
    assert "\n" not in str(error.value)
