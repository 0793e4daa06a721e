"""rgdiff: reward-guided diffusion in JAX. Pure functions over any denoiser: steer its samples by a reward, or fine-tune it.

`rgdiff.typing` is the vocabulary; `kernels`, `schedules`, `processes`, `denoisers`, `rewards` and `values` are the
words; `samplers` and `tuners` the methods; `nets` and `domains` reference parts; `runtime` and `cli` the command line.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "denoisers",
    "domains",
    "guides",
    "kernels",
    "metrics",
    "nets",
    "policies",
    "processes",
    "resampling",
    "rewards",
    "runtime",
    "samplers",
    "schedules",
    "seiko",
    "surrogates",
    "tuners",
    "typing",
    "values",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"rgdiff.{name}")
    if name == "load":  # a run's folder, back in Python
        return importlib.import_module("rgdiff.runtime.loaded").load
    raise AttributeError(f"module 'rgdiff' has no attribute {name!r}; it has {', '.join(_MODULES)}")
