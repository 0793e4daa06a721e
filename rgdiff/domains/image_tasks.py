"""Tasks on images, and their judge: what `reward/*.yaml` name, and how samples of any method are measured and shown.

The judge's classifier is trained on the held-out split and never guides, so that over-optimisation of the guiding
reward shows in its figures. Rewards themselves are in `image_rewards`, figures in `rgdiff.metrics`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, metrics
from rgdiff.domains import image_rewards
from rgdiff.domains.classifier import Classifier, train_classifier
from rgdiff.domains.images import ImageDomain
from rgdiff.domains.judging import Judge
from rgdiff.rewards import Task, ensemble, weighted_sum
from rgdiff.typing import Array, Cond, Key, Reward, pytree, static

SHOWN = 25  # pictures in a grid of the report


class ImageJudge(Judge):
    """Measures samples of an image domain with a classifier of its own."""

    def __init__(self, domain: ImageDomain, key: Key):
        super().__init__(domain.shape)
        self.domain = domain
        self.classifier = train_classifier(key, domain.heldout_x, domain.heldout_y, domain.classes)
        self._features = jax.jit(lambda classifier, x: classifier.features(x))
        self._classes = jax.jit(lambda classifier, x: classifier.logits(x).argmax(-1))

    def real(self, task: Task) -> np.ndarray:
        """Return the real images that samples are compared with: of the target's class where there is one, from all splits."""
        d = self.domain
        x = np.concatenate([d.train_x, d.heldout_x, d.test_x])
        y = np.concatenate([d.train_y, d.heldout_y, d.test_y])
        return x if task.target is None else x[y == task.target]

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method, flat: rewards under both rewards, distances, diversity, KL, cost."""
        x0 = outcome.x0
        finite = x0[np.isfinite(x0).reshape(len(x0), -1).all(-1)]
        if len(finite) < 2:
            raise ValueError(
                f"{len(x0) - len(finite)} of {len(x0)} samples are not finite; lower the learning rate or check the reward"
            )
        row = self.reward_figures(x0, task)
        asked = np.arange(len(x0)) % self.domain.classes if isinstance(task.reward, InTurn) else task.target
        if asked is not None:
            found = np.asarray(self._classes(self.classifier, jnp.asarray(x0)))
            row["heldout_accuracy"] = float(np.mean(found == asked))
        real, fake = (np.asarray(self._features(self.classifier, jnp.asarray(x))) for x in (self.real(task), finite))
        precision, recall = metrics.precision_recall(real, fake)
        return (
            row
            | {
                "frechet": metrics.frechet_distance(real, fake),
                "precision": precision,
                "recall": recall,
                "diversity": metrics.diversity(finite),
            }
            | self.costs(outcome)
        )

    def pictures(self, samples: dict[str, np.ndarray], task: Task) -> list[tuple[str, np.ndarray, list[float]]]:
        """Return (title, 8-bit pictures, their guiding rewards) for the report: real images, then each method's samples."""
        title = "real images" if task.target is None else f"real images of class {task.target}"
        shown = {title: self.real(task), **samples}
        first = {name: x0[:SHOWN] for name, x0 in shown.items()}
        return [(name, self.domain.decode(x0), self.rewards(task.reward, x0).tolist()) for name, x0 in first.items()]

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        compared = "all real images" if task.target is None else f"the real images of class {task.target}"
        accuracy = np.mean(
            np.asarray(self._classes(self.classifier, jnp.asarray(self.domain.test_x))) == self.domain.test_y
        )
        return [
            f"Frechet distance, precision and recall: against {compared}, in the features of the judging classifier, "
            f"which is trained on other images than the prior and the guiding reward (its accuracy on test images: {accuracy:.3f}).",
            "kl: path KL to the prior in nats per sample; for tuned models that of their ancestral chain, for SVDD the estimate "
            "of the selections' KL. network_calls: per sample. seconds: without compilation. Under each picture: its guiding reward.",
        ]


def digit(
    domain: ImageDomain,
    judge: ImageJudge,
    key: Key,
    target: int = 3,
    heads: int = 1,
    reduce: str = "lower",
    caution: float = 1.0,
) -> Task:
    """Make the task: log p(target | x) of a classifier trained on the training split, judged by the held-out one.

    Args:
      heads, reduce, caution: several classifiers, trained from keys of their own and joined by `rewards.ensemble`, are harder
        to exploit than one.
    """
    if not isinstance(domain, ImageDomain):
        raise ValueError("reward=digit is for images with labels; choose an image domain, e.g. domain=digits")
    checks.one_of("reward.target", target, range(domain.classes))
    classify = image_rewards.classifier_reward
    keys = [key] if checks.at_least("heads", heads, 1) == 1 else list(jax.random.split(key, heads))
    guides = [classify(train_classifier(k, domain.train_x, domain.train_y, domain.classes), target) for k in keys]
    reward = guides[0] if heads == 1 else ensemble(guides, reduce, caution=caution)
    return Task(reward, classify(judge.classifier, target), target)


@pytree
class InTurn:
    """A reward on labels, given as cond; where none are given, sample i is of class i modulo `classes`."""

    reward: Reward
    classes: int = static()

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return self.reward(x0, jnp.arange(x0.shape[0]) % self.classes if cond is None else cond)


def labelled(domain: ImageDomain, judge: ImageJudge, key: Key) -> Task:
    """Make the task of a conditional prior: log p(label | x) of the label that each sample was drawn with, every class in turn."""
    if not isinstance(domain, ImageDomain):
        raise ValueError("reward=labelled is for images with labels; choose an image domain, e.g. domain=digits")
    guide: Classifier = train_classifier(key, domain.train_x, domain.train_y, domain.classes)
    classify = image_rewards.classifier_reward
    reward, heldout = (InTurn(classify(one), domain.classes) for one in (guide, judge.classifier))
    return Task(reward, heldout, conditional=True)


def symmetric() -> Task:
    """Make the task: left-right symmetry, judged by itself."""
    return Task(image_rewards.symmetry(), image_rewards.symmetry())


def inked(target: float | None = None, slope: float = 1.0) -> Task:
    """Make the task: mean ink in [0, 1], or closeness to a target amount, times `slope`, judged by itself."""
    reward = weighted_sum([image_rewards.ink(target)], [slope])
    return Task(reward, reward)


def compressible(level: int = 6) -> Task:
    """Make the task: minus the zlib size of the 8-bit image in bytes, a black box, judged by itself."""
    return Task(image_rewards.compressibility(level), image_rewards.compressibility(level))
