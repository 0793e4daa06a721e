"""Print the numbers that tests/test_diffusers.py holds: chains of diffusers' schedulers, with a network in closed form.

Not a test, and nothing here imports rgdiff. Run it where torch and diffusers are installed:
    pip install torch==2.13.0 diffusers==0.42.1 && python tests/worlds/diffusers_golden.py
"""

import math
import pprint

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # DDPM's
START = torch.tensor([[1.3, -0.4, 0.2], [-2.1, 0.7, 3.0]], dtype=torch.float64)


def network(x, step):
    """An eps- or v-network of integer steps."""
    return torch.tanh(0.7 * x + 0.3 * math.sin(0.01 * float(step))) + 0.1 * x


def noise(index):
    """What is drawn at a move, the same for both libraries."""
    return torch.sin(3.0 * START + index)


def chain(scheduler, steps, scale=1.0, **options):
    scheduler.set_timesteps(steps)
    x = START
    for i, t in enumerate(scheduler.timesteps):
        extra = {"variance_noise": noise(i)} if options.get("eta") else {}
        x = scheduler.step(scale * network(x, t), t, x, **options, **extra).prev_sample
    return [[round(v, 7) for v in row] for row in x.tolist()]


def ddpm(steps, **options):
    """DDPM draws its own noise: ours is put in its place. Its last step draws none."""
    scheduler, count = DDPMScheduler(**LINEAR, **options), iter(range(1000))
    scheduling_ddpm.randn_tensor = lambda *args, **kwargs: noise(next(count))
    return chain(scheduler, steps)


# DDIM's and DDPM's schedulers go from t to t - T // n, which is their next step where n divides T = 1,000.
def grid(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


def main():
    ddim = lambda **o: DDIMScheduler(**SCALED, **o)  # noqa: E731
    solver = lambda **o: DPMSolverMultistepScheduler(**SCALED, **o)  # noqa: E731
    karras = solver(use_karras_sigmas=True)
    out = {
        "leading": grid(ddim(timestep_spacing="leading"), 7),
        "leading, offset 1": grid(ddim(timestep_spacing="leading", steps_offset=1), 7),
        "linspace": grid(ddim(timestep_spacing="linspace"), 7),
        "trailing": grid(ddim(timestep_spacing="trailing"), 7),
        "solver's linspace": grid(solver(timestep_spacing="linspace"), 7),
        "karras": grid(karras, 8),
        "karras sigmas": [round(v, 6) for v in karras.sigmas.tolist()[:-1]],
        "ddim": chain(ddim(clip_sample=False), 10),
        "ddim, clip_sample": chain(ddim(clip_sample=True), 10),
        "ddim, clip_sample, eta": chain(ddim(clip_sample=True), 10, eta=0.6),
        "ddim, use_clipped_model_output": chain(ddim(clip_sample=True), 10, use_clipped_model_output=True),
        "ddim, zero terminal SNR": chain(
            ddim(
                clip_sample=False,
                rescale_betas_zero_snr=True,
                prediction_type="v_prediction",
                timestep_spacing="trailing",
            ),
            5,
        ),
        "ddpm, fixed_small": ddpm(10, clip_sample=False, variance_type="fixed_small"),
        "ddpm, fixed_large": ddpm(10, clip_sample=False, variance_type="fixed_large"),
        "ddpm, fixed_large, clip_sample": ddpm(10, clip_sample=True, variance_type="fixed_large"),
        "dpm-solver++": chain(solver(timestep_spacing="trailing"), 8),
        "dpm-solver++, karras": chain(karras, 8),
    }
    assert np.all(np.isfinite([v for value in out.values() for v in np.ravel(value)]))
    pprint.pprint(out, width=110, sort_dicts=False)


if __name__ == "__main__":
    main()
