"""What is measured on a GPU: networks, their sizes, and the rows; read by both frameworks, so that neither is imported here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

CANDIDATES, TEMPERATURE, RANK, RENOISED = 8, 0.1, 8, 2
RATE = 1e-4
ROWS = ("ancestral", "svdd", "draft K=1", "draft K=5", "draft_lv", "ddpo")


@dataclasses.dataclass(frozen=True)
class Work:
    """A network and what is done with it.

    Args:
      name: of the table.
      kind: `unet` or `dit`.
      shape: of a state, [H, W, C].
      batch: of a chain, or of a training step.
      options: of `rgdiff.nets.UNet` or `DiT`.
      calls: T, network calls of a chain.
      rows: of `ROWS`.
      remat: whether activations are computed again in the backward pass.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    batch: int
    options: dict[str, Any]
    calls: int
    rows: tuple[str, ...]
    remat: bool = False


UNET = {"channels": (32, 64, 64)}
CIFAR = {"channels": (128, 256, 256, 256), "blocks": 2, "attention": (1,)}
STABLE = {"channels": (320, 640, 1280, 1280), "blocks": 2, "attention": (1, 2, 3)}
DIT = {"patch": 2, "width": 1152, "depth": 28, "heads": 16}  # DiT-XL/2

WORK = (
    Work("digits", "unet", (16, 16, 1), 1024, UNET, 20, ROWS),
    Work("CIFAR-10", "unet", (32, 32, 3), 128, CIFAR, 10, ("ancestral", "svdd", "draft K=1", "draft K=5", "ddpo")),
    Work("DiT-XL/2", "dit", (32, 32, 4), 32, DIT, 10, ("ancestral", "draft K=1", "draft_lv")),
    Work("SD-sized", "unet", (64, 64, 4), 8, STABLE, 10, ("ancestral", "draft K=1", "draft K=5"), remat=True),
)
SMALL = (
    Work("digits", "unet", (8, 8, 1), 4, {"channels": (8, 16), "attention": (1,)}, 6, ROWS),
    Work("DiT", "dit", (8, 8, 1), 4, {"patch": 2, "width": 16, "depth": 1, "heads": 2}, 6, ("ancestral", "draft K=1"), remat=True),
)  # fmt: skip


def calls_of(row: str, calls: int) -> tuple[int, int]:
    """Return the network calls of a row: forward passes, and how many of them are differentiated."""
    return {
        "ancestral": (calls, 0),
        "svdd": ((calls - 1) * CANDIDATES + 1, 0),
        "draft K=1": (calls, 1),
        "draft K=5": (calls, 5),
        "draft_lv": (calls + RENOISED, 1 + RENOISED),
        "ddpo": (2 * calls - 1, calls - 1),
    }[row]


def timed(
    run: Callable[[], None], wait: Callable[[], None], least: int, seconds: float, rounds: int = 5
) -> list[float]:
    """Return seconds of one run, one entry a round of `least` runs or fewer: where the time does not suffice, a round is shorter.

    Args:
      run: starts one run.
      wait: waits for what was started, once a round.
      least: runs a round, so that dispatch from Python is not what is timed.
      seconds: for all rounds.
      rounds: most of them.
    """
    began = time.perf_counter()
    run()  # warm
    wait()
    one = time.perf_counter() - began
    each = max(1, min(least, int(seconds / max(one, 1e-6) / 3)))
    out: list[float] = []
    while len(out) < rounds and (not out or time.perf_counter() - began < seconds):
        start = time.perf_counter()
        for _ in range(each):
            run()
        wait()
        out.append((time.perf_counter() - start) / each)
    return out


def middle(values: list[float]) -> float:
    return float(np.median(values))
