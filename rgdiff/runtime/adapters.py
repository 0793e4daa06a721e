"""LoRA adapters on disk as PEFT writes them, so that a tuned adapter loads where others sample, and theirs here.

A folder holds adapter_model.safetensors and adapter_config.json. PEFT's update is (lora_alpha / r) B A in PyTorch's
layout, ours scale * a b in Flax's; names of modules are the leaf's path unless the caller maps them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rgdiff.nets.lora import Adapter
from rgdiff.runtime.folder import write_atomic
from rgdiff.typing import Params

PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_config.json")


def module_name(path: str) -> str:
    """Return the PyTorch-like name of a leaf's module: "down_0/conv/kernel" is module "down_0.conv"."""
    return path.removesuffix("/kernel").replace("/", ".")


def save_peft(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    params: Params,
    *,
    scale: float = 1.0,
    name: Callable[[str], str] = module_name,
) -> None:
    """Write an adapter in PEFT's files: `PeftModel.from_pretrained(module, folder)` reads it.

    A kernel [in, out] is a Linear's, [k, in, out] and [k, l, in, out] are a convolution's, whose lora_A keeps the window
    and whose lora_B is 1x1, as PEFT has it.

    Args:
      adapter: from `nets.lora_init` or `nets.lora_sum`; all of one rank.
      params: what the adapter belongs to: it gives the kernels' shapes.
      scale: of the adapter; written as lora_alpha = scale * rank.
      name: leaf path -> module name on the other side.

    Raises:
      ValueError: for a path that the parameters lack, ranks that differ, names that collide.
    """
    from safetensors.numpy import save

    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    if missing := sorted(set(adapter) - set(shapes)):
        raise ValueError(f"the adapter does not belong to these parameters: they have no {missing[0]!r}")
    ranks = sorted({factors["a"].shape[-1] for factors in adapter.values()})
    if len(ranks) != 1:
        raise ValueError(f"PEFT's files hold one rank for all modules, got {ranks}")
    rank, tensors, modules = ranks[0], {}, []
    for path, factors in adapter.items():
        module, shape = name(path), shapes[path]
        if module in modules:
            raise ValueError(f"two leaves are named {module!r}; give name=, one module for each")
        modules.append(module)
        a, b = np.asarray(factors["a"], np.float32), np.asarray(factors["b"], np.float32)
        window = shape[:-2]
        down = np.moveaxis(a.reshape(*shape[:-1], rank), (-1, -2), (0, 1))
        up = b.T.reshape(shape[-1], rank, *[1] * len(window))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(down)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(up)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILES[0], save(tensors, {"format": "pt"}))
    write_atomic(folder / FILES[1], json.dumps(config, indent=2).encode())


def load_peft(
    folder: str | os.PathLike[str], params: Params, *, name: Callable[[str], str] = module_name
) -> tuple[Adapter, float]:
    """Read an adapter and its scale from PEFT's files, for parameters whose leaf `path` is module `name(path)` there.

    Raises:
      ValueError: for a missing or damaged file, a module that no leaf is named after, or shapes that do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = Path(folder)
    if absent := [file for file in FILES if not (folder / file).is_file()]:
        raise ValueError(f"{folder} holds no {absent[0]}: expected a folder written by save_peft or by PEFT")
    try:
        config = json.loads((folder / FILES[1]).read_text())
        tensors = load((folder / FILES[0]).read_bytes())
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if np.ndim(leaf) >= 2:
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            leaves[name(path)] = path, np.shape(leaf)
    adapter: Adapter = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if module not in leaves:
            raise ValueError(f"{folder}: no parameter is named after module {module!r}; give name=")
        path, shape = leaves[module]
        up = tensors.get(key.replace("lora_A", "lora_B"))
        a = np.moveaxis(down, (0, 1), (-1, -2))
        if up is None or a.shape[:-1] != shape[:-1] or up.shape[:2] != (shape[-1], down.shape[0]):
            raise ValueError(
                f"{folder}: {module!r} has lora_A {list(down.shape)}, which does not fit a kernel {list(shape)}"
            )
        adapter[path] = {
            "a": jax.numpy.asarray(a.reshape(-1, down.shape[0])),
            "b": jax.numpy.asarray(up.reshape(shape[-1], -1).T),
        }
    if not adapter:
        raise ValueError(f"{folder} holds no lora_A weights")
    return adapter, float(config["lora_alpha"]) / float(config["r"])
