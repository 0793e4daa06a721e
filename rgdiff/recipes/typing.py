"""The parts of a recipe: five protocols on one page. Whatever keeps one of them can be named in a config.

A recipe describes one experiment, p(x) proportional to p_prior(x) exp(r(x) / temperature): a domain has the data, its
judge measures samples, a prior denoises them, a value says what a noised state is worth, and a method steers samples or
fine-tunes the prior. Settings are plain frozen objects: what `check` and `suits` refuse is refused before anything is
trained, and `run` and `obtain` do the work inside a run's folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff.domains.drawing import Logo, Plane
from rgdiff.rewards import Task
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Cond, Denoiser, Model, Params, Process, Value

Shape = tuple[int, ...]
Curves = dict[str, Any]  # title -> (x, y), (x, y, low, high), or several of them by name


class Domain(Protocol):
    """Data of one kind. A class with labels has `train_y` [N] and `classes` too; one whose law is known, `data(key, count)`.

    shape: of one example. train_x [N, *shape]: what a prior learns from. value_range: the lowest and highest number of an
    example, or None where there is none.
    """

    shape: Shape
    value_range: tuple[float, float] | None

    @property
    def train_x(self) -> Any: ...


class Judge(Protocol):
    """Measures and shows samples of a domain; built with `domain` and a `key`. `rgdiff.domains.judging.BaseJudge` is the base."""

    def check(self, task: Task) -> None:
        """Refuse a reward that is not for this domain."""
        ...

    def row(self, outcome: Outcome, task: Task, prior: ReadyPrior) -> dict[str, Any]:
        """Return the figures of one method, flat."""
        ...

    def spread(self, outcome: Outcome, task: Task) -> dict[str, float]:
        """Return the figures by which a method is called over-optimised, each with its standard error in the prior's samples."""
        ...

    def scores(self, x0: np.ndarray, task: Task) -> np.ndarray | None:
        """Return the rewards [N] by which the report names the best, the median and the worst, or None."""
        ...

    def show_each(self, x0: np.ndarray) -> Any:
        """Return how single samples are drawn: 8-bit pictures [N, H, W, C], or an SVG text or a line of letters for each; or None."""
        ...

    def show_all(self, samples: Mapping[Any, np.ndarray], task: Task) -> Mapping[Any, Logo | Plane]:
        """Return one drawing for each of several sets of samples; none if only single samples are drawn."""
        ...

    def show_exact(self, outcome: Outcome, task: Task, prior: ReadyPrior) -> Mapping[str, Logo | Plane]:
        """Return drawings of the exact distribution that a method aims at, by title, where it is known."""
        ...

    def references(self, task: Task) -> Mapping[str, np.ndarray]:
        """Return data that stand beside the prior's samples, by title."""
        ...

    def rows_of(self, count: int, task: Task, prior: ReadyPrior) -> Mapping[str, range]:
        """Return the places of each condition's samples among `count`, by its name, where a report compares methods condition by condition."""
        ...

    def reward_law(self, outcome: Outcome, task: Task, prior: ReadyPrior) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the exact distribution of the reward, (rewards, probabilities), where it is known."""
        ...

    def histograms(self, outcomes: Mapping[str, Outcome], task: Task, prior: ReadyPrior) -> Sequence[tuple[Any, ...]]:
        """Return arguments of `rgdiff.runtime.report.Histogram`, where samples are numbers."""
        ...

    def curves(self, rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, tuple[str, str, Mapping[str, Any]]]:
        """Return figures made of the table: title -> (label of x, label of y, method -> (x, y))."""
        ...

    def notes(self, task: Task) -> list[str]:
        """Return what a reader of the report should know."""
        ...


class Prior(Protocol):
    """The settings of a prior: its process is known before it is trained."""

    steps: int

    def check(self, domain: Domain) -> None:
        """Refuse settings that do not fit each other or the domain, before anything is trained."""

    def process(self, shape: Shape, eta: float | None = None) -> Process:
        """Return the process on examples of this shape, with the prior's own eta or another."""
        ...

    def obtain(self, run: Run, domain: Domain, identity: Mapping[str, Any]) -> ReadyPrior:
        """Train, load or look up the prior; `identity` has its settings as plain values."""
        ...


@dataclasses.dataclass(frozen=True)
class ReadyPrior:
    """A prior ready for use: `model(params)` denoises under `process`, in chains over `times`.

    settings: what it was obtained from. shape: of one example. classes: of a conditional prior. conds: the conditions of one that
    has others than labels, a pytree of leaves [N, ...]. data [N, *shape]: what it was
    trained on, and fresh [M, *shape]: what it was not, for methods that learn from data. figures: of its own, for the table.
    problems: seed -> problems of one class, for methods that detect anomalies. decode: what rewards see of a state, or None.
    calls_each: network calls of one call of the denoiser (a corrector's among them).
    """

    process: Process
    times: Array
    model: Model
    params: Params
    settings: Prior
    shape: Shape
    classes: int | None = None
    conds: Cond = None
    data: Any = None
    fresh: Any = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    problems: Callable[[int], list[Any]] | None = None
    decode: Callable[[Any], Any] | None = None
    calls_each: int = 1

    @property
    def every_condition(self) -> Cond:
        """Every condition once, leaves [N, ...]; None for an unconditional prior."""
        return self.conds if self.classes is None else jnp.arange(self.classes)

    def conditions(self, count: int) -> Cond:
        """Return the conditions [count, ...] that samples of a conditional prior are drawn with, every one in turn."""
        every = self.every_condition
        return jax.tree.map(lambda leaf: leaf[jnp.arange(count) % leaf.shape[0]], every)

    @property
    def denoiser(self) -> Denoiser:
        return self.model(self.params)

    def with_eta(self, eta: float | None) -> Process:
        """Return the process with another eta."""
        return self.settings.process(self.shape, eta)

    def calls(self, sampler: Any) -> int:
        """Return the network calls per sample of a sampler on the prior's times."""
        return sampler.network_calls(self.times.shape[0] - 1) * self.calls_each


class Obtained(NamedTuple):
    """A value made ready, and curves that say how good it is."""

    value: Value
    curves: Curves


class ValueSource(Protocol):
    """Where a method that steers takes its value from."""

    def check(self, prior: Prior, shape: Shape, temperature: float) -> None:
        """Refuse settings that do not fit the prior, before anything is trained."""
        ...

    def suits(self, task: Task) -> None:
        """Refuse a reward that the value is not for, before anything is trained."""

    def obtain(
        self, run: Run, phase: str, prior: ReadyPrior, task: Task, denoiser: Denoiser, temperature: float
    ) -> Obtained:
        """Make the value ready: train it, where it is learnt."""
        ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Samples of one method and what they cost. Build it with `rgdiff.recipes.outcome.outcome`.

    x0 [N, ...]. network_calls: per sample. kl: path KL to the prior in nats per sample, NaN where there is none.
    seconds: without compilation. curves: title -> (x, y) for the report. figures: of the method's own, for the table.
    shown: other samples for the report, by what they are; pictures: drawn already, 8-bit [N, H, W, C], by title.
    lineages [N]: the ancestor of each sample, where samples that share one are not independent.
    temperature: of the law p(x) exp(r(x) / temperature) / Z that the method aims at, if it has one. energy: x [N, ...] ->
    [N], low on data, where the method learns one.
    """

    x0: np.ndarray
    network_calls: int
    kl: float
    seconds: float
    compile_seconds: float
    tuning_network_calls: int = 0
    curves: Curves = dataclasses.field(default_factory=dict)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    shown: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    lineages: np.ndarray | None = None
    temperature: float | None = None
    energy: Callable[[Any], Any] | None = None


class Method(Protocol):
    """What is done with a prior and a reward: steering, fine-tuning, or training another sampler."""

    def check(self, prior: Prior, shape: Shape) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""

    def suits(self, task: Task) -> None:
        """Refuse a reward that the method is not for, before anything is trained."""

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        """Do the work in the run's folder, and return `count` samples and what they cost."""
        ...
