"""Schedules as diffusers' files state them: noise levels, grids, the prediction's kind, and where a chain ends.

A file's scheduler is read for what belongs to the network: its T noise levels and what it predicts. How a chain is made is
the reader's choice: eta = 0 is DDIM and, in other coordinates, Euler; eta = 1 is DDPM and Euler ancestral; `samplers.dpm_solver`
is DPM-Solver++(2M); an eta of 1e6 draws all noise anew (a flow's `stochastic_sampling`). Level i = 0 ... T - 1 of a file is at t = (i + 1) / T here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rgdiff import checks, processes, schedules
from rgdiff.denoisers import per_row
from rgdiff.typing import Array, Cond, Denoiser, State, callable_pytree, pytree, static

DISCRETE = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "HeunDiscreteScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler",
)  # fmt: skip
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# What a scheduler does where its file does not say.
SPACING = {"DDIMScheduler": "leading", "DDPMScheduler": "leading", "PNDMScheduler": "leading"}


def alpha_bar(config: Mapping[str, Any]) -> np.ndarray:
    """Return the cumulative products of a discrete scheduler.

    Args:
      config: its settings: beta_schedule, beta_start, beta_end, num_train_timesteps, trained_betas, rescale_betas_zero_snr.

    Returns:
      [T], float64, decreasing.

    Raises:
      ValueError: for an unknown beta_schedule.

    Example:
      >>> from rgdiff.pretrained import schedulers
      >>> config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
      >>> print(schedulers.alpha_bar(config)[[0, -1]].round(5))  # Stable Diffusion's
      [0.99915 0.00466]
    """
    levels = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = checks.one_of(
        "beta_schedule",
        config.get("beta_schedule", "linear"),
        ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    )
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif kind == "linear":
        betas = np.linspace(start, end, levels)
    elif kind == "scaled_linear":
        betas = np.linspace(math.sqrt(start), math.sqrt(end), levels) ** 2
    elif kind == "sigmoid":
        betas = start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, levels)))
    else:
        u = np.arange(levels + 1) / levels
        curve = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    table = np.cumprod(1 - betas)
    return schedules.zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Return exp(mu) for an image of `tokens` patches: mu is linear in them between the file's two sizes (Flux, SD 3.5).

    Args:
      config: the scheduler's, with base_shift, max_shift, base_image_seq_len, max_image_seq_len.
      tokens: of the image, after patching.

    Example:
      >>> from rgdiff.pretrained import schedulers
      >>> print(round(schedulers.dynamic_shift({}, 4096), 3))  # exp(1.15)
      3.158
    """
    base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(low + (high - low) * (tokens - base) / (most - base))


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What a scheduler's file says of its network.

    Args:
      schedule: the noise levels, with the file's own grid: `schedule.times(steps)`.
      prediction: of the network: eps, v, x0 or velocity.
      levels: T, by which t is multiplied for the network.
      end: the time at which chains end, where the file says that they end at the first level and not at data
        (`set_alpha_to_one: false`); None at data.
      clip: range of x0 where a step uses it, and eps stays the network's (DDIM's `clip_sample`).
      clip_x0: range to which predictions of x0 are clipped, so that eps follows (DDPM's).
    """

    schedule: Any
    prediction: str
    levels: int
    end: float | None = None
    clip: tuple[float, float] | None = None
    clip_x0: tuple[float, float] | None = None

    def process(self, shape: tuple[int, ...], eta: float = 0.0) -> processes.GaussianProcess:
        """Return the process of states [B, *shape]: eta = 0 is DDIM, and eta = 1 DDPM.

        Args:
          shape: of one example.
          eta: see `processes.gaussian`.
        """
        return processes.gaussian(self.schedule, shape, eta=eta, clip=self.clip, end=self.end)


def read_scheduler(config: Mapping[str, Any], *, tokens: int | None = None, even: bool = False) -> Scheduler:
    """Read a scheduler's settings.

    Args:
      config: of scheduler_config.json, with `_class_name`.
      tokens: patches of an image, for a flow with dynamic shifting.
      even: n calls of a flow are at 1, 1 - 1/n, ..., 1/n before the shift, as Flux's pipeline has them; without, the last is at the
        scheduler's first level, as Stable Diffusion 3's has it.

    Returns:
      The scheduler.

    Raises:
      ValueError: for a class, a prediction or a spacing that is not known, or sigmas that are not of the file's levels
        (use_karras_sigmas: take `schedules.karras_times`).

    Example:
      >>> from rgdiff.pretrained import schedulers
      >>> config = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
      >>> scheduler = schedulers.read_scheduler(config | {"set_alpha_to_one": False, "steps_offset": 1})
      >>> print(scheduler.prediction, scheduler.end, (scheduler.schedule.times(50)[:2] * 1000 - 1).round())
      eps 0.001 [981. 961.]
    """
    name = checks.one_of("the scheduler's _class_name", config.get("_class_name"), (*DISCRETE, *FLOWS))
    levels = int(config.get("num_train_timesteps", 1000))
    if name in FLOWS:
        dynamic = bool(config.get("use_dynamic_shifting"))
        if dynamic and tokens is None:
            raise ValueError("this flow's shift depends on the image's size; give tokens=, its number of patches")
        shift = dynamic_shift(config, int(tokens or 0)) if dynamic else float(config.get("shift", 1.0))
        first = 1 / levels if dynamic else schedules.shifted(1 / levels, shift)  # then shifted twice, as released
        last = None if even else first
        return Scheduler(schedules.flow(shift, last=last), "velocity", levels)
    kind = config.get("prediction_type", "epsilon")
    prediction = PREDICTIONS[checks.one_of("the scheduler's prediction_type", kind, PREDICTIONS)]
    for other in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(other):
            raise ValueError(
                f"the scheduler's {other} is a grid of its own; set it to false, and take schedules.karras_times"
            )
    spacing = config.get("timestep_spacing", SPACING.get(name, "linspace"))
    checks.one_of("the scheduler's timestep_spacing", spacing, schedules.SPACINGS)
    schedule = schedules.tabulated(alpha_bar(config), spacing=spacing, offset=int(config.get("steps_offset", 0)))
    end = None
    if name in ("DDIMScheduler", "PNDMScheduler") and not config.get("set_alpha_to_one", name == "DDIMScheduler"):
        end = 1 / levels
    size = float(config.get("clip_sample_range", 1.0))
    clips = name in ("DDIMScheduler", "DDPMScheduler") and config.get("clip_sample", True)
    clip = (-size, size) if clips else None
    kept, followed = (clip, None) if name == "DDIMScheduler" else (None, clip)
    return Scheduler(schedule, prediction, levels, end, kept, followed)


@pytree
class ScaledTime:
    """Passes a network its own unit of time: T t - 1 for discrete levels, T t for a flow. Build it with `scaled_time`."""

    network: Denoiser
    levels: int = static()
    first: int = static()

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        step = jnp.maximum(per_row(t, x) * self.levels - self.first, 0.0)
        nearest = jnp.round(step)
        return self.network(x, jnp.where(jnp.abs(step - nearest) < self.levels * 2.0**-20, nearest, step), cond)


def scaled_time(network: Denoiser, levels: int, first: int = 1) -> ScaledTime:
    """Let a network of the file's steps be called at times in [0, 1]: it gets T t - first, float32 [B].

    Args:
      network: (x, step [B], cond) -> prediction; steps are whole where t is that of a level.
      levels: T.
      first: 1 for discrete chains, whose level 0 is at t = 1/T; 0 for flows.

    Returns:
      The network, (x, t, cond) -> prediction.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.pretrained import schedulers
      >>> network = schedulers.scaled_time(lambda x, step, cond: step, 1000)
      >>> print(network(jnp.zeros((1, 1)), 0.001), network(jnp.zeros((1, 1)), 0.5))
      [0.] [499.]
    """
    return ScaledTime(callable_pytree(network, "a network"), levels, first)
