"""A learned oracle of sequences: a network, by default convolutional and averaged over positions, fitted to measurements by least squares.

It assumes one-hot sequences [N, L, K] of one length with one number each. Which half of the measurements an oracle may
see, and what it is then used for, is left to `sequence_tasks`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, tuners
from rgdiff.denoisers import from_linen
from rgdiff.typing import Array, Cond, Info, Key, Params, pytree, static
from rgdiff.values import per_example


@pytree
class Oracle:
    """Predict a measurement of sequences [B, L, K], or of points of the simplex: a reward. Train it with `train_oracle`."""

    params: Params
    mean: Array
    std: Array
    network: Any = static()

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.mean + self.std * self.standard(x0)

    def standard(self, x0: Array) -> Array:
        """Return the prediction in standard deviations from the mean, [B]."""
        x0 = x0.astype(jnp.float32)
        return per_example(from_linen(self.network, self.params)(x0, jnp.float32(0)))


@pytree
class OracleTuner:
    """Least squares on standardised measurements, as a tuner for `rgdiff.tuners.fit`."""

    mean: Array
    std: Array
    amount: Array
    network: Any = static()
    optimizer: Any = static()

    def init(self, params: Params) -> tuners.TrainState:
        return tuners.start(params, self.optimizer, average=True)

    def step(self, key: Key, state: tuners.TrainState, batch: Any) -> tuple[tuners.TrainState, Info]:
        x = soften(key, batch["x"].astype(jnp.float32), self.amount)
        target = (batch["y"] - self.mean) / self.std

        def loss(params: Params) -> Array:
            return jnp.mean((Oracle(params, self.mean, self.std, self.network).standard(x) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        state, info = tuners.update(state, gradients, self.optimizer, 0.99)
        return state, {"loss": value} | info


def soften(key: Key, x: Array, amount: Array | float) -> Array:
    """Mix each sequence with its own letter frequencies by a random share up to `amount`: towards where posterior means are."""
    share = amount * jax.random.uniform(key, (x.shape[0], 1, 1))
    return (1 - share) * x + share * jnp.mean(x, 1, keepdims=True)


def train_oracle(
    key: Key,
    x: Array | np.ndarray,
    y: Array | np.ndarray,
    *,
    steps: int = 600,
    batch: int = 64,
    learning_rate: float = 2e-3,
    soft: float = 0.5,
    width: int = 32,
    kernel: int = 7,
    dilations: tuple[int, ...] = (1, 1, 4),
) -> Oracle:
    """Train a convolutional oracle, E[y | x]: `fit_oracle` with `nets.ConvNet1D`.

    Args:
      width, kernel, dilations: of the network.
      key, x, y, steps, batch, learning_rate, soft: see `fit_oracle`.

    Raises:
      ValueError: as `fit_oracle`.
    """
    from rgdiff.nets import ConvNet1D

    network = ConvNet1D(1, width, tuple(dilations), kernel)
    return fit_oracle(key, network, x, y, steps=steps, batch=batch, learning_rate=learning_rate, soft=soft)


def fit_oracle(
    key: Key,
    network: Any,
    x: Array | np.ndarray,
    y: Array | np.ndarray,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    soft: float = 0.0,
    weight_decay: float = 1e-2,
) -> Oracle:
    """Train a network on standardised measurements by least squares.

    Args:
      key: PRNG key; the result is a function of it.
      network: a Flax module (x, t) to [B, ...], averaged over all but the first axis.
      x: one-hot sequences [N, L, K].
      y: measurements [N].
      steps: optimiser steps (AdamW, cosine decay from `learning_rate`); the average of the weights is kept.
      batch: sequences per step.
      learning_rate: highest learning rate.
      soft: largest share by which a training sequence is mixed with its letter frequencies (see `soften`), in [0, 1].
      weight_decay: of AdamW.

    Raises:
      ValueError: for fewer than two measurements, for shapes that do not fit, measurements that are not finite or equal.
    """
    x, y = np.asarray(x), np.asarray(y, np.float32)
    if x.ndim != 3 or y.shape != x.shape[:1] or len(y) < 2:
        raise ValueError(
            f"expected sequences [N, L, K] with two or more measurements [N], got {list(x.shape)}, {list(y.shape)}"
        )
    if not np.isfinite(y).all() or y.std() == 0:
        raise ValueError("measurements must be finite and not all equal; leave out what was not measured")
    mean, std = jnp.float32(y.mean()), jnp.float32(y.std())
    key_init, key_fit = jax.random.split(key)
    params = jax.jit(network.init)(key_init, jnp.zeros((1, *x.shape[1:])), jnp.zeros(1))["params"]
    optimizer = tuners.adamw(learning_rate, decay_steps=steps, weight_decay=weight_decay)
    tuner = OracleTuner(mean, std, checks.positive("soft", soft, zero=True), network, optimizer)
    data = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    state = tuners.fit(tuner, key_fit, tuner.init(params), steps, data=data, batch=batch, chunk=steps)
    return Oracle(state.best, mean, std, network)
