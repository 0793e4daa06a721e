"""Where a recipe's method takes its value from: the posterior mean, a trained network, or enumeration (`value/*.yaml`).

Each is a small settings object: `check` refuses what does not fit the prior before anything is trained, `obtain` makes
the value for a temperature, with curves that tell how good it is. Any method that steers takes any of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, guides, samplers, tuners, values
from rgdiff.denoisers import from_linen
from rgdiff.domains import enumeration
from rgdiff.rewards import Task
from rgdiff.runtime.methods import Curves, draw, nothing, shown
from rgdiff.runtime.priors import Prior, initial, state_shape, unconditional
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Params, Process, Reward, pytree, static


@dataclasses.dataclass(frozen=True)
class PosteriorMean:
    """r(E[x0 | x_t]): no training. `plug_in` is mean, or mode for tokens (`rgdiff.values.posterior_mean`)."""

    plug_in: str = "mean"

    def check(self, prior: Any, shape: tuple[int, ...], temperature: float) -> None:
        """Refuse a plug-in that the process does not have."""
        stand_in: Any = nothing
        values.posterior_mean(stand_in, prior.process(shape), stand_in, plug_in=self.plug_in)

    def obtain(
        self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any, temperature: float
    ) -> tuple[Any, Curves]:
        """Plug the prediction into the reward."""
        return values.posterior_mean(task.reward, prior.process, denoiser, plug_in=self.plug_in), {}


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """log p(y | x_t) of a task whose reward is a measurement (`rgdiff.guides.likelihood`): PiGDM's value and TDS's twist, no training.

    Args:
      prior_variance: of one coordinate of the data.
    """

    prior_variance: float = 1.0

    def check(self, prior: Any, shape: tuple[int, ...], temperature: float) -> None:
        """Refuse a prior that is not Gaussian, or a temperature that makes it another likelihood."""
        blank: Any = nothing
        guides.likelihood(blank, prior.process(shape), unseen(shape), prior_variance=self.prior_variance)
        unit_temperature(temperature)

    def obtain(
        self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any, temperature: float
    ) -> tuple[Any, Curves]:
        """Join the measurement and the prediction."""
        y: Any = task.reward
        return guides.likelihood(denoiser, prior.process, y, prior_variance=self.prior_variance), {}

    def suits(self, task: Task) -> None:
        """Refuse a reward that is not a measurement."""
        measurement(task, "value@method.value=likelihood")


def unit_temperature(temperature: float) -> None:
    """Refuse another temperature than a likelihood's own."""
    if temperature != 1:
        raise ValueError(f"a likelihood's temperature is 1, got {temperature}; give method.temperature=1")


def unseen(shape: tuple[int, ...]) -> guides.Measurement:
    """Stand in for a task's measurement while settings are checked."""
    return guides.inpainting(jnp.zeros(shape), jnp.zeros(shape), 1.0)


def measurement(task: Task, what: str) -> None:
    """Refuse a task whose reward is not a measurement."""
    if not hasattr(task.reward, "log_prob"):
        raise ValueError(f"{what} is for measurements; choose reward=inpainting or reward=downsampling")


@dataclasses.dataclass(frozen=True)
class Learned:
    """A network trained on rewarded samples of the prior (SVDD-MC, noise-aware classifier guidance).

    Args:
      network: called as (x, t, cond) with one number per example or position.
      optimizer, steps, batch: of its training.
      samples: chains of the prior that the value learns from; an eighth as many are held out to measure it.
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

    def check(self, prior: Any, shape: tuple[int, ...], temperature: float) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
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
        self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any, temperature: float
    ) -> tuple[Any, Curves]:
        """Train the value, or go on with it, and measure it on chains held out."""
        process, times = prior.process, prior.times
        if self.data == "rollouts":
            data = self._rollouts(run, f"{phase}_data", prior, task, denoiser, self.samples)
        else:
            x0 = draw(run, f"{phase}_data", samplers.ancestral(process, denoiser), prior, self.samples).x0
            data = {"x0": x0, "reward": jax.jit(lambda r, x: r(x))(task.reward, x0)}
        model, key = LearnedModel(self.network), run.key(f"{phase}_value")
        tuner = self.tuner(model, process, denoiser, times, temperature)
        params = initial(self.network, key, state_shape(process))
        state = run.fit(f"{phase}_value", tuner, key, params, self.steps, data=data, batch=self.batch)
        heldout = self._rollouts(run, f"{phase}_heldout", prior, task, denoiser, max(2, self.samples // 8))
        error = values.error_over_time(model(state.best), times, heldout, temperature=tuner.temperature)
        grid, explained, bias = (np.asarray(a).tolist() for a in (times, error.explained, error.bias))
        curves = {"held-out variance of the reward explained, by t": (grid, explained), "bias, by t": (grid, bias)}
        ends = {} if process.projects else {"reward": task.reward, "process": process}
        return LearnedModel(self.network, **ends)(state.best), curves

    def _rollouts(self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any, count: int) -> dict[str, Any]:
        with shown(phase, prior.times.shape[0] - 1) as options:
            out = tuners.rollouts(run.key(phase), prior.process, denoiser, prior.times, task.reward, count, **options)
            return jax.block_until_ready(out)


@pytree
class LearnedModel:
    """Parameters to a learned value, which is the reward itself where a masked chain ends."""

    network: Any = static()
    reward: Reward | None = None
    process: Process | None = None

    def __call__(self, params: Params) -> Any:
        return values.learned(from_linen(self.network, params), self.reward, self.process)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The exact soft value of an enumerable masked prior's own chain: what is left of an error is the sampler's."""

    def check(self, prior: Any, shape: tuple[int, ...], temperature: float) -> None:
        """Refuse a prior with too many states to enumerate."""
        enumeration.sizes(prior.process(shape))

    def obtain(
        self, run: Run, phase: str, prior: Prior, task: Task, denoiser: Any, temperature: float
    ) -> tuple[Any, Curves]:
        """Enumerate the value."""
        rewards = enumeration.all_rewards(task.reward, *enumeration.sizes(prior.process))
        process: Any = prior.process
        return enumeration.chain_value(process, denoiser, prior.times, rewards, temperature), {}
