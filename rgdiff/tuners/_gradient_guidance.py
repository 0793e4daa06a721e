"""Gradient guidance for optimisation (arXiv 2404.14743): rounds of querying a reward's gradient and sampling under it.

Algorithm 1 keeps the denoiser fixed; algorithm 2 refits it to the samples as they come, through the pre-training loss.
A round is a tuner's step, so `fit` runs rounds in compiled chunks. The guidance of one round is in `guides.gradient`; further
figures of the samples come from the caller's `measure`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.guides.gradient import GradientGuided, increment, inner
from rgdiff.keys import unrolled
from rgdiff.processes import GaussianProcess
from rgdiff.rewards import differentiable, evaluate
from rgdiff.samplers import ancestral, sample
from rgdiff.shards import Shards, split
from rgdiff.tuners._loop import TrainState, start
from rgdiff.tuners._pretraining import Pretraining
from rgdiff.typing import Array, Info, Key, Model, Params, Reward, RewardLike, callable_pytree, pytree, static

GUIDANCE = ("g", "g_loss")


class GuidanceState(NamedTuple):
    """The state between rounds.

    Args:
      train: the denoiser's training state.
      x0: the newest samples [B, ...].
      gradient: of the reward [B, ...]; zero where the next round is not guided.
      target: y of the next round [B].
      history: the kept batches [memory, B, ...], a ring: the batch of round k lies at k mod memory.
      step: number of rounds made.
    """

    train: TrainState
    x0: Array  # [B, ...]
    gradient: Array  # [B, ...]; zero where the next round is not guided
    target: Array  # [B]
    history: Array  # [memory, B, ...], a ring: the batch of round k lies at k mod memory
    step: Array

    @property
    def skipped(self) -> Array:
        return self.train.skipped


@pytree
class Refit:
    """How algorithm 2 refits: see `gradient_guidance`."""

    tuner: Pretraining
    first: Array
    decay: Array
    updates: int = static()

    def __call__(self, key: Key, state: GuidanceState) -> tuple[TrainState, Array]:
        """Return the training state after this round's updates, and their mean loss (NaN before round `first`)."""

        def one(train: TrainState, key: Key) -> tuple[TrainState, Array]:
            key_rows, key_loss = jax.random.split(key)
            train, info = self.tuner.step(key_loss, train, {"x0": self.draw(key_rows, state)})
            return train, info["loss"]

        def refit(train: TrainState) -> tuple[TrainState, Array]:
            train, losses = jax.lax.scan(one, train, jax.random.split(key, self.updates))
            return train, losses.mean().astype(jnp.float32)

        wait = lambda train: (train, jnp.float32(jnp.nan))  # noqa: E731
        return jax.lax.cond(state.step >= self.first, refit, wait, state.train)

    def draw(self, key: Key, state: GuidanceState) -> Array:
        """Draw B samples: the b-th from the b-th of a batch that is drawn with weights decay^age."""
        memory, batch = state.history.shape[:2]
        age = jnp.mod(state.step - 1 - jnp.arange(memory), memory)  # of the batch at each place of the ring, in rounds
        log_weight = jnp.where(age == 0, 0.0, jnp.where(age < state.step, age * jnp.log(self.decay), -jnp.inf))
        chosen = jax.random.categorical(key, log_weight, shape=(batch,))
        # Indexed per example, not by (index, arange): a batch split over devices stays where it is.
        return jax.vmap(lambda column, i: column[i], in_axes=(1, 0))(state.history, chosen)


@pytree
class GradientGuidance:
    """Rounds of gradient-guided sampling. Build it with `gradient_guidance`."""

    model: Model
    process: GaussianProcess
    reward: Reward
    times: Array
    target: Callable[..., Array]
    noise: Array
    scale: Array
    beta: Array | None
    measure: Callable[..., Info] | None
    refit: Refit | None
    batch: int = static()
    memory: int = static()
    guidance: str = static(default="g_loss")
    gradient_at: str = static(default="sample")
    shards: Shards | None = static(default=None)

    def init(self, params: Params) -> GuidanceState:
        import optax

        x0 = jnp.zeros((self.batch, *self.process.shape), jnp.float32)
        train = start(params, optax.identity()) if self.refit is None else self.refit.tuner.init(params)
        history = jnp.zeros((self.memory, *x0.shape), jnp.float32)
        return GuidanceState(train, x0, jnp.zeros_like(x0), jnp.zeros(self.batch, jnp.float32), history, jnp.int32(0))

    def step(self, key: Key, state: GuidanceState, batch: Any = None) -> tuple[GuidanceState, Info]:
        """Refit (algorithm 2), sample under the last query, and query the reward at the new samples."""
        key_refit, key_chain = jax.random.split(unrolled(key))
        train, info = state.train, {}
        if self.refit is not None:
            train, info["loss"] = self.refit(key_refit, state)
        denoiser = GradientGuided(
            denoiser=callable_pytree(self.model(train.params), "a denoiser"),
            schedule=self.process.schedule,
            gradient=state.gradient,
            target=state.target,
            noise=self.noise,
            scale=self.scale,
            beta=self.beta,
            look_ahead=self.guidance == "g_loss",
        )
        x0 = sample(ancestral(self.process, denoiser), key_chain, self.batch, self.times, mesh=self.shards).x0
        gradient, target, usable, rewards = self._query(x0)
        info |= {
            "reward": jnp.nanmean(rewards),
            "gradient_norm": jnp.sqrt(inner(gradient, gradient)).mean(),
            "infeasible": jnp.sum(~usable),
            "skipped": train.skipped,
        }
        if self.measure is not None:
            info |= self.measure(x0)
        history = state.history.at[jnp.mod(state.step, self.memory)].set(x0)
        return GuidanceState(train, x0, gradient, target, history, state.step + 1), info

    def over_devices(self, state: GuidanceState) -> GuidanceState:
        x0, gradient, target = split((state.x0, state.gradient, state.target), self.shards)
        return state._replace(x0=x0, gradient=gradient, target=target, history=split(state.history, self.shards, 1))

    def network_calls(self) -> int:
        """Calls of the denoiser per sample and round; under G_loss each comes with a vector-Jacobian product."""
        return self.times.shape[0]

    def _query(self, x0: Array) -> tuple[Array, Array, Array, Array]:
        """Gradient [B, ...] and target [B] of the next round, whether they can be used, and the rewards [B] of the samples."""
        at = x0 if self.gradient_at == "sample" else x0.mean(0, keepdims=True)
        values, back = jax.vjp(lambda x: evaluate(self.reward, x), at)
        gradient = back(jnp.ones_like(values))[0]
        target = self.target(gradient, at, values).astype(jnp.float32)
        usable = jnp.isfinite(inner(gradient, gradient)) & jnp.isfinite(target) & jnp.isfinite(values)
        gradient = jnp.where(usable.reshape(-1, *(1,) * (x0.ndim - 1)), gradient, 0.0)
        rewards = values if self.gradient_at == "sample" else evaluate(self.reward, x0)
        spread = lambda a: jnp.broadcast_to(a, (self.batch, *a.shape[1:]))  # noqa: E731
        return spread(gradient), spread(jnp.where(usable, target, 0.0)), spread(usable), rewards


def gradient_guidance(
    model: Model,
    process: GaussianProcess,
    reward: RewardLike,
    times: Array,
    *,
    batch: int,
    guidance: str = "g_loss",
    target: Callable[..., Array] | None = None,
    noise: float = 0.1,
    scale: float = 1.0,
    beta: float | None = None,
    gradient_at: str = "sample",
    refit: Pretraining | None = None,
    refit_from: int = 1,
    updates: int = 1,
    memory: int = 1,
    decay: float = 1.0,
    measure: Callable[..., Info] | None = None,
) -> GradientGuidance:
    """Optimise a reward by rounds of guided sampling: algorithm 1, or with `refit` algorithm 2 (arXiv 2404.14743).

    Round 0 draws B samples of the prior. Round k + 1 takes g = grad r at the samples of round k and y = target(g, x, r),
    and draws from the prior guided towards g . x0 = y. The state after `fit` holds the newest samples, `state.x0`. The method
    seeks a maximum of the reward near the data; it does not aim at a tilted law.

    Args:
      model: params -> denoiser, (x [B, ...], t, cond) -> E[x0 | x_t].
      process: Gaussian; with eta = 1 the released code's DDPM.
      reward: differentiable, (x0 [B, ...], cond) -> [B].
      times: the grid [T] of network calls, from `process.times(steps)`.
      batch: B, samples a round.
      guidance: `g` or `g_loss`, see `guides.g` and `guides.g_loss`.
      target: (gradient [B, ...], x0 [B, ...], reward [B]) -> y [B]; `guides.increment(0.2)` by default.
      noise, scale, beta: of the guidance, see `guides.g`.
      gradient_at: `sample`: every sample follows its own gradient, B chains that do not interact; `batch_mean`: all
        follow the gradient at their mean.
      refit: from `tuners.pretraining(model, process, optimizer)`: its loss and optimiser refit the denoiser to the
        samples before each round; None for algorithm 1.
      refit_from: the first round that refits, at least 1.
      updates: optimiser steps a round, on B samples each.
      memory, decay: the samples to refit to are drawn from the newest `memory` batches with weights decay^age, age in
        rounds and 0 for the newest; memory = 1 is the newest batch itself.
      measure: x0 [B, ...] -> dict of numbers to report beside the reward.

    Returns:
      A tuner for `fit`; `state.x0` holds the newest samples, `state.train` the denoiser's training state. Its infos per round, of
      the new samples: reward (mean of those that are numbers), gradient_norm (of the reward, mean), infeasible (samples without a
      finite reward, gradient or target: the next round does not guide them), the numbers of `measure`, and loss where there is a
      refit. Round k = 0 is row 0.

    Raises:
      ValueError: for a process that is not Gaussian, unknown names, counts below 1, or a decay outside [0, 1].

    Note:
      The paper takes gradients at the batch mean and refits to the weighted union of all batches (its weights are an
      input; here they are geometric: decay = 1 with a memory of all rounds is the plain union). The released code takes
      gradients per sample and makes one optimiser step a round on the newest batch: the defaults here.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (2,))
      >>> model = lambda params: rgdiff.tuners.standard_normal(process)  # the prior N(0, I), fixed
      >>> tuner = rgdiff.tuners.gradient_guidance(
      ...     model, process, lambda x0, cond=None: x0[:, 0], process.times(10), batch=64)
      >>> rounds = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(None), 20)
      >>> print(bool(rounds.x0[:, 0].mean() > 1.0))  # each round asks for 0.2 more
      True
    """
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"gradient_guidance needs a gaussian process, got {type(process).__name__}")
    if refit is not None and not isinstance(refit, Pretraining):
        raise ValueError(f"refit must come from tuners.pretraining(...), got {type(refit).__name__}")
    differentiable("gradient_guidance", reward)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay!r}")
    first = jnp.int32(checks.at_least("refit_from", refit_from, 1))
    updates = checks.at_least("updates", updates, 1)
    return GradientGuidance(
        model=callable_pytree(model, "model (params -> denoiser)"),
        process=process,
        reward=callable_pytree(reward, "a reward"),
        times=checks.times(times, process),
        target=callable_pytree(increment() if target is None else target, "a target (gradient, x0, reward) -> y"),
        noise=checks.positive("noise", noise),
        scale=checks.positive("scale", scale, zero=True),
        beta=None if beta is None else checks.positive("beta", beta, zero=True),
        measure=None if measure is None else callable_pytree(measure, "a measure x0 -> dict"),
        refit=None if refit is None else Refit(refit, first, jnp.float32(decay), updates),
        batch=checks.at_least("batch", batch, 1),
        memory=checks.at_least("memory", memory, 1),
        guidance=checks.one_of("guidance", guidance, GUIDANCE),
        gradient_at=checks.one_of("gradient_at", gradient_at, ("sample", "batch_mean")),
    )
