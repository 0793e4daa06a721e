"""GDSS's score networks once more, for tests: NumPy on whole adjacency matrices, from the paper's equations and the state dict."""

from __future__ import annotations

import json

import numpy as np


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def mlp(p, name, x):
    layers = sum(key.startswith(f"{name}.linears.") and key.endswith(".weight") for key in p)
    for i in range(layers):
        x = (elu(x) if i else x) @ p[f"{name}.linears.{i}.weight"].T + p[f"{name}.linears.{i}.bias"]
    return x


def normalised(a):
    a = a * (1 - np.eye(a.shape[-1])) + np.eye(a.shape[-1])
    d = np.maximum(a.sum(-1), 1) ** -0.5
    return d[..., :, None] * a * d[..., None, :]


def convolution(p, name, x, a):
    return normalised(a) @ (x @ p[f"{name}.weight"]) + p[f"{name}.bias"]


def powers(a, count):
    return [np.linalg.matrix_power(a, n + 1) for n in range(count)]


def layer(p, name, x, channels, pair, heads):
    values, scores = [], []
    for c, a in enumerate(channels):
        q, k, v = (convolution(p, f"{name}.attn.{c}.gnn_{which}", x, a) for which in "qkv")
        width = q.shape[-1] // heads
        parts = [np.s_[..., h * width : (h + 1) * width] for h in range(heads)]
        score = np.mean([np.tanh(q[h] @ k[h].swapaxes(1, 2) / np.sqrt(v.shape[-1])) for h in parts], 0)
        values.append(v)
        scores.append((score + score.swapaxes(1, 2)) / 2)
    x = np.tanh(mlp(p, f"{name}.multi_channel", np.concatenate(values, -1)) * pair.any(-1)[..., None])
    out = mlp(p, f"{name}.mlp", np.stack([*scores, *channels], -1))
    out = (out + out.swapaxes(1, 2)) * pair[..., None]
    return x, list(np.moveaxis(out, -1, 0))


def edges(p, config, x, a, mask):
    pair = mask[:, :, None] * mask[:, None]
    channels = powers(a, config["c_init"])
    out = [*channels]
    for i in range(config["num_layers"]):
        x, channels = layer(p, f"layers.{i}", x, channels, pair, config["num_heads"])
        out += channels
    return mlp(p, "final", np.stack(out, -1))[..., 0] * pair * (1 - np.eye(a.shape[-1]))


def nodes(p, config, x, a, mask):
    out, channels = [x], powers(a, config.get("c_init", 1))
    pair = mask[:, :, None] * mask[:, None]
    for i in range(config["depth"]):
        if config["model_type"] == "ScoreNetworkX":
            x = np.tanh(convolution(p, f"layers.{i}", x, a))
        else:
            x, channels = layer(p, f"layers.{i}", x, channels, pair, config["num_heads"])
            x = np.tanh(x)
        out.append(x)
    return mlp(p, "final", np.concatenate(out, -1)) * mask[..., None]


def load(file):
    """Return both state dicts in float64, and the configuration."""
    with np.load(file) as held:
        config = json.loads(bytes(held["config"]))
        part = lambda key: {n[len(key) :]: held[n].astype(np.float64) for n in held.files if n.startswith(key)}  # noqa: E731
        return part("x/"), part("adj/"), config


HEADS = {"num_linears": 2, "c_init": 2, "c_hid": 3, "c_final": 2, "adim": 4, "num_heads": 2, "conv": "GCN"}
LAYERED = {"model_type": "ScoreNetworkX_GMH", "max_feat_num": 3, "depth": 2, "nhid": 4, **HEADS}
PLAIN = {"model_type": "ScoreNetworkX", "max_feat_num": 3, "depth": 2, "nhid": 4}


def attention(state, name, given, features, c_in, c_out):
    """Add the shapes of one attention layer of `HEADS`' widths."""
    for c in range(c_in):
        for which in "qkv":
            state[f"{name}.attn.{c}.gnn_{which}.weight"], state[f"{name}.attn.{c}.gnn_{which}.bias"] = (given, 4), (4,)
    linears(state, f"{name}.multi_channel", [c_in * features, features, features])
    linears(state, f"{name}.mlp", [2 * c_in, 2 * max(c_in, c_out), c_out])


def linears(state, name, widths):
    for i, (given, returned) in enumerate(zip(widths, widths[1:], strict=False)):
        state[f"{name}.linears.{i}.weight"], state[f"{name}.linears.{i}.bias"] = (returned, given), (returned,)


def write(file, params_x=PLAIN, change=None, seed=0):
    """Write a tiny checkpoint of random weights, 5 nodes of 3 features."""
    x, adj = {}, {}
    if params_x["model_type"] == "ScoreNetworkX":
        for i, given in enumerate((3, 4)):
            x[f"layers.{i}.weight"], x[f"layers.{i}.bias"] = (given, 4), (4,)
    else:
        attention(x, "layers.0", 3, 4, 2, 3)
        attention(x, "layers.1", 4, 4, 3, 2)
    linears(x, "final", [11, 22, 22, 3])
    attention(adj, "layers.0", 3, 4, 2, 3)
    attention(adj, "layers.1", 4, 4, 3, 2)
    linears(adj, "final", [7, 14, 14, 1])
    sde = {"beta_min": 0.2, "beta_max": 1.0, "num_scales": 1000}
    config = {
        "params_x": params_x,
        "params_adj": {"model_type": "ScoreNetworkA", "max_feat_num": 3, "max_node_num": 5, "nhid": 4, "num_layers": 2, **HEADS},
        "sde": {"x": {"type": "VP", **sde}, "adj": {"type": "VE", **sde}},
        "data": {"data": "QM9", "max_node_num": 5, "max_feat_num": 3},
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    arrays = {
        f"{key}/{n}": rng.normal(size=s).astype(np.float32) * 0.5
        for key, part in (("x", x), ("adj", adj))
        for n, s in part.items()
    }
    if change is not None:
        change(arrays, config)
    np.savez(file, config=np.frombuffer(json.dumps(config).encode(), np.uint8), **arrays)
    return file
