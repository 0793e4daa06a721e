"""Beliefs about an unknown reward: the protocol, wrappers that change one, and the optimistic reward made of one.

A surrogate learns a belief from observations; a belief gives the expected reward at x0 (`mean`), its standard deviation
(`std`), an optimistic value (`upper`) and a draw of the whole function (`draw`). All are differentiable in
x0, points of the simplex included. Conditions are passed through and not used: observations do not hold any.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from rgdiff.surrogates.observations import Observations
from rgdiff.typing import Array, Cond, Key, Reward, State, pytree


class Belief(Protocol):
    """A posterior over the reward; a pytree of the same structure in every round. All in the reward's unit, [B]."""

    def mean(self, x0: State, cond: Cond = None) -> Array: ...

    def std(self, x0: State, cond: Cond = None) -> Array: ...

    def upper(self, x0: State, cond: Cond = None) -> Array: ...

    def draw(self, key: Key) -> Reward: ...


class Surrogate(Protocol):
    """A frozen pytree that learns a belief; `previous` is the last round's, for surrogates that start from it (`warm`)."""

    def fit(self, key: Key, observations: Observations, previous: Any = None) -> Any: ...


def root(variance: Array) -> Array:
    """Return the square root with the gradient 0, not infinity, at 0; rounding below 0 counts as 0.

    Args:
      variance: any shape.
    """
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
    """Optimise the mean, with no bonus: the baseline that never explores.

    Args:
      surrogate: any surrogate.

    Returns:
      A surrogate whose belief has `upper` equal to `mean`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [0.0], [1.0]]), jnp.array([-2.0, 0.0, 2.0])  # y = 2 x
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> belief = surrogates.greedy(surrogates.ridge(surrogates.flatten)).fit(jax.random.key(0), observations)
      >>> print(bool((belief.upper(x0) == belief.mean(x0)).all()))
      True
    """
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

    Args:
      surrogate: any surrogate whose belief has `draw`.

    Returns:
      A surrogate whose belief has the drawn function as `upper`.

    Note:
      The released SEIKO code's "TS" adds gradient noise of 1.4e-8 to the fit, which draws nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [0.0], [1.0]]), jnp.array([-2.0, 0.0, 2.0])  # y = 2 x
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> surrogate = surrogates.thompson(surrogates.ridge(surrogates.flatten))
      >>> draws = [surrogate.fit(jax.random.key(i), observations).upper(x0) for i in (0, 1)]
      >>> print(bool((draws[0] == draws[1]).all()))
      False
    """
    return Thompson(surrogate)


@pytree
class Optimistic:
    """The reward to optimise: upper(x0) + weight * log p(feasible | x0), the second term where there is a classifier.

    Args:
      belief: of a surrogate.
      feasibility: belief of a classifier, with log_prob(x0, cond) [B] in nats, or None.
      weight: in the reward's unit per nat.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff import surrogates
      >>> x0, y = jnp.array([[-1.0], [0.0], [1.0]]), jnp.array([-2.0, 0.0, 2.0])  # y = 2 x
      >>> observations = surrogates.append(surrogates.empty(x0, 8), 0, x0, y)
      >>> belief = surrogates.ridge(surrogates.flatten, regularization=2.0, bonus=2.0).fit(jax.random.key(0), observations)
      >>> print(f"{surrogates.Optimistic(belief)(x0)[2]:.2f}")  # x + 2 |x| / 2
      2.00
    """

    belief: Any
    feasibility: Any = None
    weight: Array | float = 1.0

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        upper = self.belief.upper(x0, cond)
        if self.feasibility is None:
            return upper
        return upper + self.weight * self.feasibility.log_prob(x0, cond)
