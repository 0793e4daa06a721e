"""The gradient-guidance paper's runs: priors whose exact denoiser is known, and rounds of algorithms 1 and 2 over seeds.

The rounds are `tuners.gradient_guidance`'s; here they get phases, checkpoints and curves. `published` values of a
recipe are drawn beside ours, under the same title.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rgdiff import processes, tuners
from rgdiff.guides import increment
from rgdiff.rewards import Task, differentiable
from rgdiff.runtime.methods import Outcome
from rgdiff.runtime.priors import GaussianPrior, Prior, offers
from rgdiff.runtime.run import Run
from rgdiff.typing import Process

TITLES = {
    "reward": "reward by round",
    "theta_x": "theta . x by round",
    "theta_x_inside": "theta . x inside the data's support by round",
    "off_support": "distance from the data's support by round",
}
PARETO = "reward against distance from the data's support"


@dataclasses.dataclass(frozen=True)
class ExactPrior:
    """The exact denoiser of a vector domain, under any Gaussian schedule; nothing is trained."""

    schedule: Any
    steps: int = 200
    eta: float = 1.0

    def check(self, domain: Any) -> None:
        """Refuse a domain whose denoiser is not known, and a number of steps that the schedule does not take."""
        offers(domain, "family", "an exact denoiser: subspace, sphere or mixture")
        self.process(domain.shape).times(self.steps)

    def process(self, shape: tuple[int, ...], eta: float | None = None) -> Process:
        """Return the process on examples of this shape, with the prior's own eta or another."""
        return processes.gaussian(self.schedule, shape, eta=self.eta if eta is None else eta)

    def obtain(self, run: Run, domain: Any, identity: Any) -> Prior:
        """Make the prior."""
        process = self.process(domain.shape)
        model, params = domain.family(self.schedule, self.steps)
        return Prior(process, process.times(self.steps), model, params, self, domain.shape)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class MeasuredPrior(Prior):
    """A prior with figures of its own, for the table."""

    figures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class VectorPrior(GaussianPrior):
    """A network trained on a vector domain; arguments as `rgdiff.runtime.priors.gaussian_prior`."""

    def check(self, domain: Any) -> None:
        """Refuse what does not fit each other or the domain, before anything is trained."""
        offers(domain, "family", "an exact denoiser: subspace, sphere or mixture")
        super().check(domain)

    def obtain(self, run: Run, domain: Any, identity: Any) -> Prior:
        """Train or load the prior, and measure its eps-error on fresh data, beside that of the exact denoiser (the Bayes error)."""
        prior = super().obtain(run, domain, identity)
        x0, key = domain.data(run.key("prior_error_data"), 8192), run.key("prior_error")
        error = lambda model, params: float(  # noqa: E731
            jax.jit(tuners.pretraining(model, prior.process, None, grid=self.steps).loss)(params, key, x0)
        )
        figures = {
            "prior_eps_error": error(prior.model, prior.params),
            "exact_eps_error": error(*domain.family(self.schedule, self.steps)),
        }
        run.say("prior: " + ", ".join(f"{name} {value:.5f}" for name, value in figures.items()))
        known = {field.name: getattr(prior, field.name) for field in dataclasses.fields(prior)}
        return MeasuredPrior(**known, figures=figures)


@dataclasses.dataclass(frozen=True)
class GradientGuidance:
    """Algorithm 1, or with `refit` algorithm 2; arguments as `rgdiff.tuners.gradient_guidance` unless said.

    Args:
      rounds: of queries and samples, round 0 included, which is not guided.
      increment: delta, in the reward's unit; a list sweeps it, and the last round's rewards are shown against the
        distance from the support.
      seeds: independent runs.
      refit: optimizer, and first (round), updates, memory, decay; None for algorithm 1.
      published: title -> [x, y], values to show beside ours, or null.
    """

    guidance: str = "g_loss"
    rounds: int = 200
    batch: int = 32
    increment: float | Sequence[float] = 0.2
    seeds: int = 5
    noise: float = 0.1
    gradient_at: str = "sample"
    refit: dict[str, Any] | None = None
    published: dict[str, Any] | None = None
    chunk: int = 25

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        process = prior.process(shape)
        self.tuner(_nothing, process, _nothing, process.times(prior.steps), self.increments[0], None)

    def suits(self, task: Task) -> None:
        """Refuse a reward without a gradient, before anything is trained."""
        differentiable("gradient_guidance", task.reward)

    @property
    def increments(self) -> Sequence[float]:
        return [self.increment] if isinstance(self.increment, int | float) else list(self.increment)

    def tuner(self, model: Any, process: Any, reward: Any, times: Any, delta: float, measure: Any) -> Any:
        """Build the tuner."""
        options = dict(self.refit or {})
        if options:
            optimizer = options.pop("optimizer")
            grid = times.shape[0]
            options["refit"] = tuners.pretraining(model, process, optimizer, ema_decay=0.0, grid=grid)
            options["refit_from"] = options.pop("first", 1)
        return tuners.gradient_guidance(
            model,
            process,
            reward,
            times,
            batch=self.batch,
            guidance=self.guidance,
            target=increment(delta),
            noise=self.noise,
            gradient_at=self.gradient_at,
            measure=measure,
            **options,
        )

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        """Run every increment and seed; the samples are the last round's of the last increment, all seeds together."""
        last: list[Any] = []
        logs: list[list[list[dict[str, Any]]]] = []
        with run.clock() as clock:
            for i, delta in enumerate(self.increments):
                tuner = self.tuner(prior.model, prior.process, task.reward, prior.times, delta, task.measure)
                phases = [f"{phase}_{i}_{seed}" for seed in range(self.seeds)]
                last = [
                    run.fit(name, tuner, run.key(name), prior.params, self.rounds, chunk=self.chunk) for name in phases
                ]
                logs.append([[row for row in run.log.rows if row["phase"] == name] for name in phases])
        calls = prior.times.shape[0]
        return Outcome(
            np.concatenate([np.asarray(state.x0) for state in last]),
            calls,
            float("nan"),
            clock.seconds,
            clock.compile_seconds,
            tuning_network_calls=len(self.increments) * self.seeds * self.batch * self.rounds * calls,
            curves=(by_round(logs[0], self.published or {}) if len(logs) == 1 else pareto(logs, self.published or {})),
            figures=prior.figures if isinstance(prior, MeasuredPrior) else {},
        )


def by_round(seeds: list[list[dict[str, Any]]], published: dict[str, Any]) -> dict[str, Any]:
    """Curves over rounds of one increment's rows, seed by seed: mean, lowest, highest; and the published values."""
    curves: dict[str, Any] = {}
    for name, title in TITLES.items():
        if name in seeds[0][0]:
            values = np.array([[row[name] for row in rows] for rows in seeds], float)
            curves[title] = {"": (range(values.shape[1]), values.mean(0), values.min(0), values.max(0))}
        if name in published:
            curves.setdefault(title, {})["published"] = published[name]
    return curves


def pareto(logs: list[list[list[dict[str, Any]]]], published: dict[str, Any]) -> dict[str, Any]:
    """The last round's reward against the distance from the support, one point an increment."""
    ends = [[rows[-1] for rows in seeds] for seeds in logs]
    off, reward = (np.array([[row[name] for row in seeds] for seeds in ends]) for name in ("off_support", "reward"))
    curve = (off.mean(1), reward.mean(1), reward.min(1), reward.max(1))
    return {PARETO: {"": curve} | ({"published": published["pareto"]} if "pareto" in published else {})}


def _nothing(*_: Any) -> Any:
    """Stand in for a model, a reward or a measure while settings are checked; it is never called."""
