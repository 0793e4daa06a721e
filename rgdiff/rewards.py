"""Rewards: callables (x0, cond) -> [B] in the reward's own unit, and how host functions and sums become one.

NaN marks an infeasible sample; it is counted and reported by the method that uses it, never averaged. Every method calls
a reward through `evaluate`, which refuses what is not one float per example while a program is traced. What a function of
the host raises reaches the caller of `sample`, `fit` and `score` (`failures`). Nothing here knows a domain, and no
temperature lives here: it belongs to the method.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rgdiff import checks
from rgdiff.typing import Array, Cond, Function, Reward, RewardLike, State, callable_pytree, name_of, pytree, static


class RewardFailure(ValueError):
    """A reward raised, or returned something else than one number per sample.

    `state` and `step` are those of a training loop before what failed: the same call continues from them.
    """

    def __init__(self, message: str, state: Any = None, step: int | None = None):
        super().__init__(message)
        self.state, self.step = state, step


NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def evaluate(reward: RewardLike, x0: State, cond: Cond = None) -> Array:
    """Return reward(x0, cond) as float32 [B]: how every method of this library calls a reward, inside its programs.

    Args:
      reward: (x0, cond) -> [B].
      x0: samples, leaves [B, ...].
      cond: conditions, a pytree of [B, ...], or None.

    Raises:
      RewardFailure: while the program is traced, where the reward raises, needs NumPy or the numbers themselves, or returns
        something else than one float per example.
    """
    name, batch = name_of(reward), jax.tree.leaves(x0)[0].shape[0]
    try:
        out = reward(x0, cond)
    except RewardFailure:
        raise
    except NOT_TRACEABLE as error:
        raise RewardFailure(
            f"the reward {name} needs numbers that a compiled program does not have ({type(error).__name__}): write it in jax.numpy "
            "without `if` on values, or make it a black box with rewards.from_host(fn) (reward.host=true)"
        ) from error
    except Exception as error:
        given = ", ".join(str(list(jnp.shape(leaf))) for leaf in jax.tree.leaves(x0))
        raise RewardFailure(f"the reward {name} raised {_told(error)}; it was given x0 {given}") from error
    try:
        return checks.per_example(f"the reward {name} must return", out, batch)
    except ValueError as error:
        raise RewardFailure(str(error)) from None


def score(reward: RewardLike, x0: State, cond: Cond = None) -> Array:
    """Return the rewards [B] of samples outside of any program: compiled, and with what a host reward raises.

    Args:
      reward: (x0, cond) -> [B].
      x0: samples, leaves [B, ...].
      cond: conditions, a pytree of [B, ...], or None.

    Raises:
      RewardFailure: as `evaluate`, and where a host reward raises.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(rgdiff.rewards.score(lambda x0, cond=None: x0.sum(-1), jnp.array([[1.0, 2.0]])))
      [3.]
    """
    reward = callable_pytree(reward, "a reward")
    with failures(reward) as settle:
        return settle(_score(reward, x0, cond))


_score = jax.jit(evaluate)


@pytree
class HostReward:
    """A NumPy function behind a callback; what it raises becomes NaN, so that a compiled loop runs to its end, where it is raised."""

    function: Callable[..., Any] = static()
    infeasible: float | None = static(default=None)  # in place of NaN

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        batch = jax.tree.leaves(x0)[0].shape[0]
        out = jax.ShapeDtypeStruct((batch,), jnp.float32)
        x0 = jax.lax.stop_gradient(x0)
        return jax.pure_callback(self._on_host, out, x0, cond, vmap_method="sequential")

    def answers(self, x0: State, cond: Cond = None) -> np.ndarray:
        """Return the function's values [B] outside of compiled code, where an exception reaches the caller."""
        values = self.function(jax.tree.map(np.asarray, x0), cond)
        batch = jax.tree.leaves(x0)[0].shape[0]
        if isinstance(values, tuple) and [np.shape(part) for part in values] == [(batch,)] * 2:
            values = np.where(np.asarray(values[1], bool), values[0], np.nan)
        values = np.asarray(values, np.float32)
        if values.shape != (batch,):
            raise ValueError(f"a reward must return one number per sample, [{batch}], got {list(values.shape)}")
        return values if self.infeasible is None else np.where(np.isnan(values), np.float32(self.infeasible), values)

    def _on_host(self, x0: State, cond: Cond) -> np.ndarray:
        heard = _listening[-1] if _listening else None
        if not heard:  # a driver that has heard of a failure stops at its next chunk: no more is asked
            try:
                return self.answers(x0, cond)
            except Exception as error:  # noqa: BLE001 - the contract: a failing oracle marks its batch infeasible
                if heard is not None:
                    heard.append(error)
        return np.full(jax.tree.leaves(x0)[0].shape[0], np.nan, np.float32)


_listening: list[list[Exception]] = []  # what host rewards raised under each driver that runs, the innermost last


@contextlib.contextmanager
def failures(*methods: Any) -> Iterator[Callable[..., Any]]:
    """Listen for what host rewards raise while a driver runs a program of these methods.

    Gives settle(results, state=None, step=None): it waits for the results where a method holds a host reward, raises
    RewardFailure with the first failure if there was one, and returns the results.

    Args:
      methods: samplers, tuners, values or rewards.
    """
    heard: list[Exception] = []
    waits = bool(host_rewards(methods))

    def settle(results: Any, state: Any = None, step: int | None = None) -> Any:
        if waits and not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(results)):
            jax.block_until_ready(results)
        if heard:
            raise failed(heard[0], state, step) from heard[0]
        return results

    _listening.append(heard)
    try:
        yield settle
    finally:
        _listening[:] = [one for one in _listening if one is not heard]


def failed(error: Exception, state: Any = None, step: int | None = None) -> RewardFailure:
    """Return the failure of a host reward as the user reads it.

    Args:
      error: what the reward raised.
      state: from which the caller can continue, or None.
      step: its number.
    """
    where, go_on = "", ""
    if state is not None:
        where, go_on = f" at step {step}", ", and continue from the state of this exception"
    return RewardFailure(f"the reward raised {_told(error, where)}; mark infeasible samples by NaN{go_on}", state, step)


def _told(error: Exception, where: str = "") -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{where}{': ' if text else ''}{text}"


def host_rewards(tree: Any) -> list[HostReward]:
    """Return the host rewards in a reward, a value or a method.

    Args:
      tree: a pytree.
    """
    parts = jax.tree.leaves(tree, is_leaf=lambda part: isinstance(part, HostReward))
    return [part for part in parts if isinstance(part, HostReward)]


def from_host(function: Callable[..., Any]) -> Reward:
    """Make a black-box host function a reward that works inside compiled code. It has no gradient.

    Args:
      function: (x0 as NumPy [B, ...], cond) -> values [B], or (values [B], valid bool [B]).

    Returns:
      The reward, (x0, cond) -> [B], without a gradient. NaN marks an infeasible sample. Where the function raises, or returns
      something else than B numbers, `samplers.sample`, `tuners.fit` and `rewards.score` raise RewardFailure with its text;
      inside a program of your own its whole batch is infeasible. Hand the result itself to a constructor: within another
      function nobody sees that it is a black box.

    Raises:
      ValueError: for something that cannot be called.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, rgdiff
      >>> reward = rgdiff.rewards.from_host(lambda x0, cond: np.linalg.norm(x0, axis=-1))
      >>> print(jax.jit(reward)(jnp.array([[3.0, 4.0]])))
      [5.]
    """
    if isinstance(function, HostReward):
        return function
    if not callable(function):
        raise ValueError(f"from_host expects a function (x0, cond) -> [B], got {function!r}")
    plain = callable_pytree(function, "a reward") if jax.tree.leaves(function) == [function] else None
    return HostReward(plain.function if isinstance(plain, Function) else function)


@pytree
class WhereValid:
    """A reward whose function says which samples are valid. Build it with `where_valid`."""

    function: Any

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        values, valid = self.function(x0, cond)
        return jnp.where(valid, values, jnp.nan)


def where_valid(function: Callable[..., Any]) -> Reward:
    """Make a reward of a function that says which samples are valid; the others are NaN, infeasible.

    Args:
      function: (x0, cond) -> (values [B], valid bool [B]), in JAX.

    Returns:
      The reward, (x0, cond) -> [B].

    Raises:
      ValueError: for something that cannot be called.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> reward = rgdiff.rewards.where_valid(lambda x0, cond: (x0[:, 0], x0[:, 0] > 0))
      >>> print(reward(jnp.array([[2.0], [-1.0]])))
      [ 2. nan]
    """
    return WhereValid(callable_pytree(function, "a function of samples"))


def differentiable(what: str, reward: Any) -> None:
    """Refuse a reward, or a value made of one, that contains a black box: its gradient would be 0 without a warning.

    Args:
      what: name of the method that needs the gradient.
      reward: a reward or a value.

    Raises:
      ValueError: for a black box.
    """
    if host_rewards(reward):
        raise ValueError(
            f"{what} needs the reward's gradient, which a black box does not have; "
            "take svdd, smc, best_of_n, a learned value, ddpo or another online method"
        )


@pytree
class Decoded:
    """A reward on what a decoder makes of the samples; see `decoded`."""

    reward: Reward
    decode: Any
    remat: bool = static()

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        decode = jax.checkpoint(self.decode) if self.remat else self.decode
        return evaluate(self.reward, decode(x0), cond)


def decoded(reward: RewardLike, decode: Callable[[State], State], *, remat: bool = True) -> Reward:
    """Make a reward on pixels one on latents: r(decode(x0), cond), differentiable through the decoder.

    Args:
      reward: (decoded [B, ...], cond) -> [B].
      decode: callable pytree, latents [B, ...] -> [B, ...]. Its parameters, if leaves, may change without a recompilation.
      remat: compute the decoder again in the backward pass, so that none of its activations is kept while the reward's are;
        an image decoder's are some GiB a picture.

    Returns:
      The reward, (x0, cond) -> [B].

    Raises:
      ValueError: for something that cannot be called.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> reward = rgdiff.rewards.decoded(lambda x, cond: x.mean(-1), lambda latents: 2 * latents)
      >>> print(reward(jnp.array([[1.0, 2.0]])))
      [3.]
    """
    return Decoded(callable_pytree(reward, "a reward"), callable_pytree(decode, "a decoder"), remat)


@pytree
class WeightedSum:
    """sum_i weight_i reward_i; infeasible for any part is infeasible."""

    rewards: tuple[Reward, ...]
    weights: Array

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        values = jnp.stack([evaluate(reward, x0, cond) for reward in self.rewards])
        return jnp.tensordot(self.weights, values, 1)


def weighted_sum(
    rewards: list[RewardLike] | tuple[RewardLike, ...], weights: list[float] | tuple[float, ...]
) -> Reward:
    """Add rewards with weights: r(x0) = sum_i w_i r_i(x0). A sample that is infeasible (NaN) for one is infeasible.

    Args:
      rewards: r_i, each (x0, cond) -> [B].
      weights: w_i, one per reward; they may change without a recompilation.

    Returns:
      The reward, (x0, cond) -> [B].

    Raises:
      ValueError: for another number of weights than of rewards.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> first, second = lambda x0, cond: x0[:, 0], lambda x0, cond: x0[:, 1]
      >>> print(rgdiff.rewards.weighted_sum([first, second], [1.0, 2.0])(jnp.array([[1.0, 3.0]])))
      [7.]
    """
    if len(rewards) != len(weights) or not rewards:
        raise ValueError(f"weighted_sum expects as many weights as rewards, got {len(weights)} and {len(rewards)}")
    return WeightedSum(tuple(callable_pytree(r, "a reward") for r in rewards), jnp.asarray(weights, jnp.float32))


@pytree
class RewardProduct:
    """prod_i reward_i; see `product`."""

    rewards: tuple[Reward, ...]

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        return jnp.prod(jnp.stack([evaluate(reward, x0, cond) for reward in self.rewards]), 0)


def product(rewards: list[Reward] | tuple[Reward, ...]) -> Reward:
    """Multiply rewards: r(x0) = prod_i r_i(x0). A sample that is infeasible (NaN) for one is infeasible.

    Args:
      rewards: r_i, each (x0, cond) -> [B], at least one; those above 0 keep the order of the others.

    Returns:
      The reward, (x0, cond) -> [B].

    Raises:
      ValueError: without a reward.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> first, second = lambda x0, cond: x0[:, 0], lambda x0, cond: x0[:, 1]
      >>> print(rgdiff.rewards.product([first, second])(jnp.array([[2.0, 3.0]])))
      [6.]
    """
    if not rewards:
        raise ValueError("product needs at least one reward")
    return RewardProduct(tuple(callable_pytree(r, "a reward") for r in rewards))


@pytree
class Threshold:
    """Whether a reward is between two numbers; see `threshold`."""

    reward: Reward
    low: Array
    high: Array
    width: Array
    sharp: bool = static()

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        value = evaluate(self.reward, x0, cond)
        if self.sharp:
            inside = (value >= self.low) & (value <= self.high)
            return jnp.where(jnp.isnan(value), jnp.nan, inside.astype(jnp.float32))
        return jax.nn.sigmoid((value - self.low) / self.width) * jax.nn.sigmoid((self.high - value) / self.width)


def threshold(reward: Reward, low: float | None = None, high: float | None = None, *, width: float = 0.0) -> Reward:
    """Make a reward of whether another is between low and high: 1 inside and 0 outside, to be multiplied or added.

    Args:
      reward: (x0, cond) -> [B]. A sample that is infeasible (NaN) stays so.
      low, high: in the reward's unit, both inside; None for no limit. They may change without a recompilation.
      width: 0, or that of the logistic slopes sigmoid((r - low) / width) sigmoid((high - r) / width) in the reward's unit, which
        have a gradient.

    Returns:
      The reward, (x0, cond) -> [B].

    Raises:
      ValueError: without a limit, for limits in the wrong order, or a negative width.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> first, second = lambda x0, cond: x0[:, 0], lambda x0, cond: x0[:, 1]
      >>> both = rgdiff.rewards.product([first, rgdiff.rewards.threshold(second, low=1.0)])
      >>> print(both(jnp.array([[2.0, 3.0], [2.0, 0.5]])))
      [2. 0.]
    """
    if low is None and high is None:
        raise ValueError("threshold needs low, high, or both")
    if low is not None and high is not None and low > high:
        raise ValueError(f"threshold: low={low} is above high={high}")
    return Threshold(
        callable_pytree(reward, "a reward"),
        jnp.float32(-jnp.inf if low is None else low),
        jnp.float32(jnp.inf if high is None else high),
        checks.positive("width", width, zero=True),
        bool(width == 0),
    )


@pytree
class WhereInfeasible:
    """A reward with a value where another is NaN; see `where_infeasible`."""

    reward: Reward
    value: Array

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        reward = evaluate(self.reward, x0, cond)
        return jnp.where(jnp.isnan(reward), self.value, reward)


def where_infeasible(reward: RewardLike, value: float) -> Reward:
    """Make a reward that has a value where another is infeasible (NaN), so that a policy learns to make fewer such samples.

    Without it policy gradients, DRAKES and surrogates leave infeasible samples out of their estimates: nothing asks for fewer.

    Args:
      reward: (x0, cond) -> [B]; one of `from_host` stays one.
      value: of infeasible samples, in the reward's unit, at most its lowest value.

    Returns:
      The reward, (x0, cond) -> [B]. It is for methods that use no gradient: that of an infeasible sample may be NaN still.

    Raises:
      ValueError: for a value that is no finite number.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> root = lambda x0, cond: jnp.sqrt(x0[:, 0])
      >>> print(rgdiff.rewards.where_infeasible(root, -1.0)(jnp.array([[4.0], [-4.0]])))
      [ 2. -1.]
    """
    reward = callable_pytree(reward, "a reward")
    if not isinstance(value, Tracer) and not np.isfinite(np.asarray(value, np.float32)):
        raise ValueError(f"the value of infeasible samples must be a finite number, got {value!r}")
    if isinstance(reward, HostReward):
        return dataclasses.replace(reward, infeasible=float(value))
    return WhereInfeasible(reward, jnp.float32(value))


@pytree
class Ensemble:
    """Several rewards of one quantity, reduced to one. Build it with `ensemble`."""

    rewards: tuple[Reward, ...]
    caution: Array
    reduce: str = static()

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        values = jnp.stack([evaluate(reward, x0, cond) for reward in self.rewards])
        if self.reduce == "min":
            # Not jnp.min: its derivative divides by how many values equal it, none where XLA rounds one twice.
            return jnp.take_along_axis(values, jnp.argmin(values, 0)[None], 0)[0]
        mean = jnp.mean(values, 0)
        if self.reduce == "mean":
            return mean
        spread = jnp.mean((values - mean) ** 2, 0)
        return mean - self.caution * jnp.sqrt(jnp.where(spread > 0, spread, 1.0)) * (spread > 0)


def ensemble(
    rewards: list[RewardLike] | tuple[RewardLike, ...], reduce: str = "mean", *, caution: float = 1.0
) -> Reward:
    """Reduce rewards that were trained apart to one, so that a tuner exploits the errors of no single one.

    Args:
      rewards: each (x0, cond) -> [B]. A sample that is infeasible (NaN) for one is infeasible.
      reduce: `mean`, `min`, or `lower`: mean - caution * standard deviation over the rewards.
      caution: of `lower`, >= 0, without unit; it may change without a recompilation.

    Returns:
      The reward, (x0, cond) -> [B].

    Raises:
      ValueError: without a reward, for an unknown reduction, or a negative caution.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> first, second = lambda x0, cond: x0[:, 0], lambda x0, cond: x0[:, 1]
      >>> print(rgdiff.rewards.ensemble([first, second], "lower")(jnp.array([[1.0, 3.0]])))  # 2 - 1
      [1.]
    """
    if not rewards:
        raise ValueError("ensemble needs at least one reward")
    checks.one_of("reduce", reduce, ("mean", "min", "lower"))
    rewards = tuple(callable_pytree(r, "a reward") for r in rewards)
    return Ensemble(rewards, checks.positive("caution", caution, zero=True), reduce)


class Task(NamedTuple):
    """The objective of a run and its evaluation.

    Args:
      reward: the guiding reward, (x0, cond) -> [B].
      heldout: a reward that guides nothing and evaluates the samples.
      target: the class that is aimed at, or None.
      measure: x0 -> dict of numbers that are reported beside the reward, or None.
      conditional: whether the reward depends on the condition that a sample was drawn with.
    """

    reward: Reward
    heldout: Reward
    target: int | None = None
    measure: Callable[[State], dict[str, Array]] | None = None
    conditional: bool = False

    def through(self, decode: Callable[[State], State] | None) -> Task:
        """Return the task on states whose pictures, or whatever `decode` makes of them, both rewards see; None changes nothing."""
        if decode is None:
            return self
        return self._replace(reward=decoded(self.reward, decode), heldout=decoded(self.heldout, decode))


def custom(fn: Callable[..., Any], heldout_fn: Callable[..., Any] | None = None, host: bool = False) -> Task:
    """Make a task of a user's function.

    Args:
      fn: (x0 [B, ...], cond) -> [B]: in JAX, or in NumPy with host=True.
      heldout_fn: a function of the same form that evaluates the samples. Without one they are evaluated by the reward that
        guided them, and over-optimisation is not seen.
      host: whether the functions run on the host; they then have no gradient.

    Returns:
      The task.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> task = rgdiff.rewards.custom(lambda x0, cond: x0.sum(-1))
      >>> print(task.reward(jnp.ones((1, 2)), None), task.heldout(jnp.ones((1, 2)), None))
      [2.] [2.]
    """
    reward = from_host(fn) if host else callable_pytree(fn, "a reward")
    judge = heldout_fn or fn
    return Task(reward, from_host(judge) if host else callable_pytree(judge, "a reward"))


def check(reward: RewardLike, x0: State, cond: Cond = None) -> None:
    """Refuse, before any compilation, a reward that does not map this state to float [B].

    Args:
      reward: (x0, cond) -> [B].
      x0: a state, or its shapes, leaves [B, ...].
      cond: conditions, a pytree of [B, ...], or None.

    Raises:
      ValueError: for another shape or type.
    """
    jax.eval_shape(lambda x, c: evaluate(reward, x, c), x0, cond)
