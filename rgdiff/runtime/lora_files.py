"""Adapters to tensors and back, whatever the file that holds them: one reader, one writer, and PEFT's configuration."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rgdiff.nets.lora import Adapter
from rgdiff.runtime import lora_keys
from rgdiff.runtime.folder import write_atomic
from rgdiff.typing import Params

SCALING = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
HARMLESS = {  # of training, of a module's choice (the tensors say it), or of the file's history; fan_in_fan_out: of PyTorch's layout
    "lora_dropout", "inference_mode", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "megatron_core", "runtime_config",
}  # fmt: skip
INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")  # those that leave the base's weights as they are


def read_file(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors and the metadata of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from None


def write_file(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, whole or not at all."""
    from safetensors.numpy import save

    write_atomic(file, save(dict(tensors), {"format": "pt", **metadata}))


def read_json(text: str | bytes, source: Path) -> dict[str, Any]:
    """Return a configuration; `source` is what it is of, for messages."""
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{source} is damaged: the configuration is no mapping")
    return config


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def modules_of(params: Params, name: Callable[[str], str]) -> dict[str, list[str]]:
    """Return the leaves that an adapter may have, by the names of their modules."""
    modules: dict[str, list[str]] = {}
    for path, shape in _shapes(params).items():
        if len(shape) >= 2:
            modules.setdefault(name(path), []).append(path)
    return modules


def to_tensors(
    adapter: Adapter, params: Params, name: Callable[[str], str]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return an adapter's tensors in PyTorch's layout by PEFT's keys, and its modules' ranks."""
    shapes = _shapes(params)
    if missing := sorted(path for path in adapter if len(shapes.get(path, ())) < 2):
        raise ValueError(f"the adapter does not belong to these parameters: they have no {missing[0]!r}")
    ranks: dict[str, int] = {}
    tensors: dict[str, np.ndarray] = {}
    for path, factors in adapter.items():
        module, (*window, into, out) = name(path), shapes[path]
        if module in ranks:
            raise ValueError(f"two leaves are named {module!r}; give name=, one module for each")
        a, b = np.asarray(factors["a"], np.float32), np.asarray(factors["b"], np.float32)
        rank = ranks[module] = a.shape[-1]
        down = np.moveaxis(a.reshape(*window, into, rank), (-1, -2), (0, 1))
        up = b.T.reshape(out, rank, *[1] * len(window))
        table = path.removesuffix("/value").endswith("embedding")
        keys = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{module}.{key}": np.ascontiguousarray(t) for key, t in zip(keys, (down, up), strict=True)}
    return tensors, ranks


def to_config(ranks: Mapping[str, int], scale: float) -> dict[str, Any]:
    """Return PEFT's configuration of modules that have one scale, and ranks of their own."""
    rank = next(iter(ranks.values()), 1)
    others = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
    return {
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


def to_adapter(
    source: Path,
    tensors: Mapping[str, np.ndarray],
    params: Params,
    modules: Mapping[str, list[str]],
    config: Mapping[str, Any] | None,
) -> tuple[Adapter, float]:
    """Turn tensors in PyTorch's layout into an adapter and its scale.

    Args:
      source: what the tensors are of, for messages.
      tensors: by keys without the part of the pipeline.
      params: the parameters that the adapter is for.
      modules: the parameters' leaves by their modules' names in the keys.
      config: PEFT's configuration, or None where the scales are those of `alpha` tensors, or 1.
    """
    if config is not None:
        _check(config, source)
    held: dict[str, dict[str, str]] = {}
    for key in sorted(tensors):
        try:
            module, role = lora_keys.split_role(key)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if role in held.setdefault(module, {}):
            raise ValueError(f"{source}: {held[module][role]!r} and {key!r} are the same factor; expected one of them")
        held[module][role] = key
    if not held:
        raise ValueError(f"{source} holds no low-rank factors for these parameters")
    shapes, found = _shapes(params), {}
    for module, keys in held.items():
        named = modules.get(module, [])
        if len(named) != 1:
            what = "no parameter is" if not named else "two parameters are"
            raise ValueError(f"{source}: {what} named after module {module!r}; give name=")
        if absent := [role for role in ("down", "up") if role not in keys]:
            raise ValueError(f"{source}: {next(iter(keys.values()))!r} has no factor {absent[0]!r} beside it")
        path, (*window, into, out) = named[0], shapes[named[0]]
        if path in found:
            raise ValueError(f"{source}: two modules are {path!r}, one of them called {module!r}; expected one")
        down, up, alpha = tensors[keys["down"]], tensors[keys["up"]], tensors.get(keys.get("alpha", ""))
        own, rank = _scale(config, module, down.shape[0] if down.ndim else 0, alpha, source)
        fits = down.shape[:2] == (rank, into) and _window(down.shape[2:]) == _window(window)
        if not fits or up.shape[:2] != (out, rank) or _window(up.shape[2:]) or down.ndim < 2:
            kinds = [
                f"{keys[role].removeprefix(module + '.')} {list(tensors[keys[role]].shape)}" for role in ("down", "up")
            ]
            raise ValueError(
                f"{source}: {module!r} has {' and '.join(kinds)}, which does not fit a kernel {[*window, into, out]} and rank {rank}"
            )
        found[path] = (np.moveaxis(down, (0, 1), (-1, -2)).reshape(-1, rank), up.reshape(out, rank).T, own)
    own = [own for _, _, own in found.values()]
    scale = max(own, key=own.count) if config is None else _scale(config, None, 0, None, source)[0]
    adapter: Adapter = {
        path: {"a": jax.numpy.asarray(a, np.float32), "b": jax.numpy.asarray(b, np.float32) * (own / scale)}
        for path, (a, b, own) in found.items()
    }
    return adapter, scale


def _window(window: Iterable[int]) -> tuple[int, ...]:
    """Return a convolution's window; of 1x1, as of a linear map, nothing: files have either for the other."""
    return tuple(window) if max(window, default=1) != 1 else ()


def _check(config: Mapping[str, Any], source: Path) -> None:
    """Refuse a configuration that asks for more than low-rank factors, by the name of the field that does."""
    if absent := [field for field in ("r", "lora_alpha") if not config.get(field)]:
        raise ValueError(
            f"{source}: the configuration has no {absent[0]} above 0; expected the configuration of a LoRA adapter"
        )
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{source}: peft_type is {config['peft_type']!r}, expected 'LORA'")
    if config.get("init_lora_weights", True) not in INITS:
        raise ValueError(
            f"{source}: init_lora_weights={config['init_lora_weights']!r} changed the base's weights too; save it in PEFT "
            "with path_initial_model_for_weight_conversion=, which makes it an ordinary adapter"
        )
    for field, value in config.items():
        if field not in SCALING | HARMLESS and value not in (None, False, "none") and value != {} and value != []:
            raise ValueError(
                f"{source}: {field}={value!r} is not applied here, where an adapter is low-rank factors alone; merge it in PEFT"
            )


def _scale(
    config: Mapping[str, Any] | None, module: str | None, rank: int, alpha: np.ndarray | None, source: Path
) -> tuple[float, int]:
    """Return the scale and the rank of a module.

    With a configuration they are those of the first pattern that names the module, as PEFT has it; of none: the defaults. Without
    one the rank is the tensor's, and the scale is 1 or that of the module's own alpha.
    """
    if config is None:
        if alpha is None or not rank:
            return 1.0, rank
        if alpha.size != 1 or not np.isfinite(alpha).all() or not alpha.any():
            raise ValueError(f"{source}: the alpha of {module!r} is {alpha.tolist()}, expected one number other than 0")
        return float(alpha.reshape(())) / rank, rank
    if alpha is not None:
        raise ValueError(
            f"{source}: {module!r} has an alpha beside the configuration's lora_alpha; expected one of them"
        )

    def of(pattern: str, default: Any) -> Any:
        named = {} if module is None else config.get(pattern) or {}
        return next((value for key, value in named.items() if re.match(rf"(.*\.)?({key})$", str(module))), default)

    rank, own = int(of("rank_pattern", config["r"])), float(of("alpha_pattern", config["lora_alpha"]))
    return own / (math.sqrt(rank) if config.get("use_rslora") else rank), rank
