"""Anomaly detection in recipes: energies and scikit-learn's detectors on the same one-class problems, over seeds.

A method here trains its energy anew for every problem and seed, and reports AUROCs; training is `runtime.dxmi`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, processes, schedules
from rgdiff.domains import anomaly
from rgdiff.rewards import Task
from rgdiff.runtime.dxmi import LearningPrior
from rgdiff.runtime.methods import Outcome
from rgdiff.runtime.priors import offers
from rgdiff.runtime.run import Run
from rgdiff.tuners import standard_normal
from rgdiff.typing import Denoiser, Params, Process, pytree


@pytree
class _Normal:
    """A model without parameters: standard normal data."""

    denoiser: Denoiser

    def __call__(self, params: Params) -> Denoiser:
        return self.denoiser


@dataclasses.dataclass(frozen=True)
class ProblemPrior(LearningPrior):
    """A prior with the domain's problems."""

    problems: Callable[[int], list[anomaly.OneClass]] | None = None


@dataclasses.dataclass(frozen=True)
class OneClassPrior:
    """The standard normal law, which needs no training, with the problems of `domain=anomaly`."""

    steps: int = 10
    hands_on = True

    @property
    def schedule(self) -> Any:
        return schedules.cosine_vp()

    def process(self, shape: tuple[int, ...], eta: float | None = None) -> Process:
        """Return the process on examples of this shape."""
        return processes.gaussian(self.schedule, shape, eta=1.0 if eta is None else eta)

    def check(self, domain: Any) -> None:
        """Refuse a domain without problems."""
        offers(domain, "problems", "one-class problems: domain=anomaly")

    def obtain(self, run: Run, domain: Any, identity: Any) -> ProblemPrior:
        """Make the prior."""
        process: Any = self.process(domain.shape)
        model: Any = _Normal(standard_normal(process))
        problems = domain.problems
        return ProblemPrior(process, process.times(self.steps), model, None, self, domain.shape, problems=problems)


def study(prior: Any, seeds: int, auroc: Callable[[anomaly.OneClass, int], float]) -> dict[str, float]:
    """Return the mean and standard deviation over seeds of every problem's AUROC, and of their mean over problems."""
    found = [{problem.name: auroc(problem, seed) for problem in prior.problems(seed)} for seed in range(seeds)]
    every = {name: np.array([one[name] for one in found]) for name in found[0]}
    every["mean"] = np.mean([*every.values()], axis=0)
    figures = {}
    for name, values in every.items():
        figures |= {f"auroc_{name}": float(values.mean()), f"auroc_{name}_sd": float(values.std(ddof=seeds > 1))}
    return figures


@dataclasses.dataclass(frozen=True)
class Scikit:
    """A detector of scikit-learn with its defaults: see `anomaly.detect`."""

    detector: str
    seeds: int = 5

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse an unknown detector, and a prior without problems."""
        checks.one_of("detector", self.detector, anomaly.DETECTORS)
        _problems(prior)

    def run(self, run: Run, phase: str, prior: Any, task: Task, count: int) -> Outcome:
        with run.clock() as clock:
            figures = study(prior, self.seeds, lambda problem, seed: anomaly.detect(self.detector, problem, seed))
        x0 = np.resize(prior.problems(0)[0].train, (count, *prior.shape))
        return Outcome(x0, 0, float("nan"), clock.seconds, clock.compile_seconds, figures=figures)


@dataclasses.dataclass(frozen=True)
class EnergyDetector:
    """An energy as the score of what is anomalous.

    Args:
      training: how it is learnt: `runtime.dxmi.MaximumEntropy` or `runtime.dxmi_baselines.LangevinTraining`.
      seeds: independent trainings, of every problem.
    """

    training: Any
    seeds: int = 5

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        _problems(prior)
        self.training.check(prior, shape)

    def run(self, run: Run, phase: str, prior: Any, task: Task, count: int) -> Outcome:
        outcomes: list[Any] = []
        size = min(len(problem.train) for problem in prior.problems(0))  # of all, so that one program trains them

        def auroc(problem: anomaly.OneClass, seed: int) -> float:
            name = f"{phase}_{problem.name}_{seed}"
            data, fresh = jnp.asarray(problem.train[:size]), jnp.asarray(problem.normal)
            learning = dataclasses.replace(prior, data=data, fresh=fresh)
            outcome = self.training.run(run, name, learning, task, count)
            outcomes.append(outcome)
            return problem.auroc(lambda x: jax.device_get(outcome.energy(jnp.asarray(x))))

        with run.clock() as clock:
            figures = study(prior, self.seeds, auroc)
        first = outcomes[0]
        return Outcome(
            first.x0, 0, float("nan"), clock.seconds, clock.compile_seconds, curves=first.curves, figures=figures
        )


def _problems(prior: Any) -> None:
    if not isinstance(prior, OneClassPrior):
        raise ValueError("this method detects anomalies and needs prior=one_class and domain=anomaly")
