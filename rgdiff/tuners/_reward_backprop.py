"""The engine of reward gradients: E[r(x0)] minus weighted penalties to references, maximised through the sampling chain.

Four options make the whole family (`rgdiff.tuners.draft`, `drakes`, `elegant`): where the reward is evaluated, which network
calls keep their gradient, whether the gradient to a call's input is kept, and which extra draws are added. Gradients are
pathwise, or, for rewards and draws without a derivative, score-function with the batch's leave-one-out mean as the baseline.

With temperature = alpha on the path KL to the prior the best law of x0 is p(x0) exp(r(x0)/alpha)/Z, p that of the prior's
chain, if every kernel may be tilted and x_T says little of x0. Kernels of tokens can be. A denoiser moves the means of
Gaussian kernels and leaves their variances, so that the law that any tuner reaches in T moves is off by about 1/T: for N(0, 1),
r = -(x - 1)^2, alpha = 1, `linear_vp` and eta = 1 the best mean and variance are .571, .221 at T = 10, where p exp(r)/Z has
.523, .262 (KL .011 nats), and .649, .330 for .648, .324 at T = 100 (KL 1e-4). A linear reward is off by the projection alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.denoisers import needs_signal
from rgdiff.rewards import differentiable, evaluate
from rgdiff.samplers._loop import REMAT, rematerialize, roll
from rgdiff.samplers._projection import arrived, merged
from rgdiff.shards import Shards, bound, by_rows, split, spread
from rgdiff.tuners._chain import PENALTIES, Chain, ChainCarry, budget_of, hold, towards_budget, weighed_references
from rgdiff.tuners._loop import TrainState, start, update
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
    RewardLike,
    State,
    callable_pytree,
    pytree,
    static,
)

GRADIENTS = ("pathwise", "score_function")


@pytree
class RewardBackprop:
    """Maximises a reward by gradients through sampling. Build it with `reward_backprop` or a named setting."""

    model: Model
    process: Process
    reward: Reward
    times: Array
    references: tuple[Denoiser, ...]
    temperature: Array
    kl_budget: Array | None
    kl_rate: Array
    projection: Array
    heldout: Reward | None
    plan: Any
    ema_decay: Array | None
    optimizer: Any = static()
    batch: int = static()
    live: int = static()
    renoised: int = static(default=0)
    on_trajectory: bool = static(default=True)
    reduce: str = static(default="sum")
    remat: str = static(default="everything")
    gradient: str = static(default="pathwise")
    input_gradient: bool = static(default=True)
    penalty: str = static(default="kl")
    penalize_dead: bool = static(default=True)
    micro_batches: int = static(default=1)
    shards: Shards | None = static(default=None)

    def init(self, params: Params) -> TrainState:
        needs_signal(self.model, self.times, params)
        weight = None if self.kl_budget is None else self.temperature
        return start(params, self.optimizer, average=self.ema_decay is not None, extra=weight)

    def step(self, key: Key, state: TrainState, batch: Cond = None) -> tuple[TrainState, Info]:
        weight = self.temperature if self.kl_budget is None else state.extra
        gradients, info = self.gradients(state.params, key, batch, weight)
        state, more = update(state, gradients, self.optimizer, self.ema_decay)
        if self.kl_budget is not None:
            info["temperature"] = weight[0]
            state = state._replace(extra=towards_budget(weight, info["kl"], self.kl_budget, self.kl_rate))
        return state, info | more

    def network_calls(self) -> int:
        """Calls of the tuned denoiser per sample and step, forward passes only (references' not counted).

        The most, where a plan may end the chain early.
        """
        return self._calls + self.renoised

    @property
    def _calls(self) -> int:
        return self.times.shape[0] - 1 + self.process.projects

    def gradients(
        self, params: Params, key: Key, cond: Cond = None, temperature: Array | None = None
    ) -> tuple[Params, Info]:
        """Return the gradient of `loss` and its info, one micro-batch at a time.

        Micro-batches have keys of their own; every example of every one counts alike, infeasible ones not at all. Without
        a feasible one the gradient is NaN, so that the step is skipped and counted.
        """
        count = self.micro_batches
        checks.conditions(cond, self.batch)
        grad = jax.grad(self._total, has_aux=True)

        def every(params: Params) -> tuple[Params, dict[str, Array]]:
            if count == 1:
                return grad(params, key, cond, temperature)
            keys = jax.random.split(key, count)
            conds = jax.tree.map(lambda c: c.reshape(-1, count, *c.shape[1:]).swapaxes(0, 1), cond)
            first = grad(params, keys[0], jax.tree.map(lambda c: c[0], conds), temperature)
            rest = (keys[1:], jax.tree.map(lambda c: c[1:], conds))
            add = lambda total, where: (jax.tree.map(jnp.add, total, grad(params, *where, temperature)), None)  # noqa: E731
            return jax.lax.scan(add, first, rest)[0]

        gradients, rows = spread(every, self.shards)(params)
        sums = _sums(rows)
        return jax.tree.map(lambda g: g / _number(sums["feasible"]), gradients), self._info(sums)

    def loss(self, params: Params, key: Key, cond: Cond = None, temperature: Array | None = None) -> tuple[Array, Info]:
        """Return minus the objective for one batch, and info (reward, infeasible, kl).

        The mean is over feasible examples. Under `score_function` it is a surrogate with the right gradient.
        """
        total, rows = self._total(params, key, cond, temperature, micro=False)
        sums = _sums(rows)
        return total / _number(sums["feasible"]), self._info(sums)

    def _info(self, sums: dict[str, Array]) -> Info:
        feasible = _number(sums["feasible"])
        infeasible = (self.batch - sums["feasible"]).astype(jnp.int32)
        info = {"reward": sums["reward"] / feasible, "infeasible": infeasible}
        if self.references:
            costs = sums["penalty"] / self.batch
            info |= {self.penalty if i == 0 else f"{self.penalty}_{i + 1}": cost for i, cost in enumerate(costs)}
        if self.heldout is not None:
            info["heldout"] = sums["heldout"] / feasible
        return info

    def _total(
        self, params: Params, key: Key, cond: Cond, temperature: Array | None, micro: bool = True
    ) -> tuple[Array, dict[str, Array]]:
        """Minus the sum of the objective over feasible examples of one (micro-)batch, and rows [..., b] whose sums are reported."""
        temperature = self.temperature if temperature is None else temperature
        batch = self.batch // self.micro_batches if micro else self.batch
        checks.conditions(cond, batch)
        key_chain, key_extra = jax.random.split(key)
        denoiser = bound(self.model, params, "a denoiser")
        x0, log_prob, penalty = self._sample(denoiser, key_chain, batch, cond)
        rewards = self._judge(x0, cond)
        feasible = jnp.isfinite(rewards)
        safe = jnp.where(feasible, rewards, 0.0)
        rows = {"reward": safe, "feasible": feasible.astype(jnp.float32)}
        cost = jnp.float32(0)
        if penalty is not None:
            cost = jnp.tensordot(temperature, penalty, (0, 1))  # [T + 1, B]: moves, and the projection
            cost = cost.at[-1].multiply(self.projection)
            rows["penalty"] = penalty.sum(0)
        if self.heldout is not None:
            rows["heldout"] = jnp.where(feasible, evaluate(self.heldout, jax.lax.stop_gradient(x0), cond), 0.0)
        if log_prob is not None:
            return -jnp.sum(jnp.where(feasible, self._surrogate(safe, feasible, log_prob, cost), 0.0)), rows
        total = safe.sum() if self.on_trajectory else jnp.float32(0)
        if self.renoised:
            again = self._renoise(denoiser, key_extra, x0, cond)
            total += jnp.sum(jnp.where(jnp.isfinite(again), again, 0.0))
        if self.reduce == "mean":
            total /= self.renoised + self.on_trajectory
        if self.references:
            total -= jnp.sum(jnp.where(feasible, cost.sum(0), 0.0))
        return -total, rows

    def _chain(self, denoiser: Denoiser, **options: Any) -> Chain:
        return Chain(
            self.process,
            denoiser,
            self.references,
            pathwise=self.gradient == "pathwise",
            input_gradient=self.input_gradient,
            penalty=self.penalty,
            penalize_dead=self.penalize_dead,
            **options,
        )

    def _sample(self, denoiser: Denoiser, key: Key, batch: int, cond: Cond) -> tuple[State, Array | None, Array | None]:
        """Run the chain: x0, log-probabilities [T, B] of its draws and penalties [calls, n, B] of its calls."""
        cut, end = self._calls - self.live, self.times[-1]
        if self.plan is None:
            chain, head = self._chain(denoiser), self._chain(denoiser, live=False)
        else:
            plan = self.plan(jax.random.fold_in(key, self._calls + 1), self._calls)  # not a key of a move: see roll
            chain = head = self._chain(denoiser, plan=plan, early=self.plan.early)
            cut = 0
            if self.plan.early:
                end = self.times[plan.end]
        carry, kept = split(chain.init(jax.random.fold_in(key, 0), batch, self.times[0], cond), self.shards), []
        if cut:
            # A penalty needs the parameters at every move; without one the head is free of gradients altogether.
            carry, info = roll(head, key, carry, self.times[: cut + 1], cond, keep=_info, remat=self.remat)
            kept.append(info)
            carry = hold(carry, False)
        chain, tail = merged(chain, self.times[cut:])
        if len(tail) > 1:
            carry, info = roll(chain, key, carry, tail, cond, first=cut, keep=_info, remat=self.remat)
            kept.append(info)
        if cut + len(tail) > len(self.times):
            x0 = arrived(chain.process, carry.x)
        else:
            last = chain if self.gradient == "pathwise" else head
            x0, info = rematerialize(lambda carry: last.final(carry, end, cond), self.remat)(carry)
            kept.append({"penalty": info["penalty"][None]} if info else {})
        joined = lambda name: [part[name] for part in kept if name in part]  # noqa: E731
        log_prob, penalty = joined("log_prob"), joined("penalty")
        return x0, jnp.concatenate(log_prob) if log_prob else None, jnp.concatenate(penalty) if penalty else None

    def _surrogate(self, rewards: Array, feasible: Array, log_prob: Array, cost: Array) -> Array:
        """Return the function whose gradient is the policy gradient of r - sum of costs: every draw is weighted by its return. [B]"""
        moves = log_prob.shape[0]
        cost = jnp.broadcast_to(cost, (moves + 1, rewards.shape[0]))
        after = jnp.cumsum(cost[::-1], 0)[::-1][1:]
        paid = jnp.where(feasible, rewards - after, 0.0)
        others = jnp.maximum(jnp.sum(feasible.astype(jnp.float32)) - 1, 1)
        advantage = jax.lax.stop_gradient(paid - (paid.sum(-1, keepdims=True) - paid) / others)
        return jnp.sum(advantage * log_prob, 0) - cost.sum(0)

    def _renoise(self, denoiser: Denoiser, key: Key, x0: State, cond: Cond) -> Array:
        """Rewards [n * B] of one-call denoisings of the final samples, noised to the time of the last network call."""
        last = self._calls - 1
        key_noise, key_chain = jax.random.split(key)
        noised = self.process.forward(jax.lax.stop_gradient(x0), self.times[last])
        draws = jax.vmap(noised.sample)(jax.random.split(key_noise, self.renoised))
        # The draws of one sample stay together, so that samples split over devices are noised where they lie.
        x = jax.tree.map(lambda d: d.swapaxes(0, 1).reshape(-1, *d.shape[2:]), draws)
        conds = jax.tree.map(lambda c: jnp.repeat(c, self.renoised, 0), cond)
        chain, carry = Chain(self.process, denoiser), ChainCarry(x, jnp.int32(last))
        if self.times.shape[0] - 1 > last:
            carry, _ = roll(chain, key_chain, carry, self.times[last:], conds, first=last, remat=self.remat)
        final = rematerialize(lambda carry: chain.final(carry, self.times[-1], conds)[0], self.remat)
        return self._judge(final(carry), conds)

    def _judge(self, x0: State, cond: Cond) -> Array:
        return by_rows(_rewards, self.shards, (None, 0, 0))(self.reward, x0, cond)


def _rewards(reward: Reward, x0: State, cond: Cond) -> Array:
    """r(x0) [B], whose gradient is 0 where it is not finite: there the reward's own may be NaN, and 0 times that is NaN."""

    @jax.custom_vjp
    def value(x0: State) -> Array:
        return evaluate(reward, x0, cond)

    def forward(x0: State) -> tuple[Array, Any]:
        out, back = jax.vjp(lambda x0: evaluate(reward, x0, cond), x0)
        return out, (back, jnp.isfinite(out))

    def backward(saved: Any, gradient: Array) -> tuple[State]:
        back, finite = saved
        rows = lambda leaf: jnp.where(finite.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)  # noqa: E731
        return (jax.tree.map(rows, back(gradient)[0]),)

    value.defvjp(forward, backward)
    return value(x0)


def _sums(rows: dict[str, Array]) -> dict[str, Array]:
    """Sums over the last axis, of examples; what has none is a sum already."""
    return {name: jnp.sum(row, -1) if row.ndim else row for name, row in rows.items()}


def _number(count: Array) -> Array:
    """The count as a divisor: NaN where it is 0."""
    return jnp.where(count > 0, count, jnp.nan)


def _info(carry: Any, info: Info) -> Info:
    return info


def reward_backprop(
    model: Model,
    process: Process,
    reward: RewardLike,
    times: Array,
    optimizer: Any,
    *,
    batch: int,
    truncation: Any = None,
    renoised: int = 0,
    on_trajectory: bool = True,
    reduce: str = "sum",
    reference: DenoiserLike | Sequence[DenoiserLike] | None = None,
    temperature: float | Sequence[float] | None = None,
    kl_budget: float | None = None,
    kl_rate: float = 0.1,
    penalty: str = "kl",
    penalize: str = "all",
    projection: float = 1.0,
    heldout: RewardLike | None = None,
    gradient: str = "pathwise",
    input_gradient: bool = True,
    ema_decay: float | None = None,
    micro_batches: int = 1,
    remat: str = "everything",
) -> RewardBackprop:
    """Build the engine of reward gradients; the published methods are settings of it (`draft`, `refl`, `drakes`, ...).

        max over params of  E[r(x0)] - sum_i temperature_i KL(tuned path || path of reference i)

    With the prior as the one reference the optimum is near p(x0) exp(r(x0)/temperature)/Z, p the law of the prior's chain.
    Tokens unmasked one at a time reach it exactly; Gaussian moves keep their variances and miss it by about 1/T for T moves,
    and the law of x_T is not tuned (`elegant` learns it). The head of this module gives numbers. Without a reference there is
    no such target: the reward alone is maximised.

    Args:
      model: params -> denoiser, (x [B, ...], t, cond) -> E[x0 | x_t] or logits; a plain function bound once, or a callable pytree
        such as `nets.LoRAModel`.
      process: the noising process of the chain (`processes.gaussian`, `masked`, ...), eta = 0 (DDIM) or eta > 0.
      reward: (x0 [B, ...], cond) -> [B]; differentiable, unless gradient is "score_function". NaN marks an infeasible sample,
        which is left out of the mean.
      times: the grid [T + 1] of the chain, decreasing, from `process.times(steps)`.
      optimizer: an optax gradient transformation; `optax.MultiSteps` accumulates over steps.
      batch: B, samples a step.
      truncation: an integer K, the number of network calls at the end of the chain that keep their gradient, all by default; the
        calls before them form a scan without gradients. Or a plan of `rgdiff.tuners.plans`: one program for every K and draw.
      renoised: n, extra noisings of the final samples per sample (DRaFT-LV).
      on_trajectory: keep the term of the chain's own samples beside the renoised ones.
      reduce: `sum` or `mean` over these terms.
      reference, temperature: subtract temperature * path KL(tuned || reference), nats per sample, summed over all moves and
        the last projection; temperature is in the reward's unit per nat. Several references have a weight each. The KL needs
        eta > 0. Infeasible samples contribute no KL.
      kl_budget, kl_rate: target of the path KL, nats, and the rate of its control. The weights begin at temperature and are
        multiplied at every step by exp(kl_rate * (kl / kl_budget - 1)), clipped to exp(+-kl_rate), so that the KL settles at
        the budget (dual ascent).
      penalty: `kl`, or `eps_mse`, the mean squared difference of the predicted noise, which eta = 0 has too (DRaFT+).
      penalize: `all` calls: those without gradient are penalised through their kernels at constant states. Or `live`: only the
        calls that keep their gradient are penalised and reported.
      projection: factor on the penalty of the last projection (`samplers.projection_kl`). The penalty's weight is 1/2 SNR at the
        end of the chain, which holds a gradient truncated to the last call fast; a smaller factor lets that call move, at the
        cost of details.
      heldout: another reward, (x0, cond) -> [B], reported as info["heldout"] and never differentiated (see `early_stopping`).
      gradient: `pathwise`; or `score_function`: every draw's log-probability is weighted by its reward to go less the
        leave-one-out mean of the batch, KL terms are differentiated exactly at constant states, and a final projection
        is constant (nothing is drawn there).
      input_gradient: keep the gradient of each call's output to its input.
      ema_decay: decay of an average of the parameters, `state.best`; None keeps no average.
      micro_batches: number of parts that the batch is split into; the states of one part are held in memory at a time.
      remat: recomputation in the backward pass: `none`, `everything` (only states are stored), `dots`, `offload` (states go to
        the host's memory).

    Returns:
      A tuner for `fit`: `state = fit(tuner, key, tuner.init(params), steps)`, with `data=` the conditions where there are any.
      Sample with `model(state.best)`. info per step: reward (mean over feasible samples), infeasible (count), kl or eps_mse
      (kl_2, ... for further references), heldout, temperature (with a budget), gradient_norm, skipped. `tuner.gradients` and
      `tuner.loss` are for diagnostics, `tuner.network_calls()` counts calls per sample and step.

    Raises:
      ValueError: for K below 1 or above the chain's number of calls, a KL without a law or a reference, renoised terms without any term left, a batch
        that does not divide, options that exclude each other.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> alpha, sigma = process.schedule.alpha, process.schedule.sigma
      >>> model = lambda w: lambda x, t, cond=None: alpha(t) * x + sigma(t) ** 2 * w  # the exact denoiser of N(w, 1)
      >>> kl = {"reference": model(jnp.zeros(1)), "temperature": 0.5}  # tilted by r(x) = x: N(1 / 0.5, 1)
      >>> tuner = rgdiff.tuners.reward_backprop(
      ...     model, process, lambda x, cond=None: x[:, 0], process.times(400), optax.sgd(0.5), batch=2, **kl)
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 20)
      >>> print(f"{state.params[0]:.1f}")
      2.0
    """
    times = checks.times(times, process)
    calls = times.shape[0] - 1 + process.projects
    plan, live = None, calls
    if callable(truncation):
        plan = truncation
    elif truncation is not None:
        live = checks.at_least("truncation", truncation, 1)
    if live > calls:
        raise ValueError(f"truncation must be at most the chain's {calls} network calls, got {live}")
    renoised = checks.at_least("renoised", renoised, 0)
    if not on_trajectory and not renoised:
        raise ValueError("on_trajectory=False needs renoised >= 1: nothing would be left to differentiate")
    if renoised and not (process.stochastic or process.projects):
        raise ValueError("renoised > 0 needs a process with a forward law")
    references, weights = weighed_references(reference, temperature)
    checks.one_of("penalty", penalty, PENALTIES)
    checks.one_of("penalize", penalize, ("all", "live"))
    if references and penalty == "kl":
        checks.law(process, "a KL term")
    if references and penalty == "eps_mse" and not hasattr(process, "eps"):
        raise ValueError('penalty="eps_mse" compares predicted noise and needs a Gaussian process; use penalty="kl"')
    if checks.one_of("gradient", gradient, GRADIENTS) == "pathwise":
        differentiable('gradient="pathwise"', reward)
    else:
        checks.law(process, "a score-function gradient")
        if plan is not None or live < calls or renoised:
            raise ValueError("a score-function gradient takes the whole chain: leave out truncation and renoised")
    if kl_budget is not None and penalty != "kl":
        raise ValueError(f'kl_budget is of a KL, and penalty="{penalty}" has none; leave kl_budget out')
    batch = checks.at_least("batch", batch, 1)
    micro_batches = checks.divides("micro_batches", micro_batches, batch)
    if gradient == "score_function" and batch // micro_batches < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 samples in every micro-batch")
    return RewardBackprop(
        model=callable_pytree(model, "model (params -> denoiser)"),
        process=process,
        reward=callable_pytree(reward, "a reward"),
        times=times,
        references=references,
        temperature=weights,
        kl_budget=budget_of(kl_budget, references, weights),
        kl_rate=checks.positive("kl_rate", kl_rate, zero=True),
        projection=checks.positive("projection", projection, zero=True),
        heldout=None if heldout is None else callable_pytree(heldout, "a held-out reward"),
        plan=plan,
        ema_decay=None if ema_decay is None else checks.positive("ema_decay", ema_decay, zero=True),
        optimizer=checks.optimizer(optimizer),
        batch=batch,
        live=live,
        renoised=renoised,
        on_trajectory=bool(on_trajectory),
        reduce=checks.one_of("reduce", reduce, ("sum", "mean")),
        remat=checks.one_of("remat", remat, REMAT),
        gradient=gradient,
        input_gradient=bool(input_gradient),
        penalty=penalty,
        penalize_dead=penalize == "all",
        micro_batches=micro_batches,
    )
