"""Methods of recipes that use LoRA adapters: two tuned apart and mixed, and saved ones at any weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rgdiff import samplers
from rgdiff.nets import LoRAModel, lora_sum
from rgdiff.recipes.methods.tuning import FineTuning, measured
from rgdiff.recipes.outcome import draw_tuned, outcome
from rgdiff.recipes.typing import Curves, Method, Outcome, Prior, ReadyPrior, Shape
from rgdiff.rewards import Task
from rgdiff.runtime.adapters import load_lora
from rgdiff.runtime.run import Run


@dataclasses.dataclass(frozen=True)
class MixedAdapters(Method):
    """Two adapters tuned apart, one to the recipe's reward and one to `second`, and their weighted sums without more training.

    Args:
      tuning: a `FineTuning` with an adapter.
      second: the other task, e.g. `rgdiff.domains.images.tasks.inked`.
      weights: of the second adapter, each in [0, 1]; the first has the rest. The samples reported are those of the middle one.
    """

    tuning: FineTuning
    second: Task
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)

    @property
    def tunes(self) -> FineTuning:
        """The settings that tune to the reward."""
        return self.tuning

    def check(self, prior: Prior, shape: Shape) -> None:
        self.tuning.check(prior, shape)
        if self.tuning.adapter is None or not self.weights:
            raise ValueError(
                "mixing needs adapters and weights; give method.tuning.adapter=RANK and method.weights=[...]"
            )

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        other = self.second.through(prior.decode)
        with run.clock() as clock:
            first = self.tuning.tune(run, f"{phase}_first", prior, task)
            second = self.tuning.tune(run, f"{phase}_second", prior, other)
            tuner, model, process = first[0], first[1], first[3]
            mixed = [lora_sum([(first[2], 1 - w), (second[2], w)]) for w in self.weights]
            weight = self.weights[len(mixed) // 2]
            middle = model(mixed[len(mixed) // 2])
            drawn = draw_tuned(run, phase, prior, middle, process, count)
        rewards = {"reward": task.reward, "held-out reward": task.heldout, "second reward": other.reward}
        rows = [
            measured(run, f"{phase}_weight_{w}", prior, rewards, model(adapter), process, count)
            for w, adapter in zip(self.weights, mixed, strict=True)
        ]
        curves: Curves = {
            f"{name}, by the weight of the second adapter": (list(self.weights), [row[name] for row in rows])
            for name in rows[0]
        }
        return outcome(
            drawn.x0,
            prior.calls(samplers.ancestral(process, middle)),
            clock,
            drawn.path_kl(),
            tuning_network_calls=2 * self.tuning.steps * self.tuning.batch * tuner.network_calls(),
            curves=curves,
            figures={"second_reward": rows[len(rows) // 2]["second reward"]},
            of=f"{1 - weight:g} times the adapter of the reward, {weight:g} times that of the second",
        )


@dataclasses.dataclass(frozen=True)
class SavedAdapters(Method):
    """Sample the prior with adapters that were tuned before: any weighted sum of them, without training.

    Args:
      adapters: files of diffusers or kohya, or folders in PEFT's format (`runtime.adapters.load_lora`), and the weight of each,
        on top of the scale that is saved with it.
    """

    adapters: Mapping[str, float] | None = None

    def check(self, prior: Prior, shape: Shape) -> None:
        if not self.adapters:
            raise ValueError("give method.adapters={FOLDER: WEIGHT}, e.g. {runs/digits_draft/adapters/adapter: 0.5}")
        for place in self.adapters:
            if not Path(place).exists():
                raise FileNotFoundError(f"no adapter at {place}; a run leaves its own under adapters/")

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        terms = []
        for place, weight in (self.adapters or {}).items():
            adapter, scale = load_lora(place, prior.params)
            terms.append((adapter, weight * scale))
        denoiser = LoRAModel(prior.params, prior.model)(lora_sum(terms))
        with run.clock() as clock:
            drawn = draw_tuned(run, phase, prior, denoiser, prior.process, count)
        named = ", ".join(f"{weight:g} times {Path(place).name}" for place, weight in (self.adapters or {}).items())
        return outcome(
            drawn.x0, prior.calls(samplers.ancestral(prior.process, denoiser)), clock, drawn.path_kl(), of=named
        )
