"""Methods of recipes: what `method/*.yaml` name. Each takes a prior and a task and returns samples and what they cost.

A method here only assembles the library's own samplers and tuners; the mathematics is theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rgdiff import checks, samplers, tuners, values
from rgdiff.denoisers import from_linen
from rgdiff.nets import LoRAModel, lora_init
from rgdiff.rewards import Task
from rgdiff.runtime.priors import GaussianPrior, Prior, initial
from rgdiff.runtime.progress import progress
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Info, Params, Process, pytree, static


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Samples x0 [N, ...] of one method, its costs, and curves for the report: name -> (x, y)."""

    x0: np.ndarray
    network_calls: int
    kl: float
    seconds: float
    compile_seconds: float
    tuning_network_calls: int = 0
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = dataclasses.field(default_factory=dict)


def draw(run: Run, phase: str, sampler: Any, times: Array, count: int, keep: Any = None) -> Any:
    """Draw `count` samples with progress; the keys are the phase's."""
    with progress(f"{phase}: sampling", times.shape[0] - 1) as advance:
        done = 0

        def on_chunk(stop: int, total: int) -> None:
            nonlocal done
            advance(stop - done)
            done = stop

        out = samplers.sample(
            sampler,
            run.key(phase),
            count,
            times,
            keep=keep,
            chunk=max(1, -(-(times.shape[0] - 1) // 4)),
            on_chunk=on_chunk,
        )
        return jax.block_until_ready(out)


def _value_and_kl(carry: Any, info: Info) -> tuple[Array, Array]:
    return info["value"], info["kl"]


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
class Svdd:
    """SVDD with the posterior-mean value; arguments as `rgdiff.samplers.svdd`."""

    temperature: float = 0.2
    candidates: int = 16
    chunk: int | None = None
    selection: str = "soft"
    select_initial: bool = False

    def check(self, prior: GaussianPrior, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        self.sampler(prior.process(shape), _nothing, _nothing)

    def sampler(self, process: Process, denoiser: Any, value: Any) -> Any:
        """Build the sampler."""
        return samplers.svdd(
            process,
            denoiser,
            value,
            temperature=self.temperature,
            candidates=self.candidates,
            chunk=self.chunk,
            selection=self.selection,
            select_initial=self.select_initial,
        )

    def value(self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any) -> Any:
        """Make the value that selects."""
        return values.posterior_mean(task.reward, prior.process, denoiser)

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        denoiser = prior.denoiser
        with run.clock() as clock:
            sampler = self.sampler(prior.process, denoiser, self.value(run, phase, prior, task, denoiser))
            out = draw(run, phase, sampler, prior.times, count, keep=_value_and_kl)
        chosen, kl = (np.asarray(k) for k in out.kept)
        moves = len(prior.times) - 1
        return Outcome(
            np.asarray(out.x0),
            sampler.network_calls(moves),
            float(kl.sum(0).mean()),
            clock.seconds,
            clock.compile_seconds,
            curves={"value along the chain": (list(range(1, moves + 1)), np.nanmean(chosen, 1).tolist())},
        )


@dataclasses.dataclass(frozen=True)
class SvddMC(Svdd):
    """SVDD with a value learnt by regression on rewarded samples of the prior."""

    samples: int = 4096
    steps: int = 1500
    batch: int = 128
    network: Any = None
    optimizer: Any = None

    def value(self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any) -> Any:
        """Train the value, or go on with it."""
        chain = samplers.ancestral(prior.process, denoiser)
        x0 = draw(run, f"{phase}_data", chain, prior.times, self.samples).x0
        data = {"x0": x0, "reward": jax.jit(lambda r, x: r(x))(task.reward, x0)}
        key = run.key(f"{phase}_value")
        params = initial(self.network, key, x0.shape[1:])
        model = LearnedValue(self.network)
        tuner = tuners.value_regression(model, prior.process, self.optimizer)
        state = run.fit(f"{phase}_value", tuner, key, params, self.steps, data=data, batch=self.batch)
        return model(state.best)


@pytree
class LearnedValue:
    """Parameters to a learned value."""

    network: Any = static()

    def __call__(self, params: Params) -> Any:
        return values.learned(from_linen(self.network, params))


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
        self.tuner(_nothing, process, _nothing, process.times(prior.steps), _nothing)

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


def _nothing(*_: Any) -> Any:
    """Stand in for a denoiser, a value or a reward while settings are checked; it is never called."""
