"""Methods of recipes: what `method/*.yaml` name. Each takes a prior and a task and returns samples and what they cost.

A method here only assembles the library's own samplers and tuners; the mathematics is theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rgdiff import checks, samplers, tuners
from rgdiff.nets import LoRAModel, lora_init
from rgdiff.rewards import Task
from rgdiff.runtime.priors import GaussianPrior, Prior
from rgdiff.runtime.progress import progress
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Process

Curves = dict[str, tuple[Sequence[float], Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Samples x0 [N, ...] of one method, its costs, curves for the report, name -> (x, y), and figures of its own for the table."""

    x0: np.ndarray
    network_calls: int
    kl: float
    seconds: float
    compile_seconds: float
    tuning_network_calls: int = 0
    curves: Curves = dataclasses.field(default_factory=dict)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    temperature: float | None = None  # of the law that the method aims at, p(x) exp(r(x)/temperature)/Z, if it has one


@contextlib.contextmanager
def shown(phase: str, moves: int) -> Iterator[dict[str, Any]]:
    """Show the progress of a chain: options for `samplers.sample`."""
    with progress(f"{phase}: sampling", moves) as advance:
        done = 0

        def on_chunk(stop: int, total: int) -> None:
            nonlocal done
            advance(stop - done)
            done = stop

        yield {"chunk": max(1, -(-moves // 4)), "on_chunk": on_chunk}


def draw(run: Run, phase: str, sampler: Any, times: Array, count: int, keep: Any = None) -> Any:
    """Draw `count` samples with progress; the keys are the phase's."""
    with shown(phase, times.shape[0] - 1) as options:
        return jax.block_until_ready(samplers.sample(sampler, run.key(phase), count, times, keep=keep, **options))


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """The prior itself."""

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        sampler = samplers.ancestral(prior.process, prior.denoiser)
        with run.clock() as clock:
            out = draw(run, phase, sampler, prior.times, count)
        calls = sampler.network_calls(len(prior.times) - 1)
        return Outcome(np.asarray(out.x0), calls, 0.0, clock.seconds, clock.compile_seconds)


@dataclasses.dataclass(frozen=True)
class Draft:
    """DRaFT and its settings (`draft`, `draft_k`, `draft_lv`), for all weights or a LoRA adapter of rank `adapter`."""

    setting: str
    optimizer: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 200
    batch: int = 32
    eta: float = 0.0
    kl_weight: float | None = None
    remat: str = "none"
    adapter: int | None = None
    chunk: int = 10

    def check(self, prior: GaussianPrior, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        process = prior.process(shape, self.eta)
        self.tuner(nothing, process, nothing, process.times(prior.steps), nothing)

    def tuner(self, model: Any, process: Process, reward: Any, times: Array, reference: Any) -> Any:
        """Build the tuner."""
        settings = {"draft": tuners.draft, "draft_k": tuners.draft_k, "draft_lv": tuners.draft_lv}
        return settings[checks.one_of("setting", self.setting, settings)](
            model,
            process,
            reward,
            times,
            self.optimizer,
            batch=self.batch,
            reference=None if self.kl_weight is None else reference,
            kl_weight=self.kl_weight,
            remat=self.remat,
            **self.options,
        )

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        process, key = prior.with_eta(self.eta), run.key(phase)
        model: Any = prior.model
        params = prior.params
        if self.adapter is not None:
            params = lora_init(jax.random.fold_in(key, 1), prior.params, self.adapter)
            model = LoRAModel(prior.params, prior.model)
        tuner = self.tuner(model, process, task.reward, prior.times, prior.denoiser)
        with run.clock() as clock:
            state = run.fit(phase, tuner, key, params, self.steps, chunk=self.chunk)
            tuned = model(state.best)
            sampler = samplers.ancestral(process, tuned)
            out = draw(run, phase, sampler, prior.times, count)
        # Path KL needs a law: it is that of the tuned ancestral chain against the prior's, whatever eta was tuned with.
        law = prior.process if prior.process.stochastic else prior.with_eta(1.0)
        compared = samplers.ancestral(law, tuned, reference=prior.denoiser)
        kl = draw(run, f"{phase}_kl", compared, prior.times, count, keep=samplers.path_kl).kept.sum(0).mean()
        rows = [row for row in run.log.rows if row["phase"] == phase]
        return Outcome(
            np.asarray(out.x0),
            sampler.network_calls(len(prior.times) - 1),
            float(kl),
            clock.seconds,
            clock.compile_seconds,
            tuning_network_calls=self.steps * self.batch * tuner.network_calls(),
            curves={"reward while tuning": ([row["step"] for row in rows], [row["reward"] for row in rows])},
        )


def nothing(*_: Any) -> Any:
    """Stand in for a denoiser, a value or a reward while settings are checked; it is never called."""
