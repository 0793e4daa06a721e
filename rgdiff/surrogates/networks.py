"""Networks fitted to the answers of an oracle: one training for regression and for classification, and a network's features.

A Linen module is called as module(x0), or as module(x, t) at t = 0 where it takes a time, as this library's networks do;
a state of several arrays is passed as one vector [B, D], and outputs of one number a position are averaged. Rows are
drawn by their counts, so that a bootstrap resample is a vector of counts, and empty slots are never drawn.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff.denoisers import per_row
from rgdiff.tuners._loop import TrainState, start, train, update
from rgdiff.typing import Array, Info, Key, Params, State, pytree, static
from rgdiff.values import per_example


def check(network: Any) -> Any:
    """Refuse a network that is not a Linen module.

    Args:
      network: a Linen module.
    """
    if not hasattr(network, "apply") or not hasattr(network, "init"):
        raise ValueError(
            f"a surrogate's network must be a flax.linen.Module such as nets.ValueMLP(), got {type(network).__name__}"
        )
    return network


def _inputs(network: Any, x0: State) -> tuple[Any, ...]:
    """Return the module's arguments: x0 as one float32 array, or that and time 0."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(x0)]
    x = leaves[0] if len(leaves) == 1 else jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1)
    takes_time = len(inspect.signature(type(network).__call__).parameters) > 2  # self, x, t, ...
    t = jnp.float32(0)
    return (x, t if getattr(network, "scalar_time", False) else per_row(t, x)) if takes_time else (x,)


def apply(network: Any, params: Params, x0: State) -> Array:
    """Call a network: [B], the mean over positions where it gives one number each.

    Args:
      network: a Linen module.
      params: its parameters.
      x0: states [B, ...].
    """
    return per_example(network.apply({"params": params}, *_inputs(network, x0)).astype(jnp.float32))


def last_hidden(network: Any, params: Params, x0: State) -> Array:
    """Return the input of the network's last `flax.linen.Dense`, averaged over positions: [B, F].

    Args:
      network: a Linen module.
      params: its parameters.
      x0: states [B, ...].
    """
    import flax.linen as nn

    taken = []

    def listen(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            taken.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(listen):
        apply(network, params, x0)
    if not taken:
        raise ValueError(f"{type(network).__name__} has no flax.linen.Dense layer whose input could be its features")
    out = taken[-1].astype(jnp.float32)
    return jnp.mean(out.reshape(out.shape[0], -1, out.shape[-1]), 1)


def initial(key: Key, network: Any, x0: State) -> Params:
    """Draw a network's parameters for states like these.

    Args:
      key: a PRNG key.
      network: a Linen module.
      x0: states [N, ...].
    """
    one = jax.tree.map(lambda leaf: leaf[:1], x0)
    return network.init(key, *_inputs(network, one))["params"]


def shaken(key: Key, params: Params) -> Params:
    """Draw every kernel anew with variance 1 / fan in, the last one too, which networks here begin at zero.

    Args:
      key: a PRNG key.
      params: whose shapes are taken; biases stay.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, p: jax.random.normal(k, p.shape, p.dtype) / math.sqrt(math.prod(p.shape[:-1]))  # noqa: E731
    return structure.unflatten([draw(k, p) if p.ndim > 1 else p for k, p in zip(keys, leaves, strict=True)])


@pytree
class Fitting:
    """A tuner: each step draws `batch` rows with probabilities proportional to counts [N], and takes a step of the loss.

    `offset` [N] is added to the network's output (a randomised prior); targets are standardised, or 0 and 1 for `logistic`.
    """

    x0: State
    target: Array
    offset: Array
    counts: Array
    network: Any = static()
    optimizer: Any = static()
    batch: int = static()
    loss: str = static(default="squared")

    def init(self, params: Params) -> TrainState:
        return start(params, self.optimizer)

    def step(self, key: Key, state: TrainState, batch: Any = None) -> tuple[TrainState, Info]:
        total = jnp.sum(self.counts)
        ticket = jax.random.randint(key, (self.batch,), 0, jnp.maximum(total, 1))
        row = jnp.minimum(jnp.searchsorted(jnp.cumsum(self.counts), ticket, side="right"), self.counts.shape[0] - 1)
        x0 = jax.tree.map(lambda leaf: leaf[row], self.x0)

        def loss(params: Params) -> Array:
            out, target = apply(self.network, params, x0) + self.offset[row], self.target[row]
            each = (out - target) ** 2 if self.loss == "squared" else jax.nn.softplus(out) - target * out
            return jnp.where(total > 0, jnp.mean(each), 0.0)

        value, gradients = jax.value_and_grad(loss)(state.params)
        state, info = update(state, gradients, self.optimizer)
        return state, {"loss": value} | info


def fit_network(key: Key, params: Params, fitting: Fitting, steps: int) -> Params:
    """Train from `params` inside another program.

    Args:
      key: a PRNG key.
      params: the first parameters.
      fitting: may be batched by `vmap`.
      steps: optimiser steps.
    """
    return train(fitting, key, fitting.init(params), None, steps, None)[0].params


def bootstrap(key: Key, rows: Array) -> Array:
    """Resample n rows, those where `rows` is true, with replacement: how often each was drawn, int32 [N], sum n.

    The draws depend on a row's rank among the n alone, so that empty slots change nothing.

    Args:
      key: a PRNG key.
      rows: [N] bool.
    """
    rank = jnp.cumsum(rows) - 1
    drawn = jax.random.randint(key, rows.shape, 0, jnp.maximum(rank[-1] + 1, 1))
    used = (jnp.arange(rows.shape[0]) <= rank[-1]).astype(jnp.int32)
    by_rank = jnp.zeros(rows.shape, jnp.int32).at[drawn].add(used)
    return jnp.where(rows, by_rank[jnp.maximum(rank, 0)], 0)
