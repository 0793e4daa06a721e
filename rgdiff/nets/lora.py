"""Low-rank adapters on parameter trees, whatever network the tree belongs to.

It holds the making, merging and adding of adapters, and the model that maps an adapter to a denoiser. It
assumes kernels whose last axis is the output and whose other axes are the input, as in Flax. Which leaves to
adapt is the caller's choice, by path; optimising an adapter is left to the tuners.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff.nets.init import normal
from rgdiff.typing import Array, Denoiser, Key, Params, pytree, wrap_field

Adapter = dict[str, dict[str, Array]]
Target = str | Callable[[str], bool]


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def lora_init(key: Key, params: Params, rank: int, *, target: Target = "kernel") -> Adapter:
    """Make an adapter that leaves the network unchanged: a ~ N(0, 1 / rank^2), b = 0.

    Args:
      key: a typed PRNG key.
      params: the network's parameters, any pytree; leaves are named by their "/"-joined path.
      rank: inner dimension, at least 1.
      target: a regular expression searched in the path, or a predicate of the path; of the leaves it picks,
        those with two axes or more are adapted, a kernel of several axes as the matrix [fan_in, out].

    Returns:
      {path: {"a": [fan_in, rank], "b": [rank, out]}}, float32.

    Raises:
      ValueError: when rank < 1 or no leaf is picked.

    References:
      LoRA (arXiv:2106.09685).

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> adapter = rgdiff.nets.lora_init(jax.random.key(0), params, rank=1)
      >>> {path: (pair["a"].shape, pair["b"].shape) for path, pair in adapter.items()}
      {'dense/kernel': ((3, 1), (1, 2))}
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter is at least 1; got {rank}")
    chosen = (lambda path: re.search(target, path) is not None) if isinstance(target, str) else target
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    kernels = {path: jnp.shape(leaf) for path, leaf in leaves.items() if jnp.ndim(leaf) >= 2}
    shapes = {path: shape for path, shape in kernels.items() if chosen(path)}
    if not shapes:
        names = ", ".join(list(kernels)[:5]) + (", ..." if len(kernels) > 5 else "")
        raise ValueError(f"target {target!r} picks no parameter of two or more axes; there are: {names or 'none'}")
    return {
        path: {
            "a": normal(k, (math.prod(shape[:-1]), rank), 1 / rank),
            "b": jnp.zeros((rank, shape[-1])),
        }
        for k, (path, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    }


def lora_merge(params: Params, adapter: Adapter, scale: Array | float = 1.0) -> Params:
    """Add an adapter to parameters: theta + scale * (a b), reshaped to theta's shape.

    Args:
      params: the parameters the adapter was made for.
      adapter: from `lora_init` or `lora_sum`; differentiable, and `jax.vmap` over it works.
      scale: weight of the adapter; 0 gives `params` back.

    Returns:
      Parameters with the structure of `params`.

    Raises:
      ValueError: when the adapter names a path that `params` does not have.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> adapter = {"kernel": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
      >>> print(rgdiff.nets.lora_merge({"kernel": jnp.eye(2)}, adapter, scale=0.5)["kernel"])
      [[1.5 0.5]
       [0.5 1.5]]
    """
    paths = {_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if missing := sorted(set(adapter) - paths):
        raise ValueError(f"the adapter does not belong to these parameters: they have no {missing[0]!r}")

    def merge(path: Any, leaf: Array) -> Array:
        if (factors := adapter.get(_path(path))) is None:
            return leaf
        delta = jnp.matmul(factors["a"], factors["b"], precision="highest")
        return leaf + (scale * delta).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(merge, params)


def lora_sum(terms: Sequence[tuple[Adapter, Array | float]]) -> Adapter:
    """Add weighted adapters exactly: the change is sum_i scale_i (a_i b_i), the rank the sum of the ranks.

    Args:
      terms: (adapter, scale) pairs; adapters may cover different parameters.

    Returns:
      The adapter of the sum.

    Raises:
      ValueError: without a pair.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> adapter = {"kernel": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
      >>> total = rgdiff.nets.lora_sum([(adapter, 1.0), (adapter, 2.0)])["kernel"]
      >>> print(total["a"].shape, (total["a"] @ total["b"])[0])
      (2, 2) [3. 3.]
    """
    if not terms:
        raise ValueError("lora_sum needs at least one (adapter, scale) pair; got none")
    out: Adapter = {}
    for path in dict.fromkeys(path for adapter, _ in terms for path in adapter):
        held = [(adapter[path], scale) for adapter, scale in terms if path in adapter]
        out[path] = {
            "a": jnp.concatenate([factors["a"] for factors, _ in held], axis=-1),
            "b": jnp.concatenate([scale * factors["b"] for factors, scale in held], axis=-2),
        }
    return out


@pytree
class LoRAModel:
    """Map an adapter to a denoiser: model(base + scale * adapter); a tuner differentiates in the adapter alone.

    Args:
      base: the frozen parameters.
      model: parameters to denoiser; a function or a callable pytree.
      scale: weight of the adapter; it may change without a recompilation.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> model = lambda params: lambda x, t, cond: x @ params["kernel"]
      >>> adapter = {"kernel": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
      >>> denoiser = rgdiff.nets.LoRAModel({"kernel": jnp.eye(2)}, model, scale=0.5)(adapter)
      >>> print(denoiser(jnp.ones((1, 2)), 0.5, None))
      [[2. 2.]]
    """

    base: Params
    model: Any
    scale: Array | float = 1.0

    def __post_init__(self):
        wrap_field(self, "model", "model (params -> denoiser)")

    def __call__(self, params: Adapter) -> Denoiser:
        return self.model(lora_merge(self.base, params, self.scale))
