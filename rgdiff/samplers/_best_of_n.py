"""Best-of-N: draw N chains per sample to the end, keep the one with the highest reward. The baseline of every other method."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.rewards import evaluate
from rgdiff.typing import (
    Array,
    Cond,
    Info,
    Key,
    Process,
    Reward,
    RewardLike,
    Sampler,
    State,
    callable_pytree,
    pytree,
    static,
)


@pytree
class BestOfN:
    """Runs another sampler on N times the batch. Build it with `best_of_n`."""

    sampler: Any
    reward: Reward
    count: int = static()

    @property
    def process(self) -> Process:
        return self.sampler.process

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> Any:
        return self.sampler.init(key, batch * self.count, t, self._repeat(cond))

    def step(self, key: Key, carry: Any, t: Array, s: Array, cond: Cond = None) -> tuple[Any, Info]:
        return self.sampler.step(key, carry, t, s, self._repeat(cond))

    def final(self, carry: Any, t: Array, cond: Cond = None) -> tuple[State, Info]:
        """Keep the best of each group; info has `rewards` [B, N] and `candidates` [B, N, ...]."""
        x0, info = self.sampler.final(carry, t, self._repeat(cond))
        rewards = evaluate(self.reward, x0, self._repeat(cond)).reshape(-1, self.count)
        candidates = jax.tree.map(lambda leaf: leaf.reshape(-1, self.count, *leaf.shape[1:]), x0)
        best = jnp.argmax(jnp.where(jnp.isnan(rewards), -jnp.inf, rewards), axis=1)
        keep = lambda leaf: jax.vmap(lambda group, i: group[i])(leaf, best)  # noqa: E731
        return jax.tree.map(keep, candidates), info | {"rewards": rewards, "candidates": candidates}

    def network_calls(self, moves: int) -> int:
        """Calls of the denoiser per kept sample."""
        return self.count * self.sampler.network_calls(moves)

    def _repeat(self, cond: Cond) -> Cond:
        return jax.tree.map(lambda c: jnp.repeat(c, self.count, axis=0), cond)


def best_of_n(sampler: Sampler, reward: RewardLike, count: int) -> BestOfN:
    """Keep the best of `count` samples, per sample.

    The distribution of the kept sample is known: with reward quantile function Q its reward is Q of a Beta(count, 1) variable,
    and its KL to the prior is at most log count - (count - 1) / count nats (exactly that without ties). A sample whose reward is
    NaN (infeasible) is kept only where all `count` are.

    Args:
      sampler: any sampler of independent samples, such as `ancestral` or `svdd`.
      reward: (x0, cond) -> [B].
      count: N, candidates per sample.

    Returns:
      The sampler; `samples.info` has `rewards` [B, N] and `candidates` [B, N, ...].

    Raises:
      ValueError: for a count below 1.

    Example:
      >>> import jax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,))
      >>> prior = rgdiff.samplers.ancestral(process, lambda x, t, cond: x * process.schedule.alpha(t))
      >>> best = rgdiff.samplers.best_of_n(prior, lambda x0, cond: x0[:, 0], count=8)
      >>> samples = rgdiff.samplers.sample(best, jax.random.key(0), 4, process.times(4))
      >>> bool((samples.x0[:, 0] == samples.info["rewards"].max(1)).all())
      True
    """
    return BestOfN(sampler, callable_pytree(reward, "a reward"), checks.at_least("count", count, 1))
