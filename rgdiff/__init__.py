"""rgdiff: reward-guided diffusion in JAX. Pure functions over any denoiser: steer its samples by a reward, or fine-tune it.

`typing` is the vocabulary; `kernels`, `schedules`, `processes`, `graphs`, `correctors`, `denoisers`, `oracles`,
`rewards` and `values` are the words;
`samplers` and `tuners` hold the methods, `guides`, `policies`, `surrogates` and `seiko` what some of them need; `nets`,
`domains` and `exact` are reference parts; `recipes`, `runtime` and `cli` are the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rgdiff._lazy import submodules

if TYPE_CHECKING:
    from rgdiff import (
        correctors,
        denoisers,
        domains,
        exact,
        graphs,
        guides,
        kernels,
        metrics,
        nets,
        oracles,
        policies,
        pretrained,
        processes,
        recipes,
        resampling,
        rewards,
        runtime,
        samplers,
        schedules,
        seiko,
        surrogates,
        tuners,
        typing,
        values,
    )
    from rgdiff.recipes.loaded import load
    from rgdiff.samplers import sample
    from rgdiff.tuners import fit, fit_online

__version__ = "0.1.0"

__all__ = [
    "correctors",
    "denoisers",
    "domains",
    "exact",
    "fit",
    "fit_online",
    "graphs",
    "guides",
    "kernels",
    "load",
    "metrics",
    "nets",
    "oracles",
    "policies",
    "pretrained",
    "processes",
    "recipes",
    "resampling",
    "rewards",
    "runtime",
    "sample",
    "samplers",
    "schedules",
    "seiko",
    "surrogates",
    "tuners",
    "typing",
    "values",
]
_FUNCTIONS = {"sample": "samplers", "fit": "tuners", "fit_online": "tuners", "load": "recipes.loaded"}
__getattr__, __dir__ = submodules(__name__, [name for name in __all__ if name not in _FUNCTIONS], _FUNCTIONS)
