"""Reference networks, adapters and parameter averages, loaded on first use so that Flax comes late.

It re-exports the public names of the modules below. It assumes Flax for the networks only: adapters and
averages work on any pytree. The convolution function itself is `rgdiff.nets.conv.conv`, not re-exported
because its module has its name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgdiff.nets.conv import Conv
    from rgdiff.nets.conv1d import ConvNet1D
    from rgdiff.nets.graph import GraphNet
    from rgdiff.nets.lora import LoRAModel, lora_init, lora_merge, lora_sum
    from rgdiff.nets.mlp import MLP, ValueMLP
    from rgdiff.nets.resnet import ValueResNet
    from rgdiff.nets.time import Conditioning, time_features
    from rgdiff.nets.transformer import DiT, Transformer
    from rgdiff.nets.unet import UNet

__all__ = [
    "MLP",
    "Conditioning",
    "Conv",
    "ConvNet1D",
    "DiT",
    "GraphNet",
    "LoRAModel",
    "Transformer",
    "UNet",
    "ValueMLP",
    "ValueResNet",
    "lora_init",
    "lora_merge",
    "lora_sum",
    "time_features",
]

_MODULES = {
    "conv": ("Conv",),
    "conv1d": ("ConvNet1D",),
    "graph": ("GraphNet",),
    "lora": ("LoRAModel", "lora_init", "lora_merge", "lora_sum"),
    "mlp": ("MLP", "ValueMLP"),
    "resnet": ("ValueResNet",),
    "time": ("Conditioning", "time_features"),
    "transformer": ("DiT", "Transformer"),
    "unet": ("UNet",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
