"""Which samples are feasible: classifiers of answered against infeasible queries, whose log-probability can join a reward.

Before the first infeasible query log p is 0 everywhere: one class alone does not locate the other. From then on
the intercept stands at Laplace's rule of succession, and only evidence moves a prediction away from that share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.surrogates import networks
from rgdiff.surrogates._ridge import LinearReward
from rgdiff.surrogates.observations import EMPTY, Observations
from rgdiff.tuners._loop import train
from rgdiff.typing import Array, Cond, Info, Key, Params, State, callable_pytree, pytree, static

HIGHEST = jax.lax.Precision.HIGHEST
TRIALS = (*(0.5**i for i in range(8)), 0.0)  # step lengths that a Newton step may take


@pytree
class FeasibilityBelief:
    """log p(feasible | x0) = log sigmoid(logit(x0)), or 0 where no infeasible query is `known`."""

    logit: Any
    known: Array

    def log_prob(self, x0: State, cond: Cond = None) -> Array:
        """Nats, [B], at most 0."""
        return jnp.where(self.known, jax.nn.log_sigmoid(self.logit(x0, cond)), 0.0)


def succession(observations: Observations) -> Array:
    """log (n_feasible + 1) / (n_infeasible + 1), the log-odds of Laplace's rule of succession."""
    return jnp.log1p(jnp.sum(observations.answered)) - jnp.log1p(jnp.sum(observations.infeasible))


class NewtonState(NamedTuple):
    """Weights, an intercept first, [1 + d], and the steps taken."""

    weights: Array
    step: Array


@pytree
class Newton:
    """A tuner: Newton's method for ridge-penalised logistic regression, each step as long as it helps most."""

    phi: Array  # [N, 1 + d]
    label: Array
    rows: Array
    centre: Array
    regularization: Array

    def init(self, params: Array) -> NewtonState:
        return NewtonState(params, jnp.int32(0))

    def loss(self, weights: Array) -> Array:
        logit = jnp.matmul(self.phi, weights, precision=HIGHEST)
        each = jnp.where(self.rows, jax.nn.softplus(logit) - self.label * logit, 0.0)
        return jnp.sum(each) + self.regularization / 2 * jnp.sum((weights - self.centre) ** 2)

    def step(self, key: Key, state: NewtonState, batch: Any = None) -> tuple[NewtonState, Info]:
        weights = state.weights
        p = jax.nn.sigmoid(jnp.matmul(self.phi, weights, precision=HIGHEST))
        curved = jnp.where(self.rows, p * (1 - p), 0.0)[:, None] * self.phi
        hessian = jnp.matmul(self.phi.T, curved, precision=HIGHEST) + self.regularization * jnp.eye(len(weights))
        move = jax.scipy.linalg.solve(hessian, jax.grad(self.loss)(weights), assume_a="pos")
        tried = weights - jnp.asarray(TRIALS)[:, None] * move
        losses = jax.vmap(self.loss)(tried)
        losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
        return NewtonState(tried[jnp.argmin(losses)], state.step + 1), {"loss": jnp.min(losses)}


@pytree
class Feasibility:
    """Build it with `feasibility`."""

    features: Any
    regularization: Array
    steps: int = static()

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> FeasibilityBelief:
        """Find the posterior's mode."""
        rows = observations.status != EMPTY
        phi = jnp.where(rows[:, None], self.features(observations.x0), 0.0)
        phi = jnp.concatenate([jnp.ones((phi.shape[0], 1)), phi], -1)
        centre = jnp.zeros(phi.shape[1]).at[0].set(succession(observations))
        newton = Newton(phi, observations.answered.astype(jnp.float32), rows, centre, self.regularization)
        state, _ = train(newton, key, newton.init(centre), None, self.steps, None)
        logit = LinearReward(self.features, state.weights[1:], state.weights[0])
        return FeasibilityBelief(logit, jnp.any(observations.infeasible))


def feasibility(features: Any, *, regularization: float = 1.0, steps: int = 12) -> Feasibility:
    """Classify answered against infeasible queries by logistic regression on features.

        log p(feasible | x) = log sigmoid(b + phi(x) . w),   w ~ N(0, I / lambda),   b ~ N(b0, 1 / lambda)

    at the posterior's mode; b0 is the log-odds of Laplace's rule of succession, (feasible + 1) to (infeasible + 1). With
    no infeasible query yet log p is 0 everywhere.

    Args:
      features: a callable pytree x0 [B, ...] -> [B, d] without a constant, e.g. `fourier(...)` or `flatten`.
      regularization: lambda > 0, in the unit of phi squared, dynamic.
      steps: Newton steps, each with a search along it.

    Returns:
      A classifier: `fit(key, observations)` -> a belief with log_prob(x0, cond) [B], nats.

    Raises:
      ValueError: for features that cannot be called, numbers that are not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [-2.0], [1.0], [2.0]]), jnp.array([jnp.nan, jnp.nan, 0.5, 0.7])  # x < 0 is infeasible
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> belief = surrogates.feasibility(surrogates.flatten).fit(jax.random.key(0), observations)
      >>> print(jnp.exp(belief.log_prob(x0)) > 0.5)
      [False False  True  True]
    """
    return Feasibility(
        callable_pytree(features, "features (x0 -> [B, d])"),
        checks.positive("regularization", regularization),
        checks.at_least("steps", steps, 1),
    )


@pytree
class NetworkLogit:
    """A network's output above an intercept."""

    params: Params
    offset: Array
    network: Any = static()

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        return self.offset + networks.apply(self.network, self.params, x0)


@pytree
class NetworkFeasibility:
    """Build it with `feasibility_network`."""

    network: Any = static()
    optimizer: Any = static()
    steps: int = static()
    batch: int = static()

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> FeasibilityBelief:
        """Train the network from a fresh start."""
        key_init, key_fit = jax.random.split(key)
        offset = succession(observations)
        fitting = networks.Fitting(
            x0=observations.x0,
            target=observations.answered.astype(jnp.float32),
            offset=jnp.full(observations.y.shape, offset),
            counts=(observations.status != EMPTY).astype(jnp.int32),
            network=self.network,
            optimizer=self.optimizer,
            batch=self.batch,
            loss="logistic",
        )
        params = networks.initial(key_init, self.network, observations.x0)
        params = networks.fit_network(key_fit, params, fitting, self.steps)
        return FeasibilityBelief(NetworkLogit(params, offset, self.network), jnp.any(observations.infeasible))


def feasibility_network(network: Any, optimizer: Any, *, steps: int = 300, batch: int = 64) -> NetworkFeasibility:
    """Classify answered against infeasible queries by a network, log p(feasible | x) = log sigmoid(b0 + f(x)).

    b0 is the log-odds of Laplace's rule of succession; this library's networks begin at f = 0, so that a fit begins at
    that share. The optimiser's weight decay and the number of steps keep f near 0 elsewhere: it is no posterior.
    With no infeasible query yet log p is 0 everywhere.

    Args:
      network: a Linen module, x0 or (x, t, cond) -> [B] or one number a position.
      optimizer: an optax transformation, with weight decay, e.g. `tuners.adamw(1e-3, weight_decay=1e-2)`.
      steps: optimiser steps of a fit.
      batch: rows a step.

    Returns:
      A classifier: `fit(key, observations)` -> a belief with log_prob(x0, cond) [B], nats.

    Raises:
      ValueError: for a network that is no Linen module, counts below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [-2.0], [1.0], [2.0]]), jnp.array([jnp.nan, jnp.nan, 0.5, 0.7])  # x < 0 is infeasible
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> import flax.linen, optax
      >>> classifier = surrogates.feasibility_network(flax.linen.Dense(1), optax.sgd(0.5), steps=50, batch=8)
      >>> print(jnp.exp(classifier.fit(jax.random.key(0), observations).log_prob(x0)) > 0.5)
      [False False  True  True]
    """
    return NetworkFeasibility(
        networks.check(network), optimizer, checks.at_least("steps", steps, 1), checks.at_least("batch", batch, 1)
    )
