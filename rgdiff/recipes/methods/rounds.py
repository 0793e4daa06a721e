"""Rounds of gradient guidance, algorithms 1 and 2 of the paper (arXiv 2404.14743), over seeds.

The rounds are those of `tuners.gradient_guidance`; here they get phases, checkpoints and curves. `published` values of a
recipe are drawn beside ours, under the same title.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rgdiff import tuners
from rgdiff.guides import increment
from rgdiff.recipes.outcome import nothing, outcome
from rgdiff.recipes.typing import Method, Outcome, Prior, ReadyPrior, Shape
from rgdiff.rewards import Task, differentiable
from rgdiff.runtime.run import Run

TITLES = {
    "reward": "reward by round",
    "theta_x": "theta . x by round",
    "theta_x_inside": "theta . x inside the data's support by round",
    "off_support": "distance from the data's support by round",
}
PARETO = "reward against distance from the data's support"


@dataclasses.dataclass(frozen=True)
class GuidanceRounds(Method):
    """Gradient guidance by algorithm 1, or with `refit` by algorithm 2.

    Args:
      rounds: of queries and samples, round 0 included, which is not guided.
      batch: samples a round.
      increment: delta, in the reward's unit; a list sweeps it, and the last round's rewards are shown against the
        distance from the support.
      seeds: independent runs.
      options: of `rgdiff.tuners.gradient_guidance`.
      refit: the optimizer of algorithm 2, whose options (refit_from, updates, memory, decay) are among the others; None for
        algorithm 1.
      published: title -> [x, y], values to show beside ours, or null.
      chunk: rounds between two checkpoints.
    """

    rounds: int = 200
    batch: int = 32
    increment: float | Sequence[float] = 0.2
    seeds: int = 5
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    refit: Any = None
    published: dict[str, Any] | None = None
    chunk: int = 25

    def check(self, prior: Prior, shape: Shape) -> None:
        process = prior.process(shape)
        self.tuner(nothing, process, nothing, process.times(prior.steps), self.increments[0], None)

    def suits(self, task: Task) -> None:
        differentiable("gradient_guidance", task.reward)

    @property
    def increments(self) -> Sequence[float]:
        return [self.increment] if isinstance(self.increment, int | float) else list(self.increment)

    def tuner(self, model: Any, process: Any, reward: Any, times: Any, delta: float, measure: Any) -> Any:
        """Build the tuner."""
        options = dict(self.options)
        if self.refit is not None:
            options["refit"] = tuners.pretraining(model, process, self.refit, ema_decay=0.0, grid=times.shape[0])
        shared = {"batch": self.batch, "target": increment(delta), "measure": measure}
        return tuners.gradient_guidance(model, process, reward, times, **shared, **options)

    def programs(self, name: str, prior: ReadyPrior, task: Task, count: int) -> Iterator[Any]:
        """Yield the program of a round, of shapes (`rgdiff.recipes.programs`)."""
        from rgdiff.recipes.programs import step

        parts = (prior.model, prior.process, task.reward, prior.times, self.increments[0], task.measure)
        make = lambda batch: dataclasses.replace(self, batch=batch).tuner(*parts)  # noqa: E731
        yield step(name, make, prior.params, self.batch, None, lambda _: None)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
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
        return outcome(
            np.concatenate([np.asarray(state.x0) for state in last]),
            calls,
            clock,
            tuning_network_calls=len(self.increments) * self.seeds * self.batch * self.rounds * calls,
            curves=(by_round(logs[0], self.published or {}) if len(logs) == 1 else pareto(logs, self.published or {})),
            figures=prior.figures,
            of=f"round {self.rounds} at increment {self.increments[-1]:g}, {self.seeds} seeds",
        )


def by_round(seeds: list[list[dict[str, Any]]], published: dict[str, Any]) -> dict[str, Any]:
    """Return curves over rounds of one increment's rows: mean, lowest and highest over seeds; and the published values.

    Args:
      seeds: rows of the log, one list per seed.
      published: title -> [x, y].
    """
    curves: dict[str, Any] = {}
    for name, title in TITLES.items():
        if name in seeds[0][0]:
            values = np.array([[row[name] for row in rows] for rows in seeds], float)
            curves[title] = {"": (range(values.shape[1]), values.mean(0), values.min(0), values.max(0))}
        if name in published:
            curves.setdefault(title, {})["published"] = published[name]
    return curves


def pareto(logs: list[list[list[dict[str, Any]]]], published: dict[str, Any]) -> dict[str, Any]:
    """Return the last round's reward against the distance from the support, one point an increment.

    Args:
      logs: rows of the log, by increment and seed.
      published: title -> [x, y].
    """
    ends = [[rows[-1] for rows in seeds] for seeds in logs]
    off, reward = (np.array([[row[name] for row in seeds] for seeds in ends]) for name in ("off_support", "reward"))
    curve = (off.mean(1), reward.mean(1), reward.min(1), reward.max(1))
    return {PARETO: {"": curve} | ({"published": published["pareto"]} if "pareto" in published else {})}
