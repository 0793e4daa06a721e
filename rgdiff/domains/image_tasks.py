"""Tasks on images, and their judge: what `reward/*.yaml` name, and how samples of any method are measured and shown.

The judge's classifier is trained on the held-out split and never guides, so that over-optimisation of the guiding
reward shows in its figures. Rewards themselves are in `image_rewards`, figures in `rgdiff.metrics`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, guides, metrics
from rgdiff.domains import image_rewards
from rgdiff.domains.classifier import Classifier, train_classifier
from rgdiff.domains.images import ImageDomain
from rgdiff.domains.judging import Judge
from rgdiff.rewards import Task, ensemble, weighted_sum
from rgdiff.typing import Array, Cond, Key, Reward, pytree, static

SHOWN = 25  # real images in the report, at most


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
        asked = np.arange(len(x0)) % self.domain.classes if task.conditional else task.target
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

    def in_turn(self) -> np.ndarray:
        """Return real images of class 0, 1, ... in turn, as the samples of a conditional task are."""
        x, y = self.domain.train_x, self.domain.train_y
        of = [x[y == c] for c in range(self.domain.classes) if (y == c).any()]
        return np.stack([of[i % len(of)][i // len(of) % len(of[i % len(of)])] for i in range(SHOWN)])

    def spread(self, outcome: Any, task: Task) -> dict[str, float]:
        """Return the standard errors of the prior's figures; none where an image was measured: its posterior is to be narrow and far."""
        if isinstance(task.heldout, Restored):
            return {}
        x0 = outcome.x0[np.isfinite(outcome.x0).reshape(len(outcome.x0), -1).all(-1)]
        if len(x0) < 8:  # nobody is called by so few
            return {"kl": 0.0}
        real, fake = (np.asarray(self._features(self.classifier, jnp.asarray(x))) for x in (self.real(task), x0))
        return {
            "kl": 0.0,
            "frechet": metrics.jackknife(lambda part: metrics.frechet_distance(real, part), fake),
            "recall": metrics.jackknife(lambda part: metrics.precision_recall(real, part).recall, fake),
            "diversity": metrics.jackknife(metrics.diversity, x0),
        }

    def show_each(self, x0: np.ndarray) -> np.ndarray:
        """Return 8-bit pictures."""
        return self.domain.decode(x0)

    def references(self, task: Task) -> dict[str, np.ndarray]:
        """Return real images, and the image that was measured, if one was."""
        title = "real images" if task.target is None else f"real images of class {task.target}"
        shown = {title: (self.in_turn() if task.conditional else self.real(task))[:SHOWN]}
        if isinstance(task.heldout, Restored):
            told = task.heldout
            shown = {"the image, and what was seen of it": np.stack([told.truth, told.seen])} | shown
        return shown

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        compared = "all real images" if task.target is None else f"the real images of class {task.target}"
        accuracy = np.mean(
            np.asarray(self._classes(self.classifier, jnp.asarray(self.domain.test_x))) == self.domain.test_y
        )
        return [
            f"Frechet distance, precision and recall: against {compared}, in the features of the judging classifier, "
            f"which is trained on other images than the prior and the guiding reward (its accuracy on test images: {accuracy:.3f}).",
            "Path KL of tuned models: that of their ancestral chain; of SVDD: the estimate of its selections' KL.",
        ]


def digit(
    domain: ImageDomain,
    judge: ImageJudge,
    key: Key,
    target: int = 3,
    heads: int = 1,
    reduce: str = "lower",
    caution: float = 1.0,
    examples: int | None = None,
    judged: str = "classifier",
) -> Task:
    """Make the task: log p(target | x) of a classifier trained on the training split, judged by held-out images.

    Args:
      heads, reduce, caution: several classifiers, trained from keys of their own and joined by `rewards.ensemble`, are harder
        to exploit than one.
      examples: images that they are trained on, all by default. What few have taught is exploited sooner.
      judged: by a `classifier` trained on the held-out split, or by `likeness` to its images of the target, which sees also
        what no classifier does: samples that are like no image.
    """
    if not isinstance(domain, ImageDomain):
        raise ValueError("reward=digit is for images with labels; choose an image domain, e.g. domain=digits")
    checks.one_of("reward.target", target, range(domain.classes))
    classify = image_rewards.classifier_reward
    keys = [key] if checks.at_least("heads", heads, 1) == 1 else list(jax.random.split(key, heads))
    rows = slice(None)
    if examples is not None:
        every = len(domain.train_x)
        if not domain.classes <= examples <= every:
            raise ValueError(f"reward.examples must be {domain.classes} (the classes) to {every}, got {examples}")
        rows = np.asarray(jax.random.permutation(jax.random.fold_in(key, heads), every))[:examples]
    x, y = domain.train_x[rows], domain.train_y[rows]
    heard = [classify(train_classifier(k, x, y, domain.classes), target) for k in keys]
    reward = heard[0] if heads == 1 else ensemble(heard, reduce, caution=caution)
    if checks.one_of("reward.judged", judged, ("classifier", "likeness")) == "classifier":
        return Task(reward, classify(judge.classifier, target), target)
    return Task(reward, image_rewards.likeness(domain.heldout_x[domain.heldout_y == target]), target)


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


def inpainted(
    domain: ImageDomain, judge: ImageJudge, key: Key, image: int = 0, hidden: str = "right", noise: float = 0.1
) -> Task:
    """Make the task: log-likelihood of half of a test image's pixels, seen with noise, in nats; judged by the other half.

    Args:
      image: its number among the test images; its class is the task's target.
      hidden: the half that is not seen, left, right, top or bottom.
      noise: standard deviation in the unit of pixels, which span 2.
    """
    truth, target = _measured_image(domain, image)
    half = dict(zip(("left", "right", "top", "bottom"), ((1, 0), (1, 1), (0, 0), (0, 1)), strict=True))
    axis, far = half[checks.one_of("reward.hidden", hidden, half)]
    size = truth.shape[axis]
    index = jnp.arange(size).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    unseen = jnp.broadcast_to((index >= size // 2) == bool(far), truth.shape).astype(jnp.float32)
    y = truth + checks.positive("reward.noise", noise) * jax.random.normal(key, truth.shape)
    reward = guides.inpainting(1 - unseen, y, noise)
    return Task(reward, Restored(truth, jnp.where(unseen > 0, domain.value_range[0], y), unseen), target)


def downsampled(
    domain: ImageDomain, judge: ImageJudge, key: Key, image: int = 0, factor: int = 2, noise: float = 0.1
) -> Task:
    """Make the task: log-likelihood of a test image's block means, seen with noise, in nats; judged by all of its pixels.

    Args:
      image, noise: as `inpainted`.
      factor: side of a block; it divides the image's sides.
    """
    truth, target = _measured_image(domain, image)
    high, wide, channels = domain.shape
    checks.at_least("reward.factor", factor, 1)
    if high % factor or wide % factor:
        raise ValueError(
            f"images of {high} x {wide} pixels have no blocks of {factor} x {factor}; choose another reward.factor"
        )
    rows, columns = (np.kron(np.eye(n // factor), np.ones((1, factor)) / factor) for n in (high, wide))
    matrix = np.kron(np.kron(rows, columns), np.eye(channels))
    y = jnp.asarray(matrix @ np.asarray(truth, np.float64).reshape(-1), jnp.float32)
    y = y + checks.positive("reward.noise", noise) * jax.random.normal(key, y.shape)
    seen = jnp.asarray(np.asarray(y) @ matrix * factor**2, jnp.float32).reshape(domain.shape)
    reward = guides.linear(jnp.asarray(matrix, jnp.float32), y, noise, shape=domain.shape)
    return Task(reward, Restored(truth, seen, jnp.ones_like(truth)), target)


def _measured_image(domain: ImageDomain, image: int) -> tuple[Array, int]:
    if not isinstance(domain, ImageDomain):
        raise ValueError("this reward measures an image; choose an image domain, e.g. domain=digits")
    count = len(domain.test_x)
    if checks.at_least("reward.image", image, 0) >= count:
        raise ValueError(f"reward.image is the number of a test image, 0 to {count - 1}, got {image}")
    return jnp.asarray(domain.test_x[image]), int(domain.test_y[image])


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
