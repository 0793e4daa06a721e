"""Tasks on pictures of a pipeline, beside those of `rgdiff.domains.images.tasks`: what `reward/*.yaml` name.

Rewards here are of pictures [B, H, W, C] in [-1, 1]; a recipe decodes latents before them. They do not read conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.domains.images.reference import pretrained
from rgdiff.rewards import Task
from rgdiff.typing import Array, Cond, pytree


@pytree
class Colour:
    """Minus the mean squared distance of the ink's colour from the target, weighed by the ink; see `colour`."""

    target: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        light = jnp.clip((x0 + 1) / 2, 0, 1)
        ink = light.max(-1, keepdims=True)
        wrong = jnp.square(light - ink * self.target)
        return -wrong.sum((1, 2, 3)) / (ink.sum((1, 2, 3)) + 1.0)


@pytree
class GrayClass:
    """log p(target | brightest channel) of a classifier of gray pictures; see `digit`."""

    classifier: Any
    target: int

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        gray = jnp.clip(x0, -1, 1).max(-1, keepdims=True)
        return jax.nn.log_softmax(self.classifier(gray))[:, self.target]


def colour(target: Sequence[float] = (1.0, 0.2, 0.2)) -> Task:
    """Make the task: ink of one colour, whatever is drawn: minus the squared distance from the target, in [-3, 0], weighed by ink.

    Args:
      target: red, green, blue of full ink, each in [0, 1].

    Returns:
      The task, on pictures with three channels; evaluated by itself.

    Raises:
      ValueError: for something else than three numbers in [0, 1].
    """
    if len(target) != 3 or not all(0 <= share <= 1 for share in target):
        raise ValueError(f"reward.target is red, green and blue, each in [0, 1], got {list(target)}")
    reward = Colour(jnp.asarray(target, jnp.float32))
    return Task(reward, reward)


def digit(target: int = 3, reference: str = "package:mnist16_reference.safetensors") -> Task:
    """Make the task: log p(target | x) of a classifier of gray digits, in nats; evaluated by another one, trained on other images.

    Args:
      target: the class to be drawn, an integer label.
      reference: the file that holds both classifiers, see `rgdiff.domains.images.pretrained`.

    Returns:
      The task, on pictures of the classifiers' size.

    Raises:
      ValueError: for a file that is none, or an unknown class.
    """
    known = pretrained(reference)
    checks.one_of("reward.target", target, range(known.classes))
    return Task(GrayClass(known.guide, target), GrayClass(known.judge, target))
