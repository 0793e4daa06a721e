"""Checkpoints of any pytree: asynchronous, atomic, bit-exact, read back into the structure of `like`.

Assumes one writer for a folder; readers may come at any time. A tree is stored by Orbax as a flat dict from
leaf paths to arrays, beside a manifest of shapes, dtypes and CRC-32 sums that is checked before a state is
returned. The recipe decides the contents of the state and when it is saved.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff.runtime.distributed import agreed, on_first, shared

log = logging.getLogger("rgdiff")

_NAME = re.compile(r"^(\d+)(?:\.(\d+))?$")  # step, or step.n for the n-th rewriting of the same step
_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another structure; the message is one line."""


class _Unreadable(CheckpointError):
    """The files are damaged: an older checkpoint may still serve."""


class Checkpoints:
    """Keep the newest `keep` checkpoints of a run in `folder`, one directory per step.

    A checkpoint is written under a temporary name and renamed when complete, and older ones are removed only
    after that: a kill at any moment leaves the earlier or the later one. Saving at a step forgets checkpoints
    of later steps, which belong to a future that was abandoned when an older one was restored.

    Args:
      folder: of the checkpoints; made by the first `save`.
      keep: how many to keep, at least 1.

    Raises:
      ValueError: if keep < 1.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from rgdiff.runtime.checkpoint import Checkpoints
      >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
      ...     checkpoints.save(5, {"w": jnp.ones(2)})
      ...     state, step, meta = checkpoints.restore({"w": jnp.zeros(2)})
      >>> print(state["w"], step)
      [1. 1.] 5
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
        if keep < 1:
            raise ValueError(f"Checkpoints: keep={keep}, expected at least 1")
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._pending: tuple[int, Any] | None = None
        self._swept = False

    def save(self, step: int, state: Any, meta: dict[str, Any] | None = None) -> None:
        """Start writing `state` at `step` and return.

        The state is copied before this returns, so its buffers may be donated.

        Args:
          step: number of the checkpoint.
          state: a pytree of arrays, typed keys and numbers.
          meta: any JSON dict, returned by `restore`.

        Raises:
          CheckpointError: if the save before failed, or a leaf is no array or number.
        """
        self.wait()
        if not self._swept:
            _sweep(self.folder)
            self._swept = True
        rewritten = [n for s, n in self._entries() if s == step]
        name = f"{step}.{max(rewritten) + 1}" if rewritten else str(step)
        with _unwritten(f"checkpoint at step {step} was not written to {self.folder}"):
            self._pending = (step, _start_save(self.folder / name, state, {"step": step, "meta": meta}))

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        entries = self._entries()
        latest = agreed(entries[-1][0] if entries else -1)
        return None if latest < 0 else latest

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, int, dict[str, Any] | None]:
        """Read a checkpoint into the structure and placement of `like`.

        Args:
          like: a pytree of the same structure, shapes and dtypes, e.g. `tuner.init(params)`.
          step: the checkpoint's number; None for the newest, or, if that is damaged, the newest readable one, with a warning.

        Returns:
          (state, step, meta).

        Raises:
          CheckpointError: if there is no checkpoint, none is readable, or it does not fit `like`.
        """
        self.wait()
        if not self.folder.is_dir():
            raise CheckpointError(f"no checkpoint folder at {self.folder}; check the path, or start without resume")
        entries = [entry for entry in reversed(self._entries()) if step in (None, entry[0])]
        if not entries:
            raise CheckpointError(f"no checkpoint{'' if step is None else f' of step {step}'} yet in {self.folder}")
        damage = []
        for entry in entries:
            try:
                state, manifest = _load(self.folder / _name(entry), like)
            except _Unreadable as error:
                damage.append(str(error))
                continue
            if damage:
                log.warning("%s; going on from step %d", damage[0], entry[0])
            return state, manifest["step"], manifest["meta"]
        raise CheckpointError(f"{damage[0]}; no other checkpoint in the folder is readable")

    def wait(self) -> None:
        """Wait for the save under way, then remove the checkpoints that are no longer kept."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        with _unwritten(f"checkpoint at step {step} was not written to {self.folder}"):
            response.result()
        if jax.process_index() == 0:
            current = [entry for entry in self._entries() if entry[0] <= step]
            newest_of_step = dict(current)
            kept = sorted(newest_of_step.items())[-self._keep :]
            for entry in set(self._entries()) - set(kept):
                _remove(self.folder / _name(entry))

    def close(self) -> None:
        """Wait for the save under way."""
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _entries(self) -> list[tuple[int, int]]:
        if not self.folder.is_dir():
            return []
        matches = [_NAME.match(name) for name in os.listdir(self.folder)]
        return sorted((int(m[1]), int(m[2] or 0)) for m in matches if m)


def save_params(path: str | os.PathLike[str], params: Any, meta: dict[str, Any] | None = None) -> None:
    """Write one pytree at `path`, replacing an earlier one; several processes may write it at once.

    Args:
      path: a folder, which is made.
      params: a pytree of arrays, typed keys and numbers.
      meta: any JSON dict, returned by `load_meta`.

    Raises:
      CheckpointError: if it could not be written.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from rgdiff.runtime.checkpoint import load_meta, load_params, save_params
      >>> path = tempfile.mkdtemp() + "/params"
      >>> save_params(path, {"w": jnp.ones(2)}, meta={"loss": 0.5})
      >>> print(load_params(path), load_meta(path))
      {'w': array([1., 1.], dtype=float32)} {'loss': 0.5}
    """
    path = Path(path).absolute()
    new = path.with_name(shared(f".new-{uuid.uuid4().hex[:8]}-{path.name}"))  # one name in all processes
    try:
        with interruptible(), _unwritten(f"parameters were not written to {path}"):
            _start_save(new, params, {"step": None, "meta": meta}).result()
    except BaseException:
        for left in (new, new.with_name(f"{new.name}.orbax-checkpoint-tmp")):
            shutil.rmtree(left, ignore_errors=True)
        raise

    def rename() -> None:
        while True:
            try:
                return os.rename(new, path)
            except OSError:
                if not path.exists():
                    raise
                _remove(path)

    on_first(rename)


def load_params(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Read a pytree written by `save_params`, or a `.safetensors` file, into the structure of `like`.

    Names in a `.safetensors` file are leaf paths with '/' or '.' between the parts; its floating dtypes are converted to
    those of `like`.

    Args:
      path: of the folder or file.
      like: a pytree of the wanted structure; None for nested dicts of numpy arrays, keyed by the parts of the leaf paths.

    Returns:
      The pytree.

    Raises:
      CheckpointError: if nothing is there, it is damaged, or a name, shape or dtype differs from `like`.

    Example:
      >>> import numpy as np, tempfile
      >>> from rgdiff.runtime.checkpoint import load_params
      >>> from safetensors.numpy import save_file
      >>> path = tempfile.mkdtemp() + "/net.safetensors"
      >>> save_file({"dense.kernel": np.ones((1, 2), np.float32)}, path)
      >>> print(load_params(path))
      {'dense': {'kernel': array([[1., 1.]], dtype=float32)}}
    """
    path = Path(path).absolute()
    if path.suffix == ".safetensors":
        return _load_safetensors(path, like)
    return _load(path, like)[0]


def check_params(path: str | os.PathLike[str], like: Any) -> None:
    """Refuse, as `load_params` does, what is not there or does not fit `like` (arrays or their shapes); arrays are not read.

    Raises:
      CheckpointError: see `load_params`.
    """
    path = Path(path).absolute()
    if path.suffix == ".safetensors":
        _load_safetensors(path, like)
    else:
        _fit(path, _read_manifest(path)["leaves"], like)


def load_meta(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the `meta` given to `save_params`.

    Args:
      path: of the folder.

    Raises:
      CheckpointError: if nothing is there or it is damaged.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from rgdiff.runtime.checkpoint import load_meta, save_params
      >>> path = tempfile.mkdtemp() + "/params"
      >>> save_params(path, {"w": jnp.ones(2)}, meta={"loss": 0.5})
      >>> print(load_meta(path))
      {'loss': 0.5}
    """
    return _read_manifest(Path(path).absolute())["meta"]


class Stopped(KeyboardInterrupt):
    """A signal asked to stop, and what was under way is done and saved. `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Hold the first Ctrl-C or SIGTERM back, so that what is being saved is saved; the second stops at once.

    SIGTERM is how schedulers and clouds announce that a machine will be taken away.

    Yields:
      A function that returns the number of the signal that came, 0 for none; who asks it then saves and raises `Stopped`. If nobody
      does, it is raised at the end. Outside of the main thread, and where others handle a signal, it is not held back.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    main = threading.current_thread() is threading.main_thread()
    held = {number: handler for number, handler in usual.items() if main and signal.getsignal(number) is handler}
    came = 0

    def hold(number: int, _: Any) -> None:
        nonlocal came
        if came:
            raise Stopped(number)
        came = number
        named = signal.Signals(number).name
        said = f"\nrgdiff: {named}: stopping when the steps under way are done and saved; Ctrl-C again stops at once\n"
        with contextlib.suppress(OSError):  # not print: it may be under way
            os.write(2, said.encode())

    for number in held:
        signal.signal(number, hold)
    try:
        yield lambda: came
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    if came:
        raise Stopped(came)


# Writing


@contextlib.contextmanager
def _unwritten(what: str) -> Iterator[None]:
    """Say in one line that something was not written, and why."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{what}: {_line(error)}") from error


def _start_save(path: Path, state: Any, head: dict[str, Any]) -> Any:
    if pattern := set("[*?") & set(str(path)):  # Orbax would leave the arrays out, without a word
        raise CheckpointError(f"a path must not have {' or '.join(sorted(pattern))}")
    ocp = _orbax()
    arrays, leaves = {}, {}
    for name, leaf in _flatten(state):
        data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        data = data if isinstance(data, jax.Array) else np.asarray(data)
        whole = not isinstance(data, jax.Array) or data.is_fully_addressable
        leaves[name] = [_spec(leaf), zlib.crc32(_bytes(data)) if whole else None]
        if data.size:  # Orbax refuses arrays of no elements; their spec says all
            arrays[name] = data
    text = json.dumps({**head, "leaves": leaves})
    path.parent.mkdir(parents=True, exist_ok=True)
    context = ocp.Context()
    context.async_options.create_directories_asynchronously = False  # else a failed save blocks exit for 5 minutes
    with context:
        # the extra leaf keeps Orbax content with a state that has no arrays
        return ocp.save_async(
            path,
            {"arrays": arrays, "format": np.asarray(1)},
            custom_metadata={"rgdiff": text, "crc32": zlib.crc32(text.encode())},
        )


def _sweep(folder: Path) -> None:
    """Remove the files of a killed writer."""
    if folder.is_dir() and jax.process_index() == 0:
        for name in os.listdir(folder):
            if name.endswith(".orbax-checkpoint-tmp") or name.startswith(".trash-"):
                shutil.rmtree(folder / name, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a directory so that no half of it is ever seen under its name."""
    trash = path.with_name(f".trash-{uuid.uuid4().hex[:8]}-{path.name}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, trash)
        (shutil.rmtree if trash.is_dir() else os.remove)(trash)


# Reading


def _read_manifest(path: Path) -> dict[str, Any]:
    ocp = _orbax()
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint: it is a file")
    with _quiet():
        try:
            found = ocp.checkpointables_metadata(path).custom_metadata
            text = found["rgdiff"]
            if zlib.crc32(text.encode()) != found["crc32"]:
                raise ValueError("its manifest fails the check sum")
            return json.loads(text)
        except (KeyError, TypeError):
            raise _Unreadable(f"{path} is not a checkpoint of rgdiff, or its manifest is damaged") from None
        except Exception as error:
            raise _Unreadable(f"checkpoint {path} is damaged: {_line(error)}") from None


def _load(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    manifest = _read_manifest(path)
    stored: dict[str, list[Any]] = manifest["leaves"]
    wanted = [(name, None) for name in stored] if like is None else _fit(path, stored, like)
    ocp = _orbax()
    targets = {}
    for name, leaf in wanted:
        dtype, shape = _data_spec(stored[name][0], leaf)
        if np.prod(shape, dtype=np.int64):
            sharding = _placement(leaf)
            spread = sharding is not None and len(sharding.device_set) > 1 and not _is_key(leaf)
            make: Callable[..., Any] = jax.ShapeDtypeStruct if spread else np.empty
            targets[name] = make(shape, dtype, sharding=sharding) if spread else make(shape, dtype)
    try:
        with _quiet():
            arrays = ocp.load(path, {"arrays": targets, "format": np.asarray(1)})["arrays"]
    except Exception as error:
        raise _Unreadable(f"checkpoint {path} is damaged: {_line(error)}") from None
    values = []
    for name, leaf in wanted:
        spec, crc = stored[name]
        dtype, shape = _data_spec(spec, leaf)
        data = arrays[name] if name in targets else np.empty(shape, dtype)
        whole = not isinstance(data, jax.Array) or data.is_fully_addressable
        if crc is not None and whole and zlib.crc32(_bytes(data)) != crc:
            raise _Unreadable(f"checkpoint {path} is damaged: {name!r} fails its check sum")
        values.append(_as(data, leaf, spec))
    return (_nest(dict(zip(stored, values, strict=True))) if like is None else _unflatten(like, values)), manifest


def _fit(path: Path, stored: dict[str, list[Any]], like: Any) -> list[tuple[str, Any]]:
    """Return the leaves of `like` by name; refuse a checkpoint that has others."""
    wanted = _flatten(like)
    for name, leaf in wanted:
        spec, found = _spec(leaf), stored.get(name, ["nothing"])[0]
        if spec != found:
            raise CheckpointError(f"checkpoint {path} does not fit: at {name!r} expected {spec}, found {found}")
    for name in stored.keys() - dict(wanted).keys():
        raise CheckpointError(f"checkpoint {path} does not fit: at {name!r} expected nothing, found {stored[name][0]}")
    return wanted


def _load_safetensors(path: Path, like: Any) -> Any:
    try:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = {k: v for k, v in json.loads(raw[8 : 8 + size]).items() if k != "__metadata__"}
        data, arrays = memoryview(raw)[8 + size :], {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = jnp.dtype(_SAFETENSORS[entry["dtype"]])
            if not 0 <= begin <= end <= len(data):
                raise ValueError(f"{name!r} lies outside the file")
            key = name.replace(".", "/")
            arrays[key] = np.frombuffer(data[begin:end], dtype).reshape(entry["shape"])
    except FileNotFoundError:
        raise CheckpointError(f"no file at {path}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {_line(error)}") from None
    if like is None:
        return _nest(arrays)
    values = []
    for name, leaf in _flatten(like):
        spec, key = _spec(leaf), name.replace(".", "/")
        array = arrays.pop(key, None)
        if array is None:
            raise CheckpointError(f"{path} does not fit: at {name!r} expected {spec}, found nothing")
        dtype, shape = _data_spec(spec, leaf)
        floats = jnp.issubdtype(array.dtype, np.floating) and jnp.issubdtype(dtype, np.floating)
        if array.shape != shape or not (floats or array.dtype == dtype):
            raise CheckpointError(f"{path} does not fit: at {name!r} expected {spec}, found {_spec(array)}")
        values.append(_as(array.astype(dtype), leaf, spec))
    if arrays:
        name = next(iter(arrays))
        raise CheckpointError(f"{path} does not fit: at {name!r} expected nothing, found {_spec(arrays[name])}")
    return _unflatten(like, values)


# Leaves


def _flatten(tree: Any) -> list[tuple[str, Any]]:
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    names = set()
    for name, leaf in leaves:
        if name in names:
            raise CheckpointError(f"two leaves have the path {name!r}; rename one")
        if not (isinstance(leaf, bool | int | float) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))):
            raise CheckpointError(f"leaf {name!r} is a {type(leaf).__name__}; expected an array or a number")
        names.add(name)
    return leaves


def _unflatten(like: Any, values: list[Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _nest(flat: dict[str, Any]) -> Any:
    if list(flat) == [""]:
        return flat[""]
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@functools.cache
def _key_impl(dtype: Any) -> str:
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl)).dtype == dtype:
            return impl
    raise CheckpointError(f"keys of dtype {dtype} cannot be saved; use jax.random.key with a built-in impl")


def _spec(leaf: Any) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    kind = f"key<{_key_impl(leaf.dtype)}>" if _is_key(leaf) else str(leaf.dtype)
    return f"{kind}[{','.join(map(str, leaf.shape))}]"


def _data_spec(spec: str, leaf: Any) -> tuple[Any, tuple[int, ...]]:
    """Return dtype and shape of the stored array behind a leaf of this spec."""
    kind, dims = spec[:-1].rsplit("[", 1)
    shape = tuple(int(d) for d in dims.split(",") if d)
    if kind.startswith("key<"):
        like = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=kind[4:-1])))
        return np.dtype(np.uint32), shape + like.shape
    return jnp.dtype(kind), shape


def _placement(leaf: Any) -> Any:
    """Return the sharding a leaf insists on, or None where jax may choose."""
    if isinstance(leaf, jax.Array) and not getattr(leaf, "committed", True):
        return None
    return getattr(leaf, "sharding", None)


def _as(data: Any, leaf: Any, spec: str) -> Any:
    if leaf is None:
        return jax.random.wrap_key_data(data, impl=spec[4 : spec.index(">")]) if spec.startswith("key<") else data
    if isinstance(leaf, bool | int | float):
        return data.item()
    if isinstance(leaf, np.ndarray | np.generic):
        return data if isinstance(leaf, np.ndarray) else data[()]
    if _is_key(leaf):
        data = jax.random.wrap_key_data(jnp.asarray(data), impl=spec[4 : spec.index(">")])
    sharding = _placement(leaf)
    return jnp.asarray(data) if sharding is None else jax.device_put(data, sharding)


def _bytes(data: Any) -> Any:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _name(entry: tuple[int, int]) -> str:
    return f"{entry[0]}.{entry[1]}" if entry[1] else str(entry[0])


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:60]} ... {text[-95:]}"  # the reason is often said last


def _orbax() -> Any:
    import absl.logging
    from orbax.checkpoint import v1 as ocp

    absl.logging.set_verbosity(absl.logging.WARNING)
    absl.logging.get_absl_logger().addFilter(_not_orbax)
    return ocp


def _not_orbax(record: logging.LogRecord) -> bool:
    """Hold back the tracebacks that Orbax logs of its threads: what they raise reaches whoever waits for the save."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output of Orbax and asyncio for files they fail to read: the caller raises one line."""
    import absl.logging

    loggers = [absl.logging.get_absl_logger(), logging.getLogger("asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    try:
        sys.unraisablehook = lambda info: None if "loop is closed" in str(info.exc_value) else hook(info)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    except BaseException:
        gc.collect()  # asyncio complains of unread exceptions when they are collected: let it be now
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook
