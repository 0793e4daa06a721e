"""GDSS's score networks (arXiv:2202.02514): of node features, ScoreNetworkX and ScoreNetworkX_GMH, and of edges, ScoreNetworkA.

They are permutation equivariant and do not see the time. All that they compute of pairs of nodes is symmetric and never reads a
diagonal (graph convolutions set self loops to one), so that here it is computed on the upper triangle alone, half of the
released code's work. `read` reads both networks of one file, strictly.
"""

from __future__ import annotations

import collections
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import denoisers, graphs, processes, schedules
from rgdiff.pretrained import weights
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.layers import dense
from rgdiff.typing import Array, Cond, Params, State, pytree, static

NODES = {"max_feat_num": ..., "depth": ..., "nhid": ...}
HEADS = {"num_linears": ..., "c_init": ..., "c_hid": ..., "c_final": ..., "adim": ..., "num_heads": 4, "conv": "GCN"}
EDGES = {"max_feat_num": ..., "max_node_num": ..., "nhid": ..., "num_layers": ..., **HEADS}
FIXED = {"use_bn": False}
CHOICES = {"conv": ("GCN",)}


def elu(x: Array) -> Array:
    """Return x above 0, e^x - 1 below: to an absolute 1e-7, at half the cost of the accurate `expm1` near 0."""
    return jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0.0)) - 1.0)


class Linears(nn.Module):
    """`linears.0`, `linears.1`, ... with ELU between them.

    Args:
      features: width of every layer.
    """

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for number, width in enumerate(self.features):
            x = dense(width, name=f"linears.{number}")(elu(x) if number else x)
        return x


class GraphConvolution(nn.Module):
    """The weights of A x W + b for a normalised adjacency A (arXiv:1609.02907); W is [in, out] in the file too.

    Args:
      features: of the output.
    """

    features: int

    @nn.compact
    def __call__(self, given: int) -> tuple[Array, Array]:
        """Return W [given, features] and b [features]."""
        weight = self.param("weight", nn.initializers.glorot_uniform(), (given, self.features))
        return weight, self.param("bias", nn.initializers.zeros, (self.features,))


def normalised(adjacency: Array) -> Array:
    """Return D^-1/2 (A + 1) D^-1/2 for A [..., N, N] with self loops set to one and degrees clipped below at one."""
    adjacency = jnp.where(jnp.eye(adjacency.shape[-1], dtype=bool), 1.0, adjacency)
    scale = jax.lax.rsqrt(jnp.maximum(adjacency.sum(-1), 1.0))
    return scale[..., :, None] * adjacency * scale[..., None, :]


def powers(edges: Array, nodes: int, count: int) -> Array:
    """Return the upper triangles of A, A^2, ..., as channels: [B, E] -> [B, E, count]."""
    adjacency = graphs.matrix(edges, nodes)
    out = [adjacency]
    for _ in range(count - 1):
        out.append(out[-1] @ adjacency)
    return jnp.stack([graphs.triangle(one) for one in out], -1)


class GraphAttention(nn.Module):
    """The weights of the queries, keys and values of all channels, which graph convolutions make: one array for all channels.

    Args:
      channels: C.
      inner: width of queries and keys.
      features: of the values.
    """

    channels: int
    inner: int
    features: int

    @nn.compact
    def __call__(self, given: int) -> dict[str, tuple[Array, Array]]:
        """Return W [C, given, width] and b [C, width] of `gnn_q`, `gnn_k` and `gnn_v` for inputs of width `given`."""
        widths = {"gnn_q": self.inner, "gnn_k": self.inner, "gnn_v": self.features}
        apart = nn.vmap(
            GraphConvolution,
            {"params": 0},
            {"params": True},
            in_axes=None,  # type: ignore[arg-type]
            axis_size=self.channels,
        )
        return {name: apart(width, name=name)(given) for name, width in widths.items()}


class GraphAttentionLayer(nn.Module):
    """One attention per channel of the adjacency; their values are mixed to node features, their scores to new channels.

    Scores are the `tanh` of scaled products, in place of a softmax, averaged over the heads.

    Args:
      inner: width of queries and keys.
      features: of the nodes returned.
      channels: of the adjacency returned.
      depth: layers of the network of pairs.
      heads: of an attention.
    """

    inner: int
    features: int
    channels: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, x: Array, edges: Array, mask: Array) -> tuple[Array, Array]:
        """Map x [B, N, F] and channels [B, E, C] to [B, N, features] and [B, E, channels]."""
        given, nodes = edges.shape[-1], x.shape[1]
        adjacency = normalised(jnp.moveaxis(graphs.matrix(edges, nodes), -1, 1))  # [B, C, N, N]
        held = GraphAttention(given, self.inner, self.features, name="attn")(x.shape[-1])

        parts = [held[name] for name in ("gnn_q", "gnn_k", "gnn_v")]
        weight, bias = (jnp.concatenate(part, -1) for part in zip(*parts, strict=True))
        convolved = adjacency @ jnp.einsum("bnf,cfh->bcnh", x, weight) + bias[:, None]
        q, k, v = jnp.split(convolved, (self.inner, 2 * self.inner), -1)  # [B, C, N, H]
        split = lambda a: a.reshape(*a.shape[:-1], self.heads, -1)  # noqa: E731
        products = jnp.einsum("bcnhd,bcmhd->bchnm", split(q), split(k)) / self.features**0.5
        scores = jnp.tanh(products).mean(2)  # [B, C, N, N]
        scores = graphs.triangle((scores + scores.swapaxes(2, 3)).reshape(-1, nodes, nodes)) / 2
        scores = jnp.moveaxis(scores.reshape(x.shape[0], given, -1), 1, -1)  # [B, E, C]
        values = jnp.moveaxis(v, 1, 2).reshape(*x.shape[:2], -1)
        mixed = Linears((self.features, self.features), name="multi_channel")(values)
        wide = 2 * max(given, self.channels)
        mlp = Linears((wide,) * (self.depth - 1) + (self.channels,), name="mlp")
        pair = mlp(jnp.concatenate([scores, edges], -1))
        return jnp.tanh(mixed * mask[..., None]), 2 * pair * _pairs(mask)


def _pairs(mask: Array) -> Array:
    return graphs.there(mask)["edges"][..., None]


def _layer(config: Config, number: int, last: int) -> GraphAttentionLayer:
    """Return a layer of those numbered 0 ... last: the last one returns c_final channels, the others c_hid."""
    return GraphAttentionLayer(
        inner=config["adim"] if number else config["nhid"],
        features=config["nhid"],
        channels=config["c_final"] if number == last else config["c_hid"],
        depth=config["num_linears"],
        heads=config["num_heads"],
        name=f"layers.{number}",
    )


class ScoreNetworkX(nn.Module):
    """The score of node features, by graph convolutions.

    Args:
      config: max_feat_num, depth and nhid, as the file's `params_x` has them.
    """

    config: Config

    @nn.compact
    def __call__(self, nodes: Array, edges: Array, mask: Array) -> Array:
        """Map nodes [B, N, F], edges [B, N(N - 1)/2] and a mask [B, N] to [B, N, F]."""
        config = self.config.settings("ScoreNetworkX", NODES, FIXED, {"model_type"})
        adjacency = normalised(graphs.matrix(edges, nodes.shape[1]))
        out = [nodes]
        for number in range(config["depth"]):
            weight, bias = GraphConvolution(config["nhid"], name=f"layers.{number}")(out[-1].shape[-1])
            out.append(jnp.tanh(adjacency @ (out[-1] @ weight) + bias))
        return _final(out, config["max_feat_num"]) * mask[..., None]


class ScoreNetworkX_GMH(nn.Module):
    """The score of node features, by graph multi-head attention.

    Args:
      config: as the file's `params_x` has it.
    """

    config: Config

    @nn.compact
    def __call__(self, nodes: Array, edges: Array, mask: Array) -> Array:
        """Map nodes [B, N, F], edges [B, N(N - 1)/2] and a mask [B, N] to [B, N, F]."""
        config = self.config.settings("ScoreNetworkX_GMH", NODES | HEADS, FIXED, {"model_type"}, CHOICES)
        channels, x, out = powers(edges, nodes.shape[1], config["c_init"]), nodes, [nodes]
        for number in range(config["depth"]):
            x, channels = _layer(config, number, config["depth"] - 1)(x, channels, mask)
            x = jnp.tanh(x)
            out.append(x)
        return _final(out, config["max_feat_num"]) * mask[..., None]


class ScoreNetworkA(nn.Module):
    """The score of edges, by graph multi-head attention.

    Args:
      config: as the file's `params_adj` has it.
    """

    config: Config

    @nn.compact
    def __call__(self, nodes: Array, edges: Array, mask: Array) -> Array:
        """Map nodes [B, N, F], edges [B, N(N - 1)/2] and a mask [B, N] to [B, N(N - 1)/2]."""
        config = self.config.settings("ScoreNetworkA", EDGES, FIXED, {"model_type"}, CHOICES)
        channels, x = powers(edges, nodes.shape[1], config["c_init"]), nodes
        out = [channels]
        for number in range(config["num_layers"]):
            x, channels = _layer(config, number, config["num_layers"] - 1)(x, channels, mask)
            out.append(channels)
        return (_final(out, 1) * _pairs(mask))[..., 0]


def _final(parts: list[Array], features: int) -> Array:
    x = jnp.concatenate(parts, -1)
    width = x.shape[-1]
    return Linears((2 * width, 2 * width, features), name="final")(x)


NETWORKS: dict[str, Callable[[Config], Any]] = {
    "ScoreNetworkX": ScoreNetworkX,
    "ScoreNetworkX_GMH": ScoreNetworkX_GMH,
    "ScoreNetworkA": ScoreNetworkA,
}


@pytree
class GraphModel:
    """Parameters {x, adj} of both networks -> the denoiser of a graph process.

    Args:
      schedules: of `nodes` and `edges`.
      networks: the two Linen modules, in that order.
      predicts: what each predicts: `score` of a variance-exploding part, `eps` of a variance-preserving one.
      widths: of `graphs.by_size`, so that small graphs cost less; none by default.
    """

    schedules: dict[str, Any]
    networks: tuple[Any, Any] = static()
    predicts: tuple[str, str] = static()
    widths: tuple[int, ...] = static(default=())

    def __call__(self, params: Params) -> GraphDenoiser:
        return GraphDenoiser(self, params)


@pytree
class GraphDenoiser:
    """Maps a graph's state to E[x0 | x_t] of its nodes and edges. Made by a `GraphModel`."""

    model: GraphModel
    params: Params

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        model = self.model
        raw = (graphs.by_size(self._networks, model.widths) if model.widths else self._networks)(x)
        return {
            name: denoisers.to_x0(predicts, model.schedules[name], x[name], t, raw[name])
            for name, predicts in zip(("nodes", "edges"), model.predicts, strict=True)
        }

    def _networks(self, x: State) -> State:
        return {
            name: network.apply({"params": self.params[key]}, x["nodes"], x["edges"], x["mask"])
            for name, key, network in zip(("nodes", "edges"), ("x", "adj"), self.model.networks, strict=True)
        }


class Gdss(NamedTuple):
    """A released pair of networks.

    model: {x, adj} -> denoiser. params: of both. nodes: N, the largest number. features: F of a node. dataset: QM9, ZINC250k, ...
    schedules: of nodes and edges.
    """

    model: GraphModel
    params: Params
    nodes: int
    features: int
    dataset: str
    schedules: dict[str, Any]

    def process(self, sizes: Any, *, eta: float = 1.0, variance: str = "fixed_large") -> graphs.GraphProcess:
        """Return the process on graphs whose sizes are drawn from those of data.

        Args:
          sizes: numbers of nodes of data.
          eta, variance: of its steps, as `processes.gaussian` has them. GDSS's own steps have the larger variance.
        """
        count = self.nodes
        shapes = {"nodes": (count, self.features), "edges": (count * (count - 1) // 2,)}
        parts = {
            name: processes.gaussian(
                self.schedules[name], shape, eta=eta, variance=variance if eta == 1 else "fixed_small"
            )
            for name, shape in shapes.items()
        }
        return graphs.process(parts["nodes"], parts["edges"], sizes)


def schedule(settings: Mapping[str, Any], source: Any = "the configuration") -> Any:
    """Return the schedule that a file's `sde` names.

    Args:
      settings: type, beta_min and beta_max: rates of VP, or the smallest and largest sigma of VE.
      source: where they come from, for messages.

    Raises:
      ValueError: for another type.
    """
    kinds = {"VP": schedules.linear_vp, "VE": schedules.geometric_ve}
    if settings["type"] not in kinds:
        raise ValueError(f"{source}: an sde of type {settings['type']!r} is not supported, only VP and VE")
    return kinds[settings["type"]](settings["beta_min"], settings["beta_max"])


def _apart(like: Params) -> Params:
    """Return the structure of a file, with `attn.0`, `attn.1`, ... apart, for that of a network, which has them as one `attn`."""
    out: dict[str, Any] = {}
    for name, part in like.items():
        if name == "attn":
            count = jax.tree.leaves(part)[0].shape[0]
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), part)
            out |= {f"attn.{channel}": one for channel in range(count)}
        else:
            out[name] = _apart(part) if isinstance(part, Mapping) else part
    return out


def _stacked(params: Params) -> Params:
    """Return a network's parameters for those of a file, the inverse of `_apart`."""
    out: dict[str, Any] = {}
    channels = [name for name in params if name.startswith("attn.")]
    if channels:
        parts = [params[f"attn.{channel}"] for channel in range(len(channels))]
        out["attn"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    for name, part in params.items():
        if name not in channels:
            out[name] = _stacked(part) if isinstance(part, Mapping) else part
    return out


def _released(file: Path) -> dict[str, weights.Held]:
    """Read a released .pth as if it were the .npz of `read`; nothing but tensors, numbers, texts and dicts of them is unpickled."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise ValueError(f"{file} is a file of PyTorch, which is needed to read it: pip install torch") from None
    if not file.exists():
        raise ValueError(f"no file at {file}")
    try:
        with torch.serialization.safe_globals([(collections.OrderedDict, "easydict.EasyDict")]):
            read = torch.load(file, map_location="cpu", weights_only=True)
        config = {key: read[key] for key in ("params_x", "params_adj")}
        config |= {key: read["model_config"][key] for key in ("sde", "data")}
        tensors = {
            f"{part}/{name.removeprefix('module.')}": tensor.numpy()
            for part in ("x", "adj")
            for name, tensor in read[f"{part}_state_dict"].items()
        }
        tensors["config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)
    except Exception as error:  # whatever PyTorch makes of another file
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(
            f"{file} is no released checkpoint of GDSS, with model_config, params_x, x_state_dict, ...: {reason}"
        ) from None
    return {name: weights.Held(file, array) for name, array in tensors.items()}


def read(file: str | Path) -> Gdss:
    """Read both networks of a GDSS checkpoint from an .npz file, or from a released .pth where PyTorch is installed.

    Args:
      file: .npz with the released state dicts under `x/` and `adj/`, and `config`, the bytes of a JSON text with params_x,
        params_adj, sde and data; or .pth as GDSS's trainer writes it.

    Returns:
      The networks, their parameters and schedules.

    Raises:
      ValueError: in one line, for another file, an unknown architecture, or a tensor that is missing, left over or misshapen.
    """
    tensors = _released(Path(file)) if Path(file).suffix == ".pth" else weights.archive(Path(file))
    if "config" not in tensors:
        raise ValueError(f"{file} has no 'config': expected GDSS's networks, with x/..., adj/... and config")
    try:
        config = Config(json.loads(bytes(tensors.pop("config").array()).decode()), str(file))
        settings = {"x": config["params_x"], "adj": config["params_adj"]}
        sdes, data = config["sde"], config["data"]
        count, features, dataset = int(data["max_node_num"]), int(data["max_feat_num"]), str(data["data"])
        kinds = sdes["x"]["type"], sdes["adj"]["type"]
        made = {"nodes": schedule(sdes["x"], file), "edges": schedule(sdes["adj"], file)}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: its config is not GDSS's: {' '.join(str(error).split())}") from None
    networks, params = {}, {}
    blank = {
        "nodes": jnp.zeros((1, count, features)),
        "edges": jnp.zeros((1, count * (count - 1) // 2)),
        "mask": jnp.ones((1, count)),
    }
    for key, held in settings.items():
        allowed = [name for name in NETWORKS if name.startswith("ScoreNetworkA" if key == "adj" else "ScoreNetworkX")]
        if (kind := held.get("model_type")) not in allowed:
            raise ValueError(f"{file}: {key} is of model_type {kind!r}, supported are {', '.join(allowed)}")
        networks[key] = NETWORKS[kind](held)
        like = jax.eval_shape(lambda net=networks[key]: net.init(jax.random.key(0), **blank))["params"]
        own = {name.removeprefix(f"{key}/"): one for name, one in tensors.items() if name.startswith(f"{key}/")}
        params[key] = _stacked(weights.read(own, _apart(like), source=f"{file}, {key}"))
    if strangers := [name for name in tensors if name.split("/")[0] not in settings]:
        raise ValueError(f"{file} has {strangers[0]!r}, which no network reads")
    predicts = tuple("eps" if kind == "VP" else "score" for kind in kinds)
    model = GraphModel(made, (networks["x"], networks["adj"]), predicts)  # type: ignore[arg-type]
    return Gdss(model, params, count, features, dataset, made)
