"""Ridge regression on features, with the elliptical bonus of linear bandits: the belief of LinUCB.

Everything is exact and in closed form. The factor of C is taken from a QR of the stacked rows [Phi; sqrt(lambda) I], whose
triangle is the Cholesky factor of C: forming C first would lose half the digits of float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from rgdiff import checks
from rgdiff.surrogates.beliefs import root
from rgdiff.surrogates.observations import Observations
from rgdiff.typing import Array, Cond, Key, State, callable_pytree, pytree, static

HIGHEST = jax.lax.Precision.HIGHEST


@pytree
class LinearReward:
    """A linear function of features as a reward: offset + phi(x0) . weights."""

    features: Any
    weights: Array
    offset: Array

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        return self.offset + jnp.matmul(self.features(x0), self.weights, precision=HIGHEST)


@pytree
class RidgeBelief:
    """The posterior N(weights, noise^2 C^-1) over the weights of features, C = R^T R with `factor` R upper triangular."""

    features: Any
    weights: Array
    factor: Array
    offset: Array
    noise: Array
    bonus: Array

    def mean(self, x0: State, cond: Cond = None) -> Array:
        return LinearReward(self.features, self.weights, self.offset)(x0)

    def std(self, x0: State, cond: Cond = None) -> Array:
        """noise * sqrt(phi^T C^-1 phi), of the mean, not of a further noisy answer."""
        return self.noise * root(self._leverage(self.features(x0)))

    def upper(self, x0: State, cond: Cond = None) -> Array:
        phi = self.features(x0)
        mean = self.offset + jnp.matmul(phi, self.weights, precision=HIGHEST)
        return mean + self.bonus * self.noise * root(self._leverage(phi))

    def draw(self, key: Key) -> LinearReward:
        """Draw the weights from the posterior."""
        normal = jax.random.normal(key, self.weights.shape)
        shift = solve_triangular(self.factor, normal, lower=False)
        return LinearReward(self.features, self.weights + self.noise * shift, self.offset)

    def _leverage(self, phi: Array) -> Array:
        return jnp.sum(solve_triangular(self.factor, phi.T, lower=False, trans="T") ** 2, 0)


@pytree
class Ridge:
    """A surrogate. Build it with `ridge`."""

    features: Any
    regularization: Array
    noise: Array
    bonus: Array
    prior_mean: Array | None
    centred: bool = static()

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> RidgeBelief:
        """Solve for the posterior; neither the key nor the last belief is needed."""
        answered = observations.answered
        phi = jnp.where(answered[:, None], self.features(observations.x0), 0.0)
        offset = observations.mean if self.prior_mean is None else self.prior_mean
        target = jnp.where(answered, observations.y - offset, 0.0)
        q, factor = self._factor(phi)
        weights = solve_triangular(factor, jnp.matmul(q[: phi.shape[0]].T, target, precision=HIGHEST), lower=False)
        if self.centred:
            count = jnp.sum(answered)
            middle = jnp.where(answered[:, None], phi - jnp.sum(phi, 0) / jnp.maximum(count, 1), 0.0)
            _, factor = self._factor(middle / jnp.sqrt(jnp.maximum(count - 1, 1)))
        return RidgeBelief(self.features, weights, factor, offset, self.noise, self.bonus)

    def _factor(self, rows: Array) -> tuple[Array, Array]:
        """Return Q [N + d, d] and R [d, d], its diagonal positive, of the stacked rows: R^T R = rows^T rows + lambda I."""
        below = jnp.sqrt(self.regularization) * jnp.eye(rows.shape[1], dtype=rows.dtype)
        q, factor = jnp.linalg.qr(jnp.concatenate([rows, below]))
        sign = jnp.where(jnp.diagonal(factor) < 0, -1.0, 1.0)
        return q * sign, factor * sign[:, None]


def ridge(
    features: Any,
    *,
    regularization: float = 1.0,
    noise: float = 1.0,
    bonus: float = 1.0,
    prior_mean: float | None = 0.0,
    centred: bool = False,
) -> Ridge:
    """Believe that the reward is linear in features: ridge regression with the elliptical bonus (LinUCB).

        C = Phi^T Phi + lambda I,  mean(x) = m + phi(x)^T C^-1 Phi^T (y - m),  deviation(x) = noise sqrt(phi(x)^T C^-1 phi(x)),
        upper(x) = mean(x) + bonus * deviation(x)

    the posterior of y = m + phi . theta + N(0, noise^2) under the prior theta ~ N(0, noise^2 / lambda I). The deviation
    falls as 1/sqrt(n) with n answers.

    Args:
      features: a callable pytree x0 [B, ...] -> [B, d] (`rgdiff.surrogates.features`).
      regularization: lambda > 0, in the unit of phi squared. All numbers are dynamic.
      noise: standard deviation of one answer given x0, reward's unit.
      bonus: number of deviations above the mean at `upper`.
      prior_mean: m, the mean before any answer, reward's unit; None for the mean of the answers.
      centred: the released code's C = cov(Phi) + lambda I, centred and divided by n - 1, in the deviation (see the Note).

    Returns:
      A surrogate: `fit(key, observations, previous)` -> a belief with mean, std, upper and draw.

    Raises:
      ValueError: for features that cannot be called, numbers that are not positive.

    References: SEIKO, arXiv 2402.16359 (the UCB oracle); Abbasi-Yadkori et al. 2011 (elliptical bonus).

    Note:
      The released code's bonus is `centred`, with noise * bonus = 0.01 and lambda = 1e-3, on uncentred phi, clipped at 10
      (we do not clip): a covariance does not grow with n, so that bonus does not shrink with data, and it is no posterior.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [0.0], [1.0]]), jnp.array([-2.0, 0.0, 2.0])  # y = 2 x
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> belief = surrogates.ridge(surrogates.flatten, regularization=2.0).fit(jax.random.key(0), observations)
      >>> print(f"{belief.mean(x0)[2]:.2f} {belief.std(x0)[2]:.2f}")  # C = 2 + 2: slope 4 / 4, deviation |x| / 2
      1.00 0.50
    """
    return Ridge(
        callable_pytree(features, "features (x0 -> [B, d])"),
        checks.positive("regularization", regularization),
        checks.positive("noise", noise),
        checks.positive("bonus", bonus, zero=True),
        None if prior_mean is None else jnp.asarray(prior_mean, jnp.float32),
        bool(centred),
    )
