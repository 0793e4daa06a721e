"""Few-step Gaussian policies: a chain of T learnt Gaussian steps, as a process of this library and a model of its parameters.

`levels`, `variances`, `fast_dpm` and `karras` compute the noise levels of the T steps in float64. `few_step` makes
them a process whose denoisers predict the step's own kernel, and `policy` a model: parameters {network, log_sigma} become
such a denoiser. Samplers, path KL and every tuner take both without change, and then learn the standard deviations too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.kernels import Gaussian
from rgdiff.processes import GaussianProcess, along
from rgdiff.rewards import differentiable
from rgdiff.schedules import GaussianSchedule
from rgdiff.typing import Array, Cond, Move, Params, State, Value, ValueLike, callable_pytree, pytree, static
from rgdiff.values import evaluate

FORMS = ("residual", "denoiser")


@pytree
class Levels:
    """Noise levels of a T-step chain, noise first: a schedule on the times 1, (T - 1)/T, ..., 0 and on nothing between them.

    Args:
      alphas, sigmas: [T + 1], the last ones 1 and 0 (data).
      stds: [T], standard deviations of the steps before training, data units.
      of_x0, of_x: [T]; the mean of step i is of_x0[i] E[x0 | x_t] + of_x[i] x_t.
      clock, scale: [T]; the network is called as network(scale[i] * x, clock[i]), the input scale and the time of level i in its
        training.
      prior_std: standard deviation of x at t = 1, data units.

    Example:
      >>> import rgdiff
      >>> levels = rgdiff.policies.variances((0.6, 0.8))
      >>> [round(float(a) ** 2, 4) for a in levels.alphas]  # (1 - 0.36) (1 - 0.64), 1 - 0.64, 1
      [0.2304, 0.36, 1.0]
    """

    alphas: Array
    sigmas: Array
    stds: Array
    of_x0: Array
    of_x: Array
    clock: Array
    scale: Array
    prior_std: Array

    @property
    def steps(self) -> int:
        return self.stds.shape[-1]

    def index(self, t: Array) -> Array:
        """Return the number of moves made before time t."""
        return jnp.round((1 - jnp.asarray(t, jnp.float32)) * self.steps).astype(jnp.int32)

    def alpha(self, t: Array) -> Array:
        return self.alphas[self.index(t)]

    def sigma(self, t: Array) -> Array:
        return self.sigmas[self.index(t)]

    def log_snr(self, t: Array) -> Array:
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def times(self, steps: int) -> Array:
        """Return the times of the T network calls. [T]"""
        if steps != self.steps:
            raise ValueError(f"these levels are of {self.steps} steps, got {steps}")
        return jnp.arange(self.steps, 0, -1) / self.steps


def _levels(
    alphas: Any, sigmas: Any, stds: Any = None, *, last: float, clock: Any = None, known: Any = None, prior_std: float
) -> Levels:
    """Levels from alphas and sigmas [T], noise first, in float64; posterior standard deviations, and `last`, by default.

    A network of the schedule `known` is called where its signal-to-noise ratio is the level's, with states at its own alpha.
    """
    alpha, sigma = (np.append(np.asarray(a, np.float64), end) for a, end in ((alphas, 1.0), (sigmas, 0.0)))
    ratio = alpha[:-1] / alpha[1:]
    kept = (ratio * sigma[1:] / sigma[:-1]) ** 2
    if stds is None:
        stds = np.append((sigma[1:] * np.sqrt(1 - kept))[:-1], last)
    steps = len(ratio)
    clock, scale = np.arange(steps, 0, -1) / steps if clock is None else clock, np.ones(steps)
    if known is not None:
        checks.schedule(known, "a few-step process")
        clock = [_time_of(known, 2 * math.log(a / s)) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
        scale = np.asarray(known.alpha(jnp.asarray(clock, jnp.float32))) / alpha[:-1]
    parts = alpha, sigma, stds, alpha[1:] * (1 - kept), ratio * (sigma[1:] / sigma[:-1]) ** 2, clock, scale, prior_std
    return Levels(*(jnp.asarray(part, jnp.float32) for part in parts))


def levels(schedule: GaussianSchedule, steps: int, *, last: float = 0.1) -> Levels:
    """Take the levels of a prior's own grid of `steps` calls; its projection to data becomes a move.

    Args:
      schedule: of the prior, whose network is then called at its own times.
      steps: T.
      last: standard deviation of the last move, data units; the others are those of ancestral sampling.

    Returns:
      The levels.

    Raises:
      ValueError: for a process in place of the schedule, or fewer than one step.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.policies.levels(rgdiff.schedules.flow(), 3, last=0.1).stds[-1])
      0.1
    """
    times = checks.schedule(schedule, "levels").times(checks.at_least("steps", steps, 1))
    alphas, sigmas = schedule.alpha(times), schedule.sigma(times)
    return _levels(alphas, sigmas, last=last, clock=times, prior_std=float(schedule.prior_std))


def variances(stds: Sequence[float] = (0.8, 0.7, 0.6, 0.45, 0.3)) -> Levels:
    """Make DDPM's levels of T steps with standard deviations sqrt(beta), noise first: alpha_t^2 is the product of 1 - beta.

    Chains begin at N(0, I), however much of the data is left at t = 1.

    Args:
      stds: sqrt(beta) of the T steps, noise first, each in (0, 1), without unit. The default reached the best result on 2-D
        data.

    Returns:
      The levels.

    Raises:
      ValueError: for numbers outside (0, 1).

    Example:
      >>> import rgdiff
      >>> levels = rgdiff.policies.variances((0.6, 0.8))
      >>> [round(float(a) ** 2, 4) for a in levels.alphas]  # (1 - 0.36) (1 - 0.64), 1 - 0.64, 1
      [0.2304, 0.36, 1.0]
    """
    beta = np.square(np.asarray(stds, np.float64))
    if beta.ndim != 1 or not len(beta) or not ((beta > 0) & (beta < 1)).all():
        raise ValueError(f"variances takes standard deviations [T] between 0 and 1, noise first, got {stds!r}")
    kept = np.cumprod((1 - beta)[::-1])[::-1]
    return _levels(np.sqrt(kept), np.sqrt(1 - kept), np.sqrt(beta), last=0.0, prior_std=1.0)


def fast_dpm(
    steps: int,
    schedule: GaussianSchedule | None = None,
    *,
    first: float = 1e-4,
    end: float = 4.0358e-5,
    cap: float = 0.95,
    last: float = 1e-3,
) -> Levels:
    """Make FastDPM's quadratic variance schedule (arXiv 2106.00132, §3): beta_i = (sqrt(first) + i c)^2, i = 0 ... T - 1.

    c is such that the product of 1 - beta is nearest to `end`, by bisection in float64.

    Args:
      steps: T.
      schedule: of a pre-trained prior: its network is called at the time of the level's signal-to-noise ratio, at its own scale.
        None calls it at the levels' own times.
      first: the smallest beta.
      end: the wanted product, that of 1,000 steps of beta from 1e-4 to 0.02.
      cap: bounds sqrt(first) + T c, hence the largest beta.
      last: standard deviation of the last move, as released, data units.

    Returns:
      The levels.

    Raises:
      ValueError: for fewer than one step, or a number that is not positive.

    Note:
      With the released cap of 0.95 few steps do not reach `end` (0.343 for T = 4, 0.220 for 5, 0.021 for 10), and chains
      begin at N(0, I) all the same; cap = 2 lifts it. The released search runs in float32 under NumPy 2 and fails.

    Example:
      >>> import rgdiff
      >>> print(f"{rgdiff.policies.fast_dpm(4).alphas[0] ** 2:.3f}")
      0.343
    """
    root, low = math.sqrt(checks.positive("first", first)), 0.0
    high = checks.positive("cap", cap) / checks.at_least("steps", steps, 1)
    beta_of = lambda c: (root + np.arange(steps) * c) ** 2  # noqa: E731
    high = min(float(high), (1 - 1e-9 - root) / max(steps - 1, 1))
    if np.prod(1 - beta_of(high)) < end:
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if np.prod(1 - beta_of(middle)) > end else (low, middle)
    kept = np.cumprod(1 - beta_of(high))[::-1]
    return _levels(np.sqrt(kept), np.sqrt(1 - kept), last=last, known=schedule, prior_std=1.0)


def karras(steps: int, schedule: Any = None, *, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Levels:
    """Make EDM's levels (arXiv 2206.00364, eq. 5): sigma^(1/rho) decreases evenly from `high` to `low`, then the data; alpha = 1.

    Steps are EDM's ancestral ones, which are DDPM's posteriors for alpha = 1; the last standard deviation is `low`.

    Args:
      steps: T, at least 2.
      schedule: of a pre-trained prior: its network is called at the time of the level's signal-to-noise ratio, at its own scale.
        None calls it at the levels' own times.
      low, high: sigma of the last and the first level, data units.
      rho: exponent; the released samplers have rho 7 at T = 10 and 4 at T = 4.

    Returns:
      The levels.

    Raises:
      ValueError: for fewer than two steps, or unless 0 < low < high.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.policies.karras(3, low=1.0, high=3.0, rho=1.0).sigmas)  # linear for rho = 1, then data
      [3. 2. 1. 0.]
    """
    share = np.linspace(0.0, 1.0, checks.at_least("steps", steps, 2))
    if not 0 < low < high:
        raise ValueError(f"karras expects 0 < low < high, got {low} and {high}")
    sigma = (high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return _levels(np.ones(steps), sigma, last=low, known=schedule, prior_std=high)


def _time_of(schedule: GaussianSchedule, log_snr: float) -> float:
    """The time at which a schedule has a signal-to-noise ratio, which falls with time; the nearer end where it never has."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(schedule.log_snr(jnp.float32(middle))) > log_snr else (low, middle)
    return high


@pytree
class FewStep:
    """A process of T Gaussian steps to data. Build it with `few_step`. A prediction is the kernel of the next state itself."""

    levels: Levels
    shape: tuple[int, ...] = static()

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def projects(self) -> bool:
        return False

    @property
    def denoising(self) -> GaussianProcess:
        """The Gaussian process of the levels, for `tuners.pretraining(policy.denoising, process.denoising, ..., grid=T)`."""
        return GaussianProcess(self.levels, jnp.float32(1), self.shape)

    def times(self, steps: int | None = None) -> Array:
        """Return the grid of T moves, one network call each. [T + 1]"""
        return jnp.append(self.levels.times(self.levels.steps if steps is None else steps), 0.0)

    def prior(self, batch: int) -> Gaussian:
        return Gaussian(jnp.zeros((batch, *self.shape), jnp.float32), self.levels.prior_std)

    def forward(self, x0: Array, t: Array) -> Gaussian:
        return self.denoising.forward(x0, t)

    def reverse(self, x: Array, t: Array, s: Array, prediction: Gaussian) -> Gaussian:
        """p(x_s | x_t), s the time after t on the grid."""
        if not isinstance(prediction, Gaussian) or prediction.mean.shape != x.shape:
            got = list(prediction.mean.shape) if isinstance(prediction, Gaussian) else type(prediction).__name__
            raise ValueError(
                f"a few-step process takes the law of the next state {list(x.shape)} from its denoiser, got {got}; "
                "make the network one with policies.policy"
            )
        return prediction

    def mean(self, x: Array, t: Array, prediction: Gaussian) -> Array:
        """The x0 at which DDPM's posterior has the step's mean: E[x0 | x_t] of a policy that was trained as a denoiser."""
        at = self.levels.index(t)
        return (prediction.mean - along(self.levels.of_x[at], x) * x) / along(self.levels.of_x0[at], x)

    def finalize(self, x: Array, t: Array, prediction: State) -> Array:
        return x


def few_step(levels: Levels, shape: tuple[int, ...]) -> FewStep:
    """Build the process of T learnt Gaussian steps on states [B, *shape] from x_1 ~ N(0, prior_std^2) to data at t = 0.

    Args:
      levels: from `levels`, `variances`, `fast_dpm` or `karras`.
      shape: of one example.

    Returns:
      The process; its grid `times()` has T moves and ends at 0.

    Example:
      >>> import rgdiff
      >>> print(rgdiff.policies.few_step(rgdiff.policies.variances((0.6, 0.8)), (2,)).times())
      [1.  0.5 0. ]
    """
    return FewStep(levels, tuple(int(d) for d in shape))


@pytree
class Steps:
    """A denoiser of a few-step process: (x, t, cond) -> Gaussian(mean [B, ...], std [B, 1, ...]). Made by a `Policy`."""

    levels: Levels
    network: Any
    sigma: Array
    residual: bool = static()

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Gaussian:
        at = self.levels.index(t)
        out = self.network(along(self.levels.scale[at], x) * x, self.levels.clock[at], cond)
        mean = x + out
        if not self.residual:
            mean = along(self.levels.of_x0[at], x) * out + along(self.levels.of_x[at], x) * x
        return Gaussian(
            mean.astype(x.dtype), jnp.broadcast_to(along(self.sigma[at], x), (x.shape[0],) + (1,) * (x.ndim - 1))
        )


@pytree
class Denoising:
    """The network of a policy as a model of E[x0 | x_t]: params["network"] -> denoiser."""

    policy: Policy

    def __call__(self, params: Params) -> Any:
        policy = self.policy
        return _Denoiser(policy.process, policy({"network": params, "log_sigma": policy.start}))


@pytree
class _Denoiser:
    process: FewStep
    steps: Steps

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        return self.process.mean(x, t, self.steps(x, t, cond))


@pytree
class Policy:
    """A model: params = {"network": ..., "log_sigma": [T]} -> denoiser of `process`. Build it with `policy`."""

    process: FewStep
    model: Any
    start: Array
    reach: Array
    residual: bool = static()

    def init(self, network: Params) -> dict[str, Any]:
        """Return the policy's parameters made of those of the network; standard deviations are the levels' own."""
        return {"network": network, "log_sigma": self.start}

    def sigma(self, params: Params) -> Array:
        """Standard deviations of the T steps, noise first: within a factor of `reach` of the first ones. [T]"""
        return jnp.exp(self.start + self.reach * jnp.tanh((params["log_sigma"] - self.start) / self.reach))

    @property
    def denoising(self) -> Denoising:
        """The model to pre-train the network as a denoiser: `tuners.pretraining(policy.denoising, process.denoising, ..., grid=T)`."""
        return Denoising(self)

    def __call__(self, params: Params) -> Steps:
        return Steps(self.process.levels, self.model(params["network"]), self.sigma(params), self.residual)


def policy(process: FewStep, model: Any, *, form: str = "residual", reach: float = 4.0) -> Policy:
    """Build a few-step Gaussian policy: y ~ N(mean(x, t), sigma_t^2), every sigma_t learnt and bounded.

    Args:
      process: from `few_step`.
      model: params -> network (x, t, cond) -> [B, ...], e.g. `lambda p: denoisers.from_linen(nets.MLP(), p)`.
      form: `residual`, mean = x + network(x, t): every step can move as far as any other; or `denoiser`, the network returns
        E[x0 | x_t] (`denoisers.predicts` makes one of a network of eps, v, ...) and the mean is that of DDPM's posterior:
        for a pre-trained prior.
      reach: log sigma_t = log sigma_t0 + log(reach) tanh((p - log sigma_t0) / log(reach)), p the parameter: smooth, of slope
        1 at first, and always within a factor of `reach`. 1e6 is practically unbounded.

    Returns:
      The policy, a model: `policy.init(network_params)` makes its parameters.

    Raises:
      ValueError: for a process that is not few-step, another form, or a reach that is not above 1.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.policies.few_step(rgdiff.policies.variances((0.6, 0.8)), (2,))
      >>> policy = rgdiff.policies.policy(process, lambda p: lambda x, t, cond: p * x)
      >>> step = policy(policy.init(jnp.float32(1.0)))(jnp.ones((1, 2)), jnp.float32(1.0))
      >>> print(step.mean, step.std)  # x + network(x), sqrt(beta)
      [[2. 2.]] [[0.6]]
    """
    if not isinstance(process, FewStep):
        raise ValueError(f"a policy needs a few-step process, got {type(process).__name__}; build it with few_step")
    if not reach > 1:
        raise ValueError(f"reach is a factor above 1, got {reach!r}")
    return Policy(
        process,
        callable_pytree(model, "model (params -> network)"),
        jnp.log(process.levels.stds),
        jnp.float32(math.log(reach)),
        checks.one_of("form", form, FORMS) == "residual",
    )


@pytree
class ValueGuidance:
    """q(y) proportional to k(y) exp(-scale <grad V(mean, s), y>). Build it with `value_guidance`."""

    value: Value
    scale: Array

    def __call__(self, kernel: Gaussian, move: Move) -> Gaussian:
        total = lambda y: jnp.sum(evaluate(self.value, y, move.s, move.cond))  # noqa: E731
        return kernel.tilt(-self.scale * jax.grad(total)(kernel.mean))


def value_guidance(value: ValueLike, scale: float = 1.0) -> ValueGuidance:
    """Tilt every step of a policy by a cost to go V at its end: to first order, k(y) exp(-scale V(y, s)), renormalised.

    Args:
      value: a *cost*, of `tuners.dxdp` or `tuners.dxmi`: (y, s, cond) -> [B], the energy at s = 0.
      scale: 1 / temperature, per unit of V; 1 / tau is one more step of policy improvement.

    Returns:
      A guide, (kernel, move) -> kernel.

    Raises:
      ValueError: for a negative scale.

    Note:
      The paper's released code moves x by lambda sigma_t grad V, which for lambda > 0 goes *uphill* (it explores with it
      in training); improving samples is a negative lambda there, and a positive scale here. The shift is scale sigma_t^2.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from rgdiff.typing import Move
      >>> guide = rgdiff.policies.value_guidance(lambda y, s, cond: y.sum(-1), scale=2.0)
      >>> kernel = rgdiff.kernels.Gaussian(jnp.ones((1, 1)), jnp.full((1, 1), 0.5))
      >>> move = Move(jnp.zeros((1, 1)), jnp.float32(0.5), jnp.float32(0.25), None, None)
      >>> print(guide(kernel, move).mean)  # 1 - 2 * 0.5^2
      [[0.5]]
    """
    differentiable("value_guidance", value)
    return ValueGuidance(callable_pytree(value, "a value"), checks.positive("scale", scale, zero=True))
