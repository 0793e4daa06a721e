"""The method of `rgdiff run pretrain_digits` and of recipes like it: write the prior, and what judges its samples, as files that need no images."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np

from rgdiff.domains.images import ImageDomain
from rgdiff.domains.images.classifier import Classifier
from rgdiff.domains.images.reference import write_reference
from rgdiff.domains.images.rewards import ClassifierReward
from rgdiff.recipes.methods.steering import PriorSampling
from rgdiff.recipes.typing import Method, Outcome, ReadyPrior
from rgdiff.rewards import Task
from rgdiff.runtime.run import Run


@dataclasses.dataclass(frozen=True)
class Packaging(Method):
    """Write `NAME_prior.safetensors` and `NAME_reference.safetensors` into the run's folder, and sample the prior.

    Args:
      domain: the recipe's own; its images are passed through the judge's classifier and not written.
      data: what the images are, for the files' metadata: name, origin, licence.
    """

    domain: ImageDomain
    data: str

    def suits(self, task: Task) -> None:
        """Refuse a reward that is not of a classifier."""
        if not (isinstance(task.reward, ClassifierReward) and isinstance(task.heldout, ClassifierReward)):
            raise ValueError("packaging takes reward=digit, whose two classifiers it writes")

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        from flax.traverse_util import flatten_dict
        from safetensors.numpy import save_file

        assert isinstance(task.reward, ClassifierReward) and isinstance(task.heldout, ClassifierReward)
        guide, judge = task.reward.classifier, task.heldout.classifier
        assert isinstance(guide, Classifier) and isinstance(judge, Classifier)
        name = f"{self.domain.name}{self.domain.shape[0]}"
        made = {"recipe": f"rgdiff run {run.recipe}", "data": self.data, "jax": jax.__version__}
        images = len(self.domain.train_x)
        flat = flatten_dict(prior.params, sep=".")
        arrays = {key: np.asarray(value, np.float32) for key, value in flat.items()}
        file = run.folder.path / f"{name}_prior.safetensors"
        save_file(arrays, file, {"rgdiff": json.dumps({"trained on": f"{images} images"} | made)})
        reference = run.folder.path / f"{name}_reference.safetensors"
        meta = write_reference(reference, guide, judge, self.domain, **made)
        run.say(f"{file}, {reference}: for rgdiff/assets (the judge's accuracy on test images: {meta['accuracy']})")
        return PriorSampling().run(run, phase, prior, task, count)
