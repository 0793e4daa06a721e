"""Baselines of DxMI in recipes: a prior in few steps, SFT-PG, and an energy trained with Langevin chains."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, samplers, tuners
from rgdiff.domains.planar.judge import MARGIN, field
from rgdiff.recipes.methods.few_step import density_figures, energy_auc, training_curves
from rgdiff.recipes.outcome import nothing, outcome
from rgdiff.recipes.priors import initial, needs_data
from rgdiff.recipes.typing import Method, Outcome, Prior, ReadyPrior, Shape
from rgdiff.recipes.values import LearnedModel
from rgdiff.rewards import Task
from rgdiff.runtime.run import Run
from rgdiff.samplers._loop import roll
from rgdiff.tuners.energy_model import Langevin
from rgdiff.typing import Array, Params, pytree
from rgdiff.values import AtTime


@dataclasses.dataclass(frozen=True)
class ShortChain(Method):
    """The prior in few calls of its network, on its own grid: DDPM with eta = 1, DDIM with eta = 0.

    Args:
      steps: network calls.
      eta: of sampling.
    """

    steps: int = 5
    eta: float = 1.0

    def check(self, prior: Prior, shape: Shape) -> None:
        prior.process(shape, self.eta).times(self.steps)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        process = prior.with_eta(self.eta)
        with run.clock() as clock:
            sampler = samplers.ancestral(process, prior.denoiser)
            x0 = np.asarray(samplers.sample(sampler, run.key(phase), count, process.times(self.steps)).x0)
        return outcome(x0, self.steps, clock)


@pytree
class StillModel:
    """Parameters -> a network of (x, t, cond), evaluated at t = 0, as a function of (x0, cond).

    Args:
      model: params -> (x, t, cond) -> [B].
    """

    model: Any

    def __call__(self, params: Params) -> Any:
        return AtTime(self.model(params), jnp.float32(0))


@dataclasses.dataclass(frozen=True)
class ShortcutFineTuning(Method):
    """SFT-PG (2301.13362): the prior's short chain brought nearer to the data by policy gradients.

    Args:
      critic: a network (x, t, cond) -> [B], evaluated at t = 0.
      optimizer, critic_optimizer: of the sampler and of the critic.
      steps: network calls of the short chain.
      iterations: of training.
      batch: chains, and rows of data, an iteration.
      options: of `tuners.sft_pg`.
      chunk: iterations between two checkpoints.
    """

    critic: Any
    optimizer: Any
    critic_optimizer: Any
    steps: int = 5
    iterations: int = 300
    batch: int = 256
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    chunk: int = 25

    def check(self, prior: Prior, shape: Shape) -> None:
        needs_data(prior)
        self.tuner(nothing, prior.process(shape, 1.0), None)

    def tuner(self, model: Any, process: Any, params: Params) -> Any:
        """Build the tuner."""
        return tuners.sft_pg(
            model,
            process,
            process.times(self.steps),
            self.optimizer,
            batch=self.batch,
            critic=StillModel(LearnedModel(self.critic)),
            critic_params=params,
            critic_optimizer=self.critic_optimizer,
            **self.options,
        )

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        process, key = prior.with_eta(1.0), run.key(phase)
        with run.clock() as clock:
            tuner = self.tuner(prior.model, process, initial(self.critic, jax.random.fold_in(key, 1), prior.shape))
            data = {"x0": jnp.asarray(prior.data)}
            state = run.fit(
                phase, tuner, key, prior.params, self.iterations, data=data, batch=self.batch, chunk=self.chunk
            )
            sampler = samplers.ancestral(process, prior.model(state.best))
            x0 = np.asarray(samplers.sample(sampler, key, count, process.times(self.steps)).x0)
        return outcome(
            x0,
            self.steps,
            clock,
            tuning_network_calls=self.iterations * self.batch * tuner.network_calls(),
        )


@dataclasses.dataclass(frozen=True)
class LangevinTraining(Method):
    """An energy trained with Langevin chains, and samples of chains from noise.

    Args:
      value: a network (x, t, cond) -> [B], evaluated at t = 0: the energy.
      optimizer: an optax transformation.
      options: of `tuners.langevin_energy`.
      iterations: of training.
      batch: chains moved, and rows of data, an iteration.
      draws: Langevin moves from noise to the samples that are reported.
      noise_box: see `few_step.FewStepTraining`.
      chunk: iterations between two checkpoints.
    """

    value: Any
    optimizer: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    iterations: int = 2000
    batch: int = 256
    draws: int = 1000
    noise_box: float = 4.0
    chunk: int = 100

    def check(self, prior: Prior, shape: Shape) -> None:
        needs_data(prior)
        checks.at_least("draws", self.draws, 1)
        self.tuner(shape)

    def tuner(self, shape: Shape) -> Any:
        """Build the tuner."""
        model = StillModel(LearnedModel(self.value))
        return tuners.langevin_energy(model, shape, self.optimizer, batch=self.batch, **self.options)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        tuner, key = self.tuner(prior.shape), run.key(phase)
        with run.clock() as clock:
            params = initial(self.value, jax.random.fold_in(key, 1), prior.shape)
            data = {"x0": jnp.asarray(prior.data)}
            state = run.fit(phase, tuner, key, params, self.iterations, data=data, batch=self.batch, chunk=self.chunk)
            energy = tuner.energy(state.best)
            x0 = np.asarray(
                _chains(Langevin(energy, tuner.step_size), key, tuner.spread, count, self.draws, prior.shape)
            )
        judged = jax.jit(lambda x: energy(x))
        figures = {
            "skipped": float(state.skipped),
            "energy_auc": energy_auc(run, judged, prior.fresh, self.noise_box),
        }
        pictures = {}
        if prior.shape == (2,):
            figures |= density_figures(run, phase, judged, prior.fresh, self.noise_box)
            pictures = {f"{phase}: energy": field(judged, half=MARGIN * self.noise_box)[None]}
        return outcome(
            x0,
            self.draws,
            clock,
            curves=training_curves(run, phase),
            figures=figures,
            energy=judged,
            pictures=pictures,
        )


def _chains(sampler: Langevin, key: Any, spread: Array, count: int, moves: int, shape: Shape) -> Array:
    """Draw the ends of chains from noise."""

    def walk(sampler: Any, key: Any, spread: Array) -> Array:
        key_start, key_moves = jax.random.split(key)
        x = spread * jax.random.normal(key_start, (count, *shape))
        return roll(sampler, key_moves, x, jnp.linspace(1.0, 0.0, moves + 1))[0]

    return jax.jit(walk)(sampler, key, spread)
