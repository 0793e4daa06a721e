"""Methods of recipes that steer samples without touching the network, beside SVDD: particles, best-of-N and guides."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from rgdiff import checks, guides, samplers, values
from rgdiff.resampling import multinomial
from rgdiff.rewards import Task
from rgdiff.runtime.methods import Outcome, _nothing, draw
from rgdiff.runtime.priors import GaussianPrior, Prior
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Info, Process


def _particles(carry: Any, info: Info) -> tuple[Array, Array, Array]:
    return info["ess"], info["log_z"], info["strength"]


@dataclasses.dataclass(frozen=True)
class Smc:
    """A particle sampler with the posterior-mean value; `setting` is smc, fk_steering, tds or das, arguments as `rgdiff.samplers`.

    `particles` run as one problem; `count` samples are drawn from their weights.
    """

    setting: str = "smc"
    particles: int = 1024
    temperature: float = 0.2
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, prior: GaussianPrior, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        process = prior.process(shape)
        self.sampler(process, _nothing, _nothing, process.times(prior.steps))
        checks.at_least("particles", self.particles, 1)

    def sampler(self, process: Process, denoiser: Any, value: Any, times: Array) -> Any:
        """Build the sampler."""
        settings = {
            "smc": samplers.smc,
            "fk_steering": samplers.fk_steering,
            "tds": samplers.tds,
            "das": lambda *parts, **options: samplers.das(*parts, times, **options),
        }
        make = settings[checks.one_of("setting", self.setting, settings)]
        return make(process, denoiser, value, temperature=self.temperature, **self.options)

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        denoiser = prior.denoiser
        with run.clock() as clock:
            value = values.posterior_mean(task.reward, prior.process, denoiser)
            sampler = self.sampler(prior.process, denoiser, value, prior.times)
            out = draw(run, phase, sampler, prior.times, self.particles, keep=_particles)
            log_weights = out.info["log_weights"]
            chosen = np.asarray(multinomial(run.key(f"{phase}_chosen"), log_weights, count))
            x0 = jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], out.x0)
        ess, log_z, strength = (np.asarray(k).tolist() for k in out.kept)
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
            curves={"effective sample size": (moves, ess), "log Z": (moves, log_z), "tempering": (moves, strength)},
            figures={"log_z": float(out.info["log_z"]), "ess": float(out.info["ess"])},
            temperature=self.temperature,
        )


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """The best of `candidates` samples of the prior, per sample."""

    candidates: int = 16

    def check(self, prior: GaussianPrior, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        checks.at_least("candidates", self.candidates, 1)

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        plain = samplers.ancestral(prior.process, prior.denoiser)
        sampler = samplers.best_of_n(plain, task.reward, self.candidates)
        with run.clock() as clock:
            out = draw(run, phase, sampler, prior.times, count)
        kl = np.log(self.candidates) - (self.candidates - 1) / self.candidates
        calls = sampler.network_calls(len(prior.times) - 1)
        return Outcome(np.asarray(out.x0), calls, float(kl), clock.seconds, clock.compile_seconds)


@dataclasses.dataclass(frozen=True)
class Guided:
    """Ancestral sampling under a guide made from the task's reward.

    Args:
      guide: `reward` (the score moved by the gradient of r at the posterior mean: DPS for any reward), `lgd_mc` (the
        same with `draws` samples around it), or `tilt` (the kernel tilted instead; masked priors too).
      scale: 1 / temperature, per unit of the reward.
      recurrences, window: how often each move is made, and in which times (FreeDoM).
    """

    guide: str = "reward"
    scale: float = 5.0
    draws: int = 4
    tilts: str = "token"
    recurrences: int = 1
    window: tuple[float, float] | None = None

    def check(self, prior: GaussianPrior, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        self.sampler(prior.process(shape), _nothing, _nothing, jax.random.key(0))

    def sampler(self, process: Process, denoiser: Any, reward: Any, key: Any) -> Any:
        """Build the sampler."""
        checks.one_of("guide", self.guide, ("reward", "lgd_mc", "tilt"))
        guide = None
        if self.guide == "reward":
            denoiser = guides.reward_guidance(denoiser, process, reward, self.scale)
        elif self.guide == "lgd_mc":
            denoiser = guides.lgd_mc(denoiser, process, reward, key, draws=self.draws, scale=self.scale)
        else:
            checks.law(process, "a guide on the kernel")
            value = values.posterior_mean(reward, process, denoiser)
            guide = guides.gradient_guide(value, self.scale, tilts=self.tilts)
        window = None if self.window is None else tuple(self.window)
        return samplers.ancestral(process, denoiser, guide=guide, recurrences=self.recurrences, window=window)

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        sampler = self.sampler(prior.process, prior.denoiser, task.reward, run.key(f"{phase}_guide"))
        with run.clock() as clock:
            out = draw(run, phase, sampler, prior.times, count)
        kl = float("nan")  # repeated moves and points have no path KL
        if self.recurrences == 1 and prior.process.stochastic:
            compared = dataclasses.replace(sampler, reference=prior.denoiser)
            kl = float(draw(run, f"{phase}_kl", compared, prior.times, count, keep=samplers.path_kl).kept.sum(0).mean())
        calls = sampler.network_calls(len(prior.times) - 1)
        return Outcome(np.asarray(out.x0), calls, kl, clock.seconds, clock.compile_seconds)
