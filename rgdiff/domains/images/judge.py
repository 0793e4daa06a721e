"""Tasks on images, and their judge: what `reward/*.yaml` name, and how samples of any method are measured and shown.

The judge's classifier is trained on the held-out split and never guides, so that over-optimisation of the guiding
reward shows in its figures. Rewards themselves are in `image_rewards`, figures in `rgdiff.metrics`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import metrics
from rgdiff.domains.images.classifier import train_classifier
from rgdiff.domains.images.data import ImageDomain
from rgdiff.domains.images.reference import PretrainedImages
from rgdiff.domains.images.rewards import Restored
from rgdiff.domains.judging import BaseJudge
from rgdiff.rewards import Task
from rgdiff.typing import Key

SHOWN = 25  # real images in the report, at most
COMPARED = 10_000  # real images that samples are compared with, at most: precision and recall need all their distances


class ImageJudge(BaseJudge):
    """Measures samples of an image domain with a classifier of its own."""

    def __init__(self, domain: ImageDomain | PretrainedImages, key: Key):
        super().__init__(domain, key)
        if isinstance(domain, PretrainedImages):
            self.classifier = domain.judge
        else:
            self.classifier = train_classifier(key, domain.heldout_x, domain.heldout_y, domain.classes)
        self._features = jax.jit(lambda classifier, x: classifier.features(x))
        self._classes = jax.jit(lambda classifier, x: classifier.logits(x).argmax(-1))

    def real(self, task: Task) -> np.ndarray:
        """Return the real images that samples are compared with: of the target's class where there is one, evenly from all splits."""
        d = self.domain
        if isinstance(d, PretrainedImages):
            return np.zeros((0, *d.shape), np.float32)
        x = np.concatenate([d.train_x, d.heldout_x, d.test_x])
        y = np.concatenate([d.train_y, d.heldout_y, d.test_y])
        x = x if task.target is None else x[y == task.target]
        return x[:: -(-len(x) // COMPARED) or 1]

    def features(self, x: np.ndarray) -> np.ndarray:
        """Return the classifier's features [N, F] of images."""
        return np.asarray(self._features(self.classifier, jnp.asarray(x)))

    def real_features(self, task: Task) -> np.ndarray:
        """Return the features of the real images that samples are compared with."""
        d = self.domain
        if isinstance(d, PretrainedImages):
            return d.features if task.target is None else d.features[d.labels == task.target]
        return self.features(self.real(task))

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        """Return the figures of one method, flat: rewards under both rewards, distances, diversity, KL, cost."""
        x0 = outcome.x0
        finite = x0[np.isfinite(x0).reshape(len(x0), -1).all(-1)]
        if len(finite) < 2:
            raise ValueError(
                f"{len(x0) - len(finite)} of {len(x0)} samples are not finite; lower the learning rate or check the reward"
            )
        row = self.reward_figures(x0, task, outcome.lineages)
        asked = np.arange(len(x0)) % self.domain.classes if task.conditional else task.target
        if asked is not None:
            found = np.asarray(self._classes(self.classifier, jnp.asarray(x0)))
            row["heldout_accuracy"] = float(np.mean(found == asked))
        real, fake = self.real_features(task), self.features(finite)
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
        real, fake = self.real_features(task), self.features(x0)
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
        if isinstance(self.domain, PretrainedImages):
            return {}
        title = "real images" if task.target is None else f"real images of class {task.target}"
        shown = {title: (self.in_turn() if task.conditional else self.real(task))[:SHOWN]}
        if isinstance(task.heldout, Restored):
            told = task.heldout
            shown = {"the image, and what was seen of it": np.stack([told.truth, told.seen])} | shown
        return shown

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        compared = "all real images" if task.target is None else f"the real images of class {task.target}"
        d = self.domain
        if isinstance(d, PretrainedImages):
            accuracy = d.accuracy
        else:
            accuracy = np.mean(np.asarray(self._classes(self.classifier, jnp.asarray(d.test_x))) == d.test_y)
        return [
            f"Frechet distance, precision and recall: against {compared}, in the features of the judging classifier, "
            f"which is trained on other images than the prior and the guiding reward (its accuracy on test images: {accuracy:.3f}).",
            "Path KL of tuned models: that of their ancestral chain; of SVDD: the estimate of its selections' KL.",
        ]
