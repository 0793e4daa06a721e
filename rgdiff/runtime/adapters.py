"""LoRA adapters in the files of others: a tuned adapter loads where others sample, and theirs here.

    save_peft, load_peft    a folder of PEFT: adapter_model.safetensors and adapter_config.json
    save_lora, load_lora    one file for a pipeline: diffusers' pytorch_lora_weights.safetensors; kohya's is read too

An update is (alpha / r) B A in PyTorch's layout, with sqrt(r) for r where use_rslora is true; ours is scale * a b in Flax's. In
PEFT's configuration, which diffusers keeps in the file's metadata, a pattern may give a module its own alpha and r; kohya keeps
each module's alpha as a tensor. Names of modules are the leaf's path unless the caller maps them (`runtime.lora_keys` has the
keys). What else a file asks for that changes the function (biases, whole modules, DoRA, LoHa, ...) is refused by its name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from rgdiff.nets.lora import Adapter
from rgdiff.runtime import lora_files, lora_keys
from rgdiff.runtime.folder import write_atomic
from rgdiff.typing import Params

PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_config.json")
LORA_FILE, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"  # diffusers' names


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
    tensors, ranks = lora_files.to_tensors(adapter, params, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lora_files.write_file(folder / FILES[0], {PREFIX + key: tensor for key, tensor in tensors.items()}, {})
    write_atomic(folder / FILES[1], json.dumps(lora_files.to_config(ranks, scale), indent=2).encode())


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
    folder = Path(folder)
    if absent := [file for file in FILES if not (folder / file).is_file()]:
        raise ValueError(f"{folder} holds no {absent[0]}: expected a folder written by save_peft or by PEFT")
    held, _ = lora_files.read_file(folder / FILES[0])
    config = lora_files.read_json((folder / FILES[1]).read_bytes(), folder / FILES[1])
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in held.items()}
    return lora_files.to_adapter(folder, tensors, params, lora_files.modules_of(params, name), config)


def save_lora(
    place: str | os.PathLike[str],
    adapter: Adapter,
    params: Params,
    *,
    scale: float = 1.0,
    prefix: str = "unet",
    name: Callable[[str], str] = module_name,
) -> None:
    """Write an adapter in diffusers' file: `pipeline.load_lora_weights(place)` reads it.

    The metadata hold PEFT's configuration, as diffusers itself writes them, so that the scale is part of the file.

    Args:
      place: a file `.safetensors`, or a folder for `pytorch_lora_weights.safetensors`; the folder is made if it does not exist.
      adapter: from `nets.lora_init` or `nets.lora_sum`; its ranks may differ.
      params: the parameters that the adapter belongs to, which give the kernels' shapes.
      scale: of the adapter.
      prefix: the part of the pipeline whose parameters these are: "unet", "transformer", "text_encoder", ...
      name: leaf path -> module name on the other side. transformers 5 has a CLIP text encoder's modules without the "text_model."
        of the released files: give lambda path: module_name(path).removeprefix("text_model.").

    Raises:
      ValueError: for a path that the parameters lack, names that collide, or an unknown part.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> from rgdiff import nets
      >>> from rgdiff.runtime.adapters import load_lora, save_lora
      >>> params = {"conv_in": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.zeros(8)}}
      >>> adapter, folder = nets.lora_init(jax.random.key(0), params, 2), tempfile.mkdtemp()
      >>> save_lora(folder, adapter, params, scale=0.5)
      >>> print(load_lora(folder, params)[1])
      0.5
    """
    _known(prefix)
    tensors, ranks = lora_files.to_tensors(adapter, params, name)
    config = {f"{prefix}.{field}": value for field, value in lora_files.to_config(ranks, scale).items()}
    file = Path(place) if Path(place).suffix == ".safetensors" else Path(place) / LORA_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {METADATA: json.dumps(config, indent=2, sort_keys=True)}
    lora_files.write_file(file, {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}, metadata)


def load_lora(
    place: str | os.PathLike[str],
    params: Params,
    *,
    prefix: str = "unet",
    skip_others: bool = False,
    name: Callable[[str], str] = module_name,
) -> tuple[Adapter, float]:
    """Read an adapter and its scale from a file of diffusers (of any age) or kohya, or from a folder of PEFT.

    Every tensor of the file is used, or the file is refused. kohya's names, which have underscores for dots, are resolved against
    those of the parameters; those of the original code of Stable Diffusion, which kohya has for Stable Diffusion XL, are known too.

    Args:
      place: a file, or a folder with `pytorch_lora_weights.safetensors`, with one other safetensors file, or with PEFT's two.
      params: the parameters that the adapter is for, which give the kernels' shapes.
      prefix: the part of the pipeline whose parameters these are: "unet" and "transformer" both mean the denoising network,
        "text_encoder", "text_encoder_2" and "text_encoder_3" the others. Keys without a part are taken for this one's.
      skip_others: leave out the tensors of other parts, e.g. of text encoders, instead of refusing the file.
      name: leaf path -> module name on the other side.

    Returns:
      The adapter, float32, and the scale, for `nets.LoRAModel(params, model, scale)`. The scale is alpha / rank: of the
      configuration in the metadata, or of most modules where each has its alpha, or 1 where there is neither. A module of another
      scale has the ratio of its scale to that one in its factor b.

    Raises:
      ValueError: for a missing or damaged file, a tensor of another part, a module that no leaf is named after, shapes that do not
        fit, or a file that asks for more than low-rank factors.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> from rgdiff import nets
      >>> from rgdiff.runtime.adapters import load_lora, save_lora
      >>> params = {"conv_in": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.zeros(8)}}
      >>> adapter, folder = nets.lora_init(jax.random.key(0), params, 2), tempfile.mkdtemp()
      >>> save_lora(folder, adapter, params, scale=0.5)
      >>> loaded, scale = load_lora(folder, params)
      >>> print(loaded["conv_in/kernel"]["a"].shape, loaded["conv_in/kernel"]["b"].shape, scale)
      (36, 2) (2, 8) 0.5
    """
    _known(prefix)
    file = _lora_file(Path(place))
    if (file.parent / FILES[1]).is_file() and file.name == FILES[0]:
        return load_peft(file.parent, params, name=name)
    held, metadata = lora_files.read_file(file)
    wanted = (None, *(lora_keys.DENOISERS if prefix in lora_keys.DENOISERS else (prefix,)))
    split = {key: lora_keys.split_part(key) for key in held}
    others = sorted(key for key, (part, _) in split.items() if part not in wanted)
    if others and not skip_others:
        part = split[others[0]][0]
        raise ValueError(
            f"{file}: {others[0]!r} belongs to the {part} ({len(others)} of {len(held)} tensors do not belong to the {prefix}); "
            f"give skip_others=True to leave them out, and read them with prefix={part!r} and that network's parameters"
        )
    own = {key: rest for key, (part, rest) in split.items() if part in wanted}
    tensors = {rest: held[key] for key, rest in own.items()}
    modules = lora_files.modules_of(params, name)
    if any(key.startswith(tuple(lora_keys.KOHYA)) for key in own):
        modules = lora_keys.kohya_names(modules)
    config = lora_files.read_json(metadata[METADATA], file) if METADATA in metadata else {}
    parts = {split[key][0] for key in own}
    config = {
        field.rpartition(".")[2]: value
        for field, value in config.items()
        if (field.rpartition(".")[0] or None) in parts
    }
    return lora_files.to_adapter(file, tensors, params, modules, config or None)


def _known(prefix: str) -> None:
    if prefix not in lora_keys.PARTS:
        raise ValueError(f"prefix is {prefix!r}, expected one of {', '.join(lora_keys.PARTS)}")


def _lora_file(place: Path) -> Path:
    """Return the file of an adapter that is a file or in a folder."""
    if place.is_file():
        return place
    named = [place / file for file in (LORA_FILE, FILES[0]) if (place / file).is_file()]
    files = named[:1] or sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        what = f"{len(files)} safetensors files" if files else f"no {LORA_FILE}" if place.is_dir() else "nothing"
        raise ValueError(f"{place} holds {what}: expected one file of an adapter; give its path")
    return files[0]
