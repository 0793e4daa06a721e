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
    """The last k calls; earlier states are constants (DRaFT-K, arXiv 2309.17400). k is clipped to 1..calls."""

    k: Array
    early: bool = static(default=False)

    def __call__(self, key: Key, calls: int) -> Plan:
        cut = calls - jnp.clip(self.k, 1, calls)
        return Plan(jnp.arange(calls) >= cut, cut, jnp.int32(calls))


@pytree
class Suffix:
    """A random number of last calls: the first is floor(N(mean, std)) of 50, given < 50 (AlignProp, arXiv 2310.03739).

    Both numbers are in fiftieths of the chain, as published (42, 5: on average 9.1 of 50 calls live, with standard
    deviation 4.5); one draw serves the whole batch.
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
    """Each call by itself, the i-th of n with probability i / (n + 1): what AlignProp's first code and TRL do.

    It is not a truncation: gradients pass dead calls along the state, half of the calls are live on average, and the
    last one is dead now and then.
    """

    early: bool = static(default=False)

    def __call__(self, key: Key, calls: int) -> Plan:
        index = jnp.arange(calls)
        live = jax.random.uniform(key, (calls,)) < (index + 1) / (calls + 1)
        return Plan(live, jnp.int32(0), jnp.int32(calls))


@pytree
class Late:
    """One call, drawn among the last m, whose prediction of x0 is rewarded (ReFL, arXiv 2304.05977)."""

    m: Array
    early: bool = static(default=True)

    def __call__(self, key: Key, calls: int) -> Plan:
        end = calls - jax.random.randint(key, (), 1, jnp.clip(self.m, 1, calls) + 1)
        return Plan(jnp.arange(calls) == end, end, end)


@pytree
class Spaced:
    """k calls at equal distances from a random first one; the chain ends at a call drawn among the last m (DRTune, arXiv 2405.00760)."""

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
    """Plan the last k calls, k dynamic."""
    return Last(jnp.int32(checks.at_least("k", k, 1)))


def suffix(mean: float = 42.0, std: float = 5.0) -> Suffix:
    """Plan AlignProp's random suffix."""
    return Suffix(checks.positive("mean", mean), checks.positive("std", std))


def late(m: int = 20) -> Late:
    """Plan ReFL's random late call."""
    return Late(jnp.int32(checks.at_least("m", m, 1)))


def spaced(k: int = 5, m: int = 20) -> Spaced:
    """Plan DRTune's calls at equal distances."""
    return Spaced(checks.at_least("k", k, 1), jnp.int32(checks.at_least("m", m, 1)))
