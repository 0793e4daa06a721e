"""Oracles: functions of texts (a SMILES, a sequence) on the host, asked in a pool of processes, their answers kept.

A batch is answered in its order. A text without an answer is NaN and counted by kind: what the function raised, `timeout` for a
call that hung, `crash` for one that killed its process; both are tried again first, in a new process. Answers are kept in memory,
and on disk where a folder is named, shared by all runs. What makes texts of samples, and a reward of answers, is left to
domains and to `rgdiff.rewards.from_host`.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import functools
import logging
import math
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

import rgdiff
from rgdiff._worker import answer

log = logging.getLogger("rgdiff")
Tell = Callable[[str, float, str, bool, str], None]  # of a text: value, reason, whether it is final, what was raised

REMEMBERED = 2**18  # answers of one oracle in memory; the oldest are forgotten first
START = 300.0  # seconds that a process may take to import a function
QUICK = 0.05  # seconds: a process whose answers take less is asked one text ahead
COMMIT = 1.0  # seconds between two writes to disk within a batch
FILE = "answers.sqlite"


class Infeasible(ValueError):
    """Raised by an oracle's function for a text that has no value; the reason is counted, and kept as an answer is.

    Args:
      reason: a few words without the text itself, so that equal ones count together.

    Example:
      >>> from rgdiff import oracles
      >>> def length(text):
      ...     if not text:
      ...         raise oracles.Infeasible("empty")
      ...     return len(text)
      >>> length_of = oracles.oracle(length, workers=0)
      >>> print(length_of(["CCO", ""]), length_of.counts()["empty"])
      [ 3. nan] 1
    """

    def __init__(self, reason: str):
        super().__init__(reason)


@dataclasses.dataclass(frozen=True)
class TextOracle:
    """A function of texts with its pool and its kept answers. Build it with `oracle`; equal settings share both."""

    function: Callable[[str], Any]
    name: str
    version: str
    workers: int
    timeout: float
    retries: int
    folder: str | None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the values [B] of texts, float64, NaN where there is none.

        Raises:
          ValueError: in one line, for something else than texts, or a function that no process can load.
        """
        texts = list(texts)
        if stranger := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"the oracle {self.name} is asked for texts, got {type(stranger[0]).__name__}")
        state = _state(self)
        with state.lock:
            return state.answers(self, texts)

    def counts(self) -> dict[str, int]:
        """Return how many texts were asked, known (in memory, on disk, or twice in a batch), computed, and without a value by kind."""
        return dict(_state(self).counts)

    def close(self) -> None:
        """Forget what is in memory and close the file on disk. The processes are shared; `close` of this module ends them."""
        state = _state(self)
        with state.lock:
            state.close()


def oracle(
    function: Callable[[str], Any],
    *,
    name: str | None = None,
    version: str = "1",
    workers: int | None = None,
    timeout: float = 60.0,
    retries: int = 1,
    folder: str | os.PathLike[str] | None = None,
) -> TextOracle:
    """Make an oracle of a function of one text.

    Args:
      function: text -> number; it raises `Infeasible(reason)` for a text without one, and whatever else it raises
        counts by its type, the first of a type with a warning.
        It is pickled: a function of a module, or an object of a class of one, with `__call__`; with workers=0 any function.
      name: under which answers are kept, `module.function` by default.
      version: of the function and of all that its answers depend on. Another version knows none of the old answers.
      workers: processes; as many as there are cores by default (none on Windows). 0 asks in this process, without timeouts.
      timeout: seconds an answer may take, > 0.
      retries: of a text whose process hung or died, each in a new process; then it is NaN.
      folder: where answers are kept on disk, shared by runs; none by default. Answers that a retry may change (a timeout, a crash,
        an exception that is not `Infeasible`) are kept in memory alone.

    Returns:
      The oracle, texts -> values [B].

    Raises:
      ValueError: for something that cannot be called or pickled, or a setting out of its range.

    Example:
      >>> from rgdiff import oracles
      >>> length = oracles.oracle(len, workers=0)
      >>> print(length(["CCO", "C", "CCO"]), length.counts())
      [3. 1. 3.] {'asked': 3, 'known': 1, 'computed': 2}
    """
    from rgdiff import checks  # which imports JAX; a process of a pool need not

    if not callable(function):
        raise ValueError(f"an oracle expects a function of one text, got {function!r}")
    if not timeout > 0:
        raise ValueError(f"timeout={timeout}: expected seconds, > 0")
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = count if hasattr(os, "killpg") else 0  # processes and what they start are ended as POSIX has it
    workers = count if workers is None else checks.at_least("workers", workers, 0)
    label = (
        name or f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    )
    if workers:
        _pickled(function, label)
    where = None if folder is None else str(Path(folder).expanduser().absolute())
    return TextOracle(function, label, version, workers, float(timeout), checks.at_least("retries", retries, 0), where)


@functools.lru_cache(64)
def _pickled(function: Callable[[str], Any], name: str) -> bytes:
    try:
        blob = pickle.dumps(function)
    except Exception as error:
        raise ValueError(
            f"the oracle {name} cannot be sent to another process ({error}); define it at the top of a module, or take workers=0"
        ) from None
    if getattr(function, "__module__", None) == "__main__" or b"__main__" in blob:
        raise ValueError(
            f"the oracle {name} is defined in the script that runs, which other processes do not import; move it to a module of "
            "its own, or take workers=0"
        )
    return blob


class _State:
    """What is known of one oracle, and how often it was asked."""

    def __init__(self, folder: str | None):
        self.lock = threading.Lock()
        self.memory: dict[str, tuple[float, str]] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.said: set[str] = set()
        self.disk = None if folder is None else _Disk(Path(folder))

    def answers(self, of: TextOracle, texts: list[str]) -> np.ndarray:
        found = {text: self.memory[text] for text in texts if text in self.memory}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if self.disk is not None and missing:
            found |= self.disk.read(of, missing)
            missing = [text for text in missing if text not in found]

        def tell(text: str, value: float, reason: str, keep: bool, told: str) -> None:
            if told and reason not in self.said:
                self.said.add(reason)
                log.warning(
                    "the oracle %s has no value for %r: %s; others of this kind are counted", of.name, text[:80], told
                )
            found[text] = value, reason
            if self.disk is not None and keep:
                self.disk.write(of, text, value, reason)

        if missing:
            try:
                _ask(of, missing, tell)
            finally:
                if self.disk is not None:
                    self.disk.commit()
        self.memory |= found
        if len(self.memory) > REMEMBERED:
            for text in list(self.memory)[: len(self.memory) - REMEMBERED]:
                del self.memory[text]
        self.counts.update(asked=len(texts), known=len(texts) - len(missing), computed=len(missing))
        self.counts.update(reason for text in texts if (reason := found[text][1]))
        return np.array([found[text][0] for text in texts], np.float64)

    def close(self) -> None:
        self.memory.clear()
        if self.disk is not None:
            self.disk.close()


@functools.lru_cache(None)
def _state(of: TextOracle) -> _State:
    return _State(of.folder)


def _ask(of: TextOracle, texts: list[str], tell: Tell) -> None:
    """Compute answers, told one by one as they come, with whether a disk may keep them."""
    if not of.workers:
        for text in texts:
            tell(text, *answer(of.function, text))
        return
    pool = _pool(of.workers)
    with pool.lock:
        pool.ask(of, texts, tell)


class _Disk:
    """Answers of all oracles in one SQLite file, written by any number of processes. What fails is said once, and done without."""

    def __init__(self, folder: Path):
        self.file, self.connection, self.last = folder / FILE, None, 0.0
        self.broken = False

    def _try(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """Return work(connection), None where the file cannot be used."""
        if self.broken:
            return None
        try:
            if self.connection is None:
                self.connection = self._opened()
            return work(self.connection)
        except (sqlite3.Error, OSError) as error:
            log.warning("answers are not kept on disk: %s (%s)", self.file, error)
            self.broken, self.connection = True, None

    def _opened(self) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        made = sqlite3.connect(self.file, timeout=60.0, check_same_thread=False)
        made.execute("PRAGMA journal_mode=WAL")
        made.execute("PRAGMA synchronous=NORMAL")
        made.execute(
            "CREATE TABLE IF NOT EXISTS answers (name TEXT, version TEXT, text TEXT, value REAL, reason TEXT, "
            "PRIMARY KEY (name, version, text)) WITHOUT ROWID"
        )
        made.commit()
        return made

    def read(self, of: TextOracle, texts: list[str]) -> dict[str, tuple[float, str]]:
        found: dict[str, tuple[float, str]] = {}
        for start in range(0, len(texts), 500):
            keys = {_key(text): text for text in texts[start : start + 500]}
            query = (
                "SELECT text, value, reason FROM answers WHERE name=? AND version=? AND text IN "
                f"({','.join('?' * len(keys))})"
            )
            given = (query, (of.name, of.version, *keys))
            for key, value, reason in self._try(lambda file, given=given: file.execute(*given).fetchall()) or ():
                found[keys[key]] = math.nan if value is None else value, reason
        return found

    def write(self, of: TextOracle, text: str, value: float, reason: str) -> None:
        row = (of.name, of.version, _key(text), None if math.isnan(value) else value, reason)
        self._try(lambda file: file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", row))
        if time.monotonic() - self.last > COMMIT:
            self.commit()

    def commit(self) -> None:
        self._try(lambda file: file.commit())
        self.last = time.monotonic()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def _key(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate is no text to SQLite


class _Worker:
    """A process, what it was asked (numbers of texts, None while it loads the function), and since when it is at the first."""

    def __init__(self):
        self.connection, theirs = Pipe()
        paths = [str(Path(rgdiff.__file__).parents[1]), *(path or os.getcwd() for path in sys.path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
        environment.setdefault("OMP_NUM_THREADS", "1")  # one process a core
        nothing = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from rgdiff._worker import main; main({theirs.fileno()})"],
            pass_fds=(theirs.fileno(),),
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's, and what the function started dies with it
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
        )
        theirs.close()
        self.asked: collections.deque[int | None] = collections.deque()
        self.loaded: set[bytes] = set()
        self.since, self.quick = time.monotonic(), False

    def send(self, number: int | None, function: bytes, text: str) -> None:
        if not self.asked:
            self.since = time.monotonic()
        self.asked.append(number)
        with contextlib.suppress(OSError):  # a dead process is noticed where its answer is awaited
            self.connection.send((number, function, text))

    def end(self) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class _Pool:
    """Worker processes, which start when there is work for them and live until the program ends."""

    def __init__(self, count: int):
        self.count, self.workers, self.lock = count, [], threading.Lock()

    def ask(self, of: TextOracle, texts: list[str], tell: Tell) -> None:
        function = _pickled(of.function, of.name)
        todo, failures, left = collections.deque(range(len(texts))), collections.Counter[int](), len(texts)
        died_loading = 0

        def give(worker: _Worker) -> None:
            if function not in worker.loaded:
                worker.send(None, function, "")
                worker.loaded.add(function)
            while todo and len(worker.asked) < (2 if worker.quick else 1):
                number = todo.popleft()
                worker.send(number, function, texts[number])

        try:
            while left:
                while len(self.workers) < min(self.count, left):
                    self.workers.append(_Worker())
                for worker in self.workers:
                    if todo and len(worker.asked) < 2:
                        give(worker)
                busy = [worker for worker in self.workers if worker.asked]
                limits = [worker.since + (START if worker.asked[0] is None else of.timeout) for worker in busy]
                ready = wait([w.connection for w in busy], max(min(limits) - time.monotonic(), 0.0))
                for worker, limit in zip(busy, limits, strict=True):
                    failure = None
                    if worker.connection in ready:
                        try:
                            number, value, reason, final, told = worker.connection.recv()
                        except (EOFError, OSError):
                            failure = "crash"
                        else:
                            worker.asked.popleft()
                            now = time.monotonic()
                            if number is None and reason:
                                raise ValueError(
                                    f"the oracle {of.name} cannot be loaded by another process: {' '.join(reason.split())}"
                                )
                            if number is not None:
                                worker.quick = now - worker.since < QUICK
                                left -= 1
                                tell(texts[number], value, reason, final, told)
                            worker.since = now
                    elif time.monotonic() > limit:
                        failure = "timeout"
                    if failure is None:
                        continue
                    self.workers.remove(worker)
                    worker.end()
                    first, *rest = worker.asked
                    todo.extendleft(number for number in reversed(rest) if number is not None)
                    if first is None:
                        died_loading += 1
                        if died_loading > of.retries + self.count:
                            raise ValueError(
                                f"the processes that load the oracle {of.name} die; take workers=0 to see why in this one"
                            )
                        continue
                    failures[first] += 1
                    if failures[first] <= of.retries:
                        todo.append(first)
                    else:
                        left -= 1
                        tell(texts[first], math.nan, failure, False, f"{failure}, {of.retries} retries")
        except BaseException:
            self.close()  # what is under way answers nobody
            raise

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers.clear()


_pools: dict[int, _Pool] = {}


def _pool(count: int) -> _Pool:
    return _pools.setdefault(count, _Pool(count))


def close() -> None:
    """End the processes of all oracles; the next question starts new ones. It happens by itself when the program ends.

    Example:
      >>> from rgdiff import oracles
      >>> oracles.close()
    """
    for pool in _pools.values():
        with pool.lock:
            pool.close()


atexit.register(close)
