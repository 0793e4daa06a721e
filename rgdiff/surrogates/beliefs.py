"""Beliefs about an unknown reward: the protocol, what turns one into another, and the optimistic reward made of one.

A surrogate learns a belief from observations; a belief answers what the reward is at x0 (`mean`), how unsure that is
(`std`), what it may be at best (`upper`) and what it is in one plausible world (`draw`). All are differentiable in
x0, points of the simplex included. Conditions are passed through and not used: observations do not hold any.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from rgdiff.surrogates.observations import Observations
from rgdiff.typing import Array, Cond, Key, Reward, State, pytree


class Belief(Protocol):
    """What is known of the reward; a pytree of the same structure in every round. All in the reward's unit, [B]."""

    def mean(self, x0: State, cond: Cond = None) -> Array: ...

    def std(self, x0: State, cond: Cond = None) -> Array: ...

    def upper(self, x0: State, cond: Cond = None) -> Array: ...

    def draw(self, key: Key) -> Reward: ...


class Surrogate(Protocol):
    """A frozen pytree that learns a belief; `previous` is the last round's, for surrogates that start from it (`warm`)."""

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> Any: ...


def root(variance: Array) -> Array:
    """Square root with the gradient 0, not infinity, at 0; rounding below 0 counts as 0."""
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)


@pytree
class GreedyBelief:
    """A belief without optimism: `upper` is `mean`."""

    belief: Any

    def mean(self, x0: State, cond: Cond = None) -> Array:
        return self.belief.mean(x0, cond)

    def std(self, x0: State, cond: Cond = None) -> Array:
        return self.belief.std(x0, cond)

    def upper(self, x0: State, cond: Cond = None) -> Array:
        return self.belief.mean(x0, cond)

    def draw(self, key: Key) -> Reward:
        return self.belief.draw(key)


@pytree
class Greedy:
    """See `greedy`."""

    surrogate: Any

    @property
    def warm(self) -> bool:
        return getattr(self.surrogate, "warm", False)

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> GreedyBelief:
        return GreedyBelief(self.surrogate.fit(key, observations, None if previous is None else previous.belief))


def greedy(surrogate: Surrogate) -> Greedy:
    """Optimise the mean, with no bonus: the baseline that never looks where it is unsure."""
    return Greedy(surrogate)


@pytree
class ThompsonBelief:
    """A belief and one draw of it, which is its `upper`."""

    belief: Any
    drawn: Reward

    def mean(self, x0: State, cond: Cond = None) -> Array:
        return self.belief.mean(x0, cond)

    def std(self, x0: State, cond: Cond = None) -> Array:
        return self.belief.std(x0, cond)

    def upper(self, x0: State, cond: Cond = None) -> Array:
        return self.drawn(x0, cond)

    def draw(self, key: Key) -> Reward:
        return self.belief.draw(key)


@pytree
class Thompson:
    """See `thompson`."""

    surrogate: Any

    @property
    def warm(self) -> bool:
        return getattr(self.surrogate, "warm", False)

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> ThompsonBelief:
        key_fit, key_draw = jax.random.split(key)
        belief = self.surrogate.fit(key_fit, observations, None if previous is None else previous.belief)
        return ThompsonBelief(belief, belief.draw(key_draw))


def thompson(surrogate: Surrogate) -> Thompson:
    """Optimise one draw of the posterior, made at every fit, in place of an upper bound (Thompson sampling).

    Note:
      The released SEIKO code's "TS" adds gradient noise of 1.4e-8 to the fit, which draws nothing.
    """
    return Thompson(surrogate)


@pytree
class Optimistic:
    """The reward to optimise: upper(x0) + weight * log p(feasible | x0), the second term where there is a classifier.

    `weight` is in the reward's unit per nat.
    """

    belief: Any
    feasibility: Any = None
    weight: Array | float = 1.0

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        upper = self.belief.upper(x0, cond)
        if self.feasibility is None:
            return upper
        return upper + self.weight * self.feasibility.log_prob(x0, cond)
