"""DxMI and DxDP in recipes: few-step samplers made of a prior or from scratch, trained with an energy or to a reward.

The mathematics is in `rgdiff.policies` and `rgdiff.tuners`; here samplers get their start, phases, figures and pictures. These
methods learn from the data of a Gaussian prior.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, denoisers, metrics, policies, samplers, tuners
from rgdiff.domains.planar.judge import MARGIN, field
from rgdiff.recipes.outcome import nothing, outcome
from rgdiff.recipes.priors import FRESH, initial, needs_data
from rgdiff.recipes.typing import Curves, Method, Outcome, Prior, ReadyPrior, Shape
from rgdiff.recipes.values import LearnedModel
from rgdiff.rewards import Task, differentiable
from rgdiff.runtime.run import Run
from rgdiff.typing import Array, Cond, Params, callable_pytree, pytree

SETTINGS = {name: getattr(tuners, name) for name in ("dxmi", "dxmi_released", "gcd", "dxdp")}
LEVELS = {
    "prior": policies.levels,
    "variances": policies.variances,
    "fast_dpm": policies.fast_dpm,
    "karras": policies.karras,
}
STARTS = ("scratch", "denoiser", "prior")
BOXES = 400  # of a quadrature, a side


@dataclasses.dataclass(frozen=True)
class FewSteps(Method):
    """A sampler of T Gaussian steps as it begins, untuned: the quality of a prior in T steps.

    Args:
      steps: T.
      levels: `prior` (its own grid), `variances`, `fast_dpm` or `karras`.
      settings: arguments of the levels' constructor but T; for `variances` the number of standard deviations is T.
      start: `prior`: the prior's own network; `denoiser`: `network`, trained as a DDPM at these T levels; `scratch`: `network`,
        untrained.
      network: of the latter two, which make mean = x + network.
      pretraining: steps, batch, and learning_rate of `denoiser`.
      reach: bounds of sigma_t, see `policies.policy`.
    """

    steps: int = 5
    levels: str = "variances"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str = "denoiser"
    network: Any = None
    pretraining: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"steps": 3000, "batch": 512, "learning_rate": 1e-3}
    )
    reach: float = 4.0

    def check(self, prior: Prior, shape: Shape) -> None:
        needs_data(prior)
        if checks.one_of("start", self.start, STARTS) != "prior" and self.network is None:
            raise ValueError(f"start={self.start} needs method.network, e.g. rgdiff.nets.MLP")
        self.process(prior, shape)

    def process(self, prior: Prior, shape: Shape) -> policies.FewStep:
        """Build the process of T steps."""
        own: Any = prior.process(shape)
        build = LEVELS[checks.one_of("levels", self.levels, LEVELS)]
        if self.levels == "variances":
            made = build(**self.settings)
            if made.steps != self.steps:
                raise ValueError(f"levels=variances has {made.steps} standard deviations for {self.steps} steps")
        elif self.levels == "prior":
            made = build(own.schedule, self.steps, **self.settings)
        else:
            known = own.schedule if self.start == "prior" else None
            made = build(self.steps, known, **self.settings)
        return policies.few_step(made, shape)

    def policy(self, run: Run, phase: str, prior: ReadyPrior) -> tuple[policies.Policy, Params]:
        """Build the policy and its first parameters; train them as a denoiser where asked."""
        process = self.process(prior.settings, prior.shape)
        if self.start == "prior":
            policy = policies.policy(process, prior.model, form="denoiser", reach=self.reach)
            return policy, policy.init(prior.params)
        policy = policies.policy(process, denoisers.LinenModel(self.network), reach=self.reach)
        params = initial(self.network, run.key(f"{phase}_start"), prior.shape)
        if self.start == "denoiser":
            options = dict(self.pretraining)
            steps, batch, rate = options["steps"], options["batch"], options["learning_rate"]
            optimizer = tuners.adamw(rate, warmup=min(100, steps // 10), decay_steps=steps)
            tuner = tuners.pretraining(policy.denoising, process.denoising, optimizer, grid=self.steps)
            data, name = {"x0": jnp.asarray(prior.data)}, f"{phase}_start"
            params = run.fit(name, tuner, run.key(name), params, steps, data=data, batch=batch, chunk=500).best
        return policy, policy.init(params)

    def draw(
        self, run: Run, phase: str, policy: policies.Policy, params: Params, count: int, guide: Any = None
    ) -> np.ndarray:
        """Draw samples in T calls of the network."""
        sampler = samplers.ancestral(policy.process, policy(params), guide=guide)  # type: ignore[arg-type]
        return np.asarray(samplers.sample(sampler, run.key(phase), count, policy.process.times()).x0)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        with run.clock() as clock:
            policy, params = self.policy(run, phase, prior)
            x0 = self.draw(run, phase, policy, params, count)
        return outcome(x0, self.steps, clock)


@dataclasses.dataclass(frozen=True)
class FewStepTraining(FewSteps):
    """DxMI, DxDP and their kin.

    Args:
      steps, levels, settings, start, network, pretraining, reach: as in `FewSteps`.
      setting: `dxmi`, `dxmi_released`, `gcd`, or `dxdp`, which is tuned to the recipe's reward and sees no data.
      value: a network (x, t, cond) -> [B], the cost to go, and the energy at t = 0.
      options: of the setting, see `rgdiff.tuners`; decay_steps is `iterations` unless given.
      iterations: of training.
      batch: chains, and rows of data, an iteration.
      noise_box: the energy's AUC is of fresh data against uniform noise on [-noise_box, noise_box]^D.
      guidance: tilt every step of sampling by the cost to go, as a multiple of 1 / temperature; 0 for none.
      chunk: iterations between two checkpoints.
    """

    setting: str = "dxmi"
    value: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    iterations: int = 4000
    batch: int = 256
    noise_box: float = 4.0
    guidance: float = 0.0
    chunk: int = 200

    def check(self, prior: Prior, shape: Shape) -> None:
        super().check(prior, shape)
        if self.value is None:
            raise ValueError("give method.value, a network such as rgdiff.nets.ValueMLP")
        process = self.process(prior, shape)
        tuner = self.tuner(policies.policy(process, nothing), process, Task(nothing, nothing))
        if self.guidance and (self.setting == "gcd" or not float(tuner.temperature)):
            raise ValueError(
                "guidance goes by values that gcd does not learn, in units of the temperature: give setting=dxmi and options.temperature > 0, or guidance=0"
            )

    def suits(self, task: Task) -> None:
        if self.setting == "dxdp":
            differentiable("dxdp", task.reward)

    def tuner(self, policy: Any, process: policies.FewStep, task: Task) -> Any:
        """Build the tuner."""
        setting = SETTINGS[checks.one_of("setting", self.setting, SETTINGS)]
        options = {"batch": self.batch, "decay_steps": self.iterations, **self.options}
        if self.setting == "dxmi_released":
            options["dim"] = math.prod(process.shape)
        value = LearnedModel(self.value)
        if self.setting == "dxdp":
            return setting(policy, process, task.reward, value, **options)
        return setting(policy, process, value, **options)

    def learn(self, run: Run, phase: str, prior: ReadyPrior, task: Task) -> tuple[Any, Any, Any]:
        """Train; return the policy, the tuner and its last state."""
        policy, params = self.policy(run, phase, prior)
        tuner, key = self.tuner(policy, policy.process, task), run.key(phase)
        start = {"policy": params, "value": initial(self.value, jax.random.fold_in(key, 1), prior.shape)}
        data = {} if self.setting == "dxdp" else {"data": {"x0": jnp.asarray(prior.data)}, "batch": self.batch}
        return policy, tuner, run.fit(phase, tuner, key, start, self.iterations, chunk=self.chunk, **data)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        with run.clock() as clock:
            policy, tuner, state = self.learn(run, phase, prior, task)
            best = state.best
            guide = None
            if self.guidance:
                guide = policies.value_guidance(tuner.togo(best), self.guidance / float(tuner.temperature))
            x0 = self.draw(run, phase, policy, best["policy"], count, guide)
        togo, times = tuner.togo(best), np.asarray(policy.process.times())
        energy = jax.jit(lambda x: togo(x, jnp.float32(0)))
        curves: Curves = {
            "sigma_t by move, after training": (range(self.steps), np.asarray(policy.sigma(best["policy"])).tolist()),
            "s_t by move, after training": (range(self.steps), np.sqrt(np.asarray(state.extra.speed)).tolist()),
            **training_curves(run, phase),
        }
        figures = {"skipped": float(state.skipped)}
        if self.setting != "dxdp":
            figures["energy_auc"] = energy_auc(run, energy, prior.fresh, self.noise_box)
        pictures = {}
        if prior.shape == (2,):
            learnt = times[-1:] if self.setting == "gcd" else times[::-1]
            if self.setting != "dxdp" and float(getattr(tuner, "temperature", 0.0)) > 0:
                figures |= density_figures(
                    run, phase, lambda x: energy(x) / tuner.temperature, prior.fresh, self.noise_box
                )
            half = MARGIN * self.noise_box
            maps = [(t, field(jax.jit(lambda x, t=t: togo(x, jnp.float32(t))), half=half)) for t in learnt]
            pictures = {f"{phase}: V at t = {t:.3g}": picture[None] for t, picture in maps}
        return outcome(
            x0,
            self.steps,
            clock,
            tuning_network_calls=self.iterations * self.batch * tuner.network_calls(),
            curves=curves,
            figures=figures,
            energy=energy,
            pictures=pictures,
        )


def training_curves(run: Run, phase: str) -> Curves:
    """Return means of 20 stretches of training: energies of data and samples, the running cost, where they are reported.

    Args:
      run: with the log.
      phase: of the training.
    """
    rows = [row for row in run.log.rows if row["phase"] == phase]
    titles = {
        "energy_data": "energy of data while training",
        "energy_samples": "energy of samples while training",
        "running_cost": "quadratic cost of a step per dimension (1/2 at rest)",
        "reward": "reward while training",
    }
    curves: Curves = {}
    for name, title in titles.items():
        if rows and name in rows[0]:
            parts = np.array_split(np.array([row[name] for row in rows], float), min(20, len(rows)))
            ends = np.cumsum([len(part) for part in parts]).tolist()
            curves[title] = (ends, [float(np.mean(part)) for part in parts])
    return curves


def energy_auc(run: Run, energy: Callable[[Array], Array], data: Array, box: float) -> float:
    """Return the AUC of an energy, data against uniform noise on [-box, box]^D; NaN where an energy is.

    Args:
      run: for the key of the noise.
      energy: x [N, D] -> [N].
      data: [N, D].
      box: half-width, data units.
    """
    data = data[:FRESH]
    noise = jax.random.uniform(run.key("noise"), data.shape, minval=-box, maxval=box)
    high, low = np.asarray(energy(noise)), np.asarray(energy(data))
    return metrics.auroc(high, low) if np.isfinite(high).all() and np.isfinite(low).all() else float("nan")


@pytree
class Boxed:
    """An energy on [-box, box]^D, infinite outside, where the network was not trained.

    Args:
      energy: x [B, D] -> [B].
      box: half-width, data units.
    """

    energy: Any
    box: Array

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        inside = (jnp.abs(x0) <= self.box).reshape(x0.shape[0], -1).all(-1)
        return jnp.where(inside, self.energy(x0), jnp.inf)


def density_figures(
    run: Run, phase: str, energy: Callable[[Array], Array], data: Array, box: float
) -> dict[str, float]:
    """Return figures of an energy in nats on the plane as a density on [-box, box]^2.

    They are its log Z by `tuners.log_partition` and by quadrature, and the mean log-likelihood of data under it, nats.

    Args:
      run: for the key.
      phase: of the training.
      energy: x [N, 2] -> [N], nats.
      data: [N, 2].
      box: half-width, data units.
    """
    boxed = Boxed(callable_pytree(energy, "an energy"), jnp.float32(box))
    estimate = tuners.log_partition(
        run.key(f"{phase}_log_z"), boxed, (2,), scale=box / 2, detail=min(0.3, box / 2), particles=4096, twist=None
    )
    side = (np.arange(BOXES) + 0.5) / BOXES * 2 * box - box
    grid = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), jnp.float32)
    log_z = float(jax.nn.logsumexp(-energy(grid)) + 2 * np.log(2 * box / BOXES))
    points = np.asarray(data)
    inside = jnp.asarray(points[(np.abs(points) <= box).all(-1)])
    return {
        "energy_log_z": float(estimate.log_z),
        "energy_log_z_quadrature": log_z,
        "energy_log_likelihood": float(jnp.mean(-energy(inside))) - log_z,
    }
