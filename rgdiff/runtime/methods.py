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

from rgdiff import checks, samplers, tuners, values
from rgdiff.denoisers import from_linen
from rgdiff.nets import LoRAModel, lora_init
from rgdiff.rewards import Task
from rgdiff.runtime.priors import GaussianPrior, Prior, initial
from rgdiff.runtime.progress import progress
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Info, Params, Process, pytree, static

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

    def value(self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any) -> tuple[Any, Curves]:
        """Make the value that selects, and curves that tell how good it is."""
        return values.posterior_mean(task.reward, prior.process, denoiser), {}

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        denoiser = prior.denoiser
        with run.clock() as clock:
            value, curves = self.value(run, phase, prior, task, denoiser)
            sampler = self.sampler(prior.process, denoiser, value)
            out = draw(run, phase, sampler, prior.times, count, keep=_value_and_kl)
        chosen, kl = (np.asarray(k) for k in out.kept)
        moves = len(prior.times) - 1
        return Outcome(
            np.asarray(out.x0),
            sampler.network_calls(moves),
            float(kl.sum(0).mean()),
            clock.seconds,
            clock.compile_seconds,
            curves=curves | {"value along the chain": (list(range(1, moves + 1)), np.nanmean(chosen, 1).tolist())},
            temperature=self.temperature,
        )


@dataclasses.dataclass(frozen=True)
class SvddMC(Svdd):
    """SVDD with a value learnt from rewarded samples of the prior.

    Args:
      samples: chains of the prior that the value learns from; an eighth as many are held out to measure it.
      target: `mean` of the reward, or `soft`: its soft value at `temperature`.
      data: `noised` samples, or the chains' own states (`rollouts`).
      backup: next states per temporal difference; None regresses the reward.
      others: as `rgdiff.samplers.svdd`, `rgdiff.tuners.fit`.
    """

    samples: int = 4096
    steps: int = 1500
    batch: int = 128
    network: Any = None
    optimizer: Any = None
    target: str = "mean"
    data: str = "noised"
    backup: int | None = None

    def check(self, prior: GaussianPrior, shape: tuple[int, ...]) -> None:
        super().check(prior, shape)
        checks.one_of("data", self.data, ("noised", "rollouts"))
        process = prior.process(shape)
        self.tuner(_nothing, process, _nothing, process.times(prior.steps))

    def tuner(self, model: Any, process: Process, denoiser: Any, times: Array) -> Any:
        """Build the trainer of the value."""
        tau = self.temperature if checks.one_of("target", self.target, ("mean", "soft")) == "soft" else None
        if self.backup is None:
            grid = times if self.data == "rollouts" else None
            return tuners.value_regression(model, process, self.optimizer, temperature=tau, times=grid)
        return tuners.temporal_difference(
            model, process, denoiser, times, self.optimizer, temperature=tau, candidates=self.backup
        )

    def value(self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any) -> tuple[Any, Curves]:
        """Train the value, or go on with it, and measure it on chains held out."""
        process, times = prior.process, prior.times
        if self.data == "rollouts":
            data = self._rollouts(run, f"{phase}_data", prior, task, denoiser, self.samples)
        else:
            x0 = draw(run, f"{phase}_data", samplers.ancestral(process, denoiser), times, self.samples).x0
            data = {"x0": x0, "reward": jax.jit(lambda r, x: r(x))(task.reward, x0)}
        model, key = LearnedValue(self.network), run.key(f"{phase}_value")
        tuner = self.tuner(model, process, denoiser, times)
        params = initial(self.network, key, prior.shape)
        state = run.fit(f"{phase}_value", tuner, key, params, self.steps, data=data, batch=self.batch)
        value = model(state.best)
        heldout = self._rollouts(run, f"{phase}_heldout", prior, task, denoiser, max(2, self.samples // 8))
        error = values.error_over_time(value, times, heldout, temperature=tuner.temperature)
        grid, explained, bias = (np.asarray(a).tolist() for a in (times, error.explained, error.bias))
        return value, {"held-out variance of the reward explained, by t": (grid, explained), "bias, by t": (grid, bias)}

    def _rollouts(self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any, count: int) -> dict[str, Any]:
        with shown(phase, prior.times.shape[0] - 1) as options:
            out = tuners.rollouts(run.key(phase), prior.process, denoiser, prior.times, task.reward, count, **options)
            return jax.block_until_ready(out)


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
