"""Graphs of several sizes as states: node features, the upper triangle of the adjacency, and a mask of the nodes that there are.

A noised graph is a dict with leaves `nodes` [B, N, F], `edges` [B, E], E = N(N - 1)/2, and `mask` [B, N] of zeros and ones, which
the chain carries along. The mask enters kernels as the entries that they have: the others are 0, are no part of the law, and
contribute nothing to log-probabilities and KL. Denoisers are given the state with the mask and return `nodes` and `edges`; what
they say of absent entries is not looked at. A finished graph is one array [B, N, F + N + 1], a row per node: its features, its
row of the symmetric adjacency, and 1 if it is there (`packed`). That is what rewards see and data are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.kernels import Fixed, Gaussian, Product, _NoDensity
from rgdiff.processes import GaussianProcess
from rgdiff.typing import Array, Key, State, pytree, static


def pairs(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs i < j of nodes, in the order of the edges of a state.

    Args:
      nodes: N.

    Returns:
      i and j, each [N(N - 1)/2].

    Example:
      >>> from rgdiff import graphs
      >>> print(*graphs.pairs(3))
      [0 0 1] [1 2 2]
    """
    return np.triu_indices(nodes, 1)


def matrix(edges: Array, nodes: int) -> Array:
    """Return the symmetric matrices of upper triangles, with zeros on the diagonal.

    Args:
      edges: [B, N(N - 1)/2, ...].
      nodes: N.

    Returns:
      [B, N, N, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import graphs
      >>> print(graphs.matrix(jnp.array([[1.0, 2.0, 3.0]]), 3)[0])
      [[0. 1. 2.]
       [1. 0. 3.]
       [2. 3. 0.]]
    """
    i, j = pairs(nodes)
    place = np.full((nodes, nodes), len(i))
    place[i, j] = place[j, i] = np.arange(len(i))
    padded = jnp.concatenate([edges, jnp.zeros_like(edges, shape=(edges.shape[0], 1, *edges.shape[2:]))], 1)
    return padded[:, place]


def triangle(adjacency: Array) -> Array:
    """Return the upper triangles of matrices, without the diagonal.

    Args:
      adjacency: [B, N, N, ...].

    Returns:
      [B, N(N - 1)/2, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import graphs
      >>> print(graphs.triangle(jnp.arange(9.0).reshape(1, 3, 3)))
      [[1. 2. 5.]]
    """
    i, j = pairs(adjacency.shape[1])
    return adjacency[:, i, j]


def there(mask: Array) -> State:
    """Return which entries a graph has, for its node features and its edges.

    Args:
      mask: [B, N], 1 where there is a node.

    Returns:
      A dict of bool: nodes [B, N, 1], edges [B, N(N - 1)/2].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import graphs
      >>> print(graphs.there(jnp.array([[1.0, 1.0, 0.0]]))["edges"])
      [[ True False False]]
    """
    i, j = pairs(mask.shape[1])
    return {"nodes": mask[..., None] > 0, "edges": mask[:, i] * mask[:, j] > 0}


def packed(state: State) -> Array:
    """Return graphs as one array, a row per node: features, row of the adjacency, 1 if the node is there.

    Args:
      state: `nodes` [B, N, F], `edges` [B, N(N - 1)/2] and `mask` [B, N].

    Returns:
      [B, N, F + N + 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import graphs
      >>> print(graphs.packed({"nodes": jnp.full((1, 2, 1), 7.0), "edges": jnp.full((1, 1), 3.0), "mask": jnp.ones((1, 2))})[0])
      [[7. 0. 3. 1.]
       [7. 3. 0. 1.]]
    """
    mask = state["mask"]
    return jnp.concatenate([state["nodes"], matrix(state["edges"], mask.shape[1]), mask[..., None]], -1)


def unpacked(graphs: Array) -> State:
    """Return the parts of packed graphs, the inverse of `packed`.

    Args:
      graphs: [B, N, F + N + 1].

    Returns:
      A dict: nodes [B, N, F], edges [B, N(N - 1)/2], mask [B, N].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import graphs
      >>> print({name: leaf.shape for name, leaf in graphs.unpacked(jnp.zeros((1, 5, 12))).items()})
      {'nodes': (1, 5, 6), 'edges': (1, 10), 'mask': (1, 5)}
    """
    count = graphs.shape[1]
    features = graphs.shape[2] - count - 1
    return {
        "nodes": graphs[..., :features],
        "edges": triangle(graphs[..., features:-1]),
        "mask": graphs[..., -1],
    }


def narrowed(edges: Array, nodes: int, width: int) -> Array:
    """Return the edges of the first `width` of the nodes.

    Args:
      edges: [B, N(N - 1)/2].
      nodes: N.
      width: W, at most N.

    Returns:
      [B, W(W - 1)/2].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import graphs
      >>> print(graphs.narrowed(jnp.array([[1.0, 2.0, 3.0]]), 3, 2))
      [[1.]]
    """
    return edges[:, np.flatnonzero(pairs(nodes)[1] < width)]


def widened(edges: Array, width: int, nodes: int) -> Array:
    """Return edges among more nodes, 0 where there were none: the inverse of `narrowed` for graphs of at most `width` nodes.

    Args:
      edges: [B, W(W - 1)/2].
      width: W.
      nodes: N, at least W.

    Returns:
      [B, N(N - 1)/2].

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import graphs
      >>> print(graphs.widened(jnp.array([[1.0]]), 2, 3))
      [[1. 0. 0.]]
    """
    kept = pairs(nodes)[1] < width
    place = np.where(kept, np.cumsum(kept) - 1, edges.shape[1])
    return jnp.concatenate([edges, jnp.zeros_like(edges, shape=(edges.shape[0], 1))], 1)[:, place]


def by_size(function: Any, widths: tuple[int, ...], rows: int = 8) -> Any:
    """Make a function of graphs cheaper for small ones: the batch is sorted by size, and each piece is as wide as its largest graph.

    It is compiled once for every width. Under `jax.vmap` all widths are computed: give it one batch.

    Args:
      function: a state {nodes, edges, mask} -> {nodes, edges}, of each graph by itself, for any number of nodes N.
      widths: numbers of nodes of pieces, increasing; the last is the state's own N.
      rows: graphs in a piece.

    Returns:
      The function with the same results; of absent nodes and edges they are 0. A state's nodes are the first of its mask, as a
      `GraphProcess` draws them.

    Raises:
      ValueError: for widths that do not increase; at a call, for another last width than N.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff import graphs
      >>> mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
      >>> double = graphs.by_size(lambda x: {"nodes": 2 * x["nodes"], "edges": 2 * x["edges"]}, (2, 3), rows=1)
      >>> print(double({"nodes": mask[..., None], "edges": jnp.array([[5.0, 0, 0], [1, 2, 3]]), "mask": mask})["edges"])
      [[10.  0.  0.]
       [ 2.  4.  6.]]
    """
    if not widths or list(widths) != sorted(set(widths)) or widths[0] < 1:
        raise ValueError(f"by_size: widths are numbers of nodes that increase, got {list(widths)}")
    rows = checks.at_least("rows", rows, 1)

    def piece(width: int, x: State) -> State:
        nodes = x["mask"].shape[1]
        small = {
            "nodes": x["nodes"][:, :width],
            "edges": narrowed(x["edges"], nodes, width),
            "mask": x["mask"][:, :width],
        }
        out = function(small)
        where = there(small["mask"])
        out = {name: jnp.where(where[name], out[name], 0.0) for name in ("nodes", "edges")}
        wide = jnp.pad(out["nodes"], ((0, 0), (0, nodes - width), (0, 0)))
        return {"nodes": wide, "edges": widened(out["edges"], width, nodes)}

    def call(x: State) -> State:
        batch, nodes = x["mask"].shape
        if widths[-1] != nodes:
            raise ValueError(f"by_size: the last width must be the graphs' {nodes} nodes, got {widths[-1]}")
        parts = {name: x[name] for name in ("nodes", "edges", "mask")}
        size = jnp.sum(x["mask"] > 0, -1)
        order = jnp.argsort(size)
        count = -(-batch // rows)
        padded = jnp.concatenate([order, jnp.broadcast_to(order[-1], (count * rows - batch,))])
        pieces = jax.tree.map(lambda leaf: leaf[padded].reshape(count, rows, *leaf.shape[1:]), parts)
        largest = jnp.max(size[padded].reshape(count, rows), -1)
        branches = [functools.partial(piece, width) for width in widths]

        def one(given: tuple[Array, State]) -> State:
            return jax.lax.switch(jnp.searchsorted(jnp.asarray(widths), given[0]), branches, given[1])

        out = jax.lax.map(one, (largest, pieces))
        back = jnp.argsort(order)
        return jax.tree.map(lambda leaf: leaf.reshape(count * rows, *leaf.shape[2:])[back], out)

    return call


@pytree
class GraphPrior(_NoDensity):
    """A number of nodes from a law, and noise on the entries that there are. It can be drawn from and has a log-probability."""

    what = "the law of a graph's size and noise"

    stds: dict[str, Array]
    log_sizes: Array  # [N], of 1 ... N nodes
    shape: tuple[int, int] = static()
    batch: int = static()

    def _noise(self, mask: Array) -> Product:
        count, features = self.shape
        where = there(mask)
        shapes = {"nodes": (self.batch, count, features), "edges": where["edges"].shape}
        return Product({n: Gaussian(jnp.zeros(shapes[n], jnp.float32), self.stds[n], where[n]) for n in shapes})

    def sample(self, key: Key) -> State:
        key_size, key_noise = jax.random.split(key)
        size = jax.random.categorical(key_size, self.log_sizes, shape=(self.batch,)) + 1
        mask = (jnp.arange(self.shape[0]) < size[:, None]).astype(jnp.float32)
        return self._noise(mask).sample(key_noise) | {"mask": mask}

    rsample = sample

    def log_prob(self, x: State) -> Array:
        size = jnp.sum(x["mask"] > 0, -1)
        return self.log_sizes[size - 1] + self._noise(x["mask"]).log_prob(x)


@pytree
class GraphProcess:
    """Gaussian noise on node features and on edges, apart. Build it with `process`."""

    parts: dict[str, Any]
    log_sizes: Array

    @property
    def size(self) -> tuple[int, int]:
        """N and F."""
        return self.parts["nodes"].shape

    @property
    def shape(self) -> tuple[int, int]:
        """Of one finished graph, [N, F + N + 1]."""
        count, features = self.size
        return count, features + count + 1

    @property
    def stochastic(self) -> bool:
        return all(part.stochastic for part in self.parts.values())

    @property
    def projects(self) -> bool:
        return True

    def times(self, steps: int) -> Array:
        """Return the grid of `steps` network calls, even from 1 to 1e-4, GDSS's last time. [steps]"""
        return jnp.linspace(1.0, 1e-4, checks.at_least("steps", steps, 2))

    def prior(self, batch: int) -> GraphPrior:
        stds = {name: part.schedule.prior_std for name, part in self.parts.items()}
        return GraphPrior(stds, self.log_sizes, self.size, batch)

    def _kernel(self, kernels: dict[str, Any], mask: Array) -> Product:
        where = there(mask)
        masked = {name: kernel.within(where[name]) for name, kernel in kernels.items()}
        return Product(masked | {"mask": Fixed(mask)})

    def forward(self, x0: Array, t: Array) -> Product:
        x = unpacked(x0)
        return self._kernel({name: part.forward(x[name], t) for name, part in self.parts.items()}, x["mask"])

    def renoise(self, x: State, s: Array, t: Array) -> Product:
        return self._kernel({name: part.renoise(x[name], s, t) for name, part in self.parts.items()}, x["mask"])

    def reverse(self, x: State, t: Array, s: Array, prediction: State) -> Product:
        kernels = {name: part.reverse(x[name], t, s, prediction[name]) for name, part in self.parts.items()}
        return self._kernel(kernels, x["mask"])

    def score(self, x: State, t: Array, prediction: State) -> State:
        """Return the gradient of log p(x_t) for nodes and edges, 0 at absent entries."""
        where = there(x["mask"])
        return {
            name: jnp.where(where[name], part.score(x[name], t, prediction[name]), 0.0)
            for name, part in self.parts.items()
        }

    def noise(self, x: State) -> Product:
        """Return standard normal noise on the entries that there are."""
        where = there(x["mask"])
        blank = {name: jnp.zeros(x[name].shape, jnp.float32) for name in self.parts}
        return Product({name: Gaussian(leaf, jnp.float32(1), where[name]) for name, leaf in blank.items()})

    def mean(self, x: State, t: Array, prediction: State) -> Array:
        return self._pack(x, {name: part.mean(x[name], t, prediction[name]) for name, part in self.parts.items()})

    def finalize(self, x: State, t: Array, prediction: State) -> Array:
        return self._pack(x, {name: part.finalize(x[name], t, prediction[name]) for name, part in self.parts.items()})

    def _pack(self, x: State, graph: State) -> Array:
        where = there(x["mask"])
        clean = {name: jnp.where(where[name], leaf, 0.0) for name, leaf in graph.items()}
        return packed(clean | {"mask": x["mask"]})


def process(nodes: GaussianProcess, edges: GaussianProcess, sizes: Any) -> GraphProcess:
    """Build the process on graphs of several sizes: one Gaussian process on node features, another on edges.

    Args:
      nodes: on states [N, F].
      edges: on states [N(N - 1)/2].
      sizes: numbers of nodes of data, each in 1 ... N, whose frequencies are the law of a sample's size.

    Returns:
      The process. Its states and its finished graphs are those of `rgdiff.graphs`.

    Raises:
      ValueError: for parts that are not Gaussian or whose sizes do not fit, or an impossible number of nodes.

    Example:
      >>> import jax, rgdiff
      >>> from rgdiff import graphs
      >>> x = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(0.1, 1.0), (4, 2))
      >>> adjacency = rgdiff.processes.gaussian(rgdiff.schedules.geometric_ve(0.2, 1.0), (6,))
      >>> draw = graphs.process(x, adjacency, [3]).prior(1).sample(jax.random.key(0))
      >>> print(draw["mask"], draw["nodes"].shape, draw["edges"].shape)
      [[1. 1. 1. 0.]] (1, 4, 2) (1, 6)
    """
    for name, part in (("nodes", nodes), ("edges", edges)):
        if not isinstance(part, GaussianProcess):
            raise ValueError(f"graphs.process: {name} must be a Gaussian process, got {type(part).__name__}")
    if len(nodes.shape) != 2:
        raise ValueError(f"graphs.process: nodes are states [N, F], got shape {list(nodes.shape)}")
    count = nodes.shape[0]
    if edges.shape != (count * (count - 1) // 2,):
        raise ValueError(
            f"graphs.process: edges of {count} nodes are states [{count * (count - 1) // 2}], got shape {list(edges.shape)}"
        )
    numbers = np.asarray(sizes)
    if numbers.ndim != 1 or not len(numbers) or numbers.min() < 1 or numbers.max() > count:
        raise ValueError(f"graphs.process: sizes are numbers of nodes in 1 ... {count}, at least one")
    with np.errstate(divide="ignore"):
        log_sizes = np.log(np.bincount(numbers.astype(int), minlength=count + 1)[1:] / len(numbers))
    return GraphProcess({"nodes": nodes, "edges": edges}, jnp.asarray(log_sizes, jnp.float32))
