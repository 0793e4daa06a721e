"""DPM-Solver++(2M): the probability-flow ODE by a second-order multistep rule, one network call a move.

Every move is a point, as in DDIM: there is no log-probability, no KL and no second draw, and methods that need one refuse
the process. The caller chooses the grid: `process.times`, or a spacing of `rgdiff.schedules`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rgdiff import checks
from rgdiff.processes import GaussianProcess, along
from rgdiff.typing import Array, Cond, Denoiser, DenoiserLike, Info, Key, Process, callable_pytree, pytree


class Carry(NamedTuple):
    """The state, the previous prediction of x0, and the previous move's length in lambda = log(alpha / sigma)."""

    x: Array
    prediction: Array
    length: Array


@pytree
class DpmSolver:
    """Moves x by the predictions at two times. Build it with `dpm_solver`."""

    process: GaussianProcess
    denoiser: Denoiser

    @property
    def differentiable(self) -> bool:
        return True

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> Carry:
        x = self.process.prior(batch).sample(key)
        return Carry(x, jnp.zeros_like(x), jnp.float32(jnp.inf))  # as if from infinitely far: the first move is DDIM's

    def step(self, key: Key, carry: Carry, t: Array, s: Array, cond: Cond = None) -> tuple[Carry, Info]:
        schedule, x = self.process.schedule, carry.x
        prediction = self.process.mean(x, t, self.denoiser(x, t, cond))
        length = 0.5 * (schedule.log_snr(s) - schedule.log_snr(t))
        known = jnp.isfinite(carry.length)
        slope = jnp.where(known, 0.5 * length / jnp.where(known, carry.length, 1.0), 0.0)
        ahead = prediction + slope * (prediction - carry.prediction)
        ratio, weight = schedule.sigma(s) / schedule.sigma(t), -schedule.alpha(s) * jnp.expm1(-length)
        return Carry(along(ratio, x) * x + along(weight, x) * ahead, prediction, length), {}

    def final(self, carry: Carry, t: Array, cond: Cond = None) -> tuple[Array, Info]:
        return self.process.finalize(carry.x, t, self.denoiser(carry.x, t, cond)), {}

    def network_calls(self, moves: int) -> int:
        """Calls of the denoiser per sample over a chain of `moves` moves."""
        return moves + 1


def dpm_solver(process: Process, denoiser: DenoiserLike) -> DpmSolver:
    """Build DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): DDIM's moves with a linear extrapolation of x0 in lambda.

        x_s = sigma_s / sigma_t x_t - alpha_s (exp(-h) - 1) D,  D = x0 + h / (2 h') (x0 - x0'),  h = lambda_s - lambda_t

    with x0 the prediction at t, x0' and h' those of the move before, lambda = log(alpha / sigma). The first move and the
    projection to data are of first order. The error of a chain falls as 1 / T^2, that of DDIM (`ancestral` with eta = 0) as 1 / T.

    Args:
      process: Gaussian, with eta = 0.
      denoiser: (x, t, cond) -> E[x0 | x_t].

    Returns:
      The sampler.

    Raises:
      ValueError: for a process that is not Gaussian, or whose steps are draws.

    Example:
      >>> import jax, rgdiff
      >>> schedule = rgdiff.schedules.linear_vp()
      >>> process = rgdiff.processes.gaussian(schedule, (2,), eta=0.0)
      >>> sampler = rgdiff.samplers.dpm_solver(process, lambda x, t, cond: x * schedule.alpha(t))
      >>> rgdiff.samplers.sample(sampler, jax.random.key(0), 4, rgdiff.schedules.karras_times(schedule, 10)).x0.shape
      (4, 2)
    """
    checks.noising_process(process, "dpm_solver")
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"dpm_solver integrates the ODE of a Gaussian process, got {type(process).__name__}")
    if process.stochastic:
        raise ValueError("dpm_solver makes points and no draws; build the process with eta=0")
    return DpmSolver(process, callable_pytree(denoiser, "a denoiser"))
