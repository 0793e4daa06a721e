"""A progress display between chunks of compiled work: rate, time left, and one line of text.

Assumes that it is called from Python between chunks, never from inside a compiled program. On a terminal it
is a rich bar; elsewhere a line every ten seconds. What the text says is left to the caller.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

EVERY = 10.0  # seconds between lines where there is no terminal


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
    stream = sys.stdout if file is None else file
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
            return Text(f"{task.speed or 0.0:.3g}/s", style="progress.percentage")

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
    start = last = time.monotonic()
    first, count = done, done

    def advance(n: int, text: str = "") -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if now - last < EVERY and count < total:
            return
        last = now
        rate = (count - first) / max(now - start, 1e-9)
        left = f", {_clock((total - count) / rate)} left" if 0 < rate and count < total else f", {_clock(now - start)}"
        with contextlib.suppress(OSError, ValueError):
            print(
                f"{title} {count}/{total}, {rate:.3g}/s{left}{'  ' + text if text else ''}",
                file=stream,
                flush=True,
            )

    yield advance


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
