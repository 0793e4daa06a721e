"""Functions that other processes import in the tests of oracles."""

import os
import signal
import time
from pathlib import Path

from rgdiff import oracles


def length(text):
    if not text:
        raise oracles.Infeasible("empty")
    return len(text)


def hostile(text):
    """Return the length; or hang, die, raise, or do so once, as the text says."""
    kind, _, where = text.partition(":")
    if where:
        if Path(where).exists():
            return len(kind)
        Path(where).touch()
    if kind == "hang":
        time.sleep(600)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raise":
        raise RuntimeError(text)
    if kind == "nan":
        return float("nan")
    return len(kind)


def process(text):
    time.sleep(0.02)
    return os.getpid()
