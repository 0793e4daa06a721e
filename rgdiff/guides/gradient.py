"""Gradient guidance G and G_loss (arXiv 2404.14743): a denoiser guided so that g . x0 is near a target y.

The model behind both is y = g . x0 + noise. `g` changes the score along g itself, which leaves the data's support;
`g_loss` along the gradient of the look-ahead g . E[x0 | x_t], which stays in it and is the exact conditional score
for data N(m, P), P a projection, under a variance-preserving schedule. `increment` and `level` choose y from a gradient
query; the rounds of queries are `tuners.gradient_guidance`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.processes import GaussianProcess, along
from rgdiff.schedules import GaussianSchedule
from rgdiff.typing import Array, Cond, Denoiser, DenoiserLike, callable_pytree, pytree, static


def inner(a: Array, b: Array) -> Array:
    """Return <a, b> of each example, [B]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


@pytree
class GradientGuided:
    """A denoiser under G or G_loss. Build it with `g` or `g_loss`."""

    denoiser: Denoiser
    schedule: GaussianSchedule
    gradient: Array
    target: Array
    noise: Array
    scale: Array
    beta: Array | None
    look_ahead: bool = static(default=True)

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        signal, variance = self.schedule.alpha(t), self.schedule.sigma(t) ** 2
        alpha = jnp.where(signal > 0, signal, 1.0)  # where it is 0, x_t does not depend on x0 and nothing is guided
        if self.look_ahead:
            prediction, back = jax.vjp(lambda x: checks.prediction(self.denoiser(x, t, cond), x), x)
            direction = back(self.gradient)[0]
            strength = alpha**2 / (alpha**2 * self.noise**2 + variance * inner(direction, direction))
        else:
            prediction, direction = checks.prediction(self.denoiser(x, t, cond), x), self.gradient
            strength = alpha / (self.noise**2 + variance * inner(direction, direction))
        if self.beta is not None:
            strength = self.beta * (2.0 if self.look_ahead else 1.0)
        score = self.scale * strength * (self.target - inner(self.gradient, prediction))
        return prediction + along(jnp.where(signal > 0, variance / alpha * score, 0.0), x) * direction


def _guided(
    look_ahead: bool,
    denoiser: Denoiser,
    process: GaussianProcess,
    gradient: Array,
    target: Array,
    noise: float,
    scale: float,
    beta: float | None,
) -> GradientGuided:
    if not isinstance(checks.noising_process(process, "gradient guidance"), GaussianProcess):
        raise ValueError(
            f"gradient guidance moves the score of a gaussian process, got {type(process).__name__}; use rgdiff.guides.gradient_guide"
        )
    if jnp.ndim(gradient) < 2 or jnp.shape(target) != jnp.shape(gradient)[:1]:
        raise ValueError(
            f"gradient and target must be [B, ...] and [B], got {list(jnp.shape(gradient))} and {list(jnp.shape(target))}"
        )
    return GradientGuided(
        denoiser=callable_pytree(denoiser, "a denoiser"),
        schedule=process.schedule,
        gradient=gradient,
        target=target,
        noise=checks.positive("noise", noise),
        scale=checks.positive("scale", scale, zero=True),
        beta=None if beta is None else checks.positive("beta", beta, zero=True),
        look_ahead=look_ahead,
    )


def g(
    denoiser: DenoiserLike,
    process: GaussianProcess,
    gradient: Array,
    target: Array,
    *,
    noise: float = 0.1,
    scale: float = 1.0,
    beta: float | None = None,
) -> Denoiser:
    """Guide by the naive gradient G: score + beta_t (y - g . x0hat) g with beta_t = alpha / (noise^2 + sigma_t^2 |g|^2).

    Args:
      denoiser: of the prior; x0hat = E[x0 | x_t].
      process: Gaussian.
      gradient: g, [B, ...] like the state; an example whose g is 0 is not guided.
      target: y [B], in the reward's unit (see `increment`, `level`).
      noise: standard deviation of y given g . x0, in the reward's unit.
      scale: multiplies beta_t.
      beta: a constant in place of beta_t.

    Returns:
      A denoiser for the B examples; one call of the network each.

    Raises:
      ValueError: for a process that is not Gaussian, or shapes that do not fit.

    References: arXiv 2404.14743, proposition 3 for data of covariance I, as in the released code.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> prior = lambda x, t, cond: process.schedule.alpha(t) * x  # exact for N(0, 1)
      >>> guided = rgdiff.guides.g(prior, process, jnp.ones((1, 1)), jnp.ones(1), noise=1.0)
      >>> print(f"{guided(jnp.zeros((1, 1)), jnp.float32(0.5))[0, 0]:.4f}")  # E[x0 | x_t = 0, y = 1] = 0.5 / (0.5 + 1)
      0.3333
    """
    return _guided(False, denoiser, process, gradient, target, noise, scale, beta)


def g_loss(
    denoiser: DenoiserLike,
    process: GaussianProcess,
    gradient: Array,
    target: Array,
    *,
    noise: float = 0.1,
    scale: float = 1.0,
    beta: float | None = None,
) -> Denoiser:
    """Guide by the look-ahead loss G_loss: score - beta_t grad (y - v)^2, v = g . x0hat(x_t), grad with respect to x_t.

    beta_t = (alpha^2 / 2) / (alpha^2 noise^2 + sigma_t^2 |grad v|^2), per example. For data N(m, P) with P a projection and a
    variance-preserving schedule this is the score of x_t given y = g . x0 + noise, exactly; for any data on a linear subspace
    the guidance lies in it. A call costs one forward pass and one vector-Jacobian product of the network.

    Args:
      denoiser: of the prior; x0hat = E[x0 | x_t].
      process: Gaussian.
      gradient: g, [B, ...] like the state; an example whose g is 0 is not guided.
      target: y [B], in the reward's unit (see `increment`, `level`).
      noise: standard deviation of y given g . x0, in the reward's unit.
      scale: multiplies beta_t.
      beta: a constant in place of beta_t.

    Returns:
      A denoiser for the B examples.

    Raises:
      ValueError: for a process that is not Gaussian, or shapes that do not fit.

    References: arXiv 2404.14743, definition 1 and theorem 1.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> prior = lambda x, t, cond: process.schedule.alpha(t) * x  # exact for N(0, 1)
      >>> guided = rgdiff.guides.g_loss(prior, process, jnp.ones((1, 1)), jnp.ones(1), noise=1.0)
      >>> print(f"{guided(jnp.zeros((1, 1)), jnp.float32(0.5))[0, 0]:.4f}")  # E[x0 | x_t = 0, y = 1] = 0.5 / (0.5 + 1)
      0.3333
    """
    return _guided(True, denoiser, process, gradient, target, noise, scale, beta)


@pytree
class Increment:
    """y = delta + g . x."""

    delta: Array

    def __call__(self, gradient: Array, x0: Array, reward: Array) -> Array:
        return self.delta + inner(gradient, x0)


@pytree
class Level:
    """y = value + g . x - r(x)."""

    value: Array

    def __call__(self, gradient: Array, x0: Array, reward: Array) -> Array:
        return self.value + inner(gradient, x0) - reward


def increment(delta: float = 0.2) -> Increment:
    """Choose the target `delta` above the linearised reward of the queried point: y = delta + g . x (arXiv 2404.14743, §E.1).

    Args:
      delta: in the reward's unit, >= 0.

    Returns:
      A function (gradient g [B, ...], x0 [B, ...], reward [B]) -> y [B], in the reward's unit.

    Raises:
      ValueError: for a negative delta.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> target = rgdiff.guides.increment(0.5)
      >>> print(target(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]]), jnp.array([7.0])))  # 0.5 + 3 + 2
      [5.5]
    """
    return Increment(checks.positive("delta", delta, zero=True))


def level(value: float) -> Level:
    """Choose the target at which the linearised reward r(x) + g . (x0 - x) is `value`: y = value + g . x - r(x) (its images).

    Args:
      value: in the reward's unit.

    Returns:
      A function (gradient g [B, ...], x0 [B, ...], reward [B]) -> y [B], in the reward's unit.

    References: arXiv 2404.14743, experiments on images.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> target = rgdiff.guides.level(10.0)
      >>> print(target(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]]), jnp.array([7.0])))  # 10 + 3 + 2 - 7
      [8.]
    """
    return Level(jnp.asarray(value, jnp.float32))
