"""GDSS's networks against a twin on whole matrices, with random weights and with the released ones; reading is strict."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import correctors, graphs, samplers
from rgdiff.pretrained import gdss
from tests.pretrained import gdss_twin as twin

RELEASED = Path(os.environ.get("RGDIFF_DATA", ""))


def state(count, features, batch=4, seed=0):
    rng = np.random.default_rng(seed)
    size = rng.integers(max(count // 2, 2), count + 1, batch)
    mask = (np.arange(count) < size[:, None]).astype(np.float32)
    x = rng.normal(size=(batch, count, features)).astype(np.float32) * mask[..., None]
    a = np.triu(rng.normal(size=(batch, count, count)), 1).astype(np.float32)
    return x, (a + a.swapaxes(1, 2)) * mask[:, :, None] * mask[:, None], mask


def compare(file, tolerance):
    held, (px, pa, config) = gdss.read(file), twin.load(file)
    x, a, mask = state(held.nodes, held.features)
    e = graphs.triangle(jnp.asarray(a))
    nodes, edges = held.model.networks
    ours = (
        nodes.apply({"params": held.params["x"]}, x, e, mask),
        edges.apply({"params": held.params["adj"]}, x, e, mask),
    )
    whole = [np.asarray(part, np.float64) for part in (x, a, mask)]
    theirs = twin.nodes(px, config["params_x"], *whole), graphs.triangle(twin.edges(pa, config["params_adj"], *whole))
    for got, expected in zip(ours, theirs, strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("params_x", [twin.PLAIN, pytest.param(twin.LAYERED, marks=pytest.mark.slow)])
def test_networks_are_their_twins(tmp_path, params_x):
    compare(twin.write(tmp_path / "tiny.npz", params_x), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gdss_qm9.npz", "gdss_zinc250k_v2.npz"])
def test_released_networks_are_their_twins(name):
    if not (RELEASED / name).exists():
        pytest.skip(f"{RELEASED / name} is not there")
    compare(RELEASED / name, 2e-6)


@pytest.mark.slow
def test_scores_become_predictions_and_chains_run(tmp_path):
    held = gdss.read(twin.write(tmp_path / "tiny.npz"))
    process, denoiser = held.process([3, 5]), held.model(held.params)
    x, t = process.prior(2).sample(jax.random.key(0)), jnp.float32(0.7)
    nodes, edges = (
        network.apply({"params": held.params[key]}, x["nodes"], x["edges"], x["mask"])
        for network, key in zip(held.model.networks, ("x", "adj"), strict=True)
    )
    score = process.score(x, t, denoiser(x, t))
    sigma = process.parts["nodes"].schedule.sigma(t)
    np.testing.assert_allclose(score["nodes"], -nodes / sigma * x["mask"][..., None], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(score["edges"], edges, rtol=1e-3, atol=1e-4)
    sampler = samplers.ancestral(*correctors.corrected(process, denoiser))
    assert np.isfinite(samplers.sample(sampler, jax.random.key(1), 3, process.times(3)).x0).all()


def _drop(arrays, config):
    del arrays["adj/layers.1.attn.2.gnn_k.bias"]


def _more(arrays, config):
    arrays["x/layers.2.weight"] = arrays["x/layers.1.weight"]


def _odd(arrays, config):
    arrays["x/layers.0.weight"] = arrays["x/layers.0.weight"].T


def _stray(arrays, config):
    arrays["ema/decay"] = np.ones(1, np.float32)


def _kind(arrays, config):
    config["params_x"] = {**config["params_x"], "model_type": "ScoreNetworkX_New"}


def _convolution(arrays, config):
    config["params_adj"]["conv"] = "MLP"


def _sde(arrays, config):
    config["sde"]["x"]["type"] = "subVP"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, "has no 'layers.1.attn.2.gnn_k.bias'"),
        (_more, "has 'layers.2.weight', which the network lacks"),
        (_odd, r"'layers.0.weight' is \[4, 3\], expected \[3, 4\]"),
        (_stray, "has 'ema/decay', which no network reads"),
        (_kind, "x is of model_type 'ScoreNetworkX_New', supported are"),
        (_convolution, "does not support conv = 'MLP'"),
        (_sde, "an sde of type 'subVP' is not supported"),
    ],
)
@pytest.mark.first(3)
def test_another_file_is_refused_in_one_line(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        gdss.read(twin.write(tmp_path / "tiny.npz", change=change))


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file at"):
        gdss.read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="is no readable .npz file"):
        gdss.read(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", config=np.array([{}], object))
    with pytest.raises(ValueError, match="is no readable .npz file"):
        gdss.read(tmp_path / "objects.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    with pytest.raises(ValueError, match="has no 'config'"):
        gdss.read(tmp_path / "other.npz")


class EasyDict(dict):
    """Stands for the package's class, as which GDSS's trainer writes its configuration."""


def test_a_released_file_of_pytorch_is_read_without_running_it(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    held = gdss.read(npz := twin.write(tmp_path / "tiny.npz"))
    x, adj, config = twin.load(npz)
    tensors = lambda part, prefix: {prefix + n: torch.tensor(a, dtype=torch.float32) for n, a in part.items()}  # noqa: E731
    monkeypatch.setattr(EasyDict, "__module__", "easydict")
    monkeypatch.setitem(sys.modules, "easydict", types.SimpleNamespace(EasyDict=EasyDict))
    settings = EasyDict(sde=EasyDict(config["sde"]), data=EasyDict(config["data"]), train=EasyDict(lr=1e-3))
    content = {key: config[key] for key in ("params_x", "params_adj")} | {"model_config": settings, "epoch": 3}
    content |= {"x_state_dict": tensors(x, ""), "adj_state_dict": tensors(adj, "module.")}
    torch.save(content, tmp_path / "tiny.pth")
    monkeypatch.delitem(sys.modules, "easydict")
    found = gdss.read(tmp_path / "tiny.pth")
    same = np.testing.assert_array_equal
    jax.tree.map(same, (found.params, found.schedules, found.nodes), (held.params, held.schedules, held.nodes))
    for bad, words in (
        ({"x": 1}, "no released checkpoint of GDSS"),
        ({"x": tmp_path}, "no released checkpoint of GDSS"),
    ):
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=words):
            gdss.read(tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="no file at"):
        gdss.read(tmp_path / "missing.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="pip install torch"):
        gdss.read(tmp_path / "tiny.pth")
