"""Deep-feature UCB: a network fitted to the answers, then `ridge` on the input of its last dense layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.surrogates import networks
from rgdiff.surrogates._ridge import Ridge, RidgeBelief
from rgdiff.surrogates.features import with_constant
from rgdiff.surrogates.observations import Observations
from rgdiff.typing import Array, Key, Params, State, pytree, static


@pytree
class LastHidden:
    """A constant 1 and the input of a network's last dense layer, [B, 1 + F]."""

    params: Params
    network: Any = static()

    def __call__(self, x0: State) -> Array:
        return with_constant(networks.last_hidden(self.network, self.params, x0))


@pytree
class DeepFeatures:
    """A surrogate. Build it with `deep_features`."""

    regularization: Array
    noise: Array
    bonus: Array
    network: Any = static()
    optimizer: Any = static()
    steps: int = static()
    batch: int = static()
    centred: bool = static()
    warm: bool = static()

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> RidgeBelief:
        """Fit the network to all answers, then its last layer in closed form."""
        key_init, key_fit = jax.random.split(key)
        if self.warm and previous is not None:
            params = previous.features.params
        else:
            params = networks.initial(key_init, self.network, observations.x0)
        target = (observations.values - observations.mean) / observations.std
        fitting = networks.Fitting(
            observations.x0,
            target,
            jnp.zeros_like(target),
            observations.answered.astype(jnp.int32),
            self.network,
            self.optimizer,
            self.batch,
        )
        features = LastHidden(networks.fit_network(key_fit, params, fitting, self.steps), self.network)
        last = Ridge(features, self.regularization, self.noise, self.bonus, None, self.centred)
        return last.fit(key, observations)


def deep_features(
    network: Any,
    optimizer: Any,
    *,
    steps: int = 300,
    batch: int = 64,
    regularization: float = 1.0,
    noise: float = 1.0,
    bonus: float = 1.0,
    centred: bool = False,
    warm: bool = False,
) -> DeepFeatures:
    """Believe that the reward is linear in a network's last hidden layer (SEIKO-UCB, arXiv 2402.16359).

        upper(x) = mean(x) + bonus * noise sqrt(phi(x)^T C^-1 phi(x)),  phi = (1, last hidden layer),  C = Phi^T Phi + lambda I

    The network is trained by least squares on standardised answers; mean, deviation and bonus are those of `ridge` on phi, around the
    mean of the answers. The deviation is that of the last layer alone: it does not contain the uncertainty of the features, and is
    no calibrated figure where that matters.

    Args:
      network: a Linen module that ends in `flax.linen.Dense`, x0 or (x, t, cond) -> [B] or one number a position
        (features are then averaged over positions), e.g. `nets.ValueMLP((128, 16))`.
      optimizer: an optax transformation; keep one object, as another one compiles another program.
      steps: optimiser steps of a fit.
      batch: rows a step.
      regularization: lambda > 0, in the unit of phi squared; dynamic.
      noise: standard deviation of one answer given x0, reward's unit; dynamic.
      bonus: number of deviations above the mean at `upper`; dynamic.
      centred: use the released code's centred covariance in the deviation, see `ridge`.
      warm: begin a fit from the last fit's parameters where it is given (`previous`).

    Returns:
      A surrogate: `fit(key, observations, previous)` -> a belief with mean, std, upper and draw.

    Raises:
      ValueError: for a network that is no Linen module, numbers that are not positive.

    Note:
      The released code takes the mean from the network itself and the bonus from a centred covariance (`centred`).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [0.0], [1.0]]), jnp.array([-2.0, 0.0, 2.0])  # y = 2 x
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> import optax
      >>> from rgdiff import nets
      >>> surrogate = surrogates.deep_features(nets.ValueMLP((4,)), optax.sgd(0.1), steps=5, batch=8)
      >>> belief = surrogate.fit(jax.random.key(0), observations)
      >>> print(belief.mean(x0).shape, bool((belief.upper(x0) >= belief.mean(x0)).all()))
      (3,) True
    """
    return DeepFeatures(
        regularization=checks.positive("regularization", regularization),
        noise=checks.positive("noise", noise),
        bonus=checks.positive("bonus", bonus, zero=True),
        network=networks.check(network),
        optimizer=optimizer,
        steps=checks.at_least("steps", steps, 1),
        batch=checks.at_least("batch", batch, 1),
        centred=bool(centred),
        warm=bool(warm),
    )
