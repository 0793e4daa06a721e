"""Advantages: the baseline that is subtracted from a reward, and its divisor, before it weighs a draw's log-probability.

Pure functions of returns [T, B], and pytrees that say which of them a policy gradient uses (`Advantage`) and carry
running statistics in the tuner's state. Infeasible samples enter no statistic and have advantage 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.shards import Shards, bound, spread
from rgdiff.tuners._loop import TrainState, start, update
from rgdiff.typing import Array, Cond, Info, Params, State, callable_pytree, pytree, static
from rgdiff.values import evaluate

EPSILON = 1e-6  # added to standard deviations, in the reward's unit


class Returns(NamedTuple):
    """The returns of a batch of chains, in the reward's unit.

    Args:
      togo: [T, B], the reward less the KL costs of all moves after this one.
      reward: [B], 0 where infeasible.
      feasible: [B] bool.
      path: the states [T + 1, B, ...].
      times: [T + 1].
      cond: conditions [B, ...], or None.
    """

    togo: Array
    reward: Array
    feasible: Array
    path: State
    times: Array
    cond: Cond


class Estimate(NamedTuple):
    """Advantages and their scale.

    Args:
      advantage: [T, B].
      scale: the divisor [B] of the advantages: KL weights are divided by it too, so that their unit stays.
    """

    advantage: Array
    scale: Array


class Advantage(Protocol):
    """Turns returns into advantages; a pytree whose state is carried in the tuner's state."""

    def init(self) -> Any: ...

    def __call__(self, state: Any, returns: Returns) -> tuple[Estimate, Any, Info]: ...


def moments(x: Array, feasible: Array) -> tuple[Array, Array]:
    """Return mean and (population) standard deviation over feasible entries of the last axis; exactly 0 for equal entries.

    Args:
      x: [..., n].
      feasible: [..., n] bool.

    Returns:
      Mean and standard deviation, [..., 1] each.
    """
    count = jnp.maximum(feasible.sum(-1, keepdims=True), 1)
    average = lambda a: jnp.sum(jnp.where(feasible, a, 0.0), -1, keepdims=True) / count  # noqa: E731
    mean = average(x)
    mean = mean + average(x - mean)  # the second pass takes the rounding of the first away
    return mean, jnp.sqrt(average((x - mean) ** 2))


def less_others(x: Array, feasible: Array) -> Array:
    """Return each entry less the mean of the *other* feasible ones on the last axis: an unbiased baseline.

    Args:
      x: [..., n].
      feasible: [..., n] bool; other entries give 0.
    """
    mean, _ = moments(x, feasible)
    count = feasible.sum(-1, keepdims=True)
    return jnp.where(feasible, (x - mean) * count / jnp.maximum(count - 1, 1), 0.0)


def in_groups(x: Array, size: int) -> Array:
    """Return [..., B] as [..., B / size, size]: groups are consecutive rows.

    Args:
      x: [..., B].
      size: of a group, a divisor of B.
    """
    return x.reshape(*x.shape[:-1], -1, size)


@pytree
class Plain:
    """The return itself, without a baseline."""

    def init(self) -> tuple[()]:
        return ()

    def __call__(self, state: Any, returns: Returns) -> tuple[Estimate, Any, Info]:
        return Estimate(jnp.where(returns.feasible, returns.togo, 0.0), jnp.ones_like(returns.reward)), state, {}


@pytree
class LeaveOneOut:
    """Return less the mean of the others in its group. Build it with `leave_one_out`.

    Args:
      size: of a group; 0 for the whole batch.
    """

    size: int = static(default=0)

    def init(self) -> tuple[()]:
        return ()

    def __call__(self, state: Any, returns: Returns) -> tuple[Estimate, Any, Info]:
        size = self.size or returns.reward.shape[0]
        advantage = less_others(in_groups(returns.togo, size), in_groups(returns.feasible, size))
        return Estimate(advantage.reshape(returns.togo.shape), jnp.ones_like(returns.reward)), state, {}


@pytree
class Normalised:
    """(Return - mean) / standard deviation of the rewards, within groups, clipped. Build it with `batch_normalised` or `group_relative`.

    Args:
      clip: largest absolute value, or None.
      size: of a group; 0 for the whole batch.
    """

    clip: Array | None = None
    size: int = static(default=0)

    def init(self) -> tuple[()]:
        return ()

    def __call__(self, state: Any, returns: Returns) -> tuple[Estimate, Any, Info]:
        size = self.size or returns.reward.shape[0]
        togo, feasible = in_groups(returns.togo, size), in_groups(returns.feasible, size)
        scale = moments(in_groups(returns.reward, size), feasible)[1] + EPSILON
        advantage = (togo - moments(togo, feasible)[0]) / scale
        advantage = jnp.where(feasible, advantage, 0.0).reshape(returns.togo.shape)
        scale = jnp.broadcast_to(scale, feasible.shape).reshape(-1)
        return Estimate(clipped(advantage, self.clip), scale), state, {}


class Buffers(NamedTuple):
    """The last N rewards of every condition.

    Args:
      values: [C, N], rings.
      count: [C], number of rewards ever put in.
    """

    values: Array
    count: Array


def push(buffers: Buffers, index: Array, rewards: Array, feasible: Array) -> Buffers:
    """Put rewards into the ring buffers of their conditions, in order; infeasible ones are left out.

    Args:
      buffers: the last N rewards of C conditions.
      index: [B] integers in [0, C), the condition of each reward.
      rewards: [B].
      feasible: [B] bool.
    """
    conditions, length = buffers.values.shape
    mine = jax.nn.one_hot(index, conditions, dtype=jnp.int32) * feasible[:, None]
    rank = jnp.take_along_axis(jnp.cumsum(mine, 0) - mine, index[:, None], 1)[:, 0]
    total = mine.sum(0, dtype=jnp.int32)
    kept = feasible & (rank >= total[index] - length)  # of more than a whole buffer, the last ones
    slot = (buffers.count[index] + rank) % length
    row = jnp.where(kept, index, conditions)  # out of range is dropped
    return Buffers(buffers.values.at[row, slot].set(rewards, mode="drop"), buffers.count + total)


@pytree
class PerCondition:
    """(Return - mean) / std of the last N rewards of the same condition, clipped; of the batch where it has too few.

    KL costs, which no buffer holds, are centred by the batch. Build it with `per_condition`.

    Args:
      minimum: number of rewards from which a condition's own figures are used.
      clip: largest absolute value, or None.
      index: cond -> [B] integers in [0, C).
      conditions: C.
      buffer: N.
    """

    minimum: Array
    clip: Array | None
    index: Any
    conditions: int = static()
    buffer: int = static()

    def init(self) -> Buffers:
        return Buffers(jnp.zeros((self.conditions, self.buffer)), jnp.zeros(self.conditions, jnp.int32))

    def __call__(self, state: Buffers, returns: Returns) -> tuple[Estimate, Buffers, Info]:
        index = self.index(returns.cond)
        if (
            not hasattr(index, "dtype")
            or index.shape != returns.reward.shape
            or not jnp.issubdtype(index.dtype, jnp.integer)
        ):
            raise ValueError(
                "per_condition needs the number of each sample's condition, integers [B]: give index= (cond -> [B])"
            )
        state = push(state, index, returns.reward, returns.feasible)
        filled = jnp.arange(self.buffer) < jnp.minimum(state.count, self.buffer)[:, None]
        own = [m[:, 0][index] for m in moments(state.values, filled)]
        enough = state.count[index] >= self.minimum
        mean, std = (
            jnp.where(enough, o, b) for o, b in zip(own, moments(returns.reward, returns.feasible), strict=True)
        )
        scale = std + EPSILON
        cost = returns.reward - returns.togo
        centred = returns.reward - mean - (cost - moments(cost, returns.feasible)[0])
        advantage = jnp.where(returns.feasible, centred / scale, 0.0)
        return Estimate(clipped(advantage, self.clip), scale), state, {"conditions_known": jnp.mean(enough)}


@pytree
class LearntBaseline:
    """Return less V(x_t, t, cond), given to the advantage `then`; V learns afterwards, by squared error on this batch.

    V is that of before the batch, so the baseline is independent of the draws it weighs. Build it with `learnt_baseline`.

    Args:
      model: params -> V, (x [B, ...], t, cond) -> [B].
      params: V's first parameters.
      then: the `Advantage` of the rest.
      optimizer: V's own.
      steps: V's optimiser steps a batch.
    """

    model: Any
    params: Params
    then: Any
    optimizer: Any = static()
    steps: int = static(default=1)
    shards: Shards | None = static(default=None)

    def init(self) -> tuple[TrainState, Any]:
        return start(self.params, self.optimizer), self.then.init()

    def __call__(self, state: Any, returns: Returns) -> tuple[Estimate, Any, Info]:
        learner, inner = state
        times = returns.times[:-1]
        states = jax.tree.map(lambda leaf: leaf[:-1], returns.path)
        value = jax.lax.map(
            lambda at: evaluate(self.model(learner.params), at[0], at[1], returns.cond), (states, times)
        )
        weight = jnp.where(returns.feasible, 1.0, 0.0) / jnp.maximum(returns.feasible.sum(), 1) / times.shape[0]

        def error(params: Params, x: State, t: Array, goal: Array) -> tuple[Array, Array]:
            errors = weight * (evaluate(bound(self.model, params, "a value"), x, t, returns.cond) - goal) ** 2
            return jnp.sum(errors), errors

        def every(params: Params) -> tuple[Params, Array]:
            grad = jax.grad(error, has_aux=True)
            return summed(lambda *at: grad(params, *at), (states, times, returns.togo))

        def learn(learner: TrainState, _: None) -> tuple[TrainState, Array]:
            gradients, errors = spread(every, self.shards)(learner.params)
            return update(learner, gradients, self.optimizer)[0], errors.sum()

        learner, losses = jax.lax.scan(learn, learner, None, length=self.steps)
        estimate, inner, info = self.then(inner, returns._replace(togo=returns.togo - value))
        return estimate, (learner, inner), info | {"value_error": jnp.sqrt(losses[0])}


def summed(function: Any, each: Any) -> Any:
    """Sum function(*each[i]) over the leading axis, one i at a time: gradients of a sum over moves in one move's memory.

    Args:
      function: of one slice of the leaves of `each`, returns a pytree.
      each: a tuple of pytrees of leaves [n, ...].
    """
    size = jax.tree.leaves(each)[0].shape[0]
    at = lambda i: jax.tree.map(lambda leaf: leaf[i], each)  # noqa: E731
    if size == 1:  # see samplers._loop.roll
        return function(*at(0))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(lambda e: function(*e), at(0)))
    add = lambda total, one: (jax.tree.map(jnp.add, total, function(*one)), None)  # noqa: E731
    return jax.lax.scan(add, zero, each)[0]


def clipped(advantage: Array, clip: Array | None) -> Array:
    """Return advantages within +-clip.

    Args:
      advantage: [...].
      clip: the bound, or None for none.
    """
    return advantage if clip is None else jnp.clip(advantage, -clip, clip)


def plain() -> Plain:
    """Use returns without a baseline: unbiased, with the largest variance.

    Returns:
      An `Advantage` for `ddpo(advantage=)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.tuners import advantages
      >>> reward = jnp.array([1.0, 2.0, 6.0, 3.0])
      >>> returns = advantages.Returns(reward[None], reward, reward > 0, None, None, None)  # one move
      >>> estimate, _, _ = advantages.plain()((), returns)
      >>> print(estimate.advantage)
      [[1. 2. 6. 3.]]
    """
    return Plain()


def leave_one_out(size: int = 0) -> LeaveOneOut:
    """Subtract the mean of the other samples: unbiased and unscaled.

        A_i = R_i - mean over j != i of R_j

    Args:
      size: number of consecutive samples in a group that is compared; 0 for the whole batch.

    Returns:
      An `Advantage` for `ddpo(advantage=)`.

    Raises:
      ValueError: for a negative size.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.tuners import advantages
      >>> reward = jnp.array([1.0, 2.0, 6.0, 3.0])
      >>> returns = advantages.Returns(reward[None], reward, reward > 0, None, None, None)  # one move
      >>> estimate, _, _ = advantages.leave_one_out(size=2)((), returns)
      >>> print(estimate.advantage)
      [[-1.  1.  3. -3.]]
    """
    return LeaveOneOut(checks.at_least("size", size, 0))


def batch_normalised(clip: float | None = None) -> Normalised:
    """Normalise by the batch's mean and standard deviation.

        A_i = (R_i - mean R) / (std r + 1e-6)

    The sample's own return in the mean shrinks the gradient by 1 - 1/B.

    Args:
      clip: largest absolute value of an advantage, or None; dynamic.

    Returns:
      An `Advantage` for `ddpo(advantage=)`.

    Raises:
      ValueError: for a clip that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.tuners import advantages
      >>> reward = jnp.array([1.0, 2.0, 6.0, 3.0])
      >>> returns = advantages.Returns(reward[None], reward, reward > 0, None, None, None)  # one move
      >>> estimate, _, _ = advantages.batch_normalised()((), returns)
      >>> print(*[f"{a:.2f}" for a in estimate.advantage[0]])
      -1.07 -0.53 1.60 0.00
    """
    return Normalised(_clip(clip))


def group_relative(size: int, clip: float | None = None, *, scale: bool = True) -> Normalised | LeaveOneOut:
    """Normalise within groups of `size` consecutive samples of one condition (GRPO, arXiv 2402.03300).

    Args:
      size: samples of a group, at least 2; draw them by `ddpo(repeats=size)`.
      clip: largest absolute value of a scaled advantage, or None; dynamic.
      scale: divide by the group's standard deviation. False subtracts the mean of the others only: dividing by each group's own
        spread gives conditions on which all samples do alike more weight.

    Returns:
      An `Advantage` for `ddpo(advantage=)`.

    Raises:
      ValueError: for a size below 2, a clip that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.tuners import advantages
      >>> reward = jnp.array([1.0, 2.0, 6.0, 3.0])
      >>> returns = advantages.Returns(reward[None], reward, reward > 0, None, None, None)  # one move
      >>> estimate, _, _ = advantages.group_relative(2)((), returns)
      >>> print(estimate.advantage.round(2))
      [[-1.  1.  1. -1.]]
    """
    size = checks.at_least("size", size, 2)
    return Normalised(_clip(clip), size) if scale else LeaveOneOut(size)


def per_condition(
    conditions: int, *, buffer: int = 32, minimum: int = 16, clip: float | None = 10.0, index: Any = None
) -> PerCondition:
    """Normalise by each condition's last rewards (DDPO, arXiv 2305.13301; released: 32 rewards, from 16 on, clipped at 10).

    Args:
      conditions: C, their number.
      buffer: N, rewards kept of each. The batch's own are in it before it is used, as released.
      minimum: with fewer rewards than this of a condition, the batch's mean and standard deviation are used for it.
      clip: largest absolute value of an advantage, or None; dynamic.
      index: cond -> [B] integers in [0, C); by default cond is that itself.

    Returns:
      An `Advantage` for `ddpo(advantage=)`; info has conditions_known, the share of samples with enough rewards.

    Raises:
      ValueError: for a minimum above the buffer, counts below 1; when called, for an index that is not [B] integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.tuners import advantages
      >>> reward = jnp.array([1.0, 2.0, 6.0, 3.0])
      >>> returns = advantages.Returns(reward[None], reward, reward > 0, None, None, None)  # one move
      >>> advantage = advantages.per_condition(2, minimum=1)
      >>> estimate, _, _ = advantage(advantage.init(), returns._replace(cond=jnp.array([0, 0, 1, 1])))
      >>> print(estimate.advantage.round(2))
      [[-1.  1.  1. -1.]]
    """
    if checks.at_least("minimum", minimum, 1) > checks.at_least("buffer", buffer, 1):
        raise ValueError(f"minimum must be at most the buffer of {buffer} rewards, got {minimum}")
    return PerCondition(
        jnp.int32(minimum),
        _clip(clip),
        callable_pytree(_itself if index is None else index, "index (cond -> [B] integers)"),
        checks.at_least("conditions", conditions, 1),
        buffer,
    )


def learnt_baseline(
    model: Any, params: Params, optimizer: Any, *, steps: int = 1, then: Advantage | None = None
) -> LearntBaseline:
    """Subtract a value V(x_t, t, cond) that is regressed on the returns as training goes.

    Args:
      model: params -> V, (x [B, ...], t, cond) -> [B], in the reward's unit.
      params: V's first parameters.
      optimizer: V's own optax transformation.
      steps: V's optimiser steps a batch.
      then: the `Advantage` that the rest is given to; `plain` by default.

    Returns:
      An `Advantage` for `ddpo(advantage=)`; info has value_error, the root mean square error in the reward's unit.

    Raises:
      ValueError: for a model that cannot be called, steps below 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rgdiff.tuners import advantages
      >>> value = lambda c: lambda x, t, cond=None: c + 0 * x[:, 0]
      >>> advantage = advantages.learnt_baseline(value, jnp.float32(2), optax.sgd(0.1))
      >>> reward, path = jnp.array([1.0, 4.0]), jnp.zeros((2, 2, 1))
      >>> returns = advantages.Returns(reward[None], reward, reward > 0, path, jnp.array([1.0, 0.0]), None)
      >>> print(advantage(advantage.init(), returns)[0].advantage)
      [[-1.  2.]]
    """
    return LearntBaseline(
        callable_pytree(model, "model (params -> value)"),
        params,
        Plain() if then is None else then,
        checks.optimizer(optimizer),
        checks.at_least("steps", steps, 1),
    )


def _itself(cond: Cond) -> Cond:
    return cond


def _clip(clip: float | None) -> Array | None:
    return None if clip is None else checks.positive("clip", clip)
