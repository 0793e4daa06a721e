"""Methods of recipes that steer samples without touching the network: SVDD, particles, best-of-N and guides.

Each takes its value from `rgdiff.runtime.values`; a method here only assembles the library's own parts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from rgdiff import checks, guides, samplers, values
from rgdiff.resampling import multinomial
from rgdiff.rewards import Task
from rgdiff.runtime.methods import Outcome, draw, draw_with_kl, nothing
from rgdiff.runtime.priors import Prior, unconditional
from rgdiff.runtime.run import Run
from rgdiff.runtime.values import PosteriorMean, measurement, unit_temperature
from rgdiff.typing import Array, Info, Process


def _suits(value: Any, task: Task) -> None:
    if hasattr(value, "suits"):
        value.suits(task)


def _selections(carry: Any, info: Info) -> tuple[Array, Array, Array]:
    return info["value"], info["kl"], info["infeasible"]


@dataclasses.dataclass(frozen=True)
class Svdd:
    """SVDD; arguments as `rgdiff.samplers.svdd`.

    Args:
      value: what selects, of `rgdiff.runtime.values`. The last selection is by the value just before the end: by a measurement's
        likelihood with what is left of x0's variance then.
      proposal: scale of a guide by the posterior mean's gradient that proposes candidates (paid for by their weights), or None.
    """

    temperature: float = 0.2
    candidates: int = 16
    value: Any = PosteriorMean()
    chunk: int | None = None
    selection: str = "soft"
    select_initial: bool = False
    replace: float = 0.0
    distinct: bool = False
    timeless: bool = False
    proposal: float | None = None

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        if self.replace:
            unconditional(
                prior, "method.replace, which moves samples away from their conditions,", "give method.replace=0"
            )
        process = prior.process(shape)
        self.sampler(process, nothing, nothing, nothing)
        self.value.check(prior, shape, self.temperature)

    def suits(self, task: Task) -> None:
        """Refuse a reward that the value is not for, before anything is trained."""
        _suits(self.value, task)

    def sampler(self, process: Process, denoiser: Any, value: Any, reward: Any) -> Any:
        """Build the sampler."""
        guide = None
        if self.proposal is not None:
            guide = guides.gradient_guide(values.posterior_mean(reward, process, denoiser), self.proposal)
        return samplers.svdd(
            process,
            denoiser,
            value,
            temperature=self.temperature,
            candidates=self.candidates,
            chunk=self.chunk,
            selection=self.selection,
            select_initial=self.select_initial,
            proposal=guide,
            replace=self.replace,
            distinct=self.distinct,
            timeless=self.timeless,
        )

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        denoiser = prior.denoiser
        with run.clock() as clock:
            value, curves = self.value.obtain(run, phase, prior, task, denoiser, self.temperature)
            sampler = self.sampler(prior.process, denoiser, value, task.reward)
            out = draw(run, phase, sampler, prior, count, keep=_selections)
        chosen, kl, infeasible = (np.asarray(k) for k in out.kept)
        moves = len(prior.times) - 1
        along = list(range(1, moves + 1))
        curves = curves | {"value along the chain": (along, np.nanmean(chosen, 1).tolist())}
        if infeasible.any():
            share = infeasible.mean(1) / self.candidates
            curves["infeasible share of the candidates along the chain"] = (along, share.tolist())
        return Outcome(
            np.asarray(out.x0),
            sampler.network_calls(moves),
            float(kl.sum(0).mean()),
            clock.seconds,
            clock.compile_seconds,
            curves=curves,
            lineages=out.info.get("lineages"),
            temperature=self.temperature,
        )


def _particles(carry: Any, info: Info) -> tuple[Array, Array, Array]:
    return info["ess"], info["log_z"], info["strength"]


@dataclasses.dataclass(frozen=True)
class Smc:
    """A particle sampler; `setting` is smc, fk_steering, tds or das, `options` as `rgdiff.samplers`.

    `particles` run as one problem; the samples asked for are drawn from their weights. Errors are estimated from lineages.
    """

    setting: str = "smc"
    particles: int = 1024
    temperature: float = 0.2
    value: Any = PosteriorMean()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        unconditional(prior, "one problem of particles", "choose a prior without prior.guidance")
        process = prior.process(shape)
        times = process.times(prior.steps)
        self.sampler(process, nothing, nothing, times)
        self.value.check(prior, shape, self.temperature)
        checks.at_least("particles", self.particles, 1)

    def suits(self, task: Task) -> None:
        """Refuse a reward that the value is not for, before anything is trained."""
        _suits(self.value, task)

    def sampler(self, process: Process, denoiser: Any, value: Any, times: Array) -> Any:
        """Build the sampler."""
        settings: dict[str, Any] = {
            "smc": samplers.smc,
            "fk_steering": samplers.fk_steering,
            "tds": samplers.tds,
            "das": lambda process, denoiser, value, **options: samplers.das(process, denoiser, value, times, **options),
        }
        make = settings[checks.one_of("setting", self.setting, settings)]
        return make(process, denoiser, value, temperature=self.temperature, **self.options)

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        denoiser = prior.denoiser
        with run.clock() as clock:
            value, curves = self.value.obtain(run, phase, prior, task, denoiser, self.temperature)
            sampler = self.sampler(prior.process, denoiser, value, prior.times)
            if type(value) is not values.PosteriorMean:
                # The last potential is the reward's own; under that value it is anyway.
                sampler = dataclasses.replace(sampler, reward=task.reward)
            out = draw(run, phase, sampler, prior, self.particles, keep=_particles)
            log_weights = out.info["log_weights"]
            chosen = np.asarray(multinomial(run.key(f"{phase}_chosen"), log_weights, count))
            x0 = jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], out.x0)
        lineages = np.asarray(out.info["lineages"])
        ess, log_z, strength = ([float(v) for v in k] for k in out.kept)
        moves = list(range(1, len(ess) + 1))
        weights = np.exp(np.asarray(log_weights, float))
        # KL(tilted || prior) = E_tilted[r] / tau - log Z, with the particles' estimates of both.
        rewards = np.asarray(out.info["value"], float)
        kl = float(np.sum(weights * np.where(weights > 0, rewards, 0.0)) / self.temperature - out.info["log_z"])
        return Outcome(
            x0,
            round(sampler.network_calls(len(moves)) * self.particles / count),
            kl,
            clock.seconds,
            clock.compile_seconds,
            curves=curves
            | {"effective sample size": (moves, ess), "log Z": (moves, log_z), "tempering": (moves, strength)},
            figures={name: float(out.info[name]) for name in ("log_z", "log_z_se", "ess")}
            | {"lineages": float(1 / np.sum(np.bincount(lineages, weights) ** 2))},  # their effective number
            lineages=lineages[chosen],
            temperature=self.temperature,
        )


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """The best of `candidates` samples of the prior, per sample."""

    candidates: int = 16

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        checks.at_least("candidates", self.candidates, 1)

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        plain = samplers.ancestral(prior.process, prior.denoiser)
        sampler = samplers.best_of_n(plain, task.reward, self.candidates)
        with run.clock() as clock:
            out = draw(run, phase, sampler, prior, count)
        kl = np.log(self.candidates) - (self.candidates - 1) / self.candidates
        calls = sampler.network_calls(len(prior.times) - 1)
        return Outcome(np.asarray(out.x0), calls, float(kl), clock.seconds, clock.compile_seconds)


@dataclasses.dataclass(frozen=True)
class Guided:
    """Ancestral sampling under a guide made from the task's reward.

    Args:
      guide: `score` (the score moved by the gradient of the value: DPS for any reward with the posterior mean, classifier
        guidance with a learnt value, PiGDM with a measurement's likelihood), `lgd_mc` (the reward at `draws` samples around
        the posterior mean), `tmpd` (for measurements), or `tilt` (the kernel tilted instead; masked priors too).
      temperature: the scale is 1 / temperature, per unit of the reward.
      value: of `rgdiff.runtime.values`; not for lgd_mc and tmpd.
      diagonal: of tmpd: row sums in place of the covariance.
      recurrences, window: how often each move is made, and in which times (FreeDoM).
    """

    guide: str = "score"
    temperature: float = 0.2
    value: Any = PosteriorMean()
    draws: int = 4
    diagonal: bool = False
    tilts: str = "token"
    recurrences: int = 1
    window: tuple[float, float] | None = None

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        process = prior.process(shape)
        self.sampler(process, nothing, nothing, nothing, jax.random.key(0))
        self.value.check(prior, shape, self.temperature)
        if self.guide == "tmpd":
            unit_temperature(self.temperature)

    def suits(self, task: Task) -> None:
        """Refuse a reward that the guide is not for, before anything is trained."""
        if self.guide == "tmpd":
            measurement(task, "method.guide=tmpd")
        _suits(self.value, task)

    def sampler(self, process: Process, denoiser: Any, value: Any, reward: Any, key: Any) -> Any:
        """Build the sampler."""
        checks.one_of("guide", self.guide, ("score", "lgd_mc", "tmpd", "tilt"))
        guide, scale = None, 1 / self.temperature
        if self.guide == "score":
            denoiser = guides.classifier_guidance(denoiser, process, value, scale)
        elif self.guide == "lgd_mc":
            denoiser = guides.lgd_mc(denoiser, process, reward, key, draws=self.draws, scale=scale)
        elif self.guide == "tmpd":
            denoiser = guides.tmpd(denoiser, process, reward, diagonal=self.diagonal, scale=scale)
        else:
            guide = guides.gradient_guide(value, scale, tilts=self.tilts)
        window = None if self.window is None else (self.window[0], self.window[1])
        return samplers.ancestral(process, denoiser, guide=guide, recurrences=self.recurrences, window=window)

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        denoiser = prior.denoiser
        with run.clock() as clock:
            value, curves = None, {}
            if self.guide not in ("lgd_mc", "tmpd"):
                value, curves = self.value.obtain(run, phase, prior, task, denoiser, self.temperature)
            sampler = self.sampler(prior.process, denoiser, value, task.reward, run.key(f"{phase}_guide"))
            out = draw(run, phase, sampler, prior, count)
        kl = float("nan")  # repeated moves and points have no path KL
        if self.recurrences == 1 and prior.process.stochastic:
            kl = draw_with_kl(run, f"{phase}_kl", sampler, prior, count)[1]
        calls = sampler.network_calls(len(prior.times) - 1)
        return Outcome(
            np.asarray(out.x0),
            calls,
            kl,
            clock.seconds,
            clock.compile_seconds,
            curves=curves,
            temperature=self.temperature,
        )
