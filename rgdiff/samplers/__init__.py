"""Sampling methods, one a page, driven by one loop: `sample(sampler, key, batch, times)`."""

from rgdiff.samplers._ancestral import ancestral, path_kl, projection_kl, total_path_kl
from rgdiff.samplers._best_of_n import best_of_n
from rgdiff.samplers._dpm_solver import dpm_solver
from rgdiff.samplers._event_driven import event_driven
from rgdiff.samplers._loop import Samples, drawing, roll, sample
from rgdiff.samplers._resampled import resampled
from rgdiff.samplers._svdd import svdd
from rgdiff.samplers.divergence import divergent
from rgdiff.samplers.particles import das, das_tempering, fk_steering, smc, tds

__all__ = [
    "Samples",
    "ancestral",
    "best_of_n",
    "das",
    "das_tempering",
    "divergent",
    "dpm_solver",
    "drawing",
    "event_driven",
    "fk_steering",
    "path_kl",
    "projection_kl",
    "resampled",
    "roll",
    "sample",
    "smc",
    "svdd",
    "tds",
    "total_path_kl",
]
