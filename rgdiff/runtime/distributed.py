"""Several processes that run one program: how they find each other, what the first of them decides or does alone, and gathered values.

Every process runs the same lines, on the same numbers; arrays on a mesh of all their devices are shared, and each holds its rows.
Files and lines of text are the first process's. In a single process all of this is nothing.
"""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

ADDRESS = ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS")
COUNT = ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT")
INDEX = ("JAX_PROCESS_ID", "JAX_PROCESS_INDEX")
PATIENCE = 60  # seconds that a process which ends waits for the others; then what they compute together fails
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", *COUNT)  # counts of processes that somebody has started


def join(setting: Any = "auto", environ: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this program, if there are any; before JAX opens its devices.

    The coordinator is named by JAX_COORDINATOR_ADDRESS (host:port), with JAX_NUM_PROCESSES and JAX_PROCESS_ID; under SLURM and
    Open MPI, and on TPUs of several hosts, JAX finds everything itself.

    Args:
      setting: "auto", or True, which wants other processes; False stays alone.
      environ: variables of the environment.

    Raises:
      ValueError: where several processes were started and cannot be, or are not to be, joined.
    """
    if jax.distributed.is_initialized():
        return
    told = lambda names: next((environ[name] for name in names if environ.get(name)), None)  # noqa: E731
    address, count, index = told(ADDRESS), told(COUNT), told(INDEX)
    started = max((int(environ[name]) for name in TASKS if environ.get(name, "").isdigit()), default=1)
    hosts = len((environ.get("TPU_WORKER_HOSTNAMES") or "").split(","))
    if setting is False:
        if started > 1:
            raise ValueError(
                f"{started} processes were started, and distributed=false joins none; give distributed=auto"
            )
        return
    if address is None and max(started, hosts) == 1:
        if setting is True:
            raise ValueError(
                "distributed=true finds no other processes; name the first one in JAX_COORDINATOR_ADDRESS=host:port, with "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or start them by SLURM"
            )
        return
    number = lambda value: None if value is None else int(value)  # noqa: E731
    if address is not None and environ.get("SLURM_JOB_ID") is None and None in (count, index):
        raise ValueError(
            f"{ADDRESS[0]}={address} needs {COUNT[0]} and {INDEX[0]} beside it; give both, or start by SLURM"
        )
    # JAX's own preemption service would swallow SIGTERM; `checkpoint.interruptible` saves and stops at it.
    jax.config.update("jax_enable_preemption_service", False)
    named = "shutdown_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters  # not before jax 0.9
    patience: dict[str, Any] = {"shutdown_timeout_seconds": PATIENCE} if named else {}
    try:
        jax.distributed.initialize(address, number(count), number(index), **patience)
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{started} processes were started and could not be joined: {said}") from None


def several() -> bool:
    """Whether there is more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes."""
    return not several() or jax.process_index() == 0


def agreed(value: int) -> int:
    """Return the first process's value, a number below 2^31, in all of them."""
    return int(_broadcast(np.asarray(value, np.int32))) if several() else int(value)


def largest(value: int) -> int:
    """Return the largest of all processes' values, numbers below 2^31, in all of them."""
    if not several():
        return int(value)
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.asarray(value, np.int32))))


def meet() -> None:
    """Wait for all processes, before any of them ends: for one that ends sooner the others have `PATIENCE` seconds."""
    agreed(0)


def shared(text: str) -> str:
    """Return the first process's text in all of them."""
    return _shared(text.encode()).decode()


def shared_array(function: Callable[[], Any]) -> np.ndarray:
    """Call a function in the first process and return its result, as a NumPy array, in all of them; if it fails, all do.

    Args:
      function: of no argument, of something that NumPy makes an array of numbers of.

    Raises:
      ValueError: in the others, with what the first one says, whatever it raises itself.
    """
    result, buffer = on_first(function), io.BytesIO()
    if not several():
        return np.asarray(result)
    np.save(buffer, np.zeros(0) if result is None else np.asarray(result), allow_pickle=False)
    return np.load(io.BytesIO(_shared(buffer.getvalue())), allow_pickle=False)


def _shared(content: bytes) -> bytes:
    """Return the first process's bytes in all of them."""
    if not several():
        return content
    given = np.frombuffer(content, np.uint8)
    length = agreed(given.size)
    padded = np.zeros(length, np.uint8)
    padded[: min(length, given.size)] = given[:length]
    return bytes(_broadcast(padded).astype(np.uint8)) if length else b""


def on_first(function: Callable[[], Any]) -> Any:
    """Call a function in the first process and return its result there, None elsewhere, when it is done; if it fails, all do.

    Raises:
      ValueError: in the others, with what the first one says, whatever it raises itself.
    """
    if not several():
        return function()
    result, failed = None, None
    if first():
        try:
            result = function()
        except Exception as error:  # noqa: BLE001 - of any kind: the others would wait for ever
            failed = error
    said = shared("" if failed is None else " ".join(str(failed).split()) or type(failed).__name__)
    if failed is not None:
        raise failed
    if said:
        raise ValueError(said)
    return result


def gathered(tree: Any) -> Any:
    """Return arrays of a mesh as NumPy arrays with all rows, in every process; all of them must call it.

    Args:
      tree: a pytree; leaves that are no arrays of several processes become NumPy arrays as they are.
    """
    from jax.experimental import multihost_utils

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(whole, tree)


def _broadcast(value: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(value))
