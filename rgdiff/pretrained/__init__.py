"""Released networks in Flax, read from the files that diffusers and transformers write, without either of them.

`from_diffusers` turns a folder into a prior that every method of this library runs on, and `to_diffusers` writes back what
was tuned. The networks carry the names of their state dicts (`rgdiff.pretrained.weights` has the rule).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rgdiff._lazy import submodules

if TYPE_CHECKING:
    from rgdiff.pretrained import (
        autoencoder,
        clip,
        config,
        dit,
        flux,
        folders,
        gdss,
        layers,
        mood,
        pipelines,
        preprocess,
        rewards,
        schedulers,
        sd3,
        t5,
        text,
        transformer,
        unet,
        weights,
    )
    from rgdiff.pretrained.folders import from_diffusers, to_diffusers

__all__ = [
    "autoencoder",
    "clip",
    "config",
    "dit",
    "flux",
    "folders",
    "from_diffusers",
    "gdss",
    "layers",
    "mood",
    "pipelines",
    "preprocess",
    "rewards",
    "schedulers",
    "sd3",
    "t5",
    "text",
    "to_diffusers",
    "transformer",
    "unet",
    "weights",
]
_FUNCTIONS = {"from_diffusers": "folders", "to_diffusers": "folders"}
__getattr__, __dir__ = submodules(__name__, [name for name in __all__ if name not in _FUNCTIONS], _FUNCTIONS)
