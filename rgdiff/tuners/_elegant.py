"""ELEGANT: reward gradients with a path KL in Gaussian chains, with the law of x_T learnt as well (arXiv 2402.15194).

With x_T drawn from the prior the tuned chain is tilted given x_T only, and its samples miss p(x0) exp(r(x0)/alpha)/Z by
what x_T tells of x0. The paper solves two entropic problems: the value v(x_T) = alpha log E[exp(r(x0)/alpha) | x_T] is
learnt by regression and a second chain draws x_T proportional to p(x_T) exp(v(x_T)/alpha); the main chain starts from there.

In continuous time the pair then has the law p(x0) exp(r(x0)/alpha)/Z. In T moves it does not quite: both chains move means
and leave variances, which costs about 1/T of the law (see `rgdiff.tuners.reward_backprop` for numbers).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.processes import GaussianProcess, InitialProcess, along, started_from
from rgdiff.tuners._reward_backprop import RewardBackprop, reward_backprop
from rgdiff.tuners.value_learning import ValueLearning, value_regression
from rgdiff.typing import Array, Cond, Denoiser, Model, Params, Process, Reward, State, Value, callable_pytree, pytree
from rgdiff.values import AtTime


@pytree
class StandardNormal:
    """E[x0 | x_t] of standard normal data: alpha x / (alpha^2 + sigma^2), exact."""

    process: GaussianProcess

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        alpha, sigma = along(self.process.schedule.alpha(t), x), along(self.process.schedule.sigma(t), x)
        return alpha * x / (alpha**2 + sigma**2)


def standard_normal(process: GaussianProcess) -> Denoiser:
    """Return the exact denoiser of standard normal data: what `initial_tuner` begins with and is held to."""
    return StandardNormal(checks.noising_process(process, "standard_normal"))


@pytree
class Shifted:
    """params -> the exact denoiser of standard normal data plus the network's output."""

    model: Model
    base: Denoiser

    def __call__(self, params: Params) -> Denoiser:
        return _Sum(self.base, callable_pytree(self.model(params), "a denoiser"))


@pytree
class _Sum:
    base: Denoiser
    change: Denoiser

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        return self.base(x, t, cond) + self.change(x, t, cond)


@setting_of(value_regression, fixed=("temperature",))
def initial_value(
    model: Any, process: Process, times: Array, optimizer: Any, *, temperature: float, **options: Any
) -> ValueLearning:
    """Learn v(x_T) = alpha log E[exp(r(x0)/alpha) | x_T] by regression on rollouts of the prior.

    `value_regression` at the first time alone; data are {"path": path[:, :1], "reward": reward} of `rollouts`.
    """
    return value_regression(model, process, optimizer, temperature=temperature, times=jnp.asarray(times)[:1], **options)


@setting_of(reward_backprop, fixed=("reference",))
def initial_tuner(
    model: Model,
    initial: InitialProcess,
    value: Value,
    times: Array,
    optimizer: Any,
    *,
    temperature: float,
    time: Array | float = 1.0,
    **options: Any,
) -> RewardBackprop:
    """Tune the chain that draws x_T: E[v(x_T)] - alpha * path KL to the chain that draws the prior's.

    Args:
      model: params -> network whose output is added to the exact denoiser of the prior; begin with one that returns zeros.
      initial: from `processes.initial_law`.
      value: v(x_T, t, cond), from `initial_value`.
      times: of `initial.times(steps)`.
      time: the first time of the main chain, at which the value is taken.

    Note:
      The optimum is near p(x_T) exp(v(x_T)/alpha)/Z, off by about 1/T of its T moves, whose variances stay as they are.
    """
    base = standard_normal(initial)
    reward = AtTime(callable_pytree(value, "a value"), jnp.asarray(time, jnp.float32))
    shifted = Shifted(callable_pytree(model, "model (params -> network)"), base)
    return reward_backprop(
        shifted, initial, reward, times, optimizer, reference=base, temperature=temperature, **options
    )


@setting_of(reward_backprop)
def elegant(
    model: Model,
    process: GaussianProcess,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    reference: Denoiser,
    temperature: float,
    initial: Any,
    **options: Any,
) -> RewardBackprop:
    """ELEGANT's main chain: E[r(x0)] - alpha * path KL from a learnt initial law (arXiv 2402.15194).

    Args:
      process: eta > 0.
      temperature: alpha. The optimum is near p(x0) exp(r(x0)/alpha) / Z, p the law of the prior's chain, and not at it: moves
        keep their variances. For N(0, 1), r = -(x - 1)^2 and alpha = 1 on `linear_vp`: mean .571, variance .221 for
        .523, .262 at T = 10; .649, .330 for .648, .324 at T = 100.
      initial: draw(key, batch) -> x_T, e.g. `samplers.drawing(ancestral(initial_process, tuned), initial_times)`, or None
        for the prior's own, which leaves the bias of a frozen initial law. Sample with `tuner.process`, which holds it.

    Note:
      The tutorial code keeps the prior's law of x_T, sets the KL's weight to zero, and weighs it by g^3 where Girsanov has
      g^2. `info["kl"]` is the main chain's; the path KL of the pair adds that of `initial_tuner`.
    """
    if initial is not None:
        process = started_from(process, initial)
    return reward_backprop(
        model, process, reward, times, optimizer, reference=reference, temperature=temperature, **options
    )
