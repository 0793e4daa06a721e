"""DRAKES: reward gradients with a path KL in masked and mixed chains; the optimum is the prior times exp(r(x0)/alpha).

That is exact for tokens that are unmasked one at a time; Gaussian parts keep the variances of their moves and come near it
(see `rgdiff.tuners.reward_backprop`).

Tokens have no derivative, so an estimator must be chosen. `drakes` is a setting of `reward_backprop` with exact unmasking
events and the true path KL; `drakes_published` follows the released code and is kept as a baseline.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.kernels import draw_token
from rgdiff.processes import MaskedProcess, ProductProcess, along
from rgdiff.tuners._chain import Chain, hold
from rgdiff.tuners._reward_backprop import RewardBackprop, reward_backprop
from rgdiff.typing import Array, Cond, Denoiser, Key, Model, Process, Reward, State, pytree

ESTIMATORS = ("reinmax", "straight_through", "gumbel", "score_function", "log_variance")


def with_estimator(process: Process, estimator: str, gumbel_temperature: Any = 1.0) -> Process:
    """Return the process with this gradient estimator for its tokens' draws; the masked parts of a mixed state take it too."""
    if isinstance(process, ProductProcess):
        parts = {name: with_estimator(part, estimator, gumbel_temperature) for name, part in process.parts.items()}
        return ProductProcess(parts)
    if isinstance(process, MaskedProcess):
        return dataclasses.replace(
            process, relaxation=estimator, gumbel_temperature=jnp.asarray(gumbel_temperature, jnp.float32)
        )
    return process


@setting_of(reward_backprop, fixed=("gradient",))
def drakes(
    model: Model,
    process: Process,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    reference: Denoiser,
    temperature: float,
    estimator: str = "log_variance",
    gumbel_temperature: float = 1.0,
    **options: Any,
) -> RewardBackprop:
    """DRAKES: maximise E[r(x0)] - temperature * path KL to the prior, through the tokens of a masked chain (arXiv 2410.13643).

    The optimum is p(x0) exp(r(x0)/temperature)/Z, p the law of the prior's chain: exactly so for `processes.first_hitting`. A
    chain of T independent steps has an optimum of its own, short of it by its factorisation.

    Args:
      process: masked, or a product with a masked part.
      reward: (x0 [B, ..., K] one-hot, cond) -> [B]; differentiable for the pathwise estimators.
      reference: the prior's denoiser, (x, t, cond) -> logits.
      temperature: alpha, in the reward's unit per nat of path KL.
      estimator: of the token's gradient. Two are unbiased and take any reward: `log_variance` (see `LogVariance`; its noise
        vanishes at the optimum; masked processes only) and `score_function` (leave-one-out; continuous parts of a mixed process
        are treated alike). Three are pathwise and biased, with less noise at the start: `reinmax` (second order, arXiv
        2304.08612), `straight_through`, `gumbel` (straight-through, with `gumbel_temperature`).
      gumbel_temperature: of the relaxed draw of `gumbel`, no unit.
      truncation, renoised: as in `reward_backprop`, for the pathwise estimators.

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters, info has reward, kl (nats), gradient_norm, as in
      `reward_backprop`.

    Raises:
      ValueError: for a process without a masked part, an unknown estimator, `log_variance` of a mixed process, truncation or
        renoised with an unbiased estimator, and as `reward_backprop`.

    In a world of 3 tokens of 4 letters with a correlated prior, whose best E[r] - alpha KL is .747, 600 steps of 256 end at
    .746 with log_variance, .742 with score_function, .52, .43 and .34 with reinmax, straight_through and gumbel. On the
    65,536 DNA 8-mers log_variance is ahead of them too; a first stage of reinmax saves samples there
    (benchmarks/results/exact-tuning.md).

    Note:
      The published scheme relaxes the unmasking event too, truncates to the last 50 of 128 moves, and its KL term is
      zero at every hard step: `drakes_published`. Here events are exact (they do not depend on the parameters), states
      are hard, and the KL is sum over moves of P(move) * sum over masked positions of KL(p || p_prior), nats.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), (1,), 2)  # one token of two letters
      >>> model = lambda w: lambda x, t, cond=None: jnp.zeros((len(x), 1, 2)) + w  # logits of p(x0)
      >>> tuner = rgdiff.tuners.drakes(
      ...     model, process, lambda x0, cond=None: x0[:, 0, 1], process.times(2), optax.sgd(1.0), batch=64,
      ...     reference=model(0.0), temperature=0.5)
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(2)), 50)
      >>> print(f"{state.params[1] - state.params[0]:.1f}")  # the log-odds of the optimum are 1 / temperature
      2.0
    """
    masked = [process] if not isinstance(process, ProductProcess) else list(process.parts.values())
    if not any(isinstance(part, MaskedProcess) for part in masked):
        raise ValueError(
            "drakes needs a masked process, or a product with a masked part; for Gaussian ones see elegant"
        )
    checks.one_of("estimator", estimator, ESTIMATORS)
    gradient = "score_function" if estimator in ("score_function", "log_variance") else "pathwise"
    if estimator == "log_variance" and isinstance(process, ProductProcess):
        raise ValueError('estimator="log_variance" needs a masked process; for a mixed one take "score_function"')
    if gradient == "score_function" and (options.get("truncation") is not None or options.get("renoised")):
        raise ValueError(
            f'estimator="{estimator}" takes the whole chain; leave truncation and renoised out, or take "reinmax"'
        )
    if gradient == "pathwise":
        process = with_estimator(process, estimator, gumbel_temperature)
    tuner = reward_backprop(
        model,
        process,
        reward,
        times,
        optimizer,
        reference=reference,
        temperature=temperature,
        gradient=gradient,
        **options,
    )
    if estimator == "log_variance":
        tuner = LogVariance(**{field.name: getattr(tuner, field.name) for field in dataclasses.fields(tuner)})
    return tuner


@pytree
class Ratios(Chain):
    """A chain whose penalties are the sampled log-ratios log p(y | x) - log p'(y | x) of its draws, as constants."""

    def _move(
        self, key: Key, x: State, t: Array, s: Array, cond: Cond, live: Array | bool
    ) -> tuple[State, dict[str, Array]]:
        law = lambda denoiser: self.process.reverse(hold(x, False), t, s, denoiser(hold(x, False), t, cond))  # noqa: E731
        kernel = law(self.denoiser)
        y = kernel.sample(key)
        log_prob = kernel.log_prob(y)
        ratios = jnp.stack([log_prob - law(reference).log_prob(y) for reference in self.references])
        return y, {"log_prob": log_prob, "penalty": jax.lax.stop_gradient(ratios)}


@pytree
class LogVariance(RewardBackprop):
    """The score function with *sampled* log-ratios: a whole path is weighted by r(x0) - alpha * log p(path)/p'(path).

    At the optimum that is alpha * log Z whatever the path, so the gradient's noise vanishes there, where that of the
    exact KL's does not. Its mean is the same: the leave-one-out gradient of the log-variance divergence (arXiv 2005.05409,
    2010.10436). `info["kl"]` is a sampled estimate of the path KL.
    """

    def _chain(self, denoiser: Denoiser, **options: Any) -> Chain:
        return Ratios(self.process, denoiser, self.references, pathwise=False, **options)

    def _surrogate(self, rewards: Array, feasible: Array, log_prob: Array, cost: Array) -> Array:
        paid = jnp.where(feasible, rewards - cost.sum(0), 0.0)
        others = jnp.maximum(jnp.sum(feasible.astype(jnp.float32)) - 1, 1)
        return jax.lax.stop_gradient(paid - (paid.sum() - paid) / others) * log_prob.sum(0)


@pytree
class SoftAbsorbing:
    """The published relaxed step: x <- c x + (1 - c) softmax((log q + Gumbel)/gumbel_temperature), c = 1 - x[mask].

    q holds the mask and the tokens. Its `kl` is the published term, which is no KL: sum over positions and tokens of
    c x_k (-p_k + p'_k + p_k log(p_k / p'_k)) / rate_t, zero wherever x is hard.
    """

    x: Array
    logits: Array
    log_move: Array
    log_stay: Array
    rate: Array
    gumbel_temperature: Array

    @property
    def log_q(self) -> Array:
        log_p = jax.nn.log_softmax(self.logits) + self.log_move[..., None]
        return jnp.concatenate([log_p, jnp.broadcast_to(self.log_stay[..., None], (*log_p.shape[:-1], 1))], -1)

    @property
    def undecided(self) -> Array:
        """Positions at which the mask outweighs every token; the others keep their token."""
        return jnp.argmax(self.x, -1) == self.x.shape[-1] - 1

    def _mix(self, drawn: Array) -> Array:
        copied = 1 - self.x[..., -1:]
        return copied * self.x + (1 - copied) * drawn.astype(self.x.dtype)

    def sample(self, key: Key) -> Array:
        return jax.lax.stop_gradient(self._mix(draw_token(key, self.log_q, "straight_through", 1.0)))

    def rsample(self, key: Key) -> Array:
        return self._mix(draw_token(key, self.log_q, "relaxed", self.gumbel_temperature))

    def kl(self, other: SoftAbsorbing) -> Array:
        log_p, log_other = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        p = jnp.exp(log_p)
        each = jnp.sum(self.x[..., :-1] * (jnp.exp(log_other) - p + p * (log_p - log_other)), -1)
        total = jnp.where(self.undecided, (1 - self.x[..., -1]) * each, 0.0) / self.rate
        return jnp.sum(total.reshape(total.shape[0], -1), -1)

    def log_prob(self, x: Array) -> Array:
        raise ValueError("the published relaxed step has no log_prob; take tuners.drakes")

    entropy = tilt = log_prob


@pytree
class PublishedProcess(MaskedProcess):
    """The masked process whose steps are relaxed as published; its samples are made hard by straight-through at the end."""

    def reverse(self, x: Array, t: Array, s: Array, prediction: Array) -> SoftAbsorbing:  # type: ignore[override]
        rate_t, rate_s = self.schedule.rate(t), self.schedule.rate(s)
        positions = x[..., -1]
        move = jnp.broadcast_to(along(jnp.log((rate_t - rate_s) / rate_t), positions), positions.shape)
        stay = jnp.broadcast_to(along(jnp.log(rate_s / rate_t), positions), positions.shape)
        return SoftAbsorbing(x, prediction, move, stay, along(rate_t, positions), self.gumbel_temperature)

    def finalize(self, x: Array, t: Array, prediction: Array) -> Array:
        soft = x[..., :-1]
        hard = jax.nn.one_hot(jnp.argmax(soft, -1), self.classes, dtype=soft.dtype)
        return soft + jax.lax.stop_gradient(hard - soft)


@setting_of(reward_backprop, fixed=("penalize",))
def drakes_published(
    model: Model,
    process: MaskedProcess,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    reference: Denoiser,
    temperature: float,
    truncation: int,
    gumbel_temperature: float = 1.0,
    **options: Any,
) -> RewardBackprop:
    """The baseline: DRAKES as its released code does it, for comparison only.

    States are relaxed in the last `truncation` moves (50 of 128), hard and constant before; the penalty reported as `kl`
    is the released one and not a KL (see `SoftAbsorbing`). It does not aim at p(x0) exp(r/alpha): the strength of its
    regularisation depends on the number of moves and on the truncation.

    Args:
      process: from `processes.masked`.
      reference: the prior's denoiser, (x, t, cond) -> logits; it is called at relaxed states too.
      temperature: weight of the released penalty, in the reward's unit.
      truncation: number of moves at the end of the chain that keep their gradient.
      gumbel_temperature: of the relaxed draws, no unit.

    Returns:
      A tuner for `fit`, as `drakes`.

    Raises:
      ValueError: for another process than a plain masked one, and as `reward_backprop`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), (1,), 2)
      >>> model = lambda w: lambda x, t, cond=None: jnp.zeros((len(x), 1, 2)) + w
      >>> tuner = rgdiff.tuners.drakes_published(
      ...     model, process, lambda x0, cond=None: x0[:, 0, 1], process.times(2), optax.sgd(1.0), batch=64,
      ...     reference=model(0.0), temperature=0.0, truncation=2)
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(2)), 5)
      >>> print(bool(state.params[1] > state.params[0]))  # the rewarded letter gains
      True
    """
    if type(process) is not MaskedProcess:
        raise ValueError(f"the published scheme needs a masked process, got {type(process).__name__}")
    published = PublishedProcess(
        process.schedule, checks.positive("gumbel_temperature", gumbel_temperature), process.shape, process.classes
    )
    return reward_backprop(
        model,
        published,  # type: ignore[arg-type]
        reward,
        times,
        optimizer,
        truncation=truncation,
        reference=reference,
        temperature=temperature,
        penalize="live",
        **options,
    )
