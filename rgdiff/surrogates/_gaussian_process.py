"""Gaussian-process regression: the exact posterior over functions, given a covariance.

Empty and infeasible slots have rows of the identity in the covariance of the answers: they decouple exactly, and a refit
is one Cholesky factor of a fixed size. Costs N^3 / 3 for N slots; `ridge` on features is the cheaper belief for many.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

from rgdiff import checks
from rgdiff.surrogates.beliefs import root
from rgdiff.surrogates.observations import Observations
from rgdiff.tuners._loop import TrainState, start, train, update
from rgdiff.tuners.optimizers import adamw
from rgdiff.typing import Array, Cond, Info, Key, Params, State, callable_pytree, pytree, static

HIGHEST = jax.lax.Precision.HIGHEST


@pytree
class PosteriorDraw:
    """A function drawn from the posterior: one of the prior, moved through the answers (Matheron's rule)."""

    prior: Any
    prior_weights: Array
    kernel: Any
    x0: State
    weights: Array
    offset: Array

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        shift = jnp.matmul(self.kernel(x0, self.x0), self.weights, precision=HIGHEST)
        return self.offset + jnp.matmul(self.prior(x0), self.prior_weights, precision=HIGHEST) + shift


@pytree
class GaussianProcessBelief:
    """The posterior: `factor` [N, N] is the lower Cholesky factor of the answers' covariance, `weights` [N] its inverse times them."""

    kernel: Any
    x0: State
    answered: Array
    target: Array
    factor: Array
    weights: Array
    offset: Array
    noise: Array
    bonus: Array
    features: int = static()

    def mean(self, x0: State, cond: Cond = None) -> Array:
        return self.offset + jnp.matmul(self._to(x0), self.weights, precision=HIGHEST)

    def std(self, x0: State, cond: Cond = None) -> Array:
        """sqrt(k(x, x) - k(x, X) (K + noise^2 I)^-1 k(X, x)), of the function, not of a further noisy answer."""
        return self._std(x0, self._to(x0))

    def upper(self, x0: State, cond: Cond = None) -> Array:
        near = self._to(x0)
        mean = self.offset + jnp.matmul(near, self.weights, precision=HIGHEST)
        return mean + self.bonus * self._std(x0, near)

    def draw(self, key: Key) -> PosteriorDraw:
        """Draw a function, by a prior of random features and an exact update (pathwise conditioning, arXiv 2002.09309)."""
        key_features, key_weights, key_noise = jax.random.split(key, 3)
        rows = self.answered.astype(jnp.float32)
        known = jax.tree.map(lambda leaf: leaf * rows.reshape(-1, *[1] * (leaf.ndim - 1)), self.x0)
        prior = self.kernel.random_features(key_features, known, self.features)
        prior_weights = jax.random.normal(key_weights, (self.features,))
        there = jnp.matmul(prior(known), prior_weights, precision=HIGHEST)
        there += self.noise * jax.random.normal(key_noise, rows.shape)
        weights = cho_solve((self.factor, True), rows * (self.target - there))
        return PosteriorDraw(prior, prior_weights, self.kernel, known, rows * weights, self.offset)

    def _to(self, x0: State) -> Array:
        """Covariance to the answers, [B, N], 0 to other slots."""
        return jnp.where(self.answered, self.kernel(x0, self.x0), 0.0)

    def _std(self, x0: State, near: Array) -> Array:
        one = lambda x: self.kernel(*(2 * (jax.tree.map(lambda leaf: leaf[None], x),)))[0, 0]  # noqa: E731
        known = jnp.sum(solve_triangular(self.factor, near.T, lower=True) ** 2, 0)
        return root(jax.vmap(one)(x0) - known)


@pytree
class MarginalLikelihood:
    """A tuner of hyper-parameters, their logarithms: minus the log marginal likelihood, nats per answer."""

    kernel: Any
    observations: Observations
    offset: Array
    optimizer: Any = static()

    def init(self, params: Params) -> TrainState:
        return start(params, self.optimizer)

    def step(self, key: Key, state: TrainState, batch: Any = None) -> tuple[TrainState, Info]:
        value, gradients = jax.value_and_grad(self.loss)(state.params)
        state, info = update(state, gradients, self.optimizer)
        return state, {"loss": value} | info

    def loss(self, params: Params) -> Array:
        """(1/2 y^T K^-1 y + 1/2 log |K|) / n, up to a constant."""
        kernel, noise = with_numbers(self.kernel, params)
        target, factor, weights = solve(kernel, noise, self.observations, self.offset)
        nats = 0.5 * jnp.dot(target, weights) + jnp.sum(jnp.log(jnp.diagonal(factor)))
        return nats / jnp.maximum(jnp.sum(self.observations.answered), 1)


def numbers(kernel: Any, noise: Array) -> dict[str, Array]:
    """Logarithms of a kernel's positive numbers and of the noise."""
    names = [name for name in ("lengthscale", "variance") if hasattr(kernel, name)]
    return {name: jnp.log(getattr(kernel, name)) for name in names} | {"noise": jnp.log(noise)}


def with_numbers(kernel: Any, logs: dict[str, Array]) -> tuple[Any, Array]:
    """Return the kernel and the noise with these numbers."""
    values = {name: jnp.exp(value) for name, value in logs.items()}
    noise = values.pop("noise")
    return dataclasses.replace(kernel, **values), noise


def solve(kernel: Any, noise: Array, observations: Observations, offset: Array) -> tuple[Array, Array, Array]:
    """Return the centred answers [N], the lower factor L of their covariance, and its inverse times them."""
    rows = observations.answered
    target = jnp.where(rows, observations.y - offset, 0.0)
    covariance = jnp.where(rows[:, None] & rows, kernel(observations.x0, observations.x0), 0.0)
    factor = jnp.linalg.cholesky(covariance + jnp.diag(jnp.where(rows, noise**2, 1.0)))
    return target, factor, cho_solve((factor, True), target)


@pytree
class GaussianProcessRegression:
    """A surrogate. Build it with `gaussian_process`."""

    kernel: Any
    noise: Array
    bonus: Array
    prior_mean: Array | None
    optimizer: Any = static()
    steps: int = static()
    features: int = static()

    @property
    def warm(self) -> bool:
        """Whether a fit goes on from the numbers of the last one."""
        return self.steps > 0

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> GaussianProcessBelief:
        """Factor the covariance of the answers, after `steps` steps of the marginal likelihood from the last fit's numbers."""
        offset = observations.mean if self.prior_mean is None else self.prior_mean
        kernel, noise = self.kernel, self.noise
        if self.steps:
            first = numbers(kernel, noise) if previous is None else numbers(previous.kernel, previous.noise)
            tuner = MarginalLikelihood(kernel, observations, offset, self.optimizer)
            state, _ = train(tuner, key, tuner.init(first), None, self.steps, None)
            kernel, noise = with_numbers(kernel, state.params)
        target, factor, weights = solve(kernel, noise, observations, offset)
        return GaussianProcessBelief(
            kernel=kernel,
            x0=observations.x0,
            answered=observations.answered,
            target=target,
            factor=factor,
            weights=weights,
            offset=offset,
            noise=noise,
            bonus=self.bonus,
            features=self.features,
        )


def gaussian_process(
    kernel: Any,
    *,
    noise: float = 0.1,
    bonus: float = 1.0,
    prior_mean: float | None = None,
    steps: int = 0,
    rate: float = 0.05,
    features: int = 512,
) -> GaussianProcessRegression:
    """Believe that the reward is drawn from a Gaussian process with this covariance (GP-UCB).

        mean(x) = m + k(x, X) (K + noise^2 I)^-1 (y - m),  deviation(x)^2 = k(x, x) - k(x, X) (K + noise^2 I)^-1 k(X, x),
        upper(x) = mean(x) + bonus * deviation(x)

    Args:
      kernel: `rbf(...)` or `tanimoto(...)` of `rgdiff.surrogates.covariances`, or another pytree like them.
      noise: standard deviation of one answer given x0, reward's unit, > 0. In float32 keep noise^2 above 1e-6 of the
        number of answers times the variance.
      bonus: number of deviations above the mean at `upper`.
      prior_mean: m, the mean far from all answers, reward's unit; None for the mean of the answers.
      steps: optimiser steps on the log marginal likelihood of lengthscale, variance and noise at every fit; 0 keeps them.
        A fit begins at the last one's numbers where it is given (`previous`).
      rate: learning rate of their logarithms.
      features: number of random features of the prior, for posterior draws alone.

    Returns:
      A surrogate: `fit(key, observations, previous)` -> a belief with mean, std, upper and draw. A fit costs N^3 / 3 for N slots.

    Raises:
      ValueError: for a kernel that cannot be called or has no random_features, numbers that are not positive.

    References: Srinivas et al., arXiv 0912.3995 (GP-UCB); Rasmussen and Williams 2006, algorithm 2.1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [0.0], [1.0]]), jnp.array([-2.0, 0.0, 2.0])  # y = 2 x
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> belief = surrogates.gaussian_process(surrogates.rbf(1.0), noise=0.01).fit(jax.random.key(0), observations)
      >>> print(belief.mean(x0).round(1), belief.std(jnp.array([[0.0], [9.0]])).round(1))  # sure at answers, not far away
      [-2.  0.  2.] [0. 1.]
    """
    kernel = callable_pytree(kernel, "a kernel (a, b) -> [A, B]")
    if not hasattr(kernel, "random_features"):
        raise ValueError("a kernel needs random_features(key, x0, count) for posterior draws; use rbf() or tanimoto()")
    steps = checks.at_least("steps", steps, 0)
    return GaussianProcessRegression(
        kernel,
        checks.positive("noise", noise),
        checks.positive("bonus", bonus, zero=True),
        None if prior_mean is None else jnp.asarray(prior_mean, jnp.float32),
        adamw(rate) if steps else None,
        steps,
        checks.at_least("features", features, 1),
    )
