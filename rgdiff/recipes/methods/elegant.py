"""ELEGANT in recipes: the value of x_T, the chain that draws it, then any fine-tuning of the main chain from there (2402.15194).

Each of the three is a phase of its own with checkpoints; the mathematics is `rgdiff.tuners.elegant`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from rgdiff import denoisers, processes, samplers, schedules, tuners
from rgdiff.recipes.methods.tuning import FineTuning
from rgdiff.recipes.priors import initial, unconditional
from rgdiff.recipes.typing import Domain, Method, Outcome, Prior, ReadyPrior, Shape
from rgdiff.recipes.values import LearnedModel
from rgdiff.rewards import Task
from rgdiff.runtime.run import Run
from rgdiff.typing import Process


@dataclasses.dataclass(frozen=True)
class StartedPrior(Prior):
    """A prior's settings whose chains begin at draw(key, batch).

    Args:
      settings: of the prior.
      draw: (key, batch) -> x_T [B, ...].
    """

    settings: Prior
    draw: Any

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self.settings.steps

    def obtain(self, run: Run, domain: Domain, identity: Mapping[str, Any]) -> ReadyPrior:
        """Make the prior ready, with chains that begin at the draws."""
        prior = self.settings.obtain(run, domain, identity)
        return dataclasses.replace(prior, process=self.process(prior.shape), settings=self)

    def process(self, shape: Shape, eta: float | None = None) -> Process:
        """Return the process, begun at the draws."""
        process: Any = self.settings.process(shape, eta)
        return processes.started_from(process, self.draw)


@dataclasses.dataclass(frozen=True)
class Elegant(Method):
    """ELEGANT: the value of x_T from rollouts of the prior, a chain tuned to draw x_T by it, and the main chain from there.

    The main chain is that of `rgdiff.tuners.elegant`.

    Args:
      tuning: a `FineTuning` of the main chain with a temperature (alpha, for all three) and eta > 0.
      value: a network (x, t, cond) -> [B], e.g. `nets.ValueMLP`.
      network: of the chain that draws x_T, zero at first, e.g. `nets.MLP`.
      optimizer: of both networks, an optax transformation.
      rollouts: chains of the prior that the value learns from.
      value_steps, value_batch: optimiser steps of the value, and chains a step.
      moves: network calls of the chain that draws x_T.
      steps, batch: tuning steps of that chain, and chains a step.
    """

    tuning: FineTuning
    value: Any
    network: Any
    optimizer: Any
    rollouts: int = 20_000
    value_steps: int = 800
    value_batch: int = 1024
    moves: int = 20
    steps: int = 800
    batch: int = 256

    @property
    def tunes(self) -> FineTuning:
        """The settings that tune to the reward."""
        return self.tuning

    def check(self, prior: Prior, shape: Shape) -> None:
        if not self.tuning.temperature:
            raise ValueError("ELEGANT aims at p exp(r/alpha)/Z; give its alpha as method.tuning.temperature > 0")
        unconditional(prior, "the law of x_T that ELEGANT learns", "choose a prior without prior.guidance")
        self.tuning.check(prior, shape)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        with run.clock() as clock:
            draw, kl = self.start(run, phase, prior, task)
        settings = StartedPrior(prior.settings, draw)
        begun = dataclasses.replace(prior, process=processes.started_from(prior.process, draw), settings=settings)  # type: ignore[arg-type]
        outcome = self.tuning.run(run, phase, begun, task, count)
        return dataclasses.replace(
            outcome,
            kl=outcome.kl + kl,
            network_calls=outcome.network_calls + self.moves,
            seconds=outcome.seconds + clock.seconds,
            compile_seconds=outcome.compile_seconds + clock.compile_seconds,
            tuning_network_calls=outcome.tuning_network_calls + self.steps * self.batch * self.moves,
            figures=outcome.figures
            | {"start_kl": kl, "reward_queries": outcome.figures["reward_queries"] + self.rollouts},
        )

    def start(self, run: Run, phase: str, prior: ReadyPrior, task: Task) -> tuple[Any, float]:
        """Return draw(key, batch) -> x_T and the path KL, in nats, of the chain that draws it."""
        process, alpha = prior.with_eta(self.tuning.eta), float(self.tuning.temperature or 0)
        key = run.key(f"{phase}_value")
        data = tuners.rollouts(
            run.key(f"{phase}_data"), process, prior.denoiser, prior.times, task.reward, self.rollouts
        )
        data = {"path": data["path"][:, :1], "reward": data["reward"]}
        model = LearnedModel(self.value)
        learner = tuners.initial_value(model, process, prior.times, self.optimizer, temperature=alpha)
        params = initial(self.value, key, prior.shape)
        params = run.fit(
            f"{phase}_value", learner, key, params, self.value_steps, data=data, batch=self.value_batch
        ).best
        law = processes.initial_law(process, schedules.linear_vp())  # type: ignore[arg-type]
        times, key = law.times(self.moves), run.key(f"{phase}_start")
        tuner = tuners.initial_tuner(
            denoisers.LinenModel(self.network), law, model(params), times, self.optimizer, temperature=alpha, time=prior.times[0],
            batch=self.batch, remat="none",
        )  # fmt: skip
        params = initial(self.network, key, prior.shape)
        tuned = tuner.model(run.fit(f"{phase}_start", tuner, key, params, self.steps).best)
        priced = samplers.ancestral(law, tuned, reference=tuners.standard_normal(law))
        out = samplers.sample(priced, jax.random.fold_in(key, 1), 4096, times, keep=samplers.path_kl)
        kl = float(samplers.total_path_kl(out).mean())
        return samplers.drawing(samplers.ancestral(law, tuned), times), kl
