"""The source of a recipe's value function: the posterior mean, a trained network, or enumeration (`value/*.yaml`).

Each is a small settings object: `check` refuses settings that do not fit the prior before anything is trained, `obtain` makes
the value for a temperature, with curves of its error. Any method that steers takes any of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, guides, samplers, tuners, values
from rgdiff.denoisers import from_linen
from rgdiff.exact import enumeration
from rgdiff.recipes.outcome import draw, nothing, shown
from rgdiff.recipes.priors import initial, state_shape, unconditional
from rgdiff.recipes.typing import Obtained, Prior, ReadyPrior, Shape, ValueSource
from rgdiff.rewards import Task, score
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Denoiser, Params, Process, Reward, pytree, static


@dataclasses.dataclass(frozen=True)
class PosteriorMeanValue(ValueSource):
    """r(E[x0 | x_t]): no training.

    Args:
      plug_in: `mean`, or `mode` for tokens (`rgdiff.values.posterior_mean`).
    """

    plug_in: str = "mean"

    def check(self, prior: Prior, shape: Shape, temperature: float) -> None:
        stand_in: Any = nothing
        values.posterior_mean(stand_in, prior.process(shape), stand_in, plug_in=self.plug_in)

    def obtain(
        self, run: Run, phase: str, prior: ReadyPrior, task: Task, denoiser: Denoiser, temperature: float
    ) -> Obtained:
        return Obtained(values.posterior_mean(task.reward, prior.process, denoiser, plug_in=self.plug_in), {})


@dataclasses.dataclass(frozen=True)
class LikelihoodValue(ValueSource):
    """log p(y | x_t) of a task whose reward is a measurement: PiGDM's value and TDS's twist (`rgdiff.guides.likelihood`), no training.

    Args:
      prior_variance: of one coordinate of the data.
    """

    prior_variance: float = 1.0

    def check(self, prior: Prior, shape: Shape, temperature: float) -> None:
        guides.likelihood(nothing, prior.process(shape), unseen(shape), prior_variance=self.prior_variance)
        unit_temperature(temperature)

    def obtain(
        self, run: Run, phase: str, prior: ReadyPrior, task: Task, denoiser: Denoiser, temperature: float
    ) -> Obtained:
        y: Any = task.reward
        return Obtained(guides.likelihood(denoiser, prior.process, y, prior_variance=self.prior_variance), {})

    def suits(self, task: Task) -> None:
        measurement(task, "value@method.value=likelihood")


def unit_temperature(temperature: float) -> None:
    """Refuse another temperature than 1, that of a likelihood.

    Args:
      temperature: as configured.
    """
    if temperature != 1:
        raise ValueError(f"a likelihood's temperature is 1, got {temperature}; give method.temperature=1")


def unseen(shape: tuple[int, ...]) -> guides.Measurement:
    """Return a placeholder for a task's measurement while settings are checked.

    Args:
      shape: of one example.
    """
    return guides.inpainting(jnp.zeros(shape), jnp.zeros(shape), 1.0)


def measurement(task: Task, what: str) -> None:
    """Refuse a task whose reward is not a measurement.

    Args:
      task: of the recipe.
      what: the setting that needs one, for the message.
    """
    if not hasattr(task.reward, "log_prob"):
        raise ValueError(f"{what} is for measurements; choose reward=inpainting or reward=downsampling")


@dataclasses.dataclass(frozen=True)
class LearnedValue(ValueSource):
    """A network trained on rewarded samples of the prior (SVDD-MC, noise-aware classifier guidance).

    Args:
      network: called as (x, t, cond) with one number per example or position.
      optimizer: an optax transformation of its training.
      samples: chains of the prior that the value learns from; an eighth as many are held out to measure it.
      steps: optimiser steps.
      batch: rows a step.
      target: `mean` of the reward, or `soft`: its soft value at the method's temperature.
      data: `noised` samples, or the chains' own states (`rollouts`).
      backup: next states per temporal difference; None regresses the reward.
    """

    network: Any
    optimizer: Any
    samples: int = 4096
    steps: int = 1500
    batch: int = 128
    target: str = "mean"
    data: str = "noised"
    backup: int | None = None

    def check(self, prior: Prior, shape: Shape, temperature: float) -> None:
        checks.one_of("data", self.data, ("noised", "rollouts"))
        unconditional(prior, "a learnt value", "give value@method.value=posterior_mean")
        process = prior.process(shape)
        self.tuner(nothing, process, nothing, process.times(prior.steps), temperature)

    def tuner(self, model: Any, process: Process, denoiser: Any, times: Array, temperature: float) -> Any:
        """Build the trainer of the value."""
        tau = temperature if checks.one_of("target", self.target, ("mean", "soft")) == "soft" else None
        if self.backup is None:
            grid = times if self.data == "rollouts" else None
            return tuners.value_regression(model, process, self.optimizer, temperature=tau, times=grid)
        return tuners.temporal_difference(
            model, process, denoiser, times, self.optimizer, temperature=tau, candidates=self.backup
        )

    def obtain(
        self, run: Run, phase: str, prior: ReadyPrior, task: Task, denoiser: Denoiser, temperature: float
    ) -> Obtained:
        process, times = prior.process, prior.times
        if self.data == "rollouts":
            data = self._rollouts(run, f"{phase}_data", prior, task, denoiser, self.samples)
        else:
            x0 = draw(run, f"{phase}_data", samplers.ancestral(process, denoiser), prior, self.samples).x0
            data = {"x0": x0, "reward": score(task.reward, x0)}
        model, key = LearnedModel(self.network), run.key(f"{phase}_value")
        tuner = self.tuner(model, process, denoiser, times, temperature)
        params = initial(self.network, key, state_shape(process))
        state = run.fit(f"{phase}_value", tuner, key, params, self.steps, data=data, batch=self.batch)
        heldout = self._rollouts(run, f"{phase}_heldout", prior, task, denoiser, max(2, self.samples // 8))
        error = values.error_over_time(model(state.best), times, heldout, temperature=tuner.temperature)
        grid, explained, bias = (np.asarray(a).tolist() for a in (times, error.explained, error.bias))
        curves = {"held-out variance of the reward explained, by t": (grid, explained), "bias, by t": (grid, bias)}
        return Obtained(self.trained(prior, task, state.best), curves)

    def trained(self, prior: ReadyPrior, task: Task, params: Params) -> Any:
        """Return the value with its parameters, which may be shapes."""
        process = prior.process
        ends = {} if process.projects else {"reward": task.reward, "process": process}
        return LearnedModel(self.network, **ends)(params)

    def shapes(self, prior: ReadyPrior, task: Task) -> Any:
        """Return the value with shapes in place of its parameters."""
        shape = state_shape(prior.process)
        return self.trained(prior, task, jax.eval_shape(lambda: initial(self.network, jax.random.key(0), shape)))

    def _rollouts(
        self, run: Run, phase: str, prior: ReadyPrior, task: Task, denoiser: Denoiser, count: int
    ) -> dict[str, Any]:
        with shown(phase, prior.times.shape[0] - 1) as options:
            out = tuners.rollouts(run.key(phase), prior.process, denoiser, prior.times, task.reward, count, **options)
            return jax.block_until_ready(out)


@pytree
class LearnedModel:
    """Parameters -> a learned value, which is the reward itself where a masked chain ends.

    Args:
      network: a Linen module (x, t, cond) -> [B] or one number per position.
      reward, process: of a masked chain, whose last value is the reward; None for a Gaussian one.
    """

    network: Any = static()
    reward: Reward | None = None
    process: Process | None = None

    def __call__(self, params: Params) -> Any:
        return values.learned(from_linen(self.network, params), self.reward, self.process)


@dataclasses.dataclass(frozen=True)
class ExactValue(ValueSource):
    """The exact soft value of an enumerable masked prior's own chain: the remaining error is the sampler's."""

    def check(self, prior: Prior, shape: Shape, temperature: float) -> None:
        enumeration.sizes(prior.process(shape))

    def obtain(
        self, run: Run, phase: str, prior: ReadyPrior, task: Task, denoiser: Denoiser, temperature: float
    ) -> Obtained:
        rewards = enumeration.all_rewards(task.reward, *enumeration.sizes(prior.process))
        process: Any = prior.process
        return Obtained(enumeration.chain_value(process, denoiser, prior.times, rewards, temperature), {})
