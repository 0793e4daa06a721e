"""A network of graphs for values, surrogates and classifiers: one number a graph, whatever the order of its nodes.

It takes finished graphs, [B, N, F + N + 1], and the states of graph processes, corrected ones too (`rgdiff.graphs`,
`rgdiff.correctors`), so that one module is a learned value of a chain and a surrogate of its samples.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rgdiff import graphs
from rgdiff.nets.init import lecun_normal
from rgdiff.nets.time import Conditioning
from rgdiff.typing import Array, Cond, State


class GraphNet(nn.Module):
    """Map graphs (x, t, cond) to one number per example, [B]: convolutions over weighted edges, a gated sum of nodes, zero at first.

    A layer is h <- h + tanh(Dense(h) + Dense(A h / sqrt(N)) + Dense(emb)), with the numbers of the adjacency A as they are.

    Args:
      features: width of all layers.
      depth: layers.
      classes: number of classes, or None. Label N, or cond=None, means "no class".
      rounded: see a finished graph as the molecule that it is read as: bond orders 0 ... 3 by rounding, each node's largest feature 1
        and the others 0, and a node without a feature above 0.5 is none. Gradients pass straight through. A surrogate of finished graphs can
        then not be raised by numbers that no molecule shows.
      dtype: of the computation; input, output and parameters are float32.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> net = rgdiff.nets.GraphNet(features=8)  # of 5 nodes with 6 features
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((3, 5, 12)), jnp.zeros(3))[0].shape
      (3,)
    """

    features: int = 64
    depth: int = 3
    classes: int | None = None
    rounded: bool = False
    dtype: Any = jnp.float32
    scalar_time = True  # a time [] is embedded once for all examples

    @nn.compact
    def __call__(self, x: State, t: Array, cond: Cond = None) -> Array:
        state = graphs.unpacked(x) if not isinstance(x, dict) else x["state"] if "state" in x else x
        if self.rounded:
            state = _rounded(state)
        mask = state["mask"][..., None].astype(self.dtype)
        batch, nodes = mask.shape[:2]
        adjacency = graphs.matrix(state["edges"].astype(self.dtype), nodes) / nodes**0.5
        rows = 1 if jnp.ndim(t) == 0 and (cond is None or jnp.ndim(cond) == 0) else batch
        emb = nn.silu(Conditioning(self.features, 64, self.classes, dtype=self.dtype, name="emb")(rows, t, cond))

        def dense(name: str, h: Array, **options: Any) -> Array:
            return nn.Dense(self.features, kernel_init=lecun_normal, dtype=self.dtype, name=name, **options)(h)

        h = dense("start", state["nodes"]) * mask
        for i in range(self.depth):
            near = dense(f"own{i}", h) + dense(f"near{i}", adjacency @ h, use_bias=False)
            h = (h + jnp.tanh(near + dense(f"emb{i}", emb, use_bias=False)[:, None])) * mask
        gate = jax.nn.sigmoid(dense("gate", h)) * mask
        total = jnp.sum(gate * jnp.tanh(dense("sum", h)), 1) / nodes**0.5
        hidden = nn.silu(dense("hidden", total))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out")(hidden)[..., 0].astype(
            jnp.float32
        )


def _rounded(state: State) -> State:
    """Return the graph that `rgdiff.domains.molecules.chemistry.discrete` reads, with straight-through derivatives."""
    nodes, edges = state["nodes"], state["edges"]
    through = lambda x, value: x + jax.lax.stop_gradient(value - x)  # noqa: E731
    return state | {
        "nodes": through(nodes, jax.nn.one_hot(jnp.argmax(nodes, -1), nodes.shape[-1])),
        "edges": through(edges, jnp.clip(jnp.floor(edges + 0.5), 0.0, 3.0)),
        "mask": state["mask"] * (nodes.max(-1) > 0.5),
    }
