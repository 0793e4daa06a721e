"""Methods of recipes that steer samples without touching the network: SVDD, particles, best-of-N and guides."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from rgdiff import checks, guides, samplers, values
from rgdiff.recipes.assembly import assemble, named, takes
from rgdiff.recipes.outcome import draw, draw_with_kl, nothing, outcome
from rgdiff.recipes.priors import unconditional
from rgdiff.recipes.typing import Method, Obtained, Outcome, Prior, ReadyPrior, Shape, ValueSource
from rgdiff.recipes.values import PosteriorMeanValue, measurement, unit_temperature, unseen
from rgdiff.resampling import multinomial
from rgdiff.rewards import Task
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Info, Process


@dataclasses.dataclass(frozen=True)
class PriorSampling(Method):
    """The prior itself."""

    def sampler(self, process: Process, denoiser: Any) -> Any:
        """Build the sampler."""
        return samplers.ancestral(process, denoiser)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        sampler = self.sampler(prior.process, prior.denoiser)
        with run.clock() as clock:
            out = draw(run, phase, sampler, prior, count)
        return outcome(out, prior.calls(sampler), clock, 0.0)


def _selections(carry: Any, info: Info) -> tuple[Array, Array, Array]:
    return info["value"], info["kl"], info["infeasible"]


@dataclasses.dataclass(frozen=True)
class CandidateSampling(Method):
    """SVDD: candidates of every move, one of which a value selects.

    Args:
      temperature: tau, in the reward's unit.
      value: the value function that scores candidates (group `value`). At the last move it is evaluated at times[-1] > 0, so
        that a measurement's likelihood still contains the remaining posterior variance.
      proposal: scale of a guide by the posterior mean's gradient that proposes candidates, or None. Importance weights correct
        for it, so that the target stays the same.
      options: of `rgdiff.samplers.svdd`.
    """

    temperature: float = 0.2
    value: ValueSource = PosteriorMeanValue()
    proposal: float | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, prior: Prior, shape: Shape) -> None:
        process = prior.process(shape)
        if self.sampler(process, nothing, nothing, nothing).replace:
            unconditional(
                prior, "replace, which moves samples away from their conditions,", "give method.options.replace=0"
            )
        self.value.check(prior, shape, self.temperature)

    def suits(self, task: Task) -> None:
        self.value.suits(task)

    def sampler(self, process: Process, denoiser: Any, value: Any, reward: Any) -> Any:
        """Build the sampler."""
        guide = None
        if self.proposal is not None:
            guide = guides.gradient_guide(values.posterior_mean(reward, process, denoiser), self.proposal)
        shared = {"temperature": self.temperature, "proposal": guide}
        return samplers.svdd(process, denoiser, value, **shared, **self.options)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        denoiser = prior.denoiser
        with run.clock() as clock:
            value, curves = self.value.obtain(run, phase, prior, task, denoiser, self.temperature)
            sampler = self.sampler(prior.process, denoiser, value, task.reward)
            out = draw(run, phase, sampler, prior, count, keep=_selections)
        chosen, kl, infeasible = (np.asarray(k) for k in out.kept)
        along = list(range(1, len(kl) + 1))
        curves = curves | {"value along the chain": (along, np.nanmean(chosen, 1).tolist())}
        if infeasible.any():
            share = infeasible.mean(1) / sampler.candidates
            curves["infeasible share of the candidates along the chain"] = (along, share.tolist())
        total = float(kl.sum(0).mean())
        return outcome(out, prior.calls(sampler), clock, total, curves=curves, temperature=self.temperature)


def _particles(carry: Any, info: Info) -> tuple[Array, Array, Array]:
    return info["ess"], info["log_z"], info["strength"]


@dataclasses.dataclass(frozen=True)
class ParticleSampling(Method):
    """Weighted particles: one problem, from whose weights the samples asked for are drawn. Errors are estimated from lineages.

    Args:
      setting: smc, fk_steering, tds, das: a particle sampler of `rgdiff.samplers`.
      particles: of the one problem.
      temperature: tau, in the reward's unit.
      value: the value function of the potentials (group `value`); the last one is the reward's.
      options: of the particle sampler.
    """

    setting: str = "smc"
    particles: int = 1024
    temperature: float = 0.2
    value: ValueSource = PosteriorMeanValue()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, prior: Prior, shape: Shape) -> None:
        unconditional(prior, "one problem of particles", "choose a prior without prior.guidance")
        process = prior.process(shape)
        self.sampler(process, nothing, nothing, process.times(prior.steps))
        self.value.check(prior, shape, self.temperature)
        checks.at_least("particles", self.particles, 1)

    def suits(self, task: Task) -> None:
        self.value.suits(task)

    def sampler(self, process: Process, denoiser: Any, value: Any, times: Array) -> Any:
        """Build the sampler."""
        make = named(samplers, self.setting, "setting", "denoiser", "value", "ess_threshold")
        parts = {"process": process, "denoiser": denoiser, "value": value, "times": times}
        return assemble(make, self.options, **parts, temperature=self.temperature)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
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
        along = {"effective sample size": (moves, ess), "log Z": (moves, log_z), "tempering": (moves, strength)}
        return outcome(
            x0,
            round(prior.calls(sampler) * self.particles / count),
            clock,
            kl,
            curves=curves | along,
            figures={name: float(out.info[name]) for name in ("log_z", "log_z_se", "ess")}
            | {"lineages": float(1 / np.sum(np.bincount(lineages, weights) ** 2))},  # their effective number
            lineages=lineages[chosen],
            temperature=self.temperature,
        )


@dataclasses.dataclass(frozen=True)
class BestOfNSampling(Method):
    """The best of several samples of the prior, per sample.

    Args:
      candidates: N, chains of the prior per sample.
    """

    candidates: int = 16

    def check(self, prior: Prior, shape: Shape) -> None:
        checks.at_least("candidates", self.candidates, 1)

    def sampler(self, process: Process, denoiser: Any, reward: Any) -> Any:
        """Build the sampler."""
        return samplers.best_of_n(samplers.ancestral(process, denoiser), reward, self.candidates)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        sampler = self.sampler(prior.process, prior.denoiser, task.reward)
        with run.clock() as clock:
            out = draw(run, phase, sampler, prior, count)
        kl = float(np.log(self.candidates) - (self.candidates - 1) / self.candidates)
        return outcome(out, prior.calls(sampler), clock, kl)


@dataclasses.dataclass(frozen=True)
class GuidedSampling(Method):
    """Ancestral sampling under a guide made from the task's reward.

    Args:
      guide: a guide of `rgdiff.guides`: `classifier_guidance` (the score moved by the gradient of the value: DPS for any reward with
        the posterior mean, classifier guidance with a learnt value, PiGDM with a measurement's likelihood), `lgd_mc` (the reward at
        several draws around the posterior mean), `tmpd` (for measurements), or `gradient_guide` (the kernel tilted instead; masked
        priors too).
      temperature: in the reward's unit; the guide's scale is 1 / temperature.
      value: the value function whose gradient guides (group `value`); not for lgd_mc and tmpd.
      options: of the guide.
      sampling: options of `rgdiff.samplers.ancestral`: time_travel and window (FreeDoM).
    """

    guide: str = "classifier_guidance"
    temperature: float = 0.2
    value: ValueSource = PosteriorMeanValue()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def make(self) -> Any:
        """The guide's constructor."""
        return named(guides, self.guide, "guide", "scale")

    def check(self, prior: Prior, shape: Shape) -> None:
        process = prior.process(shape)
        self.sampler(process, nothing, nothing, unseen(shape), jax.random.key(0))
        if takes(self.make, "value"):
            self.value.check(prior, shape, self.temperature)
        if takes(self.make, "measurement"):
            unit_temperature(self.temperature)

    def suits(self, task: Task) -> None:
        if takes(self.make, "measurement"):
            measurement(task, f"method.guide={self.guide}")
        if takes(self.make, "value"):
            self.value.suits(task)

    def sampler(self, process: Process, denoiser: Any, value: Any, reward: Any, key: Any) -> Any:
        """Build the sampler."""
        parts = {"denoiser": denoiser, "process": process, "value": value, "reward": reward, "measurement": reward}
        made = assemble(self.make, self.options, **parts, key=key, scale=1 / self.temperature)
        plain, guide = (made, None) if takes(self.make, "denoiser") else (denoiser, made)  # else it is on the kernel
        return samplers.ancestral(process, plain, guide=guide, **self.sampling)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        denoiser = prior.denoiser
        with run.clock() as clock:
            made = Obtained(nothing, {})
            if takes(self.make, "value"):
                made = self.value.obtain(run, phase, prior, task, denoiser, self.temperature)
            sampler = self.sampler(prior.process, denoiser, made.value, task.reward, run.key(f"{phase}_guide"))
            out = draw(run, phase, sampler, prior, count)
        kl = float("nan")  # repeated moves and points have no path KL
        if sampler.time_travel == 1 and prior.process.stochastic:
            kl = draw_with_kl(run, f"{phase}_kl", sampler, prior, count)[1]
        return outcome(out, prior.calls(sampler), clock, kl, curves=made.curves, temperature=self.temperature)
