"""Rewards on images: log-probability of a class, likeness to real ones, left-right symmetry, amount of ink, and size when compressed.

Each is a callable pytree (x0, cond) -> [B] on images [B, H, W, C] in [-1, 1]; all but `compressibility` are
differentiable, and none holds a temperature. Training the classifier and the door for host functions are left to their
modules.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff.domains.images.data import to_uint8
from rgdiff.typing import Array, Cond, Reward, callable_pytree, pytree, static


@pytree
class Likeness:
    """Minus the distance to the nearest of `images` [N, H, W, C]; see `likeness`."""

    images: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        flat = self.images.reshape(self.images.shape[0], -1)
        square = jnp.min(jnp.sum((x0.reshape(x0.shape[0], 1, -1) - flat) ** 2, -1), -1) / flat.shape[1]
        return -jnp.sqrt(jnp.maximum(square, 1e-12))


def likeness(images: Array | np.ndarray) -> Reward:
    """Reward nearness to real images: minus the root mean squared difference of pixels from the nearest of them, [B].

    A judge that a classifier's blind spots do not fool: what is like no image scores low, whatever its class is said to be.

    Args:
      images: [N, H, W, C], N >= 1, in [-1, 1], the unit of the reward.
    """
    if jnp.ndim(images) != 4 or not len(images):
        raise ValueError(f"likeness needs images [N, H, W, C], N >= 1, got shape {list(jnp.shape(images))}")
    return Likeness(jnp.asarray(images, jnp.float32))


@pytree
class ClassifierReward:
    """log p(target | x0); see `classifier_reward`."""

    classifier: Callable[[Array], Array]
    target: Array | None

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        logits = self.classifier(x0)
        labels = self.target if cond is None else cond
        if labels is None:
            raise ValueError("classifier_reward without a target needs labels: pass cond [B] or give target=")
        labels = jnp.broadcast_to(labels, logits.shape[:1])
        known = (labels >= 0) & (labels < logits.shape[-1])
        index = jnp.where(known, labels, 0)[:, None]
        values = jnp.take_along_axis(jax.nn.log_softmax(logits), index, axis=-1)[:, 0]
        return jnp.where(known, values, jnp.nan)


def classifier_reward(classifier: Callable[[Array], Array], target: int | None = None) -> Reward:
    """Reward the log-probability of a class: r(x) = log p(target | x).

    Args:
      classifier: callable pytree, images [B, H, W, C] to logits [B, classes].
      target: the class; dynamic, so that changing it does not recompile. Labels given as `cond`, integer [B],
        override it example by example. None leaves the choice to `cond`.

    Returns:
      The reward, in nats, at most 0; NaN where a label is not one of the classes.

    Raises:
      ValueError: for a classifier that cannot be called or a target that is not a class number.
    """
    classifier = callable_pytree(classifier, "a classifier, x [B, H, W, C] -> logits,")
    if target is None:
        return ClassifierReward(classifier, None)
    label = jnp.asarray(target)
    if label.ndim or not jnp.issubdtype(label.dtype, jnp.integer) or (isinstance(target, int) and target < 0):
        raise ValueError(f"target={target!r}: expected one class number >= 0; labels per example go in cond")
    return ClassifierReward(classifier, label)


@pytree
class Symmetry:
    """Minus the mean squared difference to the mirror image; see `symmetry`."""

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return -jnp.mean((x0 - x0[:, :, ::-1]) ** 2, axis=(1, 2, 3))


def symmetry() -> Reward:
    """Reward left-right symmetry: r(x) = -mean (x - mirror(x))^2 over pixels; at most 0, at least -4 in [-1, 1]."""
    return Symmetry()


@pytree
class Ink:
    """Mean ink, or minus its squared distance to a target; see `ink`."""

    target: Array | None

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        amount = jnp.mean((jnp.clip(x0, -1, 1) + 1) / 2, axis=(1, 2, 3))
        return amount if self.target is None else -((amount - self.target) ** 2)


def ink(target: float | None = None) -> Reward:
    """Reward ink: r(x) = m, or -(m - target)^2, with m the mean of (x + 1) / 2 over pixels, in [0, 1].

    Pixels are clipped to [-1, 1] first: what no picture can show earns nothing, and has no gradient.

    Args:
      target: the amount aimed at, in [0, 1], dynamic; None for the more the better.

    Raises:
      ValueError: for a target outside [0, 1].
    """
    if isinstance(target, int | float) and not 0 <= target <= 1:
        raise ValueError(f"target={target}: expected a mean ink in [0, 1], or None to reward all ink")
    return Ink(None if target is None else jnp.asarray(target, jnp.float32))


@dataclasses.dataclass(frozen=True)
class ZlibSize:
    """Map images [B, H, W, C], on the host, to minus the bytes of zlib(8-bit pixels); NaN where a pixel is not finite.

    Equal levels are equal functions, so that building the reward again does not recompile.
    """

    level: int

    def __call__(self, x0: np.ndarray, cond: Cond = None) -> np.ndarray:
        finite = np.isfinite(x0).reshape(len(x0), -1).all(1)
        sizes = [len(zlib.compress(image.tobytes(), self.level)) for image in to_uint8(x0)]
        return np.where(finite, -np.asarray(sizes, np.float32), np.float32(np.nan))


def compressibility(level: int = 6) -> Reward:
    """Reward small files: r(x) = -(bytes of zlib over the 8-bit pixels). A black box on the host, without gradient.

    Args:
      level: effort of zlib, 0 (stored) to 9; static.

    Raises:
      ValueError: for a level outside 0..9.

    References: Black et al. 2023, arXiv:2305.13301, section 5.1.

    Note: that paper counts kilobytes of JPEG; zlib is lossless, needs no image library and can tell 8x8 images apart.
      Sizes can differ by a few bytes between builds of zlib.
    """
    if level not in range(10):
        raise ValueError(f"level={level!r}: expected zlib's 0 (stored) to 9 (smallest)")
    from rgdiff.rewards import from_host

    return from_host(ZlibSize(int(level)))


@pytree
class InTurn:
    """A reward on labels, given as cond; where none are given, sample i is of class i modulo `classes`."""

    reward: Reward
    classes: int = static()

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.reward(x0, jnp.arange(x0.shape[0]) % self.classes if cond is None else cond)


@pytree
class Restored:
    """Minus the root mean squared error from the image that was measured, over the pixels that were not seen, [B].

    `seen` is what of it the measurement told, as a picture.
    """

    truth: Array
    seen: Array
    unseen: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        square = (self.unseen * (x0 - self.truth) ** 2).reshape(x0.shape[0], -1)
        return -jnp.sqrt(square.sum(-1) / self.unseen.sum())
