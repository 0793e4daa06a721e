"""Guides on the kernel: the distribution of the next state, tilted by the gradient of a value at the present one.

The mean of a Gaussian kernel is shifted by std^2 times the gradient; for a one-hot kernel it is added to the logits; both by
the same code. The gradient is per example (a VJP of ones), so nothing depends on the batch. Guides that act on the
prediction instead are in `guides.score`; the two agree to first order in the step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.denoisers import says_enough
from rgdiff.kernels import Absorbing, FirstHitting, PointMass, Product
from rgdiff.rewards import differentiable
from rgdiff.typing import Array, Cond, Guide, Kernel, Move, State, Value, ValueLike, callable_pytree, pytree, static
from rgdiff.values import PosteriorMean, evaluate

TILTS = ("token", "token_and_rate")


@pytree
class GradientGuide:
    """q(y) proportional to k(y) exp<scale * gradient of v at x_t, y>. Build it with `gradient_guide`."""

    value: Value
    scale: Array
    tilts: str = static(default="token")

    def __call__(self, kernel: Kernel, move: Move) -> Kernel:
        return tilt(kernel, self.direction(move.x, move.t, move.cond), self.tilts)

    def direction(self, x: State, t: Array, cond: Cond = None) -> State:
        """Return scale * gradient of v(x, t, cond) with respect to x, per example; zero where it is not finite.

        It is zero too where x_t says too little of x0 for a posterior mean (`rgdiff.denoisers.says_enough`).
        """
        scale = self.scale
        if isinstance(self.value, PosteriorMean):
            scale = jnp.where(says_enough(self.value, self.value.process, t), scale, 0.0)
        return scaled(value_gradient(self.value, x, t, cond)[1], scale)


@pytree
class Composed:
    """Guides applied one after the other. Build it with `chain`."""

    guides: tuple[Guide, ...]

    def __call__(self, kernel: Kernel, move: Move) -> Kernel:
        for guide in self.guides:
            kernel = guide(kernel, move)
        return kernel


def value_gradient(value: Any, x: State, t: Array, cond: Cond = None) -> tuple[Array, State]:
    """Return a value and its gradient with respect to each example's own x.

    Args:
      value: (x, t, cond) -> [B].
      x: the state, leaves [B, ...].
      t: [] or [B].
      cond: conditions, a pytree of [B, ...], or None.

    Returns:
      v [B], and the gradient, leaves [B, ...].
    """
    values, back = jax.vjp(lambda x: evaluate(value, x, t, cond), x)
    return values, back(jnp.ones_like(values))[0]


def scaled(direction: State, scale: Array) -> State:
    """Return scale * direction, with 0 at coordinates that are not finite.

    Args:
      direction: leaves [B, ...].
      scale: a scalar.

    Returns:
      Leaves [B, ...].
    """
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), scale * g, 0.0), direction)


def tilt(kernel: Any, direction: State, tilts: str = "token") -> Any:
    """Tilt a kernel by a direction; of a masked one only the token, or the rate of unmasking as well.

    Args:
      kernel: of `rgdiff.kernels`.
      direction: leaves [B, ...] like the state.
      tilts: `token` or `token_and_rate`.

    Returns:
      The tilted kernel.

    Raises:
      ValueError: for a point mass.
    """
    if isinstance(kernel, Product):
        return Product({name: tilt(part, direction[name], tilts) for name, part in kernel.parts.items()})
    if isinstance(kernel, PointMass):
        raise ValueError("a guide tilts a law, but the process has eta = 0; build it with eta > 0")
    if isinstance(kernel, (Absorbing, FirstHitting)) and tilts == "token":
        return kernel.tilt_token(direction[..., :-1])
    return kernel.tilt(direction)


def gradient_guide(value: ValueLike, scale: float = 1.0, *, tilts: str = "token") -> GradientGuide:
    """Tilt every step by the gradient of a value: q(y) proportional to k(y) exp<scale * grad v(x_t), y>.

    With log p(c | x_t) and scale s this is classifier guidance (arXiv 2105.05233, algorithm 1); with
    `values.posterior_mean` it is DPS at the kernel (arXiv 2209.14687); on one-hot states it is the first-order discrete
    guidance of arXiv 2406.01572. For the tilted distribution of temperature tau the scale is 1 / tau.

    Args:
      value: (x_t, t, cond) -> [B], differentiable in x_t; of a masked process, in the one-hot state.
      scale: per unit of the value; may change without a recompilation.
      tilts: of a masked process, `token` (only which token appears), or `token_and_rate`: also how soon, by
        exp<grad, token - mask>.

    Returns:
      A guide, (kernel, move) -> kernel.

    Raises:
      ValueError: for an unknown tilt, a negative scale, or a black box in the value; at a call, for a process with eta = 0.

    Note:
      Released code divides the gradient by the batch size (a batch-mean loss) and makes up for it with scales of 1e5;
      some of it adds gradients to probabilities. Here they are added to logits, per example.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from rgdiff.typing import Move
      >>> guide = rgdiff.guides.gradient_guide(lambda x, t, cond: 3 * x[:, 0], scale=2.0)
      >>> kernel = rgdiff.kernels.Gaussian(jnp.zeros((1, 1)), jnp.float32(0.5))
      >>> move = Move(jnp.ones((1, 1)), jnp.float32(0.5), jnp.float32(0.25), None, None)
      >>> print(guide(kernel, move).mean)  # 0 + 0.5^2 * 2 * 3
      [[1.5]]
    """
    differentiable("gradient_guide", value)
    return GradientGuide(
        callable_pytree(value, "a value"),
        checks.positive("scale", scale, zero=True),
        checks.one_of("tilts", tilts, TILTS),
    )


def chain(*guides: Guide) -> Guide:
    """Apply guides one after the other.

    Args:
      guides: each (kernel, move) -> kernel, given as arguments, the first one first.

    Returns:
      A guide, (kernel, move) -> kernel.

    Raises:
      ValueError: without a guide.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from rgdiff.typing import Move
      >>> guide = rgdiff.guides.gradient_guide(lambda x, t, cond: x[:, 0])
      >>> kernel = rgdiff.kernels.Gaussian(jnp.zeros((1, 1)), jnp.float32(0.5))
      >>> move = Move(jnp.ones((1, 1)), jnp.float32(0.5), jnp.float32(0.25), None, None)
      >>> print(rgdiff.guides.chain(guide, guide)(kernel, move).mean)  # twice 0.5^2
      [[0.5]]
    """
    if not guides:
        raise ValueError("chain needs at least one guide")
    return Composed(tuple(callable_pytree(guide, "a guide") for guide in guides))
