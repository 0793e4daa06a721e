"""Reward gradients through sampling: one engine, with `draft`, `draft_k` and `draft_lv` as named settings of it.

The objective is E[r(x0)] - kl_weight * path KL to a reference, and its gradient is pathwise: through the last
`truncation` network calls of the chain, and, for DRaFT-LV, through extra one-step denoisings of the final samples.
The chain is the ancestral sampler of `rgdiff.samplers`; for eta = 0 that is DDIM.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.samplers._loop import REMAT, rematerialize, roll
from rgdiff.samplers.ancestral import Ancestral, path_kl
from rgdiff.tuners._loop import TrainState, start, update
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    Info,
    Key,
    Model,
    Params,
    Process,
    Reward,
    State,
    callable_pytree,
    pytree,
    static,
)


@pytree
class RewardBackprop:
    """Maximises a differentiable reward by gradients through sampling. Build it with `reward_backprop` or a named setting."""

    model: Model
    process: Process
    reward: Reward
    times: Array
    reference: Denoiser | None
    kl_weight: Array | None
    optimizer: Any = static()
    batch: int = static()
    live: int = static()
    renoised: int = static(default=0)
    on_trajectory: bool = static(default=True)
    reduce: str = static(default="sum")
    remat: str = static(default="everything")

    def init(self, params: Params) -> TrainState:
        return start(params, self.optimizer)

    def step(self, key: Key, state: TrainState, batch: Cond = None) -> tuple[TrainState, Info]:
        gradients, info = jax.grad(self.loss, has_aux=True)(state.params, key, batch)
        state, more = update(state, gradients, self.optimizer)
        return state, info | more

    def network_calls(self) -> int:
        """Calls of the tuned denoiser per sample and step, forward passes only (the reference's not counted)."""
        return self._calls + self.renoised

    @property
    def _calls(self) -> int:
        return self.times.shape[0] - 1 + self.process.projects

    def loss(self, params: Params, key: Key, cond: Cond = None) -> tuple[Array, Info]:
        """Return minus the objective, and info (reward, kl, infeasible), for one batch."""
        key_chain, key_extra = jax.random.split(key)
        denoiser = callable_pytree(self.model(params), "a denoiser")
        reference = None if self.kl_weight is None else self.reference
        chain = Ancestral(self.process, denoiser, reference, differentiable=True)
        cut = self._calls - self.live  # moves before the live tail: their states are constants

        # A KL needs the parameters at every move; without it the head is free of gradients altogether.
        constant = callable_pytree(self.model(jax.lax.stop_gradient(params)), "a denoiser")
        head = Ancestral(self.process, constant if reference is None else denoiser, reference)
        keep = None if reference is None else path_kl
        x = head.init(jax.random.fold_in(key_chain, 0), self.batch, self.times[0], cond)
        kl = jnp.zeros(self.batch)
        if cut:
            x, kept = roll(head, key_chain, x, self.times[: cut + 1], cond, keep=keep, remat=self.remat)
            kl = kl if kept is None else kl + kept.sum(0)
        x0, kept = self._tail(chain, key_chain, jax.lax.stop_gradient(x), cut, cond, keep)
        kl = kl if kept is None else kl + kept.sum(0)
        rewards = self.reward(x0, cond)

        objective, terms = jnp.float32(0), 0
        if self.on_trajectory:
            objective, terms = objective + _feasible_mean(rewards), 1
        if self.renoised:
            objective += self.renoised * _feasible_mean(self._renoise(chain, key_extra, x0, cond))
            terms += self.renoised
        if self.reduce == "mean":
            objective /= terms
        info = {"reward": _feasible_mean(rewards), "infeasible": jnp.sum(jnp.isnan(rewards)), "kl": kl.mean()}
        if self.kl_weight is not None:
            objective -= self.kl_weight * kl.mean()
        return -objective, info

    def _tail(
        self, chain: Ancestral, key: Key, x: State, first: int, cond: Cond, keep: Any = None
    ) -> tuple[State, Any]:
        """From the state before move `first` to data, with gradients."""
        x, kept = roll(chain, key, x, self.times[first:], cond, first=first, keep=keep, remat=self.remat)
        final = rematerialize(lambda x: chain.final(x, self.times[-1], cond)[0], self.remat)
        return final(x), kept

    def _renoise(self, chain: Ancestral, key: Key, x0: State, cond: Cond) -> Array:
        """Rewards [n * B] of one-call denoisings of the final samples, noised to the time of the last network call."""
        last = self._calls - 1
        key_noise, key_chain = jax.random.split(key)
        noised = self.process.forward(jax.lax.stop_gradient(x0), self.times[last])
        draws = jax.vmap(noised.sample)(jax.random.split(key_noise, self.renoised))
        x = jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:]), draws)
        conds = jax.tree.map(lambda c: jnp.tile(c, (self.renoised,) + (1,) * (c.ndim - 1)), cond)
        chain = Ancestral(chain.process, chain.denoiser, None, differentiable=True)
        return self.reward(self._tail(chain, key_chain, x, last, conds)[0], conds)


def _feasible_mean(rewards: Array) -> Array:
    """Mean over the rewards that are numbers."""
    feasible = ~jnp.isnan(rewards)
    return jnp.sum(jnp.where(feasible, rewards, 0.0)) / jnp.maximum(jnp.sum(feasible), 1)


def reward_backprop(
    model: Model,
    process: Process,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    batch: int,
    truncation: int | None = None,
    renoised: int = 0,
    on_trajectory: bool = True,
    reduce: str = "sum",
    reference: Denoiser | None = None,
    kl_weight: float | None = None,
    remat: str = "everything",
) -> RewardBackprop:
    """Build the engine of reward gradients; see `draft`, `draft_k`, `draft_lv` for the published settings.

    Args:
      model: params -> denoiser; a plain function, or a callable pytree such as `nets.lora.LoRAModel`.
      process: eta = 0 (DDIM, as in the paper) or eta > 0.
      reward: differentiable, (x0, cond) -> [B].
      times: [T + 1], from `process.times(steps)`.
      optimizer: an optax gradient transformation.
      batch: B, samples a step.
      truncation: K, network calls at the end of the chain that keep their gradient; all by default. Static: the dead
        head and the live tail are two scans.
      renoised: n, extra noisings of the final samples per sample (DRaFT-LV).
      on_trajectory: keep the term of the chain's own last call beside the renoised ones.
      reduce: `sum` or `mean` over these terms.
      reference, kl_weight: subtract kl_weight * path KL(tuned || reference), nats per sample, summed over all moves;
        moves before the cut contribute through their kernels, not through their states. Needs eta > 0.
      remat: `none`, `everything` (store only the states), `dots`.

    Raises:
      ValueError: for K outside 1..T calls, a KL without a law or a reference, LV with no terms at all.
    """
    times = checks.times(times, process)
    calls = times.shape[0] - 1 + process.projects
    live = calls if truncation is None else checks.at_least("truncation", truncation, 1)
    if live > calls:
        raise ValueError(f"truncation must be at most the chain's {calls} network calls, got {live}")
    renoised = checks.at_least("renoised", renoised, 0)
    if not on_trajectory and not renoised:
        raise ValueError("on_trajectory=False needs renoised >= 1: nothing would be left to differentiate")
    if renoised and not (process.stochastic or process.projects):
        raise ValueError("renoised > 0 needs a process with a forward law")
    if (kl_weight is None) != (reference is None):
        raise ValueError("a KL term needs both reference= (a denoiser) and kl_weight=")
    if kl_weight is not None:
        checks.law(process, "a KL term")
    return RewardBackprop(
        callable_pytree(model, "model (params -> denoiser)"),
        process,
        callable_pytree(reward, "a reward"),
        times,
        None if reference is None else callable_pytree(reference, "a denoiser"),
        None if kl_weight is None else checks.positive("kl_weight", kl_weight, zero=True),
        optimizer,
        checks.at_least("batch", batch, 1),
        live,
        renoised,
        bool(on_trajectory),
        checks.one_of("reduce", reduce, ("sum", "mean")),
        checks.one_of("remat", remat, REMAT),
    )


def draft(
    model: Model, process: Process, reward: Reward, times: Array, optimizer: Any, **options: Any
) -> RewardBackprop:
    """DRaFT: the gradient through the whole chain (arXiv 2309.17400, algorithm 1)."""
    return reward_backprop(model, process, reward, times, optimizer, truncation=None, **options)


def draft_k(
    model: Model, process: Process, reward: Reward, times: Array, optimizer: Any, *, k: int = 1, **options: Any
) -> RewardBackprop:
    """DRaFT-K: the gradient through the last k network calls, earlier states held constant (arXiv 2309.17400, §3)."""
    return reward_backprop(model, process, reward, times, optimizer, truncation=k, **options)


def draft_lv(
    model: Model,
    process: Process,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    n: int = 2,
    on_trajectory: bool = True,
    reduce: str = "sum",
    **options: Any,
) -> RewardBackprop:
    """DRaFT-LV: DRaFT-1 plus n noisings of the final sample to the last time, each denoised in one call (arXiv 2309.17400, §3.3).

    Note:
      Public re-implementations disagree: some replace the chain's own term (on_trajectory=False) or average
      (reduce="mean"). The default is the paper's box: both, summed, with the final sample held constant.
    """
    return reward_backprop(
        model,
        process,
        reward,
        times,
        optimizer,
        truncation=1,
        renoised=checks.at_least("n", n, 1),
        on_trajectory=on_trajectory,
        reduce=reduce,
        **options,
    )
