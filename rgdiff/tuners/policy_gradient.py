"""Policy gradients: every draw of the chain is an action, weighted by an advantage; rewards may be black boxes.

`ddpo` in its score-function and importance-sampled forms and `dpok` are settings of one `Online` method. The moves of a
chain are independent given its states, so their gradients are summed in a scan that holds one move at a time.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.denoisers import needs_signal
from rgdiff.processes import ProductProcess
from rgdiff.samplers._loop import roll
from rgdiff.shards import Shards, bound, split, spread, take
from rgdiff.tuners import advantages
from rgdiff.tuners._chain import Chain, ChainCarry, budget_of, towards_budget, weighed_references
from rgdiff.tuners._loop import TrainState, start, update
from rgdiff.tuners.advantages import Advantage, Returns, summed
from rgdiff.tuners.online import feasible_mean, minibatch_rows
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    DenoiserLike,
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

KL_GRADIENTS = ("full", "direct")
PATHS = ("kept", "again")


class Experience(NamedTuple):
    """Chains as the policy drew them: x0 and cond [B, ...], the states path [T + 1, B, ...] and log_prob [T, B] in nats.

    penalty [T + 1, n, B]: the KL of every move, and of the projection, to each of n references, nats; None without.
    key: that the chains are drawn with again, of which the path [1, B, ...] has the first state alone; None where all are kept.
    """

    x0: State
    cond: Cond
    path: State
    log_prob: Array
    penalty: Array | None
    key: Key | None = None


class Rows(NamedTuple):
    """The part of some chains that an update uses: leaves with the batch on axis 1 (path, log_prob, advantage) or 0.

    temperature [n] is of them all.
    """

    path: State
    log_prob: Array
    advantage: Array
    weight: Array
    scale: Array
    cond: Cond
    temperature: Array

    def take(self, index: Array, shards: Shards | None) -> Rows:
        path, log_prob, advantage = take((self.path, self.log_prob, self.advantage), index, shards, axis=1)
        weight, scale, cond = take((self.weight, self.scale, self.cond), index, shards)
        return Rows(path, log_prob, advantage, weight, scale, cond, self.temperature)


class Replay(NamedTuple):
    """What draws chains again: the parameters that they were drawn with, the experience, and the rows [b] that count; None for all."""

    params: Params
    experience: Experience
    index: Array | None = None


class PolicyGradientExtra(NamedTuple):
    """The extra of a state: the advantage's own state, and the weights [n] of the KLs where a budget moves them."""

    advantage: Any
    temperature: Array | None


@pytree
class PolicyGradient:
    """An `Online` method. Build it with `ddpo` or `dpok`; drive it with `as_tuner` and `fit`, or with `fit_online`."""

    model: Model
    process: Process
    times: Array
    references: tuple[Denoiser, ...]
    temperature: Array
    kl_budget: Array | None
    kl_rate: Array
    clip: Array | None
    advantage: Any
    ema_decay: Array | None
    optimizer: Any = static()
    batch: int = static()
    repeats: int = static(default=1)
    epochs: int = static(default=1)
    minibatches: int = static(default=1)
    per_dim: bool = static(default=False)
    kl_gradient: str = static(default="full")
    path: str = static(default="kept")
    shards: Shards | None = static(default=None)
    fine_clip: bool = static(default=False)  # below what a network in half precision resolves

    def init(self, params: Params) -> TrainState:
        """Return a state; its `extra` is an `PolicyGradientExtra`."""
        needs_signal(self.model, self.times, params)
        extra = PolicyGradientExtra(self.advantage.init(), None if self.kl_budget is None else self.temperature)
        return start(params, self.optimizer, average=self.ema_decay is not None, extra=extra)

    def rollout(self, key: Key, state: TrainState, cond: Cond = None) -> Experience:
        """Draw B chains, `repeats` consecutive ones for every row of cond."""
        for leaf in jax.tree.leaves(cond):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] * self.repeats != self.batch:
                raise ValueError(
                    f"conditions must have {self.batch // self.repeats} rows (batch / repeats), got shape {list(jnp.shape(leaf))}"
                )
        cond = split(jax.tree.map(lambda leaf: jnp.repeat(leaf, self.repeats, 0), cond), self.shards)
        chain = self._chain(state.params)
        first = split(chain.init(jax.random.fold_in(key, 0), self.batch, self.times[0], cond), self.shards)
        if self.fine_clip and _in_half_precision(chain.denoiser, first.x, self.times[0], cond):
            warnings.warn(
                "this network computes in half precision, which moves a log-probability by more than clip: ratios are cut by "
                "rounding; compute in float32, or give a larger clip (info['clipped'] says how many are cut)",
                stacklevel=2,
            )
        kept = self.path == "kept"
        keep = lambda carry, info: (carry.x if kept else None, info)  # noqa: E731
        last, (later, info) = roll(chain, key, first, self.times, cond, keep=keep)
        x0, end = chain.final(last, self.times[-1], cond)
        path = jax.tree.map(lambda leaf: leaf[None], first.x)
        if kept:
            path = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), path, later)
        penalty = jnp.concatenate([info["penalty"], end["penalty"][None]]) if self.references else None
        return Experience(x0, cond, path, info["log_prob"], penalty, None if kept else key)

    def update(
        self, key: Key, state: TrainState, experience: Experience, rewards: Array, terminal: Reward | None = None
    ) -> tuple[TrainState, Info]:
        """Take epochs * minibatches optimiser steps. `terminal`: the reward as a function, see `gradients`."""
        rows, extra, info = self._weigh(state.extra, experience, rewards)
        old = state.params

        def one(state: TrainState, index: Array) -> tuple[TrainState, Info]:
            part = rows if self.minibatches == 1 else rows.take(index, self.shards)
            replay = None if self.path == "kept" else Replay(old, experience, None if part is rows else index)
            gradients, sums = self._gradients(state.params, part, terminal, replay)
            scaled = jax.tree.map(lambda g: g * self.minibatches, gradients)
            new, more = update(state, scaled, self.optimizer, self.ema_decay)
            return new._replace(step=state.step), sums | {"gradient_norm": more["gradient_norm"]}

        if self.epochs * self.minibatches == 1:
            new, sums = one(state, jnp.arange(self.batch))
        else:
            new, sums = jax.lax.scan(one, state, minibatch_rows(key, self.batch, self.epochs, self.minibatches))
            sums = jax.tree.map(lambda leaf: leaf.mean(0), sums)
        if self.kl_budget is not None:
            info["temperature"] = rows.temperature[0]
            extra = extra._replace(
                temperature=towards_budget(rows.temperature, info["kl"], self.kl_budget, self.kl_rate)
            )
        state = new._replace(step=state.step + 1, extra=extra)
        return state, info | sums | {"skipped": state.skipped}

    def gradients(
        self, key: Key, state: TrainState, experience: Experience, rewards: Array, terminal: Reward | None = None
    ) -> tuple[Params, Info]:
        """Return the gradient of the loss over the whole batch at state.params, and info.

        Where the chain ends with a projection, which is no draw, the policy gradient holds it constant. With `terminal`,
        the reward as a differentiable function (x0, cond) -> [B], its gradient through the projection is added.
        """
        rows, _, info = self._weigh(state.extra, experience, rewards)
        replay = None if self.path == "kept" else Replay(state.params, experience)
        gradients, sums = self._gradients(state.params, rows, terminal, replay)
        return gradients, info | sums

    def network_calls(self) -> int:
        """Calls of the tuned denoiser per sample and step, forward passes only: of the rollout and of every epoch."""
        moves = self.times.shape[0] - 1
        again = self.epochs * self.minibatches if self.path == "again" else 0
        return moves * (1 + self.epochs + again) + self.process.projects * (1 + bool(self.references) * self.epochs)

    def _chain(self, params: Params) -> Chain:
        return Chain(self.process, bound(self.model, params, "a denoiser"), self.references, pathwise=False)

    def _weigh(
        self, extra: PolicyGradientExtra, experience: Experience, rewards: Array
    ) -> tuple[Rows, PolicyGradientExtra, Info]:
        """Advantages and weights of all chains; none is feasible: NaN, so that the step is skipped and counted."""
        rewards = checks.per_example("rewards must hold", rewards, self.batch)
        feasible = jnp.isfinite(rewards)
        reward = jnp.where(feasible, rewards, 0.0)
        info = {"reward": feasible_mean(reward, rewards), "infeasible": jnp.sum(~feasible)}
        togo = jnp.broadcast_to(reward, experience.log_prob.shape)
        temperature = self.temperature if extra.temperature is None else extra.temperature
        if experience.penalty is not None:
            kl = experience.penalty.sum(0).mean(-1)
            info |= {"kl" if i == 0 else f"kl_{i + 1}": value for i, value in enumerate(kl)}
            if self.kl_gradient == "full":
                cost = jnp.einsum("n,tnb->tb", temperature, experience.penalty)
                togo = togo - jnp.cumsum(cost[::-1], 0)[::-1][1:]
        returns = Returns(togo, reward, feasible, experience.path, self.times, experience.cond)
        estimate, own, more = self.advantage(extra.advantage, returns)
        weight = jnp.where(feasible.any(), feasible / jnp.maximum(feasible.sum(), 1), jnp.nan)
        moves = experience.path, experience.log_prob, estimate.advantage
        rows = Rows(*moves, weight, estimate.scale, experience.cond, temperature)
        return rows, extra._replace(advantage=own), info | more

    def _gradients(
        self, params: Params, rows: Rows, terminal: Reward | None, replay: Replay | None = None
    ) -> tuple[Params, Info]:
        """Gradient of minus the weighted sum of surrogates, less KL costs: summed over moves, one at a time."""
        ahead = lambda leaf: (leaf[:-1], leaf[1:])  # noqa: E731

        def every(params: Params) -> tuple[Params, Array]:
            grad = functools.partial(jax.grad(self._move, has_aux=True), params, rows)
            if replay is None:
                x = jax.tree.map(lambda leaf: ahead(leaf)[0], rows.path)
                y = jax.tree.map(lambda leaf: ahead(leaf)[1], rows.path)
                gradients, outside = summed(grad, (x, y, *ahead(self.times), rows.log_prob, rows.advantage))
                last = jax.tree.map(lambda leaf: leaf[-1], rows.path)
            else:
                (gradients, outside), last = self._replayed(grad, params, rows, replay)
            if self.process.projects and (self.references or terminal is not None):
                gradients = jax.tree.map(jnp.add, gradients, jax.grad(self._end)(params, rows, last, terminal))
            return gradients, outside

        gradients, outside = spread(every, self.shards)(params)
        return gradients, {} if self.clip is None else {"clipped": outside.sum() / rows.log_prob.size}

    def _replayed(self, grad: Any, params: Params, rows: Rows, replay: Replay) -> tuple[tuple[Params, Array], State]:
        """The sum of grad(x, y, t, s, old, advantage) over moves that are drawn again with their keys, and the last state."""
        chain = Chain(self.process, bound(self.model, replay.params, "a denoiser"), pathwise=False)
        index, experience = replay.index, replay.experience
        part = lambda x: x if index is None else take(x, index, self.shards)  # noqa: E731

        def step(key: Key, carry: Any, t: Array, s: Array, cond: Cond = None) -> tuple[Any, Info]:
            at, total = carry
            later, _ = chain.step(key, at, t, s, cond)
            one = grad(part(at.x), part(later.x), t, s, rows.log_prob[at.call], rows.advantage[at.call])
            return (later, jax.tree.map(jnp.add, total, one)), {}

        first = ChainCarry(jax.tree.map(lambda leaf: leaf[0], experience.path), jnp.int32(0))
        zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(rows.weight))
        carry = (first, zero)
        (last, total), _ = roll(SimpleNamespace(step=step), experience.key, carry, self.times, experience.cond)  # type: ignore[arg-type]
        return total, part(last.x)

    def _move(
        self, params: Params, rows: Rows, x: State, y: State, t: Array, s: Array, old: Array, advantage: Array
    ) -> tuple[Array, Array]:
        """Loss of one move over some chains, and 1 for those that are clipped [b]."""
        denoiser = bound(self.model, params, "a denoiser")
        kernel = self.process.reverse(x, t, s, denoiser(x, t, rows.cond))
        log_ratio = (kernel.log_prob(y) - old) / self._per
        if self.clip is None:
            gain = advantage * log_ratio
            outside = jnp.zeros_like(rows.weight)
        else:
            ratio = jnp.exp(log_ratio)
            held = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
            gain = jnp.minimum(ratio * advantage, held * advantage)
            outside = (held * advantage < ratio * advantage).astype(jnp.float32)
        if self.references:
            others = [self.process.reverse(x, t, s, other(x, t, rows.cond)) for other in self.references]
            gain = gain - rows.temperature @ jnp.stack([kernel.kl(other) for other in others]) / (
                rows.scale * self._per
            )
        return -jnp.sum(rows.weight * gain), outside

    def _end(self, params: Params, rows: Rows, last: State, terminal: Reward | None) -> Array:
        """Loss of the projection: its KL costs, and the reward through it where it is given as a function."""
        x0, info = self._chain(params).final(ChainCarry(last, jnp.int32(0)), self.times[-1], rows.cond)
        gain = jnp.float32(0) if terminal is None else terminal(x0, rows.cond)
        if self.references:
            gain = gain - rows.temperature @ info["penalty"]
        return -jnp.sum(rows.weight * gain / (rows.scale * self._per))

    @property
    def _per(self) -> int:
        return dimensions(self.process) if self.per_dim else 1


def _in_half_precision(denoiser: Denoiser, x: State, t: Array, cond: Cond) -> bool:
    """Whether a denoiser has numbers of 16 bits in it, whatever it returns."""
    return "f16[" in str(jax.make_jaxpr(lambda x, t, cond: denoiser(x, t, cond))(x, t, cond))


def _resolves(clip: Any, process: Process, per_dim: bool) -> bool:
    """Refuse a clip of ratios below the rounding of float32; return whether it is above that of half precision.

    Sums of D terms of order 1 are off by D 2^-24 nats (2e-4 at D = 3,072); a network in bfloat16 moves each term by some .01.
    """
    if clip is None or isinstance(clip, Tracer):
        return True
    size = dimensions(process)
    nats = float(clip) * (size if per_dim else 1)
    if 0 < nats < size * 2.0**-24:
        raise ValueError(
            f"clip={float(clip):g} is below what float32 resolves of log-probabilities of {size} dimensions, {size * 2.0**-24:.1g} nats, "
            "so that it clips rounding; give clip=0.2, or per_dim=True, which 1e-4 was published with"
        )
    return nats > 0.01 * math.sqrt(size)


def dimensions(process: Any) -> int:
    """Return D, the numbers and tokens of one example.

    Args:
      process: any.
    """
    if isinstance(process, ProductProcess):
        return sum(dimensions(part) for part in process.parts.values())
    return math.prod(process.shape)


def ddpo(
    model: Model,
    process: Process,
    times: Array,
    optimizer: Any,
    *,
    batch: int,
    clip: float | None = None,
    epochs: int = 1,
    minibatches: int = 1,
    advantage: Advantage | None = None,
    repeats: int = 1,
    per_dim: bool = False,
    reference: DenoiserLike | Sequence[DenoiserLike] | None = None,
    temperature: float | Sequence[float] | None = None,
    kl_budget: float | None = None,
    kl_rate: float = 0.1,
    kl_gradient: str = "full",
    path: str = "kept",
    ema_decay: float | None = None,
) -> PolicyGradient:
    """DDPO: the policy gradient of E[r(x0)] over the moves of the chain (arXiv 2305.13301).

        gradient = E[sum over moves of grad log p(x_s | x_t) A]

    With clip=None it is DDPO-SF: one optimiser step a batch, exactly on policy. With a clip it is DDPO-IS: every move
    gains min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), ratio = p(x_s | x_t) / p_old(x_s | x_t). Without a reference the
    reward alone is maximised. With `reference` the optimum is near p(x0) exp(r(x0)/temperature)/Z, p the law of the
    reference's chain: exactly so for tokens unmasked one at a time, up to about 1/T for Gaussian moves, whose variances stay
    (see `reward_backprop`).

    Args:
      model: params -> denoiser, (x [B, ...], t, cond) -> E[x0 | x_t] or logits; a plain function bound once, or a callable pytree.
      process: Gaussian with eta > 0, masked, first-hitting or mixed. Their projection to data is no draw and no action.
      times: the grid [T + 1] of the chain, from `process.times(steps)`; T >= 1.
      optimizer: an optax transformation; one step a minibatch, its gradient summed over all moves.
      batch: B, chains a step, at least 2.
      clip: half-width of the interval of the ratio around 1, dynamic; None for the score function.
      epochs, minibatches: passes over a batch, and parts of it in each; more than one of either needs a clip.
      advantage: from `rgdiff.tuners.advantages`; leave-one-out by default, which is unbiased and unscaled.
      repeats: consecutive chains for each row of the conditions, as `group_relative` needs them.
      per_dim: divide log-ratios, and KL terms with them, by D, the dimensions of an example: the published setting.
      reference, temperature: subtract temperature * path KL(tuned || reference), nats per sample, over all moves and the
        projection; temperature is in the reward's unit per nat, also where advantages are scaled. Several references have a
        weight each.
      kl_budget, kl_rate: target of the KL to the first reference, nats, and the rate of its control: the weights follow it as
        in `reward_backprop`, once a batch.
      kl_gradient: `full`: each draw's return contains the KL of later moves, so that the optimum is the regularised one;
        or `direct`: only each move's own KL is differentiated.
      path: `kept`: the T + 1 states of every chain stay on the device until the update; `again`: the update draws them again with the
        same keys, so that memory does not depend on T, for T more network calls of the whole batch an optimiser step.
      ema_decay: decay of an average of the parameters, `state.best`; None keeps no average.

    Returns:
      An online method: `fit(as_tuner(method, reward), ...)` for a JAX reward, `fit_online(method, ..., reward)` for one on the
      host. `state.best` holds the tuned parameters. info: reward, infeasible, kl, clipped (share of ratios whose gradient is
      cut), gradient_norm, skipped.

    Raises:
      ValueError: for eta = 0, a chain without a move, several updates without a clip, a clip below the rounding of float32,
        parts that do not divide the batch.

    Note:
      The released code takes the mean of log-probabilities over dimensions, so that its clip of 1e-4 is on the ratio's
      D-th root, takes the mean over moves (a factor for the optimiser), and steps on moves shuffled in time. It is
      ddpo(clip=1e-4, per_dim=True, advantage=per_condition(C, clip=10)). In nats a clip of 0.2 is usual.

      A ratio is no finer than its log-probabilities. These are float32, as predictions are from the denoiser's door on, and
      differ by some 2e-4 nats at D = 3,072 when they are computed again: a smaller clip is refused. A network that *computes* in
      bfloat16 moves them by .01 to .07 nats in four dimensions, so that a clip of 1e-4 is noise: that is warned of. Compute in
      float32, or clip at 0.1 and above.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), (1,), 2)  # one token of two letters
      >>> model = lambda w: lambda x, t, cond=None: jnp.zeros((len(x), 1, 2)) + w  # logits of p(x0)
      >>> method = rgdiff.tuners.ddpo(model, process, process.times(2), optax.sgd(1.0), batch=64)
      >>> tuner = rgdiff.tuners.as_tuner(method, lambda x0, cond=None: x0[:, 0, 1])
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(2)), 10)
      >>> print(bool(state.params[1] > state.params[0]))  # the rewarded letter gains
      True
    """
    checks.law(process, "a policy gradient")
    times = checks.times(times, process)
    if times.shape[0] < 2:
        raise ValueError(
            "a policy gradient needs a chain of at least one move: its projection is no draw; use more steps"
        )
    batch, epochs = checks.at_least("batch", batch, 2), checks.at_least("epochs", epochs, 1)
    advantage = advantages.leave_one_out() if advantage is None else advantage
    if not callable(advantage) or not hasattr(advantage, "init"):
        raise ValueError(
            f"advantage must come from rgdiff.tuners.advantages, e.g. batch_normalised(), got {advantage!r}"
        )
    if checks.one_of("path", path, PATHS) == "again" and isinstance(advantage, advantages.LearntBaseline):
        raise ValueError("a learnt baseline is fitted to the states of whole chains; leave path='kept'")
    group = getattr(advantage, "size", 0) or 1
    for name, parts in (("minibatches", minibatches), ("repeats", repeats), ("the advantage's groups", group)):
        checks.divides(name, parts, batch)
    if clip is None and epochs * minibatches > 1:
        raise ValueError(
            "several updates a batch need importance ratios: give clip=, e.g. 0.2 (or 1e-4 with per_dim=True)"
        )
    references, weights = weighed_references(reference, temperature)
    return PolicyGradient(
        model=callable_pytree(model, "model (params -> denoiser)"),
        process=process,
        times=times,
        references=references,
        temperature=weights,
        kl_budget=budget_of(kl_budget, references, weights),
        kl_rate=checks.positive("kl_rate", kl_rate, zero=True),
        clip=None if clip is None else checks.positive("clip", clip),
        advantage=advantage,
        ema_decay=None if ema_decay is None else checks.positive("ema_decay", ema_decay, zero=True),
        optimizer=checks.optimizer(optimizer),
        batch=batch,
        repeats=repeats,
        epochs=epochs,
        minibatches=minibatches,
        per_dim=bool(per_dim),
        kl_gradient=checks.one_of("kl_gradient", kl_gradient, KL_GRADIENTS),
        path=path,
        fine_clip=not _resolves(clip, process, per_dim),
    )


@setting_of(ddpo, fixed=("advantage",))
def dpok(
    model: Model,
    process: Process,
    times: Array,
    optimizer: Any,
    *,
    reference: DenoiserLike | Sequence[DenoiserLike],
    temperature: float | Sequence[float],
    value: Any,
    value_params: Params,
    value_optimizer: Any,
    value_steps: int = 5,
    clip: float | None = None,
    **options: Any,
) -> PolicyGradient:
    """DPOK: the policy gradient of E[r] - temperature * path KL with a learnt baseline V(x_t, t) (arXiv 2305.16381).

    The optimum is near p(x0) exp(r(x0)/temperature)/Z, as exactly as for `ddpo`.

    Args:
      reference, temperature: the prior's denoiser (x, t, cond) -> E[x0 | x_t] or logits, and the weight of the path KL to it, in
        the reward's unit per nat; several of each are allowed.
      value: params -> V, (x [B, ...], t, cond) -> [B], regressed on the return.
      value_params: V's first parameters.
      value_optimizer: V's own optax transformation.
      value_steps: V's optimiser steps a batch.
      clip: half-width of the interval of the importance ratio around 1, dynamic; None for the score function.

    Returns:
      An online method, as `ddpo`; info has value_error too, V's root mean square error in the reward's unit.

    Raises:
      ValueError: as `ddpo`.

    Note:
      The released code differentiates each move's own KL alone (kl_gradient="direct"), as a mean square of predicted
      noise; weighs rewards by 100 and the KL by 0.01; clamps ratios to 1 +- 1e-4 per dimension on both sides, whatever
      the advantage's sign; draws from a buffer of 1,000 transitions; and fits V to it before V is used. Here KL weights
      are per nat, every draw's return contains the KL of later moves, and V is that of before the batch.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), (1,), 2)
      >>> model = lambda w: lambda x, t, cond=None: jnp.zeros((len(x), 1, 2)) + w
      >>> value = lambda c: lambda x, t, cond=None: c + 0 * x[:, 0, 0]
      >>> method = rgdiff.tuners.dpok(
      ...     model, process, process.times(2), optax.sgd(1.0), batch=64, reference=model(0.0), temperature=0.5,
      ...     value=value, value_params=jnp.float32(0), value_optimizer=optax.sgd(0.1))
      >>> tuner = rgdiff.tuners.as_tuner(method, lambda x0, cond=None: x0[:, 0, 1])
      >>> print(rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(2)), 10).params.argmax())
      1
    """
    baseline = advantages.learnt_baseline(value, value_params, value_optimizer, steps=value_steps)
    options = {"advantage": baseline, "clip": clip, **options}
    return ddpo(model, process, times, optimizer, reference=reference, temperature=temperature, **options)
