"""MOOD's property networks (arXiv:2206.07632): a number in [0, 1] of a graph, trained on noised ones, by graph convolutions.

They see GDSS's states at any noise and not the time, so that one is a differentiable reward of a finished graph and a value of a
noised one. Released ones predict a docking score times QED times synthesisability, scaled to [0, 1]. `read` reads strictly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rgdiff import checks, graphs
from rgdiff.pretrained import weights
from rgdiff.pretrained.config import Config
from rgdiff.pretrained.gdss import GraphConvolution, normalised
from rgdiff.pretrained.layers import dense
from rgdiff.typing import Array, Cond, Params, State, pytree, static

SETTINGS = {"max_node_num": ..., "max_feat_num": ..., "depth": ..., "nhid": ...}


class PropertyNetwork(nn.Module):
    """Graph convolutions, a gated sum over the nodes, and two dense layers to a number in [0, 1].

    Args:
      depth: convolutions.
      hidden: width of all layers.
    """

    depth: int
    hidden: int

    @nn.compact
    def __call__(self, nodes: Array, edges: Array, mask: Array) -> Array:
        """Map nodes [B, N, F], edges [B, N(N - 1)/2] and a mask [B, N] to [B].

        As in the released networks absent nodes add the gates' biases to the sum.
        """
        adjacency = normalised(graphs.matrix(edges, nodes.shape[1]))
        x, out = nodes, [nodes]
        for number in range(self.depth):
            weight, bias = GraphConvolution(self.hidden, name=f"convs.{number}")(self.hidden)
            x = adjacency @ (dense(self.hidden, name=f"linears.{number}")(x) @ weight) + bias
            x = jnp.tanh(x) * mask[..., None]
            out.append(x)
        x = jnp.concatenate(out, -1)
        gate = nn.sigmoid(dense(self.hidden, name="sigmoid_linear.0")(x))
        x = jnp.tanh(jnp.sum(gate * jnp.tanh(dense(self.hidden, name="tanh_linear.0")(x)), 1))
        x = nn.relu(dense(self.hidden, name="final_linear.0")(x))
        return nn.sigmoid(dense(1, name="final_linear.3")(x))[..., 0]


@pytree
class GraphProperty:
    """A property network with its parameters: a reward of finished graphs, and by `at` a value of noised ones. Made by `read`."""

    params: Params
    network: PropertyNetwork = static()
    shape: tuple[int, int] = static()  # N and F

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        """Return the property [B] of graphs [B, N, F + N + 1]."""
        return self.of(graphs.unpacked(x0))

    def of(self, state: State) -> Array:
        """Return the property [B] of the parts of graphs, `nodes`, `edges` and `mask`, noised or not."""
        return self.network.apply({"params": self.params}, state["nodes"], state["edges"], state["mask"])  # type: ignore[return-value]


@pytree
class GraphValue:
    """A property as a value: (x_t, t, cond) -> [B], for the states of graph processes and of corrected ones."""

    graph_property: GraphProperty

    def __call__(self, x: State, t: Array, cond: Cond = None) -> Array:
        return self.graph_property.of(x["state"] if "state" in x else x)


def read(file: str | Path, name: str) -> GraphProperty:
    """Read one property network of an .npz file.

    Args:
      file: with a released state dict under `name/`, and `name/config`, the bytes of a JSON text with `params`.
      name: of the target, e.g. parp1.

    Returns:
      The property, a reward (x0, cond) -> [B].

    Raises:
      ValueError: in one line, for another file, a name that it has not, or a tensor that is missing, left over or misshapen.
    """
    tensors = weights.archive(Path(file))
    names = sorted({one.split("/")[0] for one in tensors if one.endswith("/config")})
    if not names:
        raise ValueError(f"{file} has no NAME/config: expected MOOD's property networks")
    checks.one_of("the property network", name, names)
    own = {one.removeprefix(f"{name}/"): tensor for one, tensor in tensors.items() if one.startswith(f"{name}/")}
    try:
        settings = json.loads(bytes(own.pop("config").array()).decode())["params"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: the config of {name} is not MOOD's: {' '.join(str(error).split())}") from None
    config = Config(settings, f"{file}, {name}").settings("PropertyNetwork", SETTINGS, harmless={"dropout"})
    count, features = config["max_node_num"], config["max_feat_num"]
    network = PropertyNetwork(config["depth"], config["nhid"])
    blank: dict[str, Any] = {
        "nodes": jnp.zeros((1, count, features)),
        "edges": jnp.zeros((1, count * (count - 1) // 2)),
        "mask": jnp.ones((1, count)),
    }
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), **blank))["params"]
    return GraphProperty(weights.read(own, like, source=f"{file}, {name}"), network, (count, features))
