"""Numbers from a Gaussian mixture, with an exact denoiser: a one-dimensional world whose distributions are computed by quadrature.

States are [B, 1]. The judge compares samples with the tilt of the prior's own chain, by quadrature, and with the
distribution that tuning reaches while x_T stays the prior's. Tuning is left to the methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, denoisers
from rgdiff.processes import along
from rgdiff.schedules import GaussianSchedule
from rgdiff.tuners._elegant import Shifted
from rgdiff.typing import Array, Cond, Key, pytree


@pytree
class MixtureDenoiser:
    """E[x0 | x_t] of x0 ~ sum_k w_k N(m_k, std^2), exact: the mean of the components' posteriors m_k + gain (x_t - alpha m_k)."""

    schedule: GaussianSchedule
    log_weights: Array
    centres: Array
    std: Array

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        alpha, sigma = along(self.schedule.alpha(t), x), along(self.schedule.sigma(t), x)
        variance = alpha**2 * self.std**2 + sigma**2
        away = x - alpha * self.centres  # [B, K]
        weights = jax.nn.softmax(self.log_weights - 0.5 * away**2 / variance)
        means = self.centres + alpha * self.std**2 / variance * away
        return jnp.sum(weights * means, -1, keepdims=True)


class MixtureDomain:
    """x0 ~ sum_k w_k N(m_k, std^2). Build it with `mixture`."""

    value_range = None
    shape = (1,)

    def __init__(self, weights: np.ndarray, centres: np.ndarray, std: float, network: Any):
        self.weights, self.centres, self.std, self.network = weights, centres, std, network

    def data(self, key: Key, count: int) -> Array:
        """Draw examples [count, 1]."""
        key_part, key_noise = jax.random.split(key)
        part = jax.random.categorical(key_part, jnp.log(jnp.asarray(self.weights, jnp.float32)), shape=(count, 1))
        return jnp.asarray(self.centres, jnp.float32)[part] + self.std * jax.random.normal(key_noise, (count, 1))

    def family(self, schedule: GaussianSchedule, steps: int) -> tuple[Any, Any]:
        """Return a model, the exact denoiser plus a network's output, and parameters at which the latter is zero."""
        log_weights = jnp.log(jnp.asarray(self.weights, jnp.float32))
        exact = MixtureDenoiser(schedule, log_weights, jnp.asarray(self.centres, jnp.float32), jnp.float32(self.std))
        params = self.network.init(jax.random.key(0), jnp.zeros((1, 1)), jnp.ones(1))["params"]
        return Shifted(denoisers.LinenModel(self.network), exact), params


def mixture(weights: Sequence[float], centres: Sequence[float], std: float, network: Any) -> MixtureDomain:
    """Make a mixture of Gaussians on the line, x0 ~ sum_k w_k N(m_k, std^2).

    Args:
      weights: w_k > 0; they need not sum to 1.
      centres: m_k, one for each weight, in the unit of x0.
      std: of every component.
      network: a Linen module called as (x, t, cond) that is zero at first, e.g. `nets.MLP`: tuning adds its output to the
        exact denoiser.

    Returns:
      The domain.

    Raises:
      ValueError: for weights that are not positive, another number of centres, or std <= 0.

    Example:
      >>> import jax, rgdiff
      >>> from rgdiff.domains import mixture
      >>> domain = mixture.mixture([1.0, 1.0], [-2.0, 2.0], 0.5, rgdiff.nets.MLP(features=(8,)))
      >>> domain.data(jax.random.key(0), 3).shape
      (3, 1)
    """
    w, m = np.asarray(weights, float), np.asarray(centres, float)
    if w.ndim != 1 or w.shape != m.shape or not (w > 0).all():
        raise ValueError(f"mixture expects positive weights and as many centres, got {weights!r} and {centres!r}")
    return MixtureDomain(w / w.sum(), m, float(checks.positive("std", std)), network)
