"""ELEGANT: reward gradients with a path KL in Gaussian chains, with the law of x_T learnt as well (arXiv 2402.15194).

With x_T drawn from the prior the tuned chain is tilted given x_T only, and its samples miss p(x0) exp(r(x0)/alpha)/Z by
the information that x_T has of x0. The paper solves two entropic problems: the value v(x_T) = alpha log E[exp(r(x0)/alpha) | x_T]
is learnt by regression and a second chain draws x_T proportional to p(x_T) exp(v(x_T)/alpha); the main chain starts from there.

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
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    DenoiserLike,
    Model,
    Params,
    Process,
    RewardLike,
    State,
    ValueLike,
    callable_pytree,
    pytree,
)
from rgdiff.values import AtTime


@pytree
class StandardNormal:
    """E[x0 | x_t] of standard normal data: alpha x / (alpha^2 + sigma^2), exact."""

    process: GaussianProcess

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        alpha, sigma = along(self.process.schedule.alpha(t), x), along(self.process.schedule.sigma(t), x)
        return alpha * x / (alpha**2 + sigma**2)


def standard_normal(process: GaussianProcess) -> Denoiser:
    """Return the exact denoiser of standard normal data, which `initial_tuner` begins with and has as its reference.

        E[x0 | x_t] = alpha x_t / (alpha^2 + sigma^2)

    Args:
      process: Gaussian, on states [B, ...].

    Returns:
      A denoiser (x [B, ...], t, cond) -> [B, ...], a callable pytree.

    Raises:
      ValueError: for an argument that is no noising process.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (2,))
      >>> denoiser = rgdiff.tuners.standard_normal(process)
      >>> print(denoiser(jnp.ones((1, 2)), jnp.float32(0.0)))  # at t = 0 the state is the data
      [[1. 1.]]
    """
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
    """Learn v(x_T) = temperature * log E[exp(r(x0)/temperature) | x_T] by regression on rollouts of the prior.

    This is `value_regression` at the first time alone. Data for `fit` are {"path": path[:, :1], "reward": reward} of `rollouts`.

    Args:
      times: the grid [T + 1] of the main chain, of which times[0] is used.
      temperature: alpha, in the reward's unit; that of the main chain.

    Returns:
      A tuner for `fit(data=...)`; `model(state.best)` is the value (x, t, cond) -> [B] for `initial_tuner`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> data = {"path": jnp.zeros((8, 1, 1)), "reward": jnp.full(8, 0.5)}  # x_T and rewards of 8 chains
      >>> model = lambda c: lambda x, t, cond=None: c + 0 * x[:, 0]
      >>> tuner = rgdiff.tuners.initial_value(model, process, process.times(4), optax.adam(0.05), temperature=1.0)
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.float32(0)), 200, data=data, batch=8)
      >>> print(f"{state.params:.1f}")
      0.5
    """
    return value_regression(model, process, optimizer, temperature=temperature, times=jnp.asarray(times)[:1], **options)


@setting_of(reward_backprop, fixed=("reference",))
def initial_tuner(
    model: Model,
    initial: InitialProcess,
    value: ValueLike,
    times: Array,
    optimizer: Any,
    *,
    temperature: float,
    time: Array | float = 1.0,
    **options: Any,
) -> RewardBackprop:
    """Tune the chain that draws x_T: maximise E[v(x_T)] - temperature * path KL to the chain that draws the prior's x_T.

    The optimum is near p(x_T) exp(v(x_T)/temperature)/Z, off by about 1/T of its T moves, whose variances stay as they are.

    Args:
      model: params -> network (x [B, ...], t, cond) -> [B, ...], whose output is added to the exact denoiser of the prior; begin
        with parameters that return zeros.
      initial: the process of x_T, from `processes.initial_law`.
      value: v (x_T, t, cond) -> [B], from `initial_value`, in the reward's unit.
      times: the grid of this chain, from `initial.times(steps)`.
      temperature: alpha, in the reward's unit per nat.
      time: the first time of the main chain, at which the value is evaluated.

    Returns:
      A tuner for `fit`; `tuner.model(state.best)` is the denoiser of the chain that draws x_T, as `reward_backprop` otherwise.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> schedule = rgdiff.schedules.cosine_vp()
      >>> law = rgdiff.processes.initial_law(rgdiff.processes.gaussian(schedule, (1,)), schedule)
      >>> model = lambda w: lambda x, t, cond=None: schedule.sigma(t) ** 2 * w + 0 * x
      >>> tuner = rgdiff.tuners.initial_tuner(
      ...     model, law, lambda x, t, cond=None: x[:, 0], law.times(200), optax.sgd(0.5), temperature=1.0, batch=2)
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 10)
      >>> print(f"{state.params[0]:.1f}")  # the tilted law of x_T is N(1, 1)
      1.0
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
    reward: RewardLike,
    times: Array,
    optimizer: Any,
    *,
    reference: DenoiserLike,
    temperature: float,
    initial: Any,
    **options: Any,
) -> RewardBackprop:
    """ELEGANT's main chain: maximise E[r(x0)] - temperature * path KL, from a learnt law of x_T (arXiv 2402.15194).

    The optimum is near p(x0) exp(r(x0)/temperature)/Z, p the law of the prior's chain, and not at it: moves keep their
    variances. For N(0, 1), r = -(x - 1)^2 and temperature 1 on `linear_vp`: mean .571, variance .221 for .523, .262 at T = 10;
    .649, .330 for .648, .324 at T = 100.

    Args:
      process: Gaussian, eta > 0.
      reference: the prior's denoiser, (x, t, cond) -> E[x0 | x_t].
      temperature: alpha, in the reward's unit per nat of path KL.
      initial: draw(key, batch) -> x_T [B, ...], e.g. `samplers.drawing(ancestral(initial_process, tuned), initial_times)`, or None
        for the prior's own law of x_T, which leaves the bias described at the head of this module.

    Returns:
      A tuner for `fit`, as `reward_backprop`. Sample with `tuner.process`, which holds the law of x_T, and `model(state.best)`.

    Raises:
      ValueError: as `reward_backprop`.

    Note:
      The tutorial code keeps the prior's law of x_T, sets the KL's weight to zero, and weighs it by g^3 where Girsanov has
      g^2. `info["kl"]` is the main chain's; the path KL of the pair adds that of `initial_tuner`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> sigma, prior = process.schedule.sigma, rgdiff.tuners.standard_normal(process)
      >>> model = lambda w: lambda x, t, cond=None: prior(x, t) + sigma(t) ** 2 * w  # of N(w, 1)
      >>> tuner = rgdiff.tuners.elegant(
      ...     model, process, lambda x, cond=None: x[:, 0], process.times(200), optax.sgd(0.5), batch=2, reference=prior,
      ...     temperature=1.0, initial=None)
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 10)
      >>> print(f"{state.params[0]:.1f}")
      1.0
    """
    if initial is not None:
        process = started_from(process, initial)
    return reward_backprop(
        model, process, reward, times, optimizer, reference=reference, temperature=temperature, **options
    )
