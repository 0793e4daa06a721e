"""Reward-weighted regression and filtered fine-tuning: the denoising loss on samples, weighted by their rewards.

They are the simplest methods for a black-box reward, and the baselines of policy gradients. Both are `Online`: samples are
rewarded between a rollout and some steps of `pretraining` on them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.samplers import ancestral
from rgdiff.samplers._loop import Drawing
from rgdiff.shards import Shards, split, take, value_and_grad
from rgdiff.tuners._loop import TrainState, update
from rgdiff.tuners._pretraining import Pretraining, pretraining
from rgdiff.tuners.advantages import in_groups
from rgdiff.tuners.online import feasible_mean, minibatch_rows
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    Info,
    Key,
    Model,
    Params,
    Process,
    State,
    callable_pytree,
    pytree,
    static,
)


class Sampled(NamedTuple):
    """Samples and their conditions, [B, ...]."""

    x0: State
    cond: Cond


def exponential_weights(rewards: Array, temperature: Array) -> Array:
    """Return exp(r / temperature) over its sum on the last axis; 0 for infeasible samples.

    Args:
      rewards: [..., n].
      temperature: in the reward's unit.
    """
    feasible = jnp.isfinite(rewards)
    scores = jnp.where(feasible, rewards / temperature, -jnp.inf)
    top = jnp.max(jnp.where(feasible.any(-1, keepdims=True), scores, 0.0), -1, keepdims=True)
    weights = jnp.exp(scores - top)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)


def top_weights(rewards: Array, fraction: Array) -> Array:
    """Return equal weights on the best ceil(fraction * n) of n feasible samples of the last axis, the first of equals first; else 0.

    Args:
      rewards: [..., n].
      fraction: in (0, 1].
    """
    feasible = jnp.isfinite(rewards)
    order = jnp.argsort(jnp.where(feasible, -rewards, jnp.inf), -1, stable=True)
    rank = jnp.argsort(order, -1)
    kept = jnp.maximum(jnp.ceil(fraction * feasible.sum(-1, keepdims=True) - 1e-4), 1)  # 0.1 * 30 > 3 in float32
    return jnp.where(feasible & (rank < kept), 1.0, 0.0) / kept


@pytree
class WeightedRegression:
    """An `Online` method. Build it with `reward_weighted` or `filtered`; drive it with `as_tuner` or `fit_online`."""

    training: Pretraining
    times: Array
    number: Array
    prior: Denoiser | None
    scheme: str = static()
    batch: int = static()
    size: int = static(default=0)
    repeats: int = static(default=1)
    epochs: int = static(default=1)
    minibatches: int = static(default=1)
    shards: Shards | None = static(default=None)

    @property
    def process(self) -> Process:
        return self.training.process

    def init(self, params: Params) -> TrainState:
        return self.training.init(params)

    def rollout(self, key: Key, state: TrainState, cond: Cond = None) -> Sampled:
        """Draw B samples of the model, or of the prior; `repeats` consecutive ones for every row of cond."""
        checks.conditions(cond, self.batch // self.repeats)
        cond = split(jax.tree.map(lambda leaf: jnp.repeat(leaf, self.repeats, 0), cond), self.shards)
        denoiser = self.training.model(state.params) if self.prior is None else self.prior
        draw = Drawing(ancestral(self.process, denoiser), self.times, self.shards)
        return Sampled(draw(key, self.batch, cond), cond)

    def weights(self, rewards: Array) -> Array:
        """Weights [B] that sum to 1, every group with a feasible sample counting alike; NaN where no sample is feasible."""
        groups = in_groups(rewards, self.size or self.batch)
        of = exponential_weights if self.scheme == "exponential" else top_weights
        weights = of(groups, self.number)
        some = jnp.isfinite(groups).any(-1).sum()
        return jnp.where(some > 0, weights / jnp.maximum(some, 1), jnp.nan).reshape(-1)

    def update(self, key: Key, state: TrainState, experience: Sampled, rewards: Array) -> tuple[TrainState, Info]:
        """Take epochs * minibatches optimiser steps of the weighted denoising loss, with fresh noise in each."""
        rewards = checks.per_example("rewards must hold", rewards, self.batch)
        weights = self.weights(rewards)
        key_rows, key_noise = jax.random.split(key)
        index = minibatch_rows(key_rows, self.batch, self.epochs, self.minibatches)

        def one(state: TrainState, where: tuple[Array, Key]) -> tuple[TrainState, Info]:
            index, key = where
            part = experience, weights
            if self.minibatches > 1:
                part = take(part, index, self.shards)
            grad = value_and_grad(self.training.loss, self.shards)
            loss, gradients = grad(state.params, key, *part[0], part[1] * self.minibatches)
            new, more = update(state, gradients, self.training.optimizer, self.training.ema_decay)
            return new._replace(step=state.step), {"loss": loss, "gradient_norm": more["gradient_norm"]}

        keys = jax.random.split(key_noise, index.shape[0])
        if index.shape[0] == 1:  # see samplers._loop.roll
            new, info = one(state, (index[0], keys[0]))
        else:
            new, infos = jax.lax.scan(one, state, (index, keys))
            info = jax.tree.map(lambda leaf: leaf.mean(0), infos)
        info |= {"reward": feasible_mean(rewards, rewards), "infeasible": jnp.sum(~jnp.isfinite(rewards))}
        info |= {"ess": 1 / jnp.sum(weights**2), "skipped": new.skipped}
        return new._replace(step=state.step + 1), info

    def gradients(self, key: Key, state: TrainState, experience: Sampled, rewards: Array) -> tuple[Params, Info]:
        """Return the gradient of the loss over the whole batch at state.params, and info."""
        grad = value_and_grad(self.training.loss, self.shards)
        loss, gradients = grad(state.params, key, *experience, self.weights(rewards))
        return gradients, {"loss": loss, "reward": feasible_mean(rewards, rewards)}

    def network_calls(self) -> int:
        """Calls of the denoiser per sample and step, forward passes only."""
        return self.times.shape[0] - 1 + self.process.projects + self.epochs


@setting_of(pretraining, fixed=("grid",))
def _build(
    scheme: str,
    number: Array,
    prior: Denoiser | None,
    model: Model,
    process: Process,
    times: Array,
    optimizer: Any,
    batch: int,
    *,
    group: int = 0,
    repeats: int = 1,
    epochs: int = 1,
    minibatches: int = 1,
    **options: Any,
) -> WeightedRegression:
    """Build weighted regression on the model's or the prior's samples.

    Args:
      times: the grid [T + 1] of the chain that draws the samples.
      batch: B, samples a step.
      group: number of consecutive samples that compete with one another; 0, the whole batch. RAFT's best of K per prompt is
        group=repeats=K, fraction=1/K.
      repeats: samples for each row of the conditions.
      epochs: passes over a batch.
      minibatches: parts of a pass, an optimiser step each.
    """
    batch = checks.at_least("batch", batch, 1)
    for name, parts in (("group", group or 1), ("repeats", repeats), ("minibatches", minibatches)):
        checks.divides(name, parts, batch)
    training = pretraining(model, process, optimizer, **options)
    epochs = checks.at_least("epochs", epochs, 1)
    return WeightedRegression(
        training=training,
        times=checks.times(times, process),
        number=number,
        prior=prior,
        scheme=scheme,
        batch=batch,
        size=group,
        repeats=repeats,
        epochs=epochs,
        minibatches=minibatches,
    )


@setting_of(_build)
def reward_weighted(
    model: Model,
    process: Process,
    times: Array,
    optimizer: Any,
    *,
    batch: int,
    temperature: float,
    prior: Denoiser | None = None,
    **options: Any,
) -> WeightedRegression:
    """RWR: the denoising loss on samples, weighted by exp(r / temperature) over its sum (arXiv 2302.12192; 2305.13301, §4.1).

        min over params of  E_{x0 ~ q}[exp(r(x0)/temperature) * denoising loss(x0)] / E_q[exp(r/temperature)]

    With q a fixed prior the fixed point is the denoiser of p(x0) exp(r(x0)/temperature)/Z, p the law of the prior's chain. One
    token at a time it draws from that; T Gaussian moves, or T of several tokens at once, draw from it up to their own
    discretisation: on `linear_vp` with eta = 1, of a law of variance .262 ten moves give .117, and a hundred .288 of .324.

    Args:
      times: the grid [T + 1] of the chain that draws the samples.
      batch: B, samples a step; self-normalised weights have a bias of order 1/B.
      temperature: in the reward's unit, dynamic.
      prior: a denoiser to draw from at every step, q above. With None samples come from the model itself, and each round tilts it
        once more: it ends at the best samples it knows, whatever the temperature.

    Returns:
      An online method: `fit(as_tuner(method, reward), ...)` or `fit_online(method, ..., reward)`; sample with `model(state.best)`.
      info: reward, infeasible, ess (effective number of samples), loss, gradient_norm, skipped.

    Raises:
      ValueError: for a temperature that is not positive, parts that do not divide the batch, and as `pretraining`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), (1,), 2)  # one token of two letters
      >>> model = lambda w: lambda x, t, cond=None: jnp.zeros((len(x), 1, 2)) + w  # logits of p(x0)
      >>> method = rgdiff.tuners.reward_weighted(
      ...     model, process, process.times(2), optax.sgd(0.1), batch=256, temperature=0.5, prior=model(0.0))
      >>> tuner = rgdiff.tuners.as_tuner(method, lambda x0, cond=None: x0[:, 0, 1])
      >>> w = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(2)), 200).best
      >>> print(abs(w[1] - w[0] - 2) < 0.3)  # the log-odds of the tilted prior are 1 / temperature
      True
    """
    if prior is not None:
        prior = callable_pytree(prior, "a denoiser")
    return _build(
        "exponential",
        checks.positive("temperature", temperature),
        prior,
        model,
        process,
        times,
        optimizer,
        batch,
        **options,
    )


@setting_of(_build)
def filtered(
    model: Model,
    process: Process,
    times: Array,
    optimizer: Any,
    *,
    batch: int,
    fraction: float = 0.1,
    prior: Denoiser | None = None,
    **options: Any,
) -> WeightedRegression:
    """Filtered fine-tuning: the denoising loss on the best fraction of the samples (RAFT, arXiv 2304.06767, algorithm 1).

    It has no temperature and does not aim at a tilted law: drawn from the model itself it ends at the best samples it knows.

    Args:
      times: the grid [T + 1] of the chain that draws the samples.
      batch: B, samples a step.
      fraction: share of each group's feasible samples that is kept, at least one; in (0, 1], dynamic.
      prior: a denoiser to draw from at every step; None draws from the model itself.

    Returns:
      An online method, as `reward_weighted`.

    Raises:
      ValueError: for a fraction outside (0, 1], parts that do not divide the batch, and as `pretraining`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), (1,), 2)
      >>> model = lambda w: lambda x, t, cond=None: jnp.zeros((len(x), 1, 2)) + w
      >>> method = rgdiff.tuners.filtered(model, process, process.times(2), optax.sgd(0.1), batch=64, fraction=0.25)
      >>> tuner = rgdiff.tuners.as_tuner(method, lambda x0, cond=None: x0[:, 0, 1])
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(2)), 5).best.argmax())
      1
    """
    number = checks.positive("fraction", fraction)
    if not isinstance(number, Tracer) and number > 1:
        raise ValueError(f"fraction must be at most 1, got {fraction!r}")
    if prior is not None:
        prior = callable_pytree(prior, "a denoiser")
    return _build("top", number, prior, model, process, times, optimizer, batch, **options)
