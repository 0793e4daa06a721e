"""What DxMI is measured against in recipes: a prior in few steps, SFT-PG, and an energy trained with Langevin chains."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, samplers, tuners
from rgdiff.domains import planar_tasks
from rgdiff.rewards import Task
from rgdiff.runtime.dxmi import Learned, density_figures, energy_auc, needs_data, training_curves
from rgdiff.runtime.methods import Outcome, nothing
from rgdiff.runtime.priors import initial
from rgdiff.runtime.run import Run
from rgdiff.runtime.values import LearnedModel
from rgdiff.samplers._loop import roll
from rgdiff.tuners.energy_model import Langevin
from rgdiff.typing import Array, Params, pytree
from rgdiff.values import AtTime


@dataclasses.dataclass(frozen=True)
class ShortChain:
    """The prior in `steps` calls of its network, on its own grid: DDPM with eta = 1, DDIM with eta = 0."""

    steps: int = 5
    eta: float = 1.0

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse a number of steps or an eta that the prior's process does not take."""
        prior.process(shape, self.eta).times(self.steps)

    def run(self, run: Run, phase: str, prior: Any, task: Task, count: int) -> Outcome:
        process = prior.with_eta(self.eta)
        with run.clock() as clock:
            sampler = samplers.ancestral(process, prior.denoiser)
            x0 = np.asarray(samplers.sample(sampler, run.key(phase), count, process.times(self.steps)).x0)
        return Outcome(x0, self.steps, float("nan"), clock.seconds, clock.compile_seconds)


@pytree
class StillModel:
    """Parameters to a network of (x, t, cond), asked at t = 0, as a function of (x0, cond)."""

    model: Any

    def __call__(self, params: Params) -> Any:
        return AtTime(self.model(params), jnp.float32(0))


@dataclasses.dataclass(frozen=True)
class ShortcutTuning:
    """SFT-PG (2301.13362): the prior's short chain brought nearer to the data by policy gradients.

    Args:
      critic: a network (x, t, cond) -> [B], asked at t = 0.
      optimizer, critic_optimizer: of the sampler and of the critic.
      options: of `tuners.sft_pg`.
    """

    critic: Any
    optimizer: Any
    critic_optimizer: Any
    steps: int = 5
    iterations: int = 300
    batch: int = 256
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    chunk: int = 25

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        needs_data(prior)
        blank: Any = nothing
        self.tuner(blank, prior.process(shape, 1.0), None)

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

    def run(self, run: Run, phase: str, prior: Any, task: Task, count: int) -> Outcome:
        process, key = prior.with_eta(1.0), run.key(phase)
        with run.clock() as clock:
            tuner = self.tuner(prior.model, process, initial(self.critic, jax.random.fold_in(key, 1), prior.shape))
            data = {"x0": prior.data}
            state = run.fit(
                phase, tuner, key, prior.params, self.iterations, data=data, batch=self.batch, chunk=self.chunk
            )
            sampler = samplers.ancestral(process, prior.model(state.best))
            x0 = np.asarray(samplers.sample(sampler, key, count, process.times(self.steps)).x0)
        return Learned(
            x0,
            self.steps,
            float("nan"),
            clock.seconds,
            clock.compile_seconds,
            tuning_network_calls=self.iterations * self.batch * tuner.network_calls(),
        )


@dataclasses.dataclass(frozen=True)
class LangevinTraining:
    """An energy trained with Langevin chains, and samples of chains from noise; arguments as `tuners.langevin_energy`.

    Args:
      value: a network (x, t, cond) -> [B], asked at t = 0: the energy.
      draws: Langevin moves from noise to the samples that are reported.
      noise_box: see `runtime.dxmi.MaximumEntropy`.
    """

    value: Any
    optimizer: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    iterations: int = 2000
    batch: int = 256
    draws: int = 1000
    noise_box: float = 4.0
    chunk: int = 100

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        needs_data(prior)
        checks.at_least("draws", self.draws, 1)
        self.tuner(shape)

    def tuner(self, shape: tuple[int, ...]) -> Any:
        """Build the tuner."""
        model = StillModel(LearnedModel(self.value))
        return tuners.langevin_energy(model, shape, self.optimizer, batch=self.batch, **self.options)

    def run(self, run: Run, phase: str, prior: Any, task: Task, count: int) -> Outcome:
        tuner, key = self.tuner(prior.shape), run.key(phase)
        with run.clock() as clock:
            params = initial(self.value, jax.random.fold_in(key, 1), prior.shape)
            data = {"x0": prior.data}
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
            pictures = {f"{phase}: energy": planar_tasks.field(judged, half=planar_tasks.MARGIN * self.noise_box)[None]}
        return Learned(
            x0,
            self.draws,
            float("nan"),
            clock.seconds,
            clock.compile_seconds,
            tuning_network_calls=0,
            curves=training_curves(run, phase),
            figures=figures,
            energy=judged,
            pictures=pictures,
        )


def _chains(sampler: Langevin, key: Any, spread: Array, count: int, moves: int, shape: tuple[int, ...]) -> Array:
    """Draw the ends of chains from noise."""

    def walk(sampler: Any, key: Any, spread: Array) -> Array:
        key_start, key_moves = jax.random.split(key)
        x = spread * jax.random.normal(key_start, (count, *shape))
        return roll(sampler, key_moves, x, jnp.linspace(1.0, 0.0, moves + 1))[0]

    return jax.jit(walk)(sampler, key, spread)
