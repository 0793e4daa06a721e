"""Settings of a process whose programs run on a CPU: how XLA compiles, and how freed memory is kept. Imports no JAX.

Both are a process's own business: recipes and benchmarks make them, nothing that is imported does.
"""

from __future__ import annotations

import ctypes
import os
from importlib.metadata import version

OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def use_quick_compilation() -> None:
    """Let XLA compile CPU programs by its older emitters, where it has them: in half the time or less, and as fast to run.

    A recipe compiles for longer than it runs. jaxlib 0.11 and later refuse the flag as unknown. It has to be set before JAX opens
    its devices; whoever names it in XLA_FLAGS is left alone.
    """
    given = os.environ.get("XLA_FLAGS", "")
    old = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
    if old and OLD_EMITTERS.split("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{given} {OLD_EMITTERS}".strip()


MALLOPT = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}  # glibc's number, value


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, where its allocator is glibc's (most Linux systems).

    A compiled program's temporaries are one block, which glibc gives back to the system after every run; the next run then waits for
    the system to clear and map it page by page. On an AMD EPYC that is up to a fifth of the time of CIFAR-10's U-Net
    (benchmarks/results/pretrained-speed.md and pretrained-speed-usual-memory.md). Call it before JAX runs anything. The process keeps its largest size until it ends.
    Whoever has set GLIBC_TUNABLES or a variable MALLOC_... is left alone.

    Returns:
      Whether it was done.

    Example:
      >>> from rgdiff.runtime.cpu import keep_memory
      >>> keep_memory() in (True, False)
      True
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return False
    return all(mallopt(number, value) for number, value in MALLOPT.values())
