"""Write golden/pipeline.npz: diffusers reads the tiny folder that rgdiff writes, makes 50 DDIM moves with guidance, and decodes.

python -m tests.pretrained.pipeline_golden      # where torch, diffusers and transformers are installed
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from tests.pretrained import tiny
from tests.pretrained.parity import GOLDEN, normal

STEPS, SCALE = 50, 7.5


def ids() -> np.ndarray:
    """Return the token ids of two prompts and of an empty one."""
    out = np.full((3, 12), 99)
    out[:, 0] = 98
    out[0, 1:6], out[1, 1:4] = [5, 17, 3, 60, 41], [80, 2, 33]
    return out


def main() -> None:
    torch.set_num_threads(1)
    folder = tiny.stable_diffusion(Path(tempfile.mkdtemp()) / "sd")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(STEPS)
    x = torch.tensor(normal(0, 2, 8, 8, 4)).permute(0, 3, 1, 2)
    states = []
    with torch.no_grad():
        embedded = text(torch.tensor(ids())).last_hidden_state
        context = torch.cat([embedded[2:].expand(2, -1, -1), embedded[:2]])
        for t in scheduler.timesteps:
            without, with_ = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(without + SCALE * (with_ - without), t, x, eta=0.0).prev_sample
            states.append(x.permute(0, 2, 3, 1).numpy().copy())
        pictures = vae.decode(x / vae.config.scaling_factor).sample.permute(0, 2, 3, 1).numpy()
        latents = vae.encode(torch.tensor(pictures).permute(0, 3, 1, 2)).latent_dist.mean * vae.config.scaling_factor
    np.savez_compressed(
        GOLDEN / "pipeline.npz",
        context=embedded.numpy(),
        early=states[9],
        last=states[-1],
        pictures=pictures,
        latents=latents.permute(0, 2, 3, 1).numpy(),
    )
    print(f"largest state {abs(states[-1]).max():.3g}, picture {abs(pictures).max():.3g}")


if __name__ == "__main__":
    main()
