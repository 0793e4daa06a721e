"""Particles as samples of equal weight, for callers that take no weights: rounds of queries, the start of another chain."""

from __future__ import annotations

from typing import NamedTuple

import jax

from rgdiff import checks
from rgdiff.resampling import systematic
from rgdiff.samplers.particles import Particles, Smc
from rgdiff.typing import Array, Cond, Info, Key, Process, State, pytree, static


class ResampledCarry(NamedTuple):
    """The particles, and the key of the draw at the end."""

    particles: Particles
    key: Key


@pytree
class Resampled:
    """Runs a particle sampler on `count` particles per sample. Build it with `resampled`."""

    sampler: Smc
    count: int = static()

    @property
    def process(self) -> Process:
        return self.sampler.process

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> ResampledCarry:
        checks.one_problem(cond)
        key_first, key_last = jax.random.split(key)
        return ResampledCarry(self.sampler.init(key_first, batch * self.count, t), key_last)

    def step(
        self, key: Key, carry: ResampledCarry, t: Array, s: Array, cond: Cond = None
    ) -> tuple[ResampledCarry, Info]:
        particles, info = self.sampler.step(key, carry.particles, t, s)
        return carry._replace(particles=particles), info

    def final(self, carry: ResampledCarry, t: Array, cond: Cond = None) -> tuple[State, Info]:
        """Resample all particles by their weights and keep B of them, chosen at random."""
        x0, info = self.sampler.final(carry.particles, t)
        key_draw, key_choose = jax.random.split(carry.key)
        total = info["log_weights"].shape[0]
        chosen = jax.random.permutation(key_choose, total)[: total // self.count]
        source = systematic(key_draw, info["log_weights"])[chosen]
        return jax.tree.map(lambda leaf: leaf[source], x0), {
            **{name: info[name] for name in ("log_z", "log_z_se", "ess")},
            "lineages": info["lineages"][source],
        }

    def over_devices(self, carry: ResampledCarry) -> ResampledCarry:
        return carry._replace(particles=self.sampler.over_devices(carry.particles))

    def network_calls(self, moves: int) -> int:
        """Calls of the denoiser per sample."""
        return self.count * self.sampler.network_calls(moves)


def resampled(sampler: Smc, count: int = 4) -> Resampled:
    """Draw B samples of equal weight from `count` * B particles of one problem.

    They have the distribution that the particles estimate, with its bias of order 1 / (count B). They are not independent:
    several may descend from one particle. A larger count makes copies rarer. `samples.info` has `log_z`, `log_z_se` and `ess` of
    the particles, and `lineages` [B], from which `resampling.standard_error` computes the error of a mean.

    Args:
      sampler: from `smc`, `fk_steering`, `tds` or `das`.
      count: particles per sample.

    Returns:
      The sampler.

    Raises:
      ValueError: for another sampler, or a count below 1.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,))
      >>> denoiser = lambda x, t, cond: x * process.schedule.alpha(t)
      >>> particles = rgdiff.samplers.smc(process, denoiser, lambda x, t, cond: jnp.full(len(x), 2.0))
      >>> samples = rgdiff.samplers.sample(rgdiff.samplers.resampled(particles), jax.random.key(0), 8, process.times(4))
      >>> print(samples.x0.shape, f"{samples.info['log_z']:.4f}")  # 8 of 32 particles; log E exp(2)
      (8, 1) 2.0000
    """
    if not isinstance(sampler, Smc):
        raise ValueError(f"resampled takes a particle sampler such as smc, got {type(sampler).__name__}")
    return Resampled(sampler, checks.at_least("count", count, 1))
