"""Released networks in Flax, read from the files that diffusers and transformers write, without either of them.

`from_diffusers` turns a folder into a prior that every method of this library runs on, and `to_diffusers` writes back what
was tuned. The networks carry the names of their state dicts (`rgdiff.pretrained.weights` has the rule).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rgdiff._lazy import submodules

if TYPE_CHECKING:
    from rgdiff.pretrained import config, layers, weights

__all__ = ["config", "layers", "weights"]
__getattr__, __dir__ = submodules(__name__, __all__)
