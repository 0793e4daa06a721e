"""Released weights to Linen parameters and back, by one rule and no tables.

A Linen module is named as in the file's state dict, dots included ("down_blocks.0", "to_out.0"), so that a leaf's path
joined by dots is its key there. Only the leaf is renamed (kernel, scale and embedding are `weight`) and, a kernel, transposed:
a linear map [in, out] is [out, in] there, a convolution [H, W, in, out] is [out, in, H, W]. `read` is strict: every key of
the file is used, every leaf is found, every shape fits. Files are safetensors, one or several with an index; nothing is
unpickled, and what a header says is checked before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rgdiff.typing import Params

WEIGHT = ("kernel", "scale", "embedding")
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


def key(path: Iterable[Any]) -> str:
    """Return the state-dict key of a leaf.

    Args:
      path: the leaf's path, of strings or of `jax.tree_util` keys.

    Returns:
      The key.

    Example:
      >>> from rgdiff.pretrained import weights
      >>> weights.key(("down_blocks.0", "resnets.0", "conv1", "kernel"))
      'down_blocks.0.resnets.0.conv1.weight'
    """
    *modules, leaf = [getattr(part, "key", part) for part in path]
    return ".".join([*modules, "weight" if leaf in WEIGHT else leaf])


def to_file(leaf: str, array: Any) -> Any:
    """Return a leaf's array in the file's layout: [in, out] -> [out, in], [H, W, in, out] -> [out, in, H, W].

    Args:
      leaf: its name; only a `kernel` is transposed.
      array: the leaf.

    Returns:
      The array, a view where it can be.
    """
    if leaf != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_file(leaf: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a file's array in Flax's layout, the inverse of `to_file`.

    Args:
      leaf: its name.
      array: from the file.
      shape: that the leaf has. Old files have a 1x1 convolution where newer ones have a linear map, and the other way round.

    Returns:
      The array, a view; its shape may still differ from `shape`.
    """
    if leaf != "kernel":
        return array
    if array.ndim == 4 and len(shape) == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    if array.ndim == 2 and len(shape) == 4:
        array = array[:, :, None, None]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, not read yet."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def array(self) -> np.ndarray:
        """Return the tensor mapped from its file, read-only."""
        if not self.shape or 0 in self.shape:  # a memory map is never empty
            count = int(np.prod(self.shape))
            return np.fromfile(self.file, self.dtype, count, offset=self.offset).reshape(self.shape)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor that is in memory: of an .npz file."""

    file: Path
    held: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.held.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape

    def array(self) -> np.ndarray:
        """Return the tensor."""
        return self.held


def archive(file: Path) -> dict[str, Held]:
    """Read an .npz file of small arrays; nothing is unpickled.

    Args:
      file: its path.

    Returns:
      key -> tensor.

    Raises:
      ValueError: in one line, for a file that is missing or another, or that holds Python objects.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            return {name: Held(Path(file), opened[name]) for name in opened.files}
    except FileNotFoundError:
        raise ValueError(f"no file at {file}") from None
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is no readable .npz file of arrays: {' '.join(str(error).split())}") from None


def index(file: Path) -> dict[str, Tensor]:
    """Read the header of a safetensors file, and check it against the file's size.

    Args:
      file: its path.

    Returns:
      key -> tensor.

    Raises:
      ValueError: in one line, for a file that is missing, is of another format, is cut off, or whose header is inconsistent.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(LONGEST_HEADER, size - 8):
                pickled = start[:2] == b"PK" or start[:1] == b"\x80"
                what = (
                    "it begins as a pickle does" if pickled else f"its header would have {length:,} of {size:,} bytes"
                )
                raise ValueError(f"{file} is no safetensors file, or cut off: {what}")
            header = json.loads(opened.read(length))
        out = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file}: {name!r} has dtype {entry['dtype']}, known are {', '.join(DTYPES)}")
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
            if (
                not 0 <= begin <= end
                or min(shape, default=0) < 0
                or end - begin != dtype.itemsize * int(np.prod(shape))
            ):
                raise ValueError(f"{file}: {name!r} {list(shape)} does not fit its {end - begin:,} bytes")
            if 8 + length + end > size:
                raise ValueError(f"{file} is cut off: {name!r} ends at byte {8 + length + end:,} of {size:,}")
            out[name] = Tensor(file, dtype, shape, 8 + length + begin)
    except FileNotFoundError:
        raise ValueError(f"no file at {file}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no readable safetensors file: {' '.join(str(error).split())}") from None
    return out


def inside(file: Path, folder: Path) -> Path:
    """Return a file's path, with links followed; refuse one that leads out of the folder.

    A snapshot of the Hugging Face cache (`models--NAME/snapshots/REVISION`) may lead to that model's own blobs.

    Args:
      file: a path below the folder.
      folder: of the model or pipeline.

    Returns:
      The path, resolved.

    Raises:
      ValueError: for a link out of the folder.
    """
    real, root = file.resolve(), folder.resolve()
    for place in (root, *root.parents):
        if place.name == "snapshots" and place.parent.name.startswith("models--"):
            root = place.parent
            break
    if not real.is_relative_to(root):
        raise ValueError(f"{file} leads out of {folder}, to {real}; copy the file in its place")
    return real


def find(folder: Path, root: Path | None = None) -> dict[str, Tensor]:
    """Find the weights of a folder: one safetensors file, or several with an index.

    Args:
      folder: of one model, with `diffusion_pytorch_model.safetensors`, `model.safetensors`, or one of these followed by
        `.index.json`; a single `.safetensors` file of any name does as well.
      root: the pipeline's folder, out of which no link may lead; `folder` by default.

    Returns:
      key -> tensor.

    Raises:
      ValueError: for a folder without such files, with pickled ones only, with parts and no index, or with a part that is missing.
    """
    root = folder if root is None else root
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}")
    stems = ("diffusion_pytorch_model", "model")
    for stem in stems:
        if (file := folder / f"{stem}.safetensors").exists() or file.is_symlink():
            return index(inside(file, root))
    for stem in stems:
        if (file := folder / f"{stem}.safetensors.index.json").exists():
            return _parts(inside(file, root), folder, root)
    files = sorted(folder.glob("*.safetensors"))
    parts = [file for file in files if "-of-" in file.name]
    if parts:
        raise ValueError(f"{folder} holds {parts[0].name} and no index: expected {stems[0]}.safetensors.index.json")
    if len(files) == 1:
        return index(inside(files[0], root))
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} safetensors files: expected one named {stems[0]}.safetensors")
    pickled = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled:
        raise ValueError(
            f"{folder} holds {pickled[0]}, a pickle, which is not read; save it with save_pretrained(safe_serialization=True)"
        )
    raise ValueError(f"{folder} holds no .safetensors file")


def _parts(file: Path, folder: Path, root: Path) -> dict[str, Tensor]:
    try:
        places = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no index of weights: {' '.join(str(error).split())}") from None
    tensors = {name: index(inside(folder / name, root)) for name in names}
    if missing := [name for name, place in places.items() if name not in tensors[place]]:
        raise ValueError(f"{folder / places[missing[0]]} has no {missing[0]!r}, which {file.name} says it has")
    return {name: tensors[place][name] for name, place in places.items()}


def read(
    tensors: Mapping[str, Tensor] | Mapping[str, Held],
    like: Params,
    *,
    dtype: Any = None,
    sharding: Callable[[str, tuple[int, ...]], Any] | Any = None,
    rename: Callable[[str], str | None] | None = None,
    source: Any = "the file",
) -> Params:
    """Read parameters of a known structure from files, one tensor at a time, each straight into its sharding.

    Args:
      tensors: from `find`, `index` or `archive`.
      like: the structure, leaves with shape and dtype, as `jax.eval_shape` gives them.
      dtype: of floating leaves; the file's own by default.
      sharding: one for all leaves, or a function of a leaf's path ("/"-joined) and shape; None leaves them on the default device.
      rename: key of the file -> key wanted, or None for a tensor to be left out (a buffer).
      source: what the tensors are of, for messages.

    Returns:
      The parameters.

    Raises:
      ValueError: in one line that names the key, for a tensor that is missing, left over, misshapen or of no floating dtype.

    Example:
      >>> import jax, jax.numpy as jnp, pathlib, tempfile
      >>> from rgdiff.pretrained import weights
      >>> params = {"linear_1": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> weights.write(file, params)
      >>> print({name: one.shape for name, one in weights.index(file).items()})
      {'linear_1.bias': (2,), 'linear_1.weight': (2, 3)}
      >>> back = weights.read(weights.find(file.parent), jax.eval_shape(lambda: params))
      >>> print(back["linear_1"]["kernel"].shape)
      (3, 2)
    """
    named: dict[str, Tensor | Held] = {}
    for name, tensor in tensors.items():
        new = name if rename is None else rename(name)
        if new is not None:
            if new in named:
                raise ValueError(f"{source}: two tensors are {new!r}, one of them stored as {name!r}")
            named[new] = tensor
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = [key(path) for path, _ in leaves]
    if missing := [name for name in wanted if name not in named]:
        raise ValueError(f"{source} has no {missing[0]!r} ({len(missing)} of {len(wanted)} tensors are missing)")
    if extra := sorted(set(named) - set(wanted)):
        raise ValueError(f"{source} has {extra[0]!r}, which the network lacks ({len(extra)} tensors are left over)")
    for (path, leaf), name in zip(leaves, wanted, strict=True):  # all of them, before anything is allocated
        tensor = named[name]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{tensor.file}: {name!r} has dtype {tensor.dtype}, expected floating numbers")
        if from_file(path[-1].key, _blank(tensor.shape), leaf.shape).shape != leaf.shape:
            expected = to_file(path[-1].key, _blank(leaf.shape)).shape
            raise ValueError(f"{tensor.file}: {name!r} is {list(tensor.shape)}, expected {list(expected)}")
    out = []
    for (path, leaf), name in zip(leaves, wanted, strict=True):
        tensor = named[name]
        array = from_file(path[-1].key, tensor.array(), leaf.shape)
        where = sharding
        if callable(sharding):
            where = sharding(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
        out.append(_placed(array, np.dtype(dtype or tensor.dtype), where))
    return jax.tree_util.tree_unflatten(structure, out)


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array of a shape, of one number."""
    return np.broadcast_to(np.bool_(False), shape)


def _placed(array: np.ndarray, dtype: np.dtype, sharding: Any) -> jax.Array:
    """Copy one tensor to its device or devices; done before the next is touched, so that one at a time is in memory."""
    if sharding is None or isinstance(sharding, jax.Device):
        return jnp.array(np.asarray(array, dtype), device=sharding).block_until_ready()
    part = lambda place: np.asarray(array[place], dtype)  # noqa: E731
    return jax.make_array_from_callback(array.shape, sharding, part).block_until_ready()


def write(file: str | os.PathLike[str], params: Params) -> None:
    """Write parameters as a safetensors file under the state dict's keys and in its layout; whole or not at all.

    Args:
      file: its path; an existing file is replaced.
      params: of a network whose modules are named as in the state dict.
    """
    from safetensors.numpy import save_file

    leaves = jax.tree_util.tree_leaves_with_path(params)
    state = {key(path): np.asarray(to_file(path[-1].key, np.asarray(leaf)), order="C") for path, leaf in leaves}
    part = Path(f"{os.fspath(file)}.part")
    try:
        save_file(state, part, {"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # safetensors makes files that nobody else may read
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
