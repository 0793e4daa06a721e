"""Bootstrap ensembles: networks fitted to resamples of the answers, all heads in one program by `vmap`.

Their spread is the deviation, their maximum or their mean plus deviations the optimistic reward, and one head is a posterior
draw.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.surrogates import networks
from rgdiff.surrogates.beliefs import root
from rgdiff.surrogates.observations import Observations
from rgdiff.typing import Array, Cond, Key, Params, State, pytree, static

REDUCTIONS = ("max", "mean_plus_std")


@pytree
class Head:
    """One network, with its randomised prior, as a reward; see `ensemble`."""

    params: Params
    prior_params: Params
    prior: Array
    offset: Array
    scale: Array
    network: Any = static()

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        out = networks.apply(self.network, self.params, x0)
        out += self.prior * networks.apply(self.network, self.prior_params, x0)
        return self.offset + self.scale * out


@pytree
class EnsembleBelief:
    """Several heads, stacked along the first axis of their parameters."""

    heads: Head
    bonus: Array
    count: int = static()
    reduce: str = static()

    def predictions(self, x0: State) -> Array:
        """Return the prediction of every head, [heads, B].

        Args:
          x0: samples [B, ...].
        """
        one = lambda params, prior_params: self._head(params, prior_params)(x0)  # noqa: E731
        return jax.vmap(one)(self.heads.params, self.heads.prior_params)

    def mean(self, x0: State, cond: Cond = None) -> Array:
        return jnp.mean(self.predictions(x0), 0)

    def std(self, x0: State, cond: Cond = None) -> Array:
        """Standard deviation over heads (n - 1); 0 for a single one."""
        return self._spread(self.predictions(x0))

    def upper(self, x0: State, cond: Cond = None) -> Array:
        values = self.predictions(x0)
        if self.reduce == "max":
            # The derivative of jnp.max divides by how many values equal it: none do where XLA rounds one twice.
            highest = jnp.argmax(values, 0)
            return jnp.take_along_axis(values, highest[None], 0)[0]
        return jnp.mean(values, 0) + self.bonus * self._spread(values)

    def draw(self, key: Key) -> Head:
        """Draw one of the heads."""
        index = jax.random.randint(key, (), 0, self.count)
        return self._head(*jax.tree.map(lambda p: p[index], (self.heads.params, self.heads.prior_params)))

    def _head(self, params: Params, prior_params: Params) -> Head:
        heads = self.heads
        return Head(params, prior_params, heads.prior, heads.offset, heads.scale, heads.network)

    def _spread(self, values: Array) -> Array:
        return root(jnp.sum((values - jnp.mean(values, 0)) ** 2, 0) / max(self.count - 1, 1))


@pytree
class BootstrapEnsemble:
    """A surrogate. Build it with `ensemble`."""

    bonus: Array
    prior: Array
    network: Any = static()
    optimizer: Any = static()
    heads: int = static()
    steps: int = static()
    batch: int = static()
    reduce: str = static()
    warm: bool = static()

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> EnsembleBelief:
        """Fit every head to its own resample of the answers."""
        key_init, key_prior, key_resample, key_fit = jax.random.split(key, 4)
        split = lambda k: jax.random.split(k, self.heads)  # noqa: E731
        if self.warm and previous is not None:
            params, prior_params = previous.heads.params, previous.heads.prior_params
        else:
            params = jax.vmap(lambda k: networks.initial(k, self.network, observations.x0))(split(key_init))
            prior_params = jax.vmap(networks.shaken)(split(key_prior), params)
        counts = jax.vmap(networks.bootstrap, (0, None))(split(key_resample), observations.answered)
        offset, scale = observations.mean, observations.std
        target = (observations.values - offset) / scale

        def one(key: Key, params: Params, prior_params: Params, counts: Array) -> Params:
            known = self.prior * networks.apply(self.network, prior_params, observations.x0)
            fitting = networks.Fitting(observations.x0, target, known, counts, self.network, self.optimizer, self.batch)
            return networks.fit_network(key, params, fitting, self.steps)

        params = jax.vmap(one)(split(key_fit), params, prior_params, counts)
        heads = Head(params, prior_params, self.prior, offset, scale, self.network)
        return EnsembleBelief(heads, self.bonus, self.heads, self.reduce)


def ensemble(
    network: Any,
    optimizer: Any,
    *,
    heads: int = 4,
    steps: int = 300,
    batch: int = 64,
    reduce: str = "max",
    bonus: float = 1.0,
    prior: float = 0.0,
    warm: bool = False,
) -> BootstrapEnsemble:
    """Believe in an ensemble of networks fitted to bootstrap resamples (SEIKO-Bootstrap, arXiv 2402.16359).

        f_h = argmin_f  sum over resample h of (y - f(x))^2,   upper(x) = max_h f_h(x)   or   mean_h + bonus * deviation_h

    Answers are standardised inside; every head draws its own start, its own n of the n answers with replacement (once a
    fit), and its own minibatches of them.

    Args:
      network: a Linen module, x0 or (x, t, cond) -> [B] or one number a position, e.g. `nets.ValueMLP((128,) * 3)`.
      optimizer: an optax transformation; keep one object, as another one compiles another program.
      heads: number of networks, in one program by `vmap`.
      steps: optimiser steps of a fit.
      batch: rows a step.
      reduce: the optimistic reward: `max` over heads, as released, or `mean_plus_std`.
      bonus: number of deviations above the mean, for the latter; dynamic.
      prior: scale, in standard deviations of the answers, of a fixed random network added to every head, so that heads
        disagree where there are no data (randomised priors, arXiv 1806.03335); 0 for none; dynamic.
      warm: begin from the last fit's heads where it is given (`previous`), as the released code does.

    Returns:
      A surrogate: `fit(key, observations, previous)` -> a belief with mean, std, upper and draw.

    Raises:
      ValueError: for a network that is no Linen module, an unknown reduction, counts below 1.

    Note:
      The released code resamples into four networks of its own kind, without randomised priors. The spread of few heads
      is a coarse deviation, and without priors it can vanish away from the data.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [0.0], [1.0]]), jnp.array([-2.0, 0.0, 2.0])  # y = 2 x
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> import flax.linen, optax
      >>> surrogate = surrogates.ensemble(flax.linen.Dense(1), optax.sgd(0.1), heads=2, steps=20, batch=8)
      >>> belief = surrogate.fit(jax.random.key(0), observations)
      >>> print(belief.predictions(x0).shape, bool((belief.upper(x0) >= belief.mean(x0)).all()))
      (2, 3) True
    """
    return BootstrapEnsemble(
        bonus=checks.positive("bonus", bonus, zero=True),
        prior=checks.positive("prior", prior, zero=True),
        network=networks.check(network),
        optimizer=optimizer,
        heads=checks.at_least("heads", heads, 1),
        steps=checks.at_least("steps", steps, 1),
        batch=checks.at_least("batch", batch, 1),
        reduce=checks.one_of("reduce", reduce, REDUCTIONS),
        warm=bool(warm),
    )
