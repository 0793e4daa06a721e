"""Methods of recipes that fine-tune a prior by a reward, and what is done with the result: adapters scaled and mixed.

Each names a setting of `rgdiff.tuners`: a reward gradient, or an online method, which takes black boxes too. A method here
only assembles the library's own parts.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, metrics, samplers, tuners
from rgdiff.nets import LoRAModel, lora_init, lora_sum
from rgdiff.rewards import HostReward, Task
from rgdiff.runtime.adapters import load_peft, save_peft
from rgdiff.runtime.checkpoint import save_params
from rgdiff.runtime.methods import Curves, Outcome, draw, draw_with_kl, nothing
from rgdiff.runtime.priors import Prior, initial, state_shape, unconditional
from rgdiff.runtime.run import Run
from rgdiff.runtime.values import LearnedModel
from rgdiff.typing import Array, Params, Process, Reward

GRADIENTS = {
    name: getattr(tuners, name)
    for name in (
        "draft",
        "draft_k",
        "draft_lv",
        "draft_plus",
        "refl",
        "alignprop",
        "alignprop_subset",
        "drtune",
        "drakes",
        "drakes_published",
    )
}
ONLINE = {name: getattr(tuners, name) for name in ("ddpo", "dpok", "reward_weighted", "filtered")}
SETTINGS = GRADIENTS | ONLINE
SHOWN = {
    "reward": "reward, by step of tuning",
    "heldout": "held-out reward, by step of tuning",
    "kl": "path KL, by step of tuning",
}


def path_kl(run: Run, phase: str, prior: Prior, tuned: Any, count: int) -> float:
    """Return the mean path KL in nats of a tuned model's ancestral chain to the prior's, whatever eta it was tuned with."""
    law = prior.process if prior.process.stochastic else prior.with_eta(1.0)
    return draw_with_kl(run, f"{phase}_kl", samplers.ancestral(law, tuned), prior, count)[1]


def measured(
    run: Run, phase: str, prior: Prior, rewards: dict[str, Reward], denoiser: Any, process: Process, count: int
) -> dict[str, float]:
    """Return, and log, mean rewards, diversity and path KL of a denoiser's samples; of one chain where the process has a law."""
    sampler = samplers.ancestral(process, denoiser)
    if process.stochastic:
        x0, kl = draw_with_kl(run, phase, sampler, prior, count)
    else:
        x0 = np.asarray(draw(run, phase, sampler, prior, count).x0)
        kl = path_kl(run, phase, prior, denoiser, count)
    cond = prior.conditions(count)
    figures = {name: float(jnp.nanmean(_rewards(reward, x0, cond))) for name, reward in rewards.items()}
    figures |= {"diversity": metrics.diversity(x0), "path KL": kl}
    run.log.rewind(phase, 0)
    run.log.write(phase, 0, {name.replace(" ", "_").replace("-", "_"): value for name, value in figures.items()})
    return figures


_rewards = jax.jit(lambda reward, x0, cond: reward(x0, cond))


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A setting of `rgdiff.tuners`, for all weights or a LoRA adapter.

    Args:
      setting: its name, of a reward gradient or an online method; `options` are its own arguments.
      eta: of the tuned chain; null for a masked prior.
      kl_weight: of the path KL to the prior, nats; null for none.
      adapter: rank of a LoRA adapter, which is saved in PEFT's files under adapters/ (`method=adapters` samples with it), or
        null for all weights, which are saved under tuned/ (`prior.checkpoint` takes them).
      heldout: report the held-out reward while tuning.
      stopping: window, patience, metric, limited, limit of `tuners.early_stopping`, or null; it watches the held-out reward.
      scales: of the adapter at sampling time, at which reward, held-out reward, diversity and KL are shown.
      diagnose: number of batches from which the gradient's noise is estimated at the start, or 0.
      value: a network (x, t, cond) -> [B], the baseline of dpok.
      value_optimizer: for it; the same as the policy's by default.
      noise: standard deviation of what an online method is answered, in the reward's unit.
    """

    setting: str
    optimizer: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 200
    batch: int = 32
    eta: float | None = 0.0
    kl_weight: float | None = None
    remat: str = "none"
    adapter: int | None = None
    heldout: bool = False
    stopping: dict[str, Any] | None = None
    scales: Sequence[float] = ()
    diagnose: int = 0
    value: Any = None
    value_optimizer: Any = None
    noise: float | None = None
    chunk: int = 10

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        process = prior.process(shape, self.eta)
        blank: Any = nothing
        tuner = self.tuner(blank, process, Task(blank, blank), process.times(prior.steps), blank)
        if self.setting == "dpok" and getattr(self.value, "classes", 0) is None:
            unconditional(prior, "dpok's baseline without classes", "give +method.value.classes=N")
        if self.stopping is not None and self.steps < tuner.window:
            raise ValueError(f"stopping judges windows of {tuner.window} steps, more than all {self.steps}")
        if self.scales and self.adapter is None:
            raise ValueError("scales are of a LoRA adapter; give method.adapter=RANK as well")

    def suits(self, task: Task) -> None:
        """Refuse a reward that does not fit the settings, before anything is trained."""
        if self.noise is not None and (self.setting in GRADIENTS or isinstance(task.reward, HostReward)):
            raise ValueError(
                "noise is on what an online method is answered by a reward in JAX; leave method.noise=null"
            )

    def tuner(self, model: Any, process: Process, task: Task, times: Array, reference: Any, key: Any = None) -> Any:
        """Build the tuner; an online one has the reward of `task` in its program."""
        setting = SETTINGS[checks.one_of("setting", self.setting, SETTINGS)]
        needed = inspect.signature(setting).parameters.get("reference")
        if self.kl_weight is None and needed is not None and needed.default is needed.empty:
            raise ValueError(f"{self.setting} has a KL to the prior; give method.kl_weight")
        kl = {} if self.kl_weight is None else {"reference": reference, "kl_weight": self.kl_weight}
        self.suits(task)
        heldout = task.heldout if self.heldout or self.stopping is not None else None
        if self.setting in GRADIENTS:
            tuner = self.gradient(model, process, task.reward, times, heldout=heldout, **kl)
        else:
            options = {"batch": self.batch, **kl, **self.baseline(process, key), **self.options}
            online = ONLINE[self.setting](model, process, times, self.optimizer, **options)
            tuner = tuners.as_tuner(online, task.reward, heldout=heldout, noise=self.noise)
        return tuner if self.stopping is None else tuners.early_stopping(tuner, **self.stopping)

    def gradient(self, model: Any, process: Process, reward: Any, times: Array, **options: Any) -> Any:
        """Build a reward gradient under its references and weights, or whatever else `options` are."""
        setting = GRADIENTS[checks.one_of("setting", self.setting, GRADIENTS)]
        shared = {"batch": self.batch, "remat": self.remat}
        return setting(model, process, reward, times, self.optimizer, **(shared | options | self.options))

    def model(self, prior: Prior) -> Any:
        """Return what the tuned parameters are of: the prior's model, or an adapter of it."""
        return prior.model if self.adapter is None else LoRAModel(prior.params, prior.model)

    def baseline(self, process: Process, key: Any) -> dict[str, Any]:
        """Return dpok's value, its parameters and optimizer."""
        if self.setting != "dpok":
            return {}
        if self.value is None:
            raise ValueError("dpok learns a baseline; give method.value, a network such as rgdiff.nets.ValueMLP")
        params = initial(self.value, jax.random.key(0) if key is None else key, state_shape(process))
        optimizer = self.optimizer if self.value_optimizer is None else self.value_optimizer
        return {"value": LearnedModel(self.value), "value_params": params, "value_optimizer": optimizer}

    def tune(self, run: Run, phase: str, prior: Prior, task: Task) -> tuple[Any, Any, Params, Process]:
        """Return the tuner, the model, its tuned parameters and the process they were tuned on."""
        process, key = prior.with_eta(self.eta), run.key(phase)
        model = self.model(prior)
        tuner = self.tuner(model, process, task, prior.times, prior.denoiser, jax.random.fold_in(key, 2))
        labels = batch = None
        if prior.classes is not None:
            labels, batch = jnp.arange(prior.classes), self.batch // self.options.get("repeats", 1)
        params = self.start(run, phase, prior)
        params = run.fit(phase, tuner, key, params, self.steps, data=labels, batch=batch, chunk=self.chunk).best
        if self.adapter is not None:
            save_peft(run.folder.path / "adapters" / phase, params, prior.params)
        else:
            (run.folder.path / "tuned").mkdir(exist_ok=True)
            save_params(run.folder.path / "tuned" / phase, params)
        return tuner, model, params, process

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        with run.clock() as clock:
            tuner, model, params, process = self.tune(run, phase, prior, task)
            tuned = model(params)
            sampler = samplers.ancestral(process, tuned)
            out = draw(run, phase, sampler, prior, count)
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
        return Outcome(
            np.asarray(out.x0),
            sampler.network_calls(len(prior.times) - 1),
            path_kl(run, phase, prior, tuned, count),
            clock.seconds,
            clock.compile_seconds,
            tuning_network_calls=len(rows) * self.batch * tuner.network_calls(),
            curves=curves,
            figures=figures,
            temperature=self.kl_weight,
        )

    def start(self, run: Run, phase: str, prior: Prior) -> Params:
        """Return the parameters that tuning begins with."""
        if self.adapter is None:
            return prior.params
        return lora_init(jax.random.fold_in(run.key(phase), 1), prior.params, self.adapter)


@dataclasses.dataclass(frozen=True)
class MixedAdapters:
    """Two adapters tuned apart, one to the recipe's reward and one to `second`, and their weighted sums without more training.

    Args:
      tuning: a `FineTuning` with an adapter.
      second: the other task, e.g. `rgdiff.domains.image_tasks.inked`.
      weights: of the second adapter, each in [0, 1]; the first has the rest. The samples reported are those of the middle one.
    """

    tuning: FineTuning
    second: Task
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)

    @property
    def tunes(self) -> FineTuning:
        """The settings that tune to the reward."""
        return self.tuning

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        self.tuning.check(prior, shape)
        if self.tuning.adapter is None or not self.weights:
            raise ValueError(
                "mixing needs adapters and weights; give method.tuning.adapter=RANK and method.weights=[...]"
            )

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        with run.clock() as clock:
            first = self.tuning.tune(run, f"{phase}_first", prior, task)
            second = self.tuning.tune(run, f"{phase}_second", prior, self.second)
            tuner, model, process = first[0], first[1], first[3]
            mixed = [lora_sum([(first[2], 1 - w), (second[2], w)]) for w in self.weights]
            middle = model(mixed[len(mixed) // 2])
            sampler = samplers.ancestral(process, middle)
            out = draw(run, phase, sampler, prior, count)
        rewards = {"reward": task.reward, "held-out reward": task.heldout, "second reward": self.second.reward}
        rows = [
            measured(run, f"{phase}_weight_{weight}", prior, rewards, model(adapter), process, count)
            for weight, adapter in zip(self.weights, mixed, strict=True)
        ]
        curves: Curves = {
            f"{name}, by the weight of the second adapter": (list(self.weights), [row[name] for row in rows])
            for name in rows[0]
        }
        return Outcome(
            np.asarray(out.x0),
            sampler.network_calls(len(prior.times) - 1),
            path_kl(run, phase, prior, middle, count),
            clock.seconds,
            clock.compile_seconds,
            tuning_network_calls=2 * self.tuning.steps * self.tuning.batch * tuner.network_calls(),
            curves=curves,
            figures={"second_reward": rows[len(rows) // 2]["second reward"]},
        )


@dataclasses.dataclass(frozen=True)
class SavedAdapters:
    """Sample the prior with adapters that were tuned before: any weighted sum of them, without training.

    Args:
      adapters: folders in PEFT's format and the weight of each, on top of the scale that is saved with it.
    """

    adapters: Mapping[str, float] | None = None

    def check(self, prior: Any, shape: tuple[int, ...]) -> None:
        """Refuse settings that do not fit each other or the prior, before anything is trained."""
        if not self.adapters:
            raise ValueError("give method.adapters={FOLDER: WEIGHT}, e.g. {runs/digits_draft/adapters/adapter: 0.5}")
        for folder in self.adapters:
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"no adapter at {folder}; a run leaves its own under adapters/")

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        terms = []
        for folder, weight in (self.adapters or {}).items():
            adapter, scale = load_peft(folder, prior.params)
            terms.append((adapter, weight * scale))
        denoiser = LoRAModel(prior.params, prior.model)(lora_sum(terms))
        sampler = samplers.ancestral(prior.process, denoiser)
        with run.clock() as clock:
            out = draw(run, phase, sampler, prior, count)
        return Outcome(
            np.asarray(out.x0),
            sampler.network_calls(len(prior.times) - 1),
            path_kl(run, phase, prior, denoiser, count),
            clock.seconds,
            clock.compile_seconds,
        )
