"""Values: callables (x_t, t, cond) -> [B], the expected reward to go in the reward's own unit.

`posterior_mean` makes a value of a reward and a denoiser without training. `learned` takes a network trained by
`rgdiff.tuners.value_regression` or `temporal_difference`; their losses and backups are in this module.
`error_over_time` measures the error of a value at each time. Methods that already hold the denoiser's prediction pass it
to the value (`given`), so that no network is called twice with the same input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks, rewards
from rgdiff.processes import MaskedProcess, ProductProcess
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    DenoiserLike,
    Process,
    Reward,
    RewardLike,
    State,
    Value,
    ValueLike,
    callable_pytree,
    name_of,
    pytree,
    static,
)


def evaluate(value: ValueLike, x: State, t: Array, cond: Cond = None) -> Array:
    """Return value(x, t, cond) as float32 [B]: how every method of this library calls a value.

    Args:
      value: (x, t, cond) -> [B].
      x: the state, leaves [B, ...].
      t: [] or [B].
      cond: conditions, a pytree of [B, ...], or None.

    Raises:
      ValueError: while the program is traced, for anything else than one float per example.
    """
    return checks.per_example(
        f"the value {name_of(value)} must return", value(x, t, cond), jax.tree.leaves(x)[0].shape[0]
    )


@pytree
class PosteriorMean:
    """v(x_t) = r(E[x0 | x_t]). Build it with `posterior_mean`."""

    reward: Reward
    process: Process
    denoiser: Denoiser
    mode: bool = static(default=False)

    def __call__(self, x: State, t: Array, cond: Cond = None) -> Array:
        return self.given(x, t, self.denoiser(x, t, cond), cond)

    def given(self, x: State, t: Array, prediction: State, cond: Cond = None) -> Array:
        """Return the value for a denoiser's prediction at (x, t) that is already known: no network call."""
        if self.mode:
            prediction = _sharpen(self.process, prediction)
        return rewards.evaluate(self.reward, self.process.mean(x, t, prediction), cond)


def _sharpen(process: Process, prediction: State) -> State:
    """Logits whose softmax is one-hot at the most probable token (the first of equals); other parts as they are."""
    if isinstance(process, ProductProcess):
        return {name: _sharpen(part, prediction[name]) for name, part in process.parts.items()}
    if not isinstance(process, MaskedProcess):
        return prediction
    best = jax.nn.one_hot(jnp.argmax(prediction, -1), prediction.shape[-1], dtype=bool)
    return jnp.where(best, 0.0, -jnp.inf)


def _has_tokens(process: Process) -> bool:
    if isinstance(process, ProductProcess):
        return any(_has_tokens(part) for part in process.parts.values())
    return isinstance(process, MaskedProcess)


def posterior_mean(
    reward: RewardLike, process: Process, denoiser: DenoiserLike, *, plug_in: str = "mean"
) -> PosteriorMean:
    """Evaluate the reward at the posterior mean of x0: v(x_t) = r(E[x0 | x_t]) (SVDD-PM, arXiv 2408.08252; DPS, arXiv 2209.14687).

    Args:
      reward: (x0, cond) -> [B].
      process: of the chain.
      denoiser: of the prior. A sampler with this same object computes its prediction once.
      plug_in: `mean`, or `mode` for discrete states: the most probable token at each masked position (the first of
        equally probable ones) in place of a point of the simplex, as in the released SVDD code. In a
        product process it concerns the masked parts; the others keep their mean.

    Returns:
      The value, (x_t, t, cond) -> [B], in the reward's unit.

    Raises:
      ValueError: for an unknown plug-in, or the mode of a process without tokens.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (2,))
      >>> value = rgdiff.values.posterior_mean(lambda x0, cond: x0.sum(-1), process, lambda x, t, cond: 3 * x)
      >>> print(value(jnp.ones((1, 2)), jnp.float32(0.5)))
      [6.]
    """
    checks.noising_process(process, "posterior_mean")
    checks.one_of("plug_in", plug_in, ("mean", "mode"))
    if plug_in == "mode" and not _has_tokens(process):
        raise ValueError("plug_in='mode' is for masked processes; a Gaussian posterior mean needs plug_in='mean'")
    return PosteriorMean(
        callable_pytree(reward, "a reward"), process, callable_pytree(denoiser, "a denoiser"), plug_in == "mode"
    )


@pytree
class Learned:
    """A network (x_t, t, cond) -> [B], [B, 1] or [B, ..., 1] as a value. Build it with `learned`."""

    network: Denoiser

    def __call__(self, x: State, t: Array, cond: Cond = None) -> Array:
        return per_example(self.network(x, t, cond))


def per_example(out: Array) -> Array:
    """Return one number per example; numbers per position are averaged.

    Args:
      out: [B], [B, 1] or [B, ..., 1].

    Returns:
      [B].

    Raises:
      ValueError: for another shape.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(rgdiff.values.per_example(jnp.array([[[1.0], [3.0]]])))
      [2.]
    """
    if out.ndim > 1 and out.shape[-1] != 1:
        raise ValueError(f"the network must return [B], [B, 1] or one number a position, got {list(out.shape)}")
    return jnp.mean(out.reshape(out.shape[0], -1), -1)


@pytree
class AtTime:
    """A value at one fixed time, as a reward or an energy of that time's states: (x, cond) -> v(x, time, cond).

    Args:
      value: (x, t, cond) -> [B].
      time: t, a scalar.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> reward = rgdiff.values.AtTime(lambda x, t, cond: t * x.sum(-1), jnp.float32(0.5))
      >>> print(reward(jnp.ones((1, 2))))
      [1.]
    """

    value: Value
    time: Array

    def __call__(self, x0: State, cond: Cond = None) -> Array:
        return evaluate(self.value, x0, self.time, cond)


@pytree
class EndsAtReward:
    """The value for t > 0 and the reward itself at t = 0, the end of a masked chain. Build it with `learned(..., reward, process)`."""

    value: Value
    reward: Reward
    process: Process

    def __call__(self, x: State, t: Array, cond: Cond = None) -> Array:
        value = lambda: evaluate(self.value, x, t, cond).astype(jnp.float32)  # noqa: E731
        at_end = lambda: rewards.evaluate(self.reward, self.process.finalize(x, t, None), cond).astype(jnp.float32)  # noqa: E731
        return jax.lax.cond(t > 0, value, at_end) if jnp.ndim(t) == 0 else jnp.where(t > 0, value(), at_end())


def learned(network: DenoiserLike, reward: RewardLike | None = None, process: Process | None = None) -> Value:
    """Make a value of a network (SVDD-MC, arXiv 2408.08252).

    Args:
      network: one number per example, or one per position, which are averaged: `nets.ValueMLP()` for any state,
        `nets.ConvNet1D(out=1, time_conditioning=True)` for sequences.
      reward, process: for a masked process, whose chain reaches t = 0: the last selection then uses the reward itself.

    Returns:
      The value, (x_t, t, cond) -> [B], in the reward's unit.

    Raises:
      ValueError: for a reward without a process, or with a process that is not masked.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> value = rgdiff.values.learned(lambda x, t, cond: x)  # one number a position: [B, L, 1]
      >>> print(value(jnp.array([[[1.0], [3.0]]]), jnp.float32(0.5)))
      [2.]
    """
    value = Learned(callable_pytree(network, "a value network"))
    if reward is None:
        return value
    if process is None or checks.noising_process(process, "learned(network, reward=...)").projects:
        raise ValueError(
            "learned(network, reward=...) is for masked processes and needs process=; leave reward out otherwise"
        )
    return EndsAtReward(value, callable_pytree(reward, "a reward"), process)


def backup(values: Array, temperature: Array | float | None = None) -> Array:
    """Compute the soft Bellman backup of M next states' values: tau log (1/M) sum_m exp(v_m / tau) (arXiv 2408.08252, §3).

    Args:
      values: v [M, B], in the reward's unit. NaN values are left out.
      temperature: tau, in the reward's unit; None takes the plain mean.

    Returns:
      [B], in the reward's unit; NaN where a column has no number.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> print(f"{rgdiff.values.backup(jnp.log(jnp.array([[1.0], [3.0]])), 1.0)[0]:.4f}")  # log((1 + 3) / 2)
      0.6931
    """
    known = ~jnp.isnan(values)
    count = jnp.sum(known, 0)
    if temperature is None:
        return jnp.sum(jnp.where(known, values, 0.0), 0) / count
    best = jnp.nanmax(values, 0)
    gaps = jnp.where(values == best, 0.0, (values - best) / temperature)  # equal infinities are no gap
    return best + temperature * jnp.log(jnp.sum(jnp.where(known, jnp.exp(gaps), 0.0), 0) / count)


def regression_loss(
    value: Array, target: Array, temperature: Array | float | None = None, bound: Array | float = 10.0
) -> Array:
    """Compute the loss of a value f against targets y, elementwise: (y - f)^2, or 2 tau^2 (e^z - z - 1) with z = (y - f) / tau.

    Without a temperature the minimiser is E[y]. With tau the loss is continued along its tangent beyond z = bound. It is the
    Itakura-Saito divergence of exp(f/tau) from exp(y/tau), also known as LINEX and as Gumbel regression (arXiv
    2301.02328). It is convex in f, tends to (y - f)^2 as tau grows, and its slope 2 tau (1 - E min(e^z, e^bound))
    vanishes where E e^z = 1: at f = tau log E exp(y/tau), the soft value, exactly if y <= f + bound tau almost surely.
    E e^z = 1 itself bounds e^z by one over the outcome's probability, so that every outcome y of conditional probability
    at least e^-bound counts in full; rarer and larger ones are bounded, and the minimiser lies below the soft value.

    Args:
      value: f, any shape, in the reward's unit.
      target: y, the same shape, finite.
      temperature: tau in the reward's unit.
      bound: in nats; the slope is at most 2 tau e^bound, so nothing overflows whatever y / tau is.

    Returns:
      The loss, the shape of f, in the reward's unit squared.

    Note:
      arXiv 2408.08252 (algorithm 3) writes {exp(y/tau) - exp(f/tau)}^2. It has the same minimiser, overflows at
      y/tau = 45 in float32, and has no gradient where exp(f/tau) is small: its slope over exp(2 f/tau) is ours.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> loss = rgdiff.values.regression_loss(jnp.float32(0.0), jnp.float32(1.0), temperature=1.0)
      >>> print(f"{loss:.4f}")  # 2 (e - 2)
      1.4366
    """
    if temperature is None:
        return (target - value) ** 2
    z = (target - value) / temperature
    near = jnp.minimum(z, bound)
    return 2 * temperature**2 * (jnp.expm1(near) - near + jnp.expm1(bound) * jnp.maximum(z - bound, 0.0))


class ErrorOverTime(NamedTuple):
    """Errors of a value at each time of a grid, [T + 1] each; see `error_over_time`."""

    times: Array
    mse: Array
    explained: Array
    bias: Array
    exact: Array | None


def error_over_time(
    value: ValueLike,
    times: Array,
    rollouts: Any,
    *,
    temperature: Array | float | None = None,
    exact: ValueLike | None = None,
) -> ErrorOverTime:
    """Measure the errors of a value on held-out rollouts, at each time.

    Args:
      value: (x, t, cond) -> [B].
      times: [T + 1] of the rollouts.
      rollouts: as `rgdiff.tuners.rollouts` returns them, not those the value was trained on.
      temperature: of a soft value, in the reward's unit.
      exact: a value to compare with, where one is known.

    Returns:
      mse: mean of (r - v)^2, reward squared. It contains the reward's own variance given x_t, which no value removes.
      explained: 1 - mse / Var r, the part of the reward's variance that the value explains (NaN for a constant reward).
      bias: mean of r - v, or tau log mean exp((r - v)/tau) with a temperature: 0 for the exact value of its kind, up to
        sampling error. Reward's unit.
      exact: mean of (v - exact)^2, reward squared, or None.

      All over examples whose reward is finite.

    Raises:
      ValueError: for times of another length than the rollouts'.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> rollouts = {"path": jnp.zeros((4, 2, 1)), "reward": jnp.array([0.0, 0.0, 2.0, 2.0])}  # B = 4, T + 1 = 2
      >>> errors = rgdiff.values.error_over_time(lambda x, t, cond: 1 - t + x[:, 0], [1.0, 0.0], rollouts)
      >>> print(errors.mse, errors.bias)  # v = 0, then 1
      [2. 1.] [1. 0.]
    """
    times = jnp.asarray(times, jnp.float32)
    path, reward = rollouts["path"], rollouts["reward"]
    length = jax.tree.leaves(path)[0].shape[1]
    if times.shape != (length,):
        raise ValueError(f"times must be those of the rollouts, [{length}], got shape {list(times.shape)}")
    reward = checks.per_example("rollouts['reward'] must hold", reward, jax.tree.leaves(path)[0].shape[0])
    exact = None if exact is None else callable_pytree(exact, "an exact value")
    return _errors(callable_pytree(value, "a value"), times, path, reward, rollouts.get("cond"), temperature, exact)


@jax.jit
def _errors(
    value: Value, times: Array, path: State, reward: Array, cond: Cond, temperature: Any, exact: Value | None
) -> ErrorOverTime:
    feasible = jnp.isfinite(reward)
    mean = lambda e: jnp.sum(jnp.where(feasible, e, 0.0)) / jnp.sum(feasible)  # noqa: E731
    variance = mean((reward - mean(reward)) ** 2)

    def at(where: tuple[Array, State]) -> tuple[Array, ...]:
        t, x = where
        v = evaluate(value, x, t, cond)
        mse, bias = mean((reward - v) ** 2), backup(jnp.where(feasible, reward - v, jnp.nan)[:, None], temperature)[0]
        return mse, bias, mse if exact is None else mean((v - evaluate(exact, x, t, cond)) ** 2)

    mse, bias, off = jax.lax.map(at, (times, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), path)))
    explained = jnp.where(variance > 0, 1 - mse / variance, jnp.nan)
    return ErrorOverTime(times, mse, explained, bias, None if exact is None else off)
