"""Digits that come with the package and without their images: two trained classifiers, and real images as one of them sees them.

They let a run of the packaged prior be rewarded, judged and shown with no data and no training. The files are made by
`rgdiff run pretrain_digits` from MNIST; `assets/README.md` says of what. Methods that learn from images need
`domain=mnist domain.size=16` and the data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rgdiff import assets, checks
from rgdiff.domains.images.classifier import Classifier
from rgdiff.domains.images.data import ImageDomain, Pictures
from rgdiff.typing import Key, pytree, static

WITHOUT_IMAGES = "this reward needs real images, which do not come with the package; take domain=digits"
KEPT = 400  # real images of a class whose features are kept, at most


@pytree
class PretrainedImages(Pictures):
    """Hold what judges samples of an image domain whose images are elsewhere.

    guide, judge: classifiers of disjoint images; the judge never guides. features [N, F], labels [N]: real images, as the
    judge's `features` sees them. accuracy: the judge's on images that neither has seen.
    """

    guide: Classifier
    judge: Classifier
    features: np.ndarray
    labels: np.ndarray
    accuracy: float = static()
    name: str = static()
    shape: tuple[int, int, int] = static()
    classes: int = static()
    value_range: tuple[float, float] = static(default=(-1.0, 1.0))

    def classifier(self, split: str, key: Key, examples: np.ndarray | None = None) -> Classifier:
        """Return the classifier of a split, as `ImageDomain.classifier`; it is trained already, on all images of the split.

        Raises:
          ValueError: for other examples.
        """
        if examples is not None:
            raise ValueError(WITHOUT_IMAGES)
        return {"train": self.guide, "heldout": self.judge}[checks.one_of("split", split, ("train", "heldout"))]

    def real(self, target: int | None = None) -> np.ndarray:
        """Return the real images, as `ImageDomain.real`: none are here."""
        return np.zeros((0, *self.shape), np.float32)

    def real_features(self, classifier: Classifier, target: int | None = None) -> np.ndarray:
        """Return features [N, F] of real images, as `ImageDomain.real_features`; those of the judge alone are known."""
        return self.features if target is None else self.features[self.labels == target]

    def accuracy_of(self, classifier: Classifier) -> float:
        """Return the accuracy on test images, as `ImageDomain.accuracy_of`; that of the judge alone is known."""
        return self.accuracy


def pretrained(path: str = "package:mnist16_reference.safetensors") -> PretrainedImages:
    """Load a domain without its images; by default, MNIST's digits at 16 x 16 pixels, which come with the package.

    Args:
      path: of a file that `rgdiff run pretrain_digits` has written; `package:NAME` is one that comes with the package.

    Returns:
      The domain.

    Raises:
      ValueError: for a file that is missing, damaged, or not of that kind.

    Example:
      >>> from rgdiff.domains import images
      >>> domain = images.pretrained()
      >>> print(domain.shape, domain.classes)
      (16, 16, 1) 10
    """
    from safetensors import SafetensorError, safe_open

    file = assets.resolved(path)
    try:
        with safe_open(file, "np") as opened:
            meta = json.loads((opened.metadata() or {})["rgdiff"])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
        networks: dict[str, Any] = {"guide": {}, "judge": {}}
        for name, array in arrays.items():
            if name.count(".") == 2:
                owner, layer, part = name.split(".")
                networks[owner].setdefault(layer, {})[part] = jnp.asarray(array)
        return PretrainedImages(
            guide=Classifier(networks["guide"]),
            judge=Classifier(networks["judge"]),
            features=arrays["features"].astype(np.float32),
            labels=arrays["labels"],
            accuracy=float(meta["accuracy"]),
            name=meta["name"],
            shape=tuple(meta["shape"]),
            classes=int(meta["classes"]),
        )
    except FileNotFoundError:
        raise ValueError(f"no file at {file}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} was not written by `rgdiff run pretrain_digits`: {reason}") from None


def write_reference(
    path: Path, guide: Classifier, judge: Classifier, domain: ImageDomain, **meta: Any
) -> dict[str, Any]:
    """Write the file that `pretrained` reads.

    Args:
      path: of the file.
      guide, judge: the classifiers.
      domain: an `ImageDomain`; its images are passed through the judge, and not written.
      meta: further entries of the metadata: provenance.

    Returns:
      The metadata.
    """
    from safetensors.numpy import save_file

    x = np.concatenate([domain.train_x, domain.heldout_x, domain.test_x])
    y = np.concatenate([domain.train_y, domain.heldout_y, domain.test_y])
    kept = np.concatenate([_spread(np.flatnonzero(y == label), KEPT) for label in range(domain.classes)])
    features = np.concatenate([np.asarray(judge.features(jnp.asarray(x[rows]))) for rows in np.array_split(kept, 10)])
    arrays = {f"{name}.{layer}.{part}": np.asarray(value)
              for name, one in (("guide", guide), ("judge", judge))
              for layer, values in one.params.items() for part, value in values.items()}  # fmt: skip
    arrays |= {"features": features.astype(np.float16), "labels": y[kept].astype(np.int32)}
    meta = {"name": f"{domain.name}{domain.shape[0]}", "shape": list(domain.shape), "classes": domain.classes,
            "accuracy": round(domain.accuracy_of(judge), 4)} | meta  # fmt: skip
    save_file(arrays, path, {"rgdiff": json.dumps(meta)})
    return meta


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Keep at most `count` of some rows, evenly from all of them."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
