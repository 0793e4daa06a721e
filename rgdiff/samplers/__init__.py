"""Sampling methods, one a page, driven by one loop: `sample(sampler, key, batch, times)`."""

from rgdiff.samplers._loop import Samples, roll, sample
from rgdiff.samplers.ancestral import ancestral, path_kl
from rgdiff.samplers.svdd import svdd

__all__ = ["Samples", "ancestral", "path_kl", "roll", "sample", "svdd"]
