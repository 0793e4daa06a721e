"""One-class problems: train on normal examples alone, then separate normal from anomalous ones; and three detectors to compare with.

Data are scikit-learn's: digits with one class held out, and two medical and chemical tables whose one class is normal. Examples are
float32 [N, D], scaled by the training examples'. Scores are higher for anomalous examples and are evaluated by their AUROC.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rgdiff import checks, metrics
from rgdiff.domains.images import data as images

TABLES = {"breast_cancer": 1, "wine": 1}  # the normal class: benign; the largest of three cultivars
DETECTORS = ("isolation_forest", "one_class_svm", "local_outlier_factor")


class OneClass(NamedTuple):
    """Normal examples for training [N, D], and normal [M, D] and anomalous ones [K, D] for the test."""

    name: str
    train: np.ndarray
    normal: np.ndarray
    anomalous: np.ndarray

    def auroc(self, score: Any) -> float:
        """Return the AUROC of a score [N, D] -> [N], higher where anomalous."""
        return metrics.auroc(np.asarray(score(self.anomalous)), np.asarray(score(self.normal)))


def _scaled(name: str, train: Any, normal: Any, anomalous: Any, spread: Any) -> OneClass:
    mean = np.mean(train, 0)
    return OneClass(name, *(((np.asarray(x) - mean) / spread).astype(np.float32) for x in (train, normal, anomalous)))


def held_out_digit(digit: int) -> OneClass:
    """Make the problem of scikit-learn's digits without one: nine classes are normal, and the tenth is not.

    Training examples are seven eighths of the nine classes, normal ones the rest of them; pixels share one scale.

    Args:
      digit: the anomalous class, 0 to 9.

    Returns:
      The problem, with D = 64.

    Raises:
      ValueError: for another digit.
    """
    domain = images.digits()
    checks.one_of("digit", digit, range(domain.classes))
    x = np.concatenate([domain.train_x, domain.heldout_x]).reshape(-1, 64)
    y = np.concatenate([domain.train_y, domain.heldout_y])
    test = domain.test_x.reshape(-1, 64)
    anomalous = np.concatenate([x[y == digit], test[domain.test_y == digit]])
    train = x[y != digit]
    return _scaled(f"digit_{digit}", train, test[domain.test_y != digit], anomalous, np.std(train - train.mean(0)))


def table(name: str, split: int = 0) -> OneClass:
    """Make the problem of a table of scikit-learn: half of its normal class is for training, the rest for the test.

    Args:
      name: `breast_cancer` (benign is normal; D = 30) or `wine` (the second cultivar is; D = 13).
      split: seed of the random half.

    Returns:
      The problem.

    Raises:
      ValueError: for another name.
    """
    from sklearn import datasets

    checks.one_of("table", name, TABLES)
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    normal = np.random.default_rng(split).permutation(x[y == TABLES[name]])
    half = len(normal) // 2
    spread = np.maximum(np.std(normal[:half], 0), 1e-6)
    return _scaled(name, normal[:half], normal[half:], x[y != TABLES[name]], spread)


def detect(name: str, problem: OneClass, seed: int = 0) -> float:
    """Return the AUROC of a detector of scikit-learn with its defaults (`local_outlier_factor` with novelty=True).

    Args:
      name: `isolation_forest`, `one_class_svm` or `local_outlier_factor`.
      problem: to fit the training examples of, and to score the others.
      seed: of the isolation forest; the others are deterministic.

    Returns:
      The AUROC, in [0, 1].

    Raises:
      ValueError: for another name.
    """
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor
    from sklearn.svm import OneClassSVM

    made = {
        "isolation_forest": lambda: IsolationForest(random_state=seed),
        "one_class_svm": OneClassSVM,
        "local_outlier_factor": lambda: LocalOutlierFactor(novelty=True),
    }
    detector = made[checks.one_of("detector", name, DETECTORS)]().fit(problem.train)
    return problem.auroc(lambda x: -detector.score_samples(x))


class AnomalyDomain:
    """One-class problems of one size. Build it with `one_class`. A problem of a table is split anew for every seed."""

    value_range = None

    def __init__(self, source: str, digits: tuple[int, ...]):
        self.source, self.digits = source, digits
        first = self.problems(0)[0]
        self.shape, self.train_x = first.train.shape[1:], first.train

    def problems(self, seed: int) -> list[OneClass]:
        """Return the problems of a seed."""
        return [held_out_digit(d) for d in self.digits] if self.source == "digits" else [table(self.source, seed)]


def one_class(source: str = "digits", digits: tuple[int, ...] = tuple(range(10))) -> AnomalyDomain:
    """Make a domain of one-class problems.

    Args:
      source: `digits`, one problem for each of `digits` held out; or a table, `breast_cancer` or `wine`.
      digits: the classes to hold out, one at least; of the source `digits` only.

    Returns:
      The domain.

    Raises:
      ValueError: for another source, or no digit.

    Example:
      >>> from rgdiff.domains import anomaly
      >>> domain = anomaly.one_class("wine")
      >>> print(domain.shape, len(domain.problems(seed=0)))
      (13,) 1
    """
    checks.one_of("domain.source", source, ("digits", *TABLES))
    if not digits:
        raise ValueError("digits names the classes to hold out, one at least")
    return AnomalyDomain(source, tuple(digits))
