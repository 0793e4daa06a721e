"""Anomaly detection in recipes: energies and scikit-learn's detectors on the same one-class problems, over seeds.

A method here trains its energy anew for every problem and seed, and reports AUROCs; the training is that of `few_step`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.domains.anomaly import data as anomaly
from rgdiff.recipes.outcome import outcome
from rgdiff.recipes.priors import OneClassPrior
from rgdiff.recipes.typing import Method, Outcome, Prior, ReadyPrior, Shape
from rgdiff.rewards import Task
from rgdiff.runtime.run import Run


def problems(prior: ReadyPrior, seed: int) -> list[anomaly.OneClass]:
    """Return the prior's problems of a seed.

    Args:
      prior: with problems, from `OneClassPrior`.
      seed: of their splits.
    """
    assert prior.problems is not None  # `check` has seen to it
    return prior.problems(seed)


def study(prior: ReadyPrior, seeds: int, auroc: Callable[[anomaly.OneClass, int], float]) -> dict[str, float]:
    """Return the mean and standard deviation over seeds of every problem's AUROC, and of their mean over problems.

    Args:
      prior: with problems.
      seeds: their number.
      auroc: (problem, seed) -> AUROC of one training.
    """
    found = [{problem.name: auroc(problem, seed) for problem in problems(prior, seed)} for seed in range(seeds)]
    every = {name: np.array([one[name] for one in found]) for name in found[0]}
    every["mean"] = np.mean([*every.values()], axis=0)
    figures = {}
    for name, values in every.items():
        figures |= {f"auroc_{name}": float(values.mean()), f"auroc_{name}_sd": float(values.std(ddof=seeds > 1))}
    return figures


@dataclasses.dataclass(frozen=True)
class Scikit(Method):
    """A detector of scikit-learn with its defaults: see `anomaly.detect`.

    Args:
      detector: its name, one of `anomaly.DETECTORS`.
      seeds: independent trainings, of every problem.
    """

    detector: str
    seeds: int = 5

    def check(self, prior: Prior, shape: Shape) -> None:
        checks.one_of("detector", self.detector, anomaly.DETECTORS)
        _problems(prior)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        with run.clock() as clock:
            figures = study(prior, self.seeds, lambda problem, seed: anomaly.detect(self.detector, problem, seed))
        x0 = np.resize(problems(prior, 0)[0].train, (count, *prior.shape))
        return outcome(x0, 0, clock, figures=figures)


@dataclasses.dataclass(frozen=True)
class EnergyDetector(Method):
    """An energy as the anomaly score.

    Args:
      training: how it is learnt: `few_step.FewStepTraining` or `few_step_baselines.LangevinTraining`.
      seeds: independent trainings, of every problem.
    """

    training: Method
    seeds: int = 5

    def check(self, prior: Prior, shape: Shape) -> None:
        _problems(prior)
        self.training.check(prior, shape)

    def learning(self, prior: ReadyPrior, problem: anomaly.OneClass) -> ReadyPrior:
        """Return the prior with a problem's data, as many as the smallest has, so that one program trains all."""
        size = min(len(one.train) for one in problems(prior, 0))
        return dataclasses.replace(prior, data=jnp.asarray(problem.train[:size]), fresh=jnp.asarray(problem.normal))

    def programs(self, name: str, prior: ReadyPrior, task: Task, count: int) -> Iterator[Any]:
        """Yield the programs of a training, of shapes (`rgdiff.recipes.programs`)."""
        from rgdiff.recipes.programs import of_method

        yield from of_method(name, self.training, self.learning(prior, problems(prior, 0)[0]), task, count)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        outcomes: list[Any] = []

        def auroc(problem: anomaly.OneClass, seed: int) -> float:
            name = f"{phase}_{problem.name}_{seed}"
            trained = self.training.run(run, name, self.learning(prior, problem), task, count)
            outcomes.append(trained)
            energy: Any = trained.energy
            return problem.auroc(lambda x: jax.device_get(energy(jnp.asarray(x))))

        with run.clock() as clock:
            figures = study(prior, self.seeds, auroc)
        first = outcomes[0]
        return outcome(first.x0, 0, clock, curves=first.curves, figures=figures)


def _problems(prior: Prior) -> None:
    if not isinstance(prior, OneClassPrior):
        raise ValueError("this method detects anomalies and needs prior=one_class and domain=anomaly")
