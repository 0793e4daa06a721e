"""Print the numbers that test_schedulers.py holds: chains of diffusers' schedulers, read from their settings.

Not a test, and nothing here imports rgdiff. Run it where torch and diffusers are installed:
    pip install torch==2.13.0 diffusers==0.42.1 && python tests/pretrained/schedulers_golden.py
"""

import sys

import diffusers
import numpy as np
import torch

START = torch.tensor([[1.3, -0.4, 0.2], [-2.1, 0.7, 3.0]])
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STABLE = {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
ZERO = {**SD, "clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {**SD, "timestep_spacing": "trailing"}
CASES = {  # DDIM's scheduler goes from t to t - T // n, which is its next step where n divides T = 1,000, or is the last one
    "ddim of SD 1": ("DDIMScheduler", STABLE, 7),
    "ddim, zero terminal SNR, v": ("DDIMScheduler", {**ZERO, "timestep_spacing": "trailing"}, 5),
    "euler, leading": ("EulerDiscreteScheduler", LEADING, 7),
    "euler, linspace": ("EulerDiscreteScheduler", SD, 7),
    "euler, trailing, v": ("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "v_prediction"}, 7),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", LEADING, 7),
    "ddpm": ("DDPMScheduler", {"beta_schedule": "linear", "clip_sample": True, "variance_type": "fixed_large"}, 7),
    "dpm-solver++": ("DPMSolverMultistepScheduler", TRAILING, 20),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 7),
    "flow, stochastic": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}, 7),
    "flow, dynamic shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}, 7),
}


def network(x, step):
    return torch.tanh(0.7 * x + 0.3 * torch.sin(torch.tensor(0.01 * float(step)))) + 0.1 * x


def chain(name, settings, steps):
    kind = getattr(diffusers, name)
    scheduler = kind(**settings)
    if settings.get("use_dynamic_shifting"):
        c, tokens = scheduler.config, 1024
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        mu = c.base_shift + slope * (tokens - c.base_image_seq_len)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps)
    x = START * (scheduler.init_noise_sigma if "Euler" in name and "Flow" not in name else 1.0)
    for i, t in enumerate(scheduler.timesteps):
        noise = torch.sin(3 * START + i)  # in place of what a scheduler draws
        sys.modules[kind.__module__].randn_tensor = lambda *args, noise=noise, **kwargs: noise
        torch.randn_like = lambda *args, noise=noise, **kwargs: noise
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(seen, t), t, x).prev_sample
    return [round(float(t), 4) for t in scheduler.timesteps], [[round(float(v), 7) for v in row] for row in x]


if __name__ == "__main__":
    for title, case in CASES.items():
        print(title, *chain(*case))
