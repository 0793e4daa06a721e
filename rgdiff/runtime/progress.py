"""A progress display between chunks of compiled work: rate, time left, and one line of text.

Assumes that it is called from Python between chunks, never from inside a compiled program. On a terminal it
is a rich bar; elsewhere a line every ten seconds. Until the first chunk is done it says that it is compiling, and the rate leaves
that chunk out. What the text says is left to the caller.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

EVERY = 10.0  # seconds between lines where there is no terminal
COMPILING = "compiling…"
SILENT = 2.0  # seconds after which a line says what is being waited for


def say(text: str) -> None:
    """Print a line, of several processes the first one's, unless nobody listens."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=_heard(), flush=True)


def _heard(file: TextIO | None = None) -> TextIO:
    """Return the file, or standard output; of several processes only the first is heard there."""
    if file is None and "jax" in sys.modules:  # before JAX is loaded nobody has joined anybody
        from rgdiff.runtime.distributed import first

        if not first():
            return open(os.devnull, "w", encoding="utf-8")
    return sys.stdout if file is None else file


def pieces(total: int, most: int, least: int) -> int | None:
    """Return the largest divisor of `total` from `least` to `most`, or None: pieces of one length are one compiled program."""
    return next((length for length in range(most, max(least, 1) - 1, -1) if total % length == 0), None)


@contextlib.contextmanager
def progress(title: str, total: int, *, done: int = 0, file: TextIO | None = None) -> Iterator[Callable[..., None]]:
    """Yield `advance(n, text="")`, which counts n more of `total` units and shows rate and time left.

    A stream that is closed or whose reader has gone is never an error.

    Args:
      title: what is being done.
      total: number of units.
      done: units done before this run (a resumed run); they do not count in the rate.
      file: where to write; standard output by default.
    """
    stream = _heard(file)
    announce(None)
    show = _bar if _is_terminal(stream) else _lines
    with show(title, total, done, stream) as advance:
        yield advance


@contextlib.contextmanager
def _bar(title: str, total: int, done: int, stream: TextIO) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(TextColumn):
        def render(self, task: Any) -> Text:
            if task.completed == done and not task.finished:
                return Text(COMPILING, style="progress.remaining")
            return Text(f"{task.speed:.3g}/s" if task.speed else "", style="progress.percentage")

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), Rate(""),
        TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip

    class Quiet(Console):
        def on_broken_pipe(self) -> None:  # rich would end the program
            self.quiet = True

    bar = Progress(*columns, console=Quiet(file=stream), speed_estimate_period=60.0)
    task = bar.add_task(title, total=total, completed=done, note="")

    def advance(n: int, text: str = "") -> None:
        with contextlib.suppress(OSError, ValueError):
            bar.update(task, advance=n, note=text, refresh=True)

    with contextlib.suppress(OSError, ValueError):
        bar.start()
    try:
        yield advance
    finally:
        with contextlib.suppress(OSError, ValueError):
            bar.stop()


@contextlib.contextmanager
def _lines(title: str, total: int, done: int, stream: TextIO) -> Iterator[Callable[..., None]]:
    begun = last = time.monotonic()
    since, first, count = begun, done, done  # of the rate: when the first chunk was done, and what was done then
    stop = _soon(f"{title} {done}/{total}, {COMPILING}", stream)

    def advance(n: int, text: str = "") -> None:
        nonlocal count, last, since, first
        stop()
        now = time.monotonic()
        if count == done and count + n < total:
            since, first = now, count + n
        count += n
        if now - last < EVERY and count < total:
            return
        last = now
        rate = (count - first) / max(now - since, 1e-9)
        said = f", {rate:.3g}/s" if rate else ""
        left = f", {_clock((total - count) / rate)} left" if rate and count < total else ""
        left = left if count < total else f", {_clock(now - begun)}"
        with contextlib.suppress(OSError, ValueError):
            print(f"{title} {count}/{total}{said}{left}{'  ' + text if text else ''}", file=stream, flush=True)

    try:
        yield advance
    finally:
        stop()


def announce(what: str | None, file: TextIO | None = None) -> None:
    """Say in one line what is under way, if nothing follows soon: the next call, with None where there is nothing to say, ends it.

    Args:
      what: e.g. "training the judge…".
      file: where to write; standard output by default.
    """
    while _announced:
        _announced.pop()()
    if what is not None:
        _announced.append(_soon(what, _heard(file)))


_announced: list[Callable[[], None]] = []


def _soon(what: str, stream: TextIO | None) -> Callable[[], None]:
    """Print a line after `SILENT` seconds, unless the function that is returned was called before."""
    lock, over = threading.Lock(), [False]

    def say() -> None:
        with lock, contextlib.suppress(OSError, ValueError):
            if not over[0]:
                print(what, file=stream, flush=True)

    def stop() -> None:
        with lock:
            over[0] = True
        timer.cancel()

    timer = threading.Timer(SILENT, say)
    timer.daemon = True
    timer.start()
    return stop


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
