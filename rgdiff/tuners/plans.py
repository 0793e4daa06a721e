"""Plans of truncation: which network calls of a chain keep their gradient, drawn anew at every step. One compiled program each.

A plan is a callable (key, calls) -> Plan for `reward_backprop(truncation=...)`. Numbers in it are dynamic: changing K
does not compile again. A fixed K given as an integer instead makes two scans, the first without any gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.tuners._chain import Plan
from rgdiff.typing import Array, Key, pytree, static


@pytree
class Last:
    """The last k calls; earlier states are constants (DRaFT-K, arXiv 2309.17400). Build it with `last`.

    Args:
      k: number of calls, clipped to 1..calls.
      early: whether the plan may end the chain before its last call; leave it.
    """

    k: Array
    early: bool = static(default=False)

    def __call__(self, key: Key, calls: int) -> Plan:
        cut = calls - jnp.clip(self.k, 1, calls)
        return Plan(jnp.arange(calls) >= cut, cut, jnp.int32(calls))


@pytree
class Suffix:
    """A random number of last calls: the first is floor(N(mean, std)) of 50, given < 50 (AlignProp, arXiv 2310.03739).

    Both numbers are in fiftieths of the chain, as published (42, 5: on average 9.1 of 50 calls keep their gradient, with
    standard deviation 4.5); one draw serves the whole batch. Build it with `suffix`.

    Args:
      mean, std: in fiftieths of the chain.
      early: whether the plan may end the chain before its last call; leave it.
    """

    mean: Array
    std: Array
    early: bool = static(default=False)

    def __call__(self, key: Key, calls: int) -> Plan:
        low, high = -self.mean / self.std, (50 - self.mean) / self.std
        first = self.mean + self.std * jax.random.truncated_normal(key, low, high)
        cut = jnp.clip(jnp.floor(first * calls / 50).astype(jnp.int32), 0, calls - 1)
        return Plan(jnp.arange(calls) >= cut, cut, jnp.int32(calls))


@pytree
class Subset:
    """Keep the gradient of each call independently, that of the i-th of n with probability i / (n + 1), as AlignProp's first code and TRL.

    It is not a truncation: gradients pass the other calls along the state, half of the calls keep theirs on average, and now and
    then the last one does not.

    Args:
      early: whether the plan may end the chain before its last call; leave it.

    Example:
      >>> import jax, rgdiff
      >>> print(rgdiff.tuners.plans.Subset()(jax.random.key(0), 4).live.shape)  # which of 4 calls keep their gradient
      (4,)
    """

    early: bool = static(default=False)

    def __call__(self, key: Key, calls: int) -> Plan:
        index = jnp.arange(calls)
        live = jax.random.uniform(key, (calls,)) < (index + 1) / (calls + 1)
        return Plan(live, jnp.int32(0), jnp.int32(calls))


@pytree
class Late:
    """One call, drawn among the last m, whose prediction of x0 is rewarded (ReFL, arXiv 2304.05977). Build it with `late`.

    Args:
      m: number of late calls, clipped to 1..calls.
      early: whether the plan may end the chain before its last call; leave it.
    """

    m: Array
    early: bool = static(default=True)

    def __call__(self, key: Key, calls: int) -> Plan:
        end = calls - jax.random.randint(key, (), 1, jnp.clip(self.m, 1, calls) + 1)
        return Plan(jnp.arange(calls) == end, end, end)


@pytree
class Spaced:
    """k calls at equal distances from a random first one; the chain ends at a call drawn among the last m (DRTune, arXiv 2405.00760).

    Build it with `spaced`.

    Args:
      k: number of calls that keep their gradient.
      m: number of late calls, clipped to 1..calls.
      early: whether the plan may end the chain before its last call; leave it.
    """

    k: int = static()
    m: Array = 1  # type: ignore[assignment]
    early: bool = static(default=True)

    def __call__(self, key: Key, calls: int) -> Plan:
        key_first, key_end = jax.random.split(key)
        stride = max(calls // self.k, 1)
        first = jax.random.randint(key_first, (), 0, calls - stride * min(self.k, calls) + stride)
        index = jnp.arange(calls) - first
        live = (index >= 0) & (index % stride == 0) & (index < stride * self.k)
        end = calls - jax.random.randint(key_end, (), 1, jnp.clip(self.m, 1, calls) + 1)
        return Plan(live, jnp.int32(0), end)


def last(k: int) -> Last:
    """Keep the gradient of the last k calls, k dynamic (DRaFT-K, arXiv 2309.17400).

    Args:
      k: number of calls; clipped to the chain's.

    Returns:
      A plan for `reward_backprop(truncation=)`: (key, calls) -> Plan.

    Raises:
      ValueError: for k below 1.

    Example:
      >>> import jax, rgdiff
      >>> plan = rgdiff.tuners.plans.last(2)(jax.random.key(0), 5)  # a chain of 5 calls
      >>> print(plan.live)
      [False False False  True  True]
    """
    return Last(jnp.int32(checks.at_least("k", k, 1)))


def suffix(mean: float = 42.0, std: float = 5.0) -> Suffix:
    """Keep the gradient of a random suffix of the chain (AlignProp, arXiv 2310.03739).

    Args:
      mean, std: of the normal law of the first call that keeps its gradient, in fiftieths of the chain, truncated to [0, 50).

    Returns:
      A plan for `reward_backprop(truncation=)`: (key, calls) -> Plan.

    Raises:
      ValueError: for numbers that are not positive.

    Example:
      >>> import jax, rgdiff
      >>> plan = rgdiff.tuners.plans.suffix(30.0, 0.01)(jax.random.key(0), 5)  # from 3/5 of 5 calls on, nearly surely
      >>> print(plan.live)
      [False False False  True  True]
    """
    return Suffix(checks.positive("mean", mean), checks.positive("std", std))


def late(m: int = 20) -> Late:
    """End the chain at one call drawn among the last m, which alone keeps its gradient (ReFL, arXiv 2304.05977).

    Args:
      m: the call is drawn uniformly among the last m; clipped to the chain's.

    Returns:
      A plan for `reward_backprop(truncation=)`: (key, calls) -> Plan.

    Raises:
      ValueError: for m below 1.

    Example:
      >>> import jax, rgdiff
      >>> plan = rgdiff.tuners.plans.late(1)(jax.random.key(0), 5)  # a chain of 5 calls
      >>> print(plan.live, int(plan.end))
      [False False False False  True] 4
    """
    return Late(jnp.int32(checks.at_least("m", m, 1)))


def spaced(k: int = 5, m: int = 20) -> Spaced:
    """Keep the gradient of k calls at equal distances, and end the chain early (DRTune, arXiv 2405.00760).

    Args:
      k: number of calls that keep their gradient; the first is random.
      m: the chain ends at a call drawn uniformly among the last m.

    Returns:
      A plan for `reward_backprop(truncation=)`: (key, calls) -> Plan.

    Raises:
      ValueError: for k or m below 1.

    Example:
      >>> import jax, rgdiff
      >>> plan = rgdiff.tuners.plans.spaced(5, 1)(jax.random.key(0), 5)  # all 5 calls
      >>> print(plan.live, int(plan.end))
      [ True  True  True  True  True] 4
    """
    return Spaced(checks.at_least("k", k, 1), jnp.int32(checks.at_least("m", m, 1)))
