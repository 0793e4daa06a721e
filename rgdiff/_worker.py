"""A process of a pool: it answers with a function on texts until its parent is gone. It imports nothing but that function.

The parent sends (number, function, text) and gets (number, value, reason, whether it is final, what was raised): a value, or NaN with a reason. A request
without a number loads the function. A process whose parent is gone ends at once, also in the middle of an answer.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def answer(function: Callable[[str], Any], text: str) -> tuple[float, str, bool, str]:
    """Return a function's value at a text and "", or NaN and why there is none; whether it is the same when asked again; what was raised.

    The reason is the one that the function gives, or the type of what it raised, which may not come again.

    Args:
      function: text -> number. It raises `rgdiff.oracles.Infeasible` for a text that has none.
      text: its argument.
    """
    try:
        value = float(function(text))
    except Exception as error:  # noqa: BLE001 - the contract: one text's failure is NaN with a reason
        own = error.args[0] if type(error).__name__ == "Infeasible" else None
        told = " ".join(f"{type(error).__name__}: {error}".split())
        return math.nan, str(own or type(error).__name__), own is not None, "" if own else told
    return (value, "", True, "") if math.isfinite(value) else (math.nan, "not finite", True, "")


@functools.lru_cache(16)
def _loaded(function: bytes) -> Callable[[str], Any]:
    return pickle.loads(function)


def _read(connection: Connection, requests: queue.SimpleQueue) -> None:
    try:
        while True:
            requests.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def main(descriptor: int) -> None:
    """Serve the parent at the other end of a pipe.

    Args:
      descriptor: of this end.
    """
    connection, requests = Connection(descriptor), queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, requests), daemon=True).start()
    while True:
        number, function, text = requests.get()
        if number is None:
            try:
                _loaded(function)
                connection.send((None, math.nan, "", True, ""))
            except Exception as error:  # noqa: BLE001 - the parent raises it
                connection.send((None, math.nan, f"{type(error).__name__}: {error}", True, ""))
        else:
            connection.send((number, *answer(_loaded(function), text)))
