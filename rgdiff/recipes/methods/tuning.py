"""The method of recipes that fine-tunes a prior by a reward: any reward gradient or online method of `rgdiff.tuners`, by its name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks, metrics, samplers, tuners
from rgdiff.nets import LoRAModel, lora_init
from rgdiff.recipes.assembly import assemble, named, takes
from rgdiff.recipes.outcome import draw_tuned, nothing, outcome
from rgdiff.recipes.priors import initial, state_shape, unconditional
from rgdiff.recipes.typing import Curves, Method, Outcome, Prior, ReadyPrior, Shape
from rgdiff.recipes.values import LearnedModel
from rgdiff.rewards import HostReward, Task, score
from rgdiff.runtime.adapters import save_peft
from rgdiff.runtime.checkpoint import save_params
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Denoiser, Params, Process, Reward

SHOWN = {
    "reward": "reward, by step of tuning",
    "heldout": "held-out reward, by step of tuning",
    "kl": "path KL, by step of tuning",
}


def measured(
    run: Run,
    phase: str,
    prior: ReadyPrior,
    rewards: dict[str, Reward],
    denoiser: Denoiser,
    process: Process,
    count: int,
) -> dict[str, float]:
    """Return, and log, mean rewards, diversity and path KL of a denoiser's samples; of one chain where the process has a law.

    Args:
      run: for the key, progress and the log.
      phase: name of the draws.
      prior: ready, the reference of the KL.
      rewards: title -> reward.
      denoiser: that is sampled.
      process: of its chain.
      count: number of samples.
    """
    drawn = draw_tuned(run, phase, prior, denoiser, process, count)
    x0, kl = drawn.x0, drawn.path_kl()
    cond = prior.conditions(count)
    figures = {name: float(jnp.nanmean(score(reward, x0, cond))) for name, reward in rewards.items()}
    figures |= {"diversity": metrics.diversity(x0), "path KL": kl}
    run.log.rewind(phase, 0)
    run.log.write(phase, 0, {name.replace(" ", "_").replace("-", "_"): value for name, value in figures.items()})
    return figures


@dataclasses.dataclass(frozen=True)
class FineTuning(Method):
    """A setting of `rgdiff.tuners`, for all weights or a LoRA adapter.

    Args:
      setting: its name, of a reward gradient or an online method.
      optimizer: an optax transformation.
      options: arguments of the setting itself.
      steps: tuning steps.
      batch: samples a step.
      eta: of the tuned chain; null for a masked prior.
      calls: network calls of the chain that is tuned, by default the prior's; fewer are more steps of tuning in the same time. Samples
        are drawn by as many as the prior's.
      temperature: alpha, in the reward's unit per nat of path KL to the prior; null for none.
      remat: recomputation in the backward pass, see `tuners.reward_backprop`.
      adapter: rank of a LoRA adapter, which is saved in PEFT's files under adapters/ (`method=adapters` samples with it), or
        null for all weights, which are saved under tuned/ (`prior.checkpoint` takes them).
      target: regular expression of the parameters' paths that the adapter is for, by default every kernel.
      heldout: report the held-out reward while tuning.
      stopping: window, patience, metric, limited, limit of `tuners.early_stopping`, or null; it watches the held-out reward.
      scales: of the adapter at sampling time, at which reward, held-out reward, diversity and KL are shown.
      diagnose: number of batches from which the gradient's noise is estimated at the start, or 0.
      value: a network (x, t, cond) -> [B], the baseline that dpok learns.
      value_optimizer: for it; the same as the policy's by default.
      noise: standard deviation of Gaussian noise added to each reward before an online method sees it (reward's unit).
      chunk: steps between two checkpoints.
    """

    setting: str
    optimizer: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 200
    batch: int = 32
    eta: float | None = 0.0
    calls: int | None = None
    temperature: float | None = None
    remat: str = "none"
    adapter: int | None = None
    target: str = "kernel"
    heldout: bool = False
    stopping: dict[str, Any] | None = None
    scales: Sequence[float] = ()
    diagnose: int = 0
    value: Any = None
    value_optimizer: Any = None
    noise: float | None = None
    chunk: int = 10

    @property
    def make(self) -> Any:
        """The tuner's constructor: of a reward gradient, or of an online method."""
        return named(tuners, self.setting, "setting", "model", "process", "times", "optimizer", "batch")

    @property
    def online(self) -> bool:
        """Whether the reward is asked between two programs, so that it may be a black box."""
        return not takes(self.make, "reward")

    def check(self, prior: Prior, shape: Shape) -> None:
        process = prior.process(shape, self.eta)
        tuner = self.tuner(nothing, process, Task(nothing, nothing), process.times(prior.steps), nothing)
        if takes(self.make, "value_params") and getattr(self.value, "classes", 0) is None:
            unconditional(prior, f"{self.setting}'s baseline without classes", "give +method.value.classes=N")
        if self.stopping is not None and self.steps < tuner.window:
            raise ValueError(f"stopping judges windows of {tuner.window} steps, more than all {self.steps}")
        if self.scales and self.adapter is None:
            raise ValueError("scales are of a LoRA adapter; give method.adapter=RANK as well")

    def suits(self, task: Task) -> None:
        if self.noise is not None and (not self.online or isinstance(task.reward, HostReward)):
            raise ValueError("noise is added to what a reward in JAX answers an online method; leave method.noise=null")

    def tuner(self, model: Any, process: Process, task: Task, times: Array, reference: Any, key: Any = None) -> Any:
        """Build the tuner; an online one has the reward of `task` in its program."""
        accepted = inspect.signature(self.make).parameters
        required = {name for name, p in accepted.items() if p.default is p.empty}
        if self.temperature is None and "temperature" in required:
            raise ValueError(f"{self.setting} aims at p exp(r / temperature); give method.temperature")
        if self.temperature is not None and "temperature" not in accepted:
            raise ValueError(f"{self.setting} has no KL to the prior; leave method.temperature=null")
        kl: dict[str, Any] = {"temperature": self.temperature}
        if "reference" in required or self.temperature is not None:
            kl["reference"] = reference
        self.suits(task)
        heldout = task.heldout if self.heldout or self.stopping is not None else None
        tuner = self.build(model, process, task.reward, times, heldout=heldout, **kl, **self.baseline(process, key))
        if self.online:
            tuner = tuners.as_tuner(tuner, task.reward, heldout=heldout, noise=self.noise)
        return tuner if self.stopping is None else tuners.early_stopping(tuner, **self.stopping)

    def build(self, model: Any, process: Process, reward: Reward, times: Array, **more: Any) -> Any:
        """Build the setting from its parts, and from `more` of them; `calls` replaces the times."""
        if self.calls is not None:
            times = process.times(checks.at_least("calls", self.calls, 1))
        parts = {"model": model, "process": process, "reward": reward, "times": times, "optimizer": self.optimizer}
        return assemble(self.make, self.options, **parts, batch=self.batch, remat=self.remat, **more)

    def model(self, prior: ReadyPrior) -> Any:
        """Return the model of the tuned parameters: the prior's, or an adapter of it."""
        return prior.model if self.adapter is None else LoRAModel(prior.params, prior.model)

    def baseline(self, process: Process, key: Any) -> dict[str, Any]:
        """Return the value, its parameters and optimizer of a method that learns a baseline."""
        if not takes(self.make, "value_params"):
            return {}
        if self.value is None:
            raise ValueError(
                f"{self.setting} learns a baseline; give method.value, a network such as rgdiff.nets.ValueMLP"
            )
        params = initial(self.value, jax.random.key(0) if key is None else key, state_shape(process))
        optimizer = self.optimizer if self.value_optimizer is None else self.value_optimizer
        return {"value": LearnedModel(self.value), "value_params": params, "value_optimizer": optimizer}

    def tune(self, run: Run, phase: str, prior: ReadyPrior, task: Task) -> tuple[Any, Any, Params, Process]:
        """Return the tuner, the model, its tuned parameters and the process they were tuned on."""
        process, key = prior.with_eta(self.eta), run.key(phase)
        model = self.model(prior)
        tuner = self.tuner(model, process, task, prior.times, prior.denoiser, jax.random.fold_in(key, 2))
        params, labels = self.start(run, phase, prior), prior.every_condition
        rows = self.rows(prior, self.batch)
        params = run.fit(phase, tuner, key, params, self.steps, data=labels, batch=rows, chunk=self.chunk).best
        if self.adapter is not None:
            save_peft(run.folder.path / "adapters" / phase, params, prior.params)
        else:
            (run.folder.path / "tuned").mkdir(exist_ok=True)
            save_params(run.folder.path / "tuned" / phase, params)
        return tuner, model, params, process

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        with run.clock() as clock:
            tuner, model, params, process = self.tune(run, phase, prior, task)
            tuned = model(params)
            drawn = draw_tuned(run, phase, prior, tuned, process, count)
        rows = [row for row in run.log.rows if row["phase"] == phase and not row.get("stopped")]
        curves: Curves = {
            title: ([row["step"] for row in rows], [row[name] for row in rows])
            for name, title in SHOWN.items()
            if rows and name in rows[0]
        }
        inner = tuner if self.stopping is None else tuner.tuner
        queries = len(rows) * self.batch * (1 + getattr(inner, "renoised", 0))
        figures: dict[str, float] = {"tuning_steps": len(rows), "reward_queries": queries}
        if self.diagnose:
            key, params_then = run.key(f"{phase}_noise"), self.start(run, phase, prior)
            cond = prior.conditions(self.batch // self.options.get("repeats", 1))
            noise = tuners.gradient_statistics(tuner, key, params_then, self.diagnose, cond, chunk=1)
            figures["gradient_snr"] = float(noise.snr)
        if self.scales:
            rewards = {"reward": task.reward, "held-out reward": task.heldout}
            scaled = {scale: LoRAModel(prior.params, prior.model, scale)(params) for scale in self.scales}
            by_scale = [
                measured(run, f"{phase}_scale_{scale}", prior, rewards, denoiser, process, count)
                for scale, denoiser in scaled.items()
            ]
            curves |= {
                f"{name}, by the adapter's scale": (list(self.scales), [m[name] for m in by_scale])
                for name in by_scale[0]
            }
        return outcome(
            drawn.x0,
            prior.calls(samplers.ancestral(process, tuned)),
            clock,
            drawn.path_kl(),
            tuning_network_calls=len(rows) * self.batch * tuner.network_calls(),
            curves=curves,
            figures=figures,
            temperature=self.temperature,
            of="the adapter at scale 1" if self.scales else "",
        )

    def start(self, run: Run, phase: str, prior: ReadyPrior) -> Params:
        """Return the parameters that tuning begins with."""
        return self.first(prior, run.key(phase))

    def first(self, prior: ReadyPrior, key: Any) -> Params:
        """Return the parameters that tuning begins with; those of the prior may be shapes."""
        if self.adapter is None:
            return prior.params
        return lora_init(jax.random.fold_in(key, 1), prior.params, self.adapter, target=self.target)

    def rows(self, prior: ReadyPrior, batch: int) -> int | None:
        """Return the conditions that a step of `batch` chains draws; None for an unconditional prior."""
        return None if prior.every_condition is None else batch // self.options.get("repeats", 1)
