"""Guides: on the kernel (`gradient_guide`; kernel -> kernel), and on the prediction (all others; denoiser -> denoiser)."""

from rgdiff.guides.gradient import g, g_loss, increment, level
from rgdiff.guides.inverse import dps, dps_stable_scale, dps_step, likelihood, pigdm, tmpd
from rgdiff.guides.measurements import Measurement, inpainting, linear
from rgdiff.guides.score import classifier_guidance, guided, lgd_mc, reward_guidance
from rgdiff.guides.tilt import chain, gradient_guide

__all__ = [
    "Measurement",
    "chain",
    "classifier_guidance",
    "dps",
    "dps_stable_scale",
    "dps_step",
    "g",
    "g_loss",
    "gradient_guide",
    "guided",
    "increment",
    "inpainting",
    "level",
    "lgd_mc",
    "likelihood",
    "linear",
    "pigdm",
    "reward_guidance",
    "tmpd",
]
