"""Guides for y = A x0 + noise: `dps`, `dps_step`, `pigdm`, `tmpd`, each a score g(x_t) in place of grad log p(y | x_t).

They approximate p(x0 | x_t) by a point (DPS), by a Gaussian of one variance (PiGDM), or by a Gaussian with the
covariance that the denoiser's Jacobian gives (TMPD). J is that Jacobian; J^T u is a backward pass, and no Jacobian is
formed. The measurement is an object of `guides.measurements`. `likelihood` is PiGDM's log p(y | x_t), a value.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.guides.measurements import Measurement, measured
from rgdiff.guides.score import (
    Guided,
    Point,
    classifier_guidance,
    gaussian_only,
    guided,
    posterior_variance,
    reward_guidance,
    score_weight,
)
from rgdiff.processes import GaussianProcess, along
from rgdiff.rewards import differentiable
from rgdiff.typing import Array, Cond, DenoiserLike, Process, RewardLike, callable_pytree, pytree, static
from rgdiff.values import PosteriorMean


def dps(denoiser: DenoiserLike, process: Process, measurement: Measurement | RewardLike, scale: float = 1.0) -> Guided:
    """Guide by diffusion posterior sampling (DPS, arXiv 2209.14687): g = gradient of log p(y | E[x0 | x_t]).

    For a linear measurement that is J^T A^T (y - A E[x0 | x_t]) / sigma^2. The variance of x0 given x_t is left out, so that
    the samples are biased, and above all too narrow: of N(0, 1) data with y = 1.5, sigma = 0.1, the variance is 0.0050 in
    place of 0.0099. `dps_step` is the form of the released code.

    **At small noise DPS diverges**, to 1e6 and beyond (`samplers.divergent` finds such samples). Along a coordinate of variance
    v, measured with gain a, a move t -> s multiplies x by  M = b + h j - scale h (sigma_t^2 / alpha_t) j^2 a^2 / sigma^2,  where
    the step's mean is h E[x0 | x_t] + b x_t and j = alpha_t v / (alpha_t^2 v + sigma_t^2). It is stable while M >= -1:

        scale <= sigma^2 (1 + b + h j) / (h (sigma_t^2 / alpha_t) j^2 a^2),   `dps_stable_scale`

    which grows with the number of steps: for v = 1 under `linear_vp`, eta = 1, T steps it is 0.74 T sigma^2 / a^2, so that scale
    1 needs 135 steps at sigma = 0.1 and 1,510 at 0.03. `pigdm` (of the data's variance) and `tmpd` contain x0's variance and
    are stable at any noise.

    Args:
      denoiser, process: the prior, Gaussian.
      measurement: from `linear` or `inpainting`; any other log-likelihood or reward (x0, cond) -> [B] does as well.
      scale: of the log-likelihood, per nat; 1 / temperature for a reward.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a process that is not Gaussian, or a black box.

    Note:
      A network that predicts eps or the score says little of x0 near t = 1, where its error is divided by alpha, with DDPM's betas by
      .006: a quadratic reward then diverged. There nothing is guided (`denoisers.says_enough`); so it is for every guide.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> prior = lambda x, t, cond: x  # exact for N(0, 1) at t = 1/2
      >>> guided = rgdiff.guides.dps(prior, process, rgdiff.guides.linear(jnp.eye(1), jnp.ones(1), sigma=1.0))
      >>> print(guided(jnp.zeros((1, 1)), jnp.float32(0.5)))  # 0 + (sigma_t^2 / alpha_t) (1 - 0) / 1
      [[0.5]]
    """
    differentiable("dps", measurement)
    return reward_guidance(denoiser, gaussian_only(process, "dps"), measurement, scale)


def dps_stable_scale(process: Process, measurement: Measurement, times: Array, *, prior_variance: float = 1.0) -> Array:
    """Return, move by move, the largest scale at which DPS is stable; `dps` has the equation.

    The smallest of them is safe for the whole chain. A few moves above their limit amplify what others contract again; many make
    the chain diverge.

    Args:
      process: Gaussian.
      measurement: from `linear` or `inpainting`.
      times: [T + 1], of the chain; its projection has no limit.
      prior_variance: v, of one coordinate of the data, in its unit squared.

    Returns:
      Scales [T], per nat; infinite where a move does not depend on the measurement.

    Raises:
      ValueError: for a process that is not Gaussian, a reward that is no measurement, or a bad grid.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,))
      >>> measurement = rgdiff.guides.linear(jnp.eye(1), jnp.ones(1), sigma=0.1)
      >>> print(f"{rgdiff.guides.dps_stable_scale(process, measurement, process.times(136)).min():.1f}")  # 0.74 T sigma^2
      1.0
    """
    process = gaussian_only(process, "dps_stable_scale")
    times, v = checks.times(times, process), checks.positive("prior_variance", prior_variance)
    t, s = times[:-1], times[1:]
    mean_of = lambda kernel: kernel.mean if process.stochastic else kernel.point  # noqa: E731
    h = mean_of(process.reverse(jnp.zeros_like(t), t, s, jnp.ones_like(t)))
    b = mean_of(process.reverse(jnp.ones_like(t), t, s, jnp.zeros_like(t)))
    alpha, variance = process.schedule.alpha(t), process.schedule.sigma(t) ** 2
    j = alpha * v / (alpha**2 * v + variance)
    pull = h * score_weight(process, t) * (j * measured(measurement, "dps_stable_scale").gain / measurement.sigma) ** 2
    return jnp.where(pull > 0, (1 + b + h * j) / jnp.where(pull > 0, pull, 1.0), jnp.inf)


@pytree
class NormStep:
    """g such that the mean of the step t -> s is shifted by minus the gradient of ||y - A E[x0 | x_t]||. Built by `dps_step`."""

    measurement: Measurement
    process: GaussianProcess
    times: Array

    def __call__(self, at: Point) -> Array:
        residual = self.measurement.residual(at.prediction)
        norm = jnp.linalg.norm(residual, axis=-1, keepdims=True)
        down = at.pull(self.measurement.transpose(residual / jnp.where(norm > 0, norm, 1.0)))
        weight = score_weight(self.process, at.t) * self._share(at.t)
        return down / along(jnp.where(weight > 0, weight, jnp.inf), down)

    def _share(self, t: Array) -> Array:
        """What the mean of x_s moves by per unit of the prediction of x0: 1 at the projection."""
        i = jnp.argmin(jnp.abs(self.times - jnp.asarray(t)[..., None]), -1)
        s = self.times[jnp.minimum(i + 1, self.times.shape[0] - 1)]
        kernel: Any = self.process.reverse(jnp.zeros_like(s), t, s, jnp.ones_like(s))
        mean = kernel.mean if self.process.stochastic else kernel.point
        return jnp.where(i + 1 < self.times.shape[0], mean, 1.0)


def dps_step(
    denoiser: DenoiserLike, process: Process, measurement: Measurement, times: Array, *, step: float = 1.0
) -> Guided:
    """Guide by DPS as released: the mean of every step is shifted by -step * gradient of ||y - A E[x0 | x_t]|| (not its square).

    Args:
      denoiser, process: the prior, Gaussian.
      measurement: from `linear` or `inpainting`.
      times: the sampler's own grid, [T + 1]: the guide depends on the end of each step.
      step: zeta, the shift in data units for a gradient of norm 1. The released code takes 0.3 to 1.0 for images in [-1, 1] and
        1,000 steps.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a process that is not Gaussian, a reward that is no measurement, or a bad grid.

    Note:
      The norm is per example; released code takes one norm over the batch, so that its results depend on the batch.

    References: arXiv 2209.14687, algorithm 1.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> measurement, times = rgdiff.guides.linear(jnp.eye(1), jnp.ones(1), sigma=1.0), jnp.array([0.5, 0.25])
      >>> guided = rgdiff.guides.dps_step(lambda x, t, cond: x, process, measurement, times, step=0.3)
      >>> x, (t, s) = jnp.zeros((1, 1)), times
      >>> print(f"{process.reverse(x, t, s, guided(x, t)).mean[0, 0]:.4f}")  # 0 before, y = 1, J = 1
      0.3000
    """
    process, measurement = gaussian_only(process, "dps_step"), measured(measurement, "dps_step")
    return guided(denoiser, process, NormStep(measurement, process, checks.times(times, process)), step)


@pytree
class Likelihood(PosteriorMean):
    """v(x_t) = log N(y; A E[x0 | x_t], r_t^2 A A^T + sigma^2 I). Build it with `likelihood`."""

    prior_variance: Array | float = 1.0

    def given(self, x: Array, t: Array, prediction: Array, cond: Cond = None) -> Array:
        variance = posterior_variance(self.process, t, self.prior_variance)  # type: ignore[arg-type]
        return self.reward.log_prob(prediction, variance)  # type: ignore[attr-defined]


def likelihood(
    denoiser: DenoiserLike, process: Process, measurement: Measurement, *, prior_variance: float = 1.0
) -> Likelihood:
    """Make the value log p(y | x_t) with x0 | x_t approximated by N(E[x0 | x_t], r_t^2 I): the twist of TDS (arXiv 2306.17775).

    v(x_t) = log N(y; A E[x0 | x_t], r_t^2 A A^T + sigma^2 I); exact for N(m, v I) data. A sampler that ends at a small t
    must end with the likelihood of x0 itself: particle samplers do, others take `reward=measurement` where they can.

    Args:
      denoiser, process: the prior, Gaussian.
      measurement: from `linear` or `inpainting`.
      prior_variance: v, of one coordinate of the data; r_t^2 = v s^2 / (v + s^2), s = sigma_t / alpha_t. With one that does not
        fit the data, particle methods converge slowly to the same limit.

    Returns:
      The value, (x_t, t, cond) -> [B], nats.

    Raises:
      ValueError: for a process that is not Gaussian, or a reward that is no measurement.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> measurement = rgdiff.guides.linear(jnp.eye(1), jnp.ones(1), sigma=1.0)
      >>> value = rgdiff.guides.likelihood(lambda x, t, cond: x, process, measurement)  # exact for N(0, 1) at t = 1/2
      >>> print(f"{value(jnp.zeros((1, 1)), jnp.float32(0.5))[0]:.4f}")  # log N(1; 0, 0.5 + 1)
      -1.4550
    """
    denoiser, v = callable_pytree(denoiser, "a denoiser"), checks.positive("prior_variance", prior_variance)
    return Likelihood(
        measured(measurement, "likelihood"), gaussian_only(process, "likelihood"), denoiser, prior_variance=v
    )


def pigdm(
    denoiser: DenoiserLike,
    process: Process,
    measurement: Measurement,
    *,
    prior_variance: float = 1.0,
    scale: float = 1.0,
) -> Guided:
    """Guide by the pseudo-inverse (PiGDM, Song et al., ICLR 2023): x0 | x_t is approximated by N(E[x0 | x_t], r_t^2 I).

    g = J^T A^T (r_t^2 A A^T + sigma^2 I)^-1 (y - A E[x0 | x_t]), the gradient of `likelihood`; exact for N(m, v I) data.

    Args:
      denoiser, process: the prior, Gaussian.
      measurement: from `linear` or `inpainting`.
      prior_variance: v, of one coordinate of the data; r_t^2 = v s^2 / (v + s^2), s = sigma_t / alpha_t. With 1 it is
        the published r_t.
      scale: of the score's change; 1 is the method.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a process that is not Gaussian, or a reward that is no measurement.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> measurement = rgdiff.guides.linear(jnp.eye(1), jnp.ones(1), sigma=1.0)
      >>> guided = rgdiff.guides.pigdm(lambda x, t, cond: x, process, measurement)  # exact for N(0, 1) at t = 1/2
      >>> print(f"{guided(jnp.zeros((1, 1)), jnp.float32(0.5))[0, 0]:.4f}")  # E[x0 | x_t = 0, y = 1] = 0.5 / (0.5 + 1)
      0.3333
    """
    measured(measurement, "pigdm")
    value = likelihood(denoiser, gaussian_only(process, "pigdm"), measurement, prior_variance=prior_variance)
    return classifier_guidance(value.denoiser, process, value, scale)


@pytree
class TweedieMoments:
    """g = J^T A^T (A C A^T + sigma^2 I)^-1 (y - A E[x0 | x_t]), C = (sigma_t^2 / alpha_t) J, or with the row sums of A C A^T."""

    measurement: Measurement
    process: GaussianProcess
    diagonal: bool = static()

    def __call__(self, at: Point) -> Array:
        measurement, weight = self.measurement, score_weight(self.process, at.t)
        residual, noise = measurement.residual(at.prediction), measurement.sigma**2
        if self.diagonal:
            sums = measurement.forward(at.pull(measurement.transpose(jnp.ones_like(residual))))
            return at.pull(measurement.transpose(residual / (along(weight, sums) * sums + noise)))
        pulled = jax.vmap(lambda row: at.pull(jnp.broadcast_to(row, at.x.shape)))(
            measurement.rows()
        )  # [M, B, ...]: (A J)^T
        covariance = jax.vmap(measurement.forward, out_axes=1)(pulled)  # [B, M, M]
        covariance = along(weight, covariance) * 0.5 * (covariance + jnp.swapaxes(covariance, 1, 2))
        u = jnp.linalg.solve(covariance + noise * jnp.eye(residual.shape[-1]), residual[..., None])[..., 0]
        return jnp.einsum("bm,mb...->b...", u, pulled, precision="highest")


def tmpd(
    denoiser: DenoiserLike, process: Process, measurement: Measurement, *, diagonal: bool = False, scale: float = 1.0
) -> Guided:
    """Guide by Tweedie moment projection (TMPD, arXiv 2310.06721): x0 | x_t is approximated by a Gaussian of its own covariance.

    g = J^T A^T (A C A^T + sigma^2 I)^-1 (y - A E[x0 | x_t]) with C = Cov[x0 | x_t] = (sigma_t^2 / alpha_t) J, which holds
    for any data. Exact for Gaussian data.

    Args:
      denoiser, process: the prior, Gaussian.
      measurement: from `linear` or `inpainting`.
      diagonal: False takes one backward pass per measurement, for small problems; True takes two, and the row sums of
        A C A^T in place of the matrix (DTMPD).
      scale: of the score's change; 1 is the method.

    Returns:
      The denoiser.

    Raises:
      ValueError: for a process that is not Gaussian, or a reward that is no measurement.

    Note:
      A network's J need not be symmetric; A J A^T is symmetrised.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (1,))
      >>> measurement = rgdiff.guides.linear(jnp.eye(1), jnp.ones(1), sigma=1.0)
      >>> guided = rgdiff.guides.tmpd(lambda x, t, cond: x, process, measurement)  # exact for N(0, 1) at t = 1/2
      >>> print(f"{guided(jnp.zeros((1, 1)), jnp.float32(0.5))[0, 0]:.4f}")  # E[x0 | x_t = 0, y = 1] = 0.5 / (0.5 + 1)
      0.3333
    """
    process, measurement = gaussian_only(process, "tmpd"), measured(measurement, "tmpd")
    return guided(denoiser, process, TweedieMoments(measurement, process, bool(diagonal)), scale)
