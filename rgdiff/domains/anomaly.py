"""One-class problems: learn from normal examples alone, then tell normal from anomalous ones; and three detectors to compare with.

Data are scikit-learn's: digits with one class held out, and two medical and chemical tables whose one class is normal. Examples are
float32 [N, D], scaled by the training examples'; scores are higher for what is more anomalous, and judged by their AUROC.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rgdiff import checks, metrics
from rgdiff.domains import drawing, images
from rgdiff.domains.judging import Judge
from rgdiff.rewards import Task
from rgdiff.typing import Array, Cond, Key, pytree

TABLES = {"breast_cancer": 1, "wine": 1}  # the normal class: benign; the largest of three cultivars
DETECTORS = ("isolation_forest", "one_class_svm", "local_outlier_factor")


class OneClass(NamedTuple):
    """Normal examples to learn from [N, D], and normal [M, D] and anomalous ones [K, D] to be told apart."""

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
    """Make the problem of a table of scikit-learn: half of its normal class to learn from, drawn by `split`; all else is to be told apart.

    Args:
      name: `breast_cancer` (benign is normal; D = 30) or `wine` (the second cultivar is; D = 13).
    """
    from sklearn import datasets

    checks.one_of("table", name, TABLES)
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    normal = np.random.default_rng(split).permutation(x[y == TABLES[name]])
    half = len(normal) // 2
    spread = np.maximum(np.std(normal[:half], 0), 1e-6)
    return _scaled(name, normal[:half], normal[half:], x[y != TABLES[name]], spread)


def detect(name: str, problem: OneClass, seed: int = 0) -> float:
    """Return the AUROC of a detector of scikit-learn, with its defaults: `isolation_forest`, `one_class_svm`, `local_outlier_factor`.

    The last has novelty=True; the first is the only one that draws.
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


class AnomalyJudge(Judge):
    """Hands on what detectors measured of themselves: their figures are AUROCs."""

    pictured = False  # detectors have no samples

    def __init__(self, domain: AnomalyDomain):
        super().__init__(domain.shape)
        self.domain = domain

    def row(self, outcome: Any, task: Task, prior: Any = None) -> dict[str, Any]:
        return self.costs(outcome)

    def scores(self, x0: np.ndarray, task: Task) -> None:
        return None

    def show_each(self, x0: np.ndarray) -> Any:
        """Return digits as pictures of their differences from the mean digit, and rows of a table as bars."""
        if self.domain.source != "digits":
            return drawing.bars(x0, 3.0)
        return np.rint(np.clip(127.5 + 127.5 * x0 / 3, 0, 255)).astype(np.uint8).reshape(-1, 8, 8, 1)

    def references(self, task: Task) -> dict[str, np.ndarray]:
        """Return normal and anomalous examples of the first problem."""
        problem = self.domain.problems(0)[0]
        of = f"{problem.name.replace('_', ' ')}, as differences from the mean"
        return {f"normal examples of {of}": problem.normal, f"anomalous examples of {of}": problem.anomalous}

    def curves(self, rows: Any) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """Return the AUROC of every digit held out."""
        if self.domain.source != "digits" or len(self.domain.digits) < 2:
            return {}
        digits = list(self.domain.digits)
        of = {k: [row.get(f"auroc_digit_{d}") for d in digits] for k, row in rows.items()}
        return {"AUROC, by the digit held out": ("digit held out", "AUROC (1/2 is chance)", {
            key: (digits, values) for key, values in of.items() if None not in values
        })}  # fmt: skip

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        return [
            "auroc: how often an anomalous example scores above a normal one, both unseen in training; mean and standard deviation "
            "over seeds, and for tables over as many splits; auroc_mean: over problems and seeds. prior: the distance from the mean.",
        ]


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

    def evaluator(self, key: Key) -> AnomalyJudge:
        """Return what measures samples of this domain."""
        return AnomalyJudge(self)


def one_class(source: str = "digits", digits: tuple[int, ...] = tuple(range(10))) -> AnomalyDomain:
    """Make a domain of one-class problems.

    Args:
      source: `digits`, one problem for each of `digits` held out; or a table, `breast_cancer` or `wine`.
    """
    checks.one_of("domain.source", source, ("digits", *TABLES))
    if not digits:
        raise ValueError("digits names the classes to hold out, one at least")
    return AnomalyDomain(source, tuple(digits))


@pytree
class Typicality:
    """r(x) = -|x|^2 / 2: near the mean of the scaled data is better."""

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        return -0.5 * jnp.sum(x0.reshape(x0.shape[0], -1) ** 2, -1)


def typicality() -> Task:
    """Make the task of a run that has no reward: minus half the squared distance from the mean."""
    return Task(Typicality(), Typicality())
