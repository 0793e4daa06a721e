"""LoRA adapters on disk as PEFT writes them, so that a tuned adapter loads where others sample, and theirs here.

A folder holds adapter_model.safetensors and adapter_config.json. PEFT's update is (lora_alpha / r) B A in PyTorch's
layout, with sqrt(r) for r where use_rslora is true, and alpha and r of a module's own where a pattern names it; ours is
scale * a b in Flax's. Names of modules are the leaf's path unless the caller maps them. Whatever else a configuration
asks for that changes the function (biases, whole modules, DoRA, ...) is refused by its name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rgdiff.nets.lora import Adapter
from rgdiff.runtime.folder import write_atomic
from rgdiff.typing import Params

PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_config.json")
FACTORS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
SCALING = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
HARMLESS = {  # of training, of a module's choice (the tensors say it), or of the file's history; fan_in_fan_out: of PyTorch's layout
    "lora_dropout", "inference_mode", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "megatron_core", "runtime_config",
}  # fmt: skip
INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")  # those that leave the base's weights as they are


def module_name(path: str) -> str:
    """Return the PyTorch-like name of a leaf's module.

    A table "table/embedding" is module "table"; the "/value" of an NNX state's leaf is not part of the name.

    Args:
      path: of a leaf, its keys joined by "/".

    Example:
      >>> from rgdiff.runtime.adapters import module_name
      >>> print(module_name("down_0/conv/kernel"))
      down_0.conv
    """
    return re.sub("/(kernel|embedding)$", "", path.removesuffix("/value")).replace("/", ".")


def _is_table(path: str) -> bool:
    return path.removesuffix("/value").endswith("embedding")


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
    and whose lora_B is 1x1, as PEFT has it. A leaf named `embedding` [N, D] is an Embedding's table.

    Args:
      folder: where the two files are written; it is made if it does not exist.
      adapter: from `nets.lora_init` or `nets.lora_sum`. Ranks that differ are written as rank_pattern and alpha_pattern.
      params: the parameters that the adapter belongs to, which give the kernels' shapes.
      scale: of the adapter; written as lora_alpha = scale * rank.
      name: leaf path -> module name on the other side.

    Raises:
      ValueError: for a path that the parameters lack, or names that collide.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> from rgdiff import nets
      >>> from rgdiff.runtime.adapters import load_peft, save_peft
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> adapter, folder = nets.lora_init(jax.random.key(0), params, 2), tempfile.mkdtemp()
      >>> save_peft(folder, adapter, params, scale=0.5)
      >>> print(load_peft(folder, params)[1])
      0.5
    """
    from safetensors.numpy import save

    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    if missing := sorted(set(adapter) - set(shapes)):
        raise ValueError(f"the adapter does not belong to these parameters: they have no {missing[0]!r}")
    ranks: dict[str, int] = {}
    tensors: dict[str, np.ndarray] = {}
    for path, factors in adapter.items():
        module, shape = name(path), shapes[path]
        if module in ranks:
            raise ValueError(f"two leaves are named {module!r}; give name=, one module for each")
        a, b = np.asarray(factors["a"], np.float32), np.asarray(factors["b"], np.float32)
        rank = ranks[module] = a.shape[-1]
        if _is_table(path):
            down, up, keys = a.T, b.T, ("lora_embedding_A", "lora_embedding_B")
        else:
            down = np.moveaxis(a.reshape(*shape[:-1], rank), (-1, -2), (0, 1))
            up = b.T.reshape(shape[-1], rank, *[1] * len(shape[:-2]))
            keys = ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{module}.{key}": np.ascontiguousarray(t) for key, t in zip(keys, (down, up), strict=True)}
    rank = next(iter(ranks.values()), 1)
    others = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": others,
        "alpha_pattern": {module: scale * own for module, own in others.items()},
        "target_modules": list(ranks),
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

    Args:
      folder: with adapter_model.safetensors and adapter_config.json.
      params: the parameters that the adapter is for, which give the kernels' shapes.
      name: leaf path -> module name on the other side.

    Returns:
      The adapter, float32, and the scale of the configuration (lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora), for
      `nets.LoRAModel(params, model, scale)`; a module with an alpha or a rank of its own has the ratio of its scale to that one
      in its factor b.

    Raises:
      ValueError: for a missing or damaged file, a module that no leaf is named after, shapes that do not fit, or a
        configuration or tensors that ask for more than low-rank factors.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> from rgdiff import nets
      >>> from rgdiff.runtime.adapters import load_peft, save_peft
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> adapter, folder = nets.lora_init(jax.random.key(0), params, 2), tempfile.mkdtemp()
      >>> save_peft(folder, adapter, params, scale=0.5)
      >>> loaded, scale = load_peft(folder, params)
      >>> print(loaded["dense/kernel"]["a"].shape, loaded["dense/kernel"]["b"].shape, scale)
      (4, 2) (2, 3) 0.5
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = Path(folder)
    if absent := [file for file in FILES if not (folder / file).is_file()]:
        raise ValueError(f"{folder} holds no {absent[0]}: expected a folder written by save_peft or by PEFT")
    try:
        config = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        tensors = load((folder / FILES[0]).read_bytes())
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    _check(config, folder)
    leaves: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if np.ndim(leaf) >= 2:
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            leaves.setdefault(name(path), []).append((path, np.shape(leaf)))
    scale = _scale(config, None)[0]
    adapter: Adapter = {}
    used = set()
    for key, down in sorted(tensors.items()):
        kind = next((kind for kind in FACTORS if key.endswith("." + kind)), None)
        if kind is None:
            continue
        module, partner = key.removeprefix(PREFIX).removesuffix("." + kind), key.removesuffix(kind) + FACTORS[kind]
        named = leaves.get(module, [])
        if len(named) != 1:
            what = "no parameter is" if not named else "two parameters are"
            raise ValueError(f"{folder}: {what} named after module {module!r}; give name=")
        (path, shape), up = named[0], tensors.get(partner)
        a = down.T if kind == "lora_embedding_A" else np.moveaxis(down, (0, 1), (-1, -2))
        own, rank = _scale(config, module)
        if up is None or a.shape[:-1] != shape[:-1] or up.shape[:2] != (shape[-1], rank) or down.shape[0] != rank:
            raise ValueError(
                f"{folder}: {module!r} has {kind} {list(down.shape)}, which does not fit a kernel {list(shape)} and rank {rank}"
            )
        used |= {key, partner}
        adapter[path] = {
            "a": jax.numpy.asarray(a.reshape(-1, rank), np.float32),
            "b": jax.numpy.asarray(up.reshape(shape[-1], -1).T, np.float32) * (own / scale),
        }
    if more := sorted(set(tensors) - used):
        raise ValueError(
            f"{folder}: {more[0].removeprefix(PREFIX)!r} is no low-rank factor; an adapter here holds nothing else"
        )
    if not adapter:
        raise ValueError(f"{folder} holds no lora_A weights")
    return adapter, scale


def _check(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a configuration that asks for more than low-rank factors, by the name of the field that does."""
    if absent := [field for field in ("r", "lora_alpha") if not config.get(field)]:
        raise ValueError(
            f"{folder}: {FILES[1]} has no {absent[0]} above 0; expected the configuration of a LoRA adapter"
        )
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{folder}: peft_type is {config['peft_type']!r}, expected 'LORA'")
    if config.get("init_lora_weights", True) not in INITS:
        raise ValueError(
            f"{folder}: init_lora_weights={config['init_lora_weights']!r} changed the base's weights too; save it in PEFT "
            "with path_initial_model_for_weight_conversion=, which makes it an ordinary adapter"
        )
    for field, value in config.items():
        if field not in SCALING | HARMLESS and value not in (None, False, "none") and value != {} and value != []:
            raise ValueError(
                f"{folder}: {field}={value!r} is not applied here, where an adapter is low-rank factors alone; merge it in PEFT"
            )


def _scale(config: Mapping[str, Any], module: str | None) -> tuple[float, int]:
    """Return the scale and the rank of a module, by the first pattern that names it, as PEFT has it; of none: the defaults."""

    def of(pattern: str, default: Any) -> Any:
        named = {} if module is None else config.get(pattern) or {}
        return next((value for key, value in named.items() if re.match(rf"(.*\.)?({key})$", str(module))), default)

    rank, alpha = int(of("rank_pattern", config["r"])), float(of("alpha_pattern", config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank
