"""Graphs of several sizes as states: node features, the upper triangle of the adjacency, and a mask of the nodes that there are.

A noised graph is a dict with leaves `nodes` [B, N, F], `edges` [B, E], E = N(N - 1)/2, and `mask` [B, N] of zeros and ones, which
the chain carries along. The mask enters kernels as the entries that they have: the others are 0, are no part of the law, and
contribute nothing to log-probabilities and KL. Denoisers are given the state with the mask and return `nodes` and `edges`; what
they say of absent entries is not looked at. A finished graph is one array [B, N, F + N + 1], a row per node: its features, its
row of the symmetric adjacency, and 1 if it is there (`packed`). That is what rewards see and data are.
"""

from __future__ import annotations

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
        masked: dict[str, Any] = {"mask": Fixed(mask)}
        for name, kernel in kernels.items():
            if isinstance(kernel, Gaussian):
                kernel = Gaussian(jnp.where(where[name], kernel.mean, 0.0), kernel.std, where[name])
            else:
                kernel = type(kernel)(jnp.where(where[name], kernel.point, 0.0))
            masked[name] = kernel
        return Product(masked)

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

    def _pack(self, x: State, graph: dict[str, Array]) -> Array:
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
