"""Campaigns: rounds of queries whose answers come from outside, kept on disk between `ask` and `tell`.

An experiment may take a week and another process may continue the campaign: queries are on disk before `ask` returns them,
answers before `tell` returns, the model after every round. A query is a row of the observations and keeps its number, so
that no answer is counted twice, whatever order answers come in. Of several processes each asks, refits and tunes alike; the first one
writes, and its answers are the ones that count.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, samplers
from rgdiff.runtime.checkpoint import Checkpoints
from rgdiff.runtime.distributed import agreed, gathered, on_first, several
from rgdiff.runtime.folder import RunFolder, write_atomic
from rgdiff.runtime.run import Run
from rgdiff.seiko import Queries, Rounds, RoundState, Seiko
from rgdiff.shards import placed, shards_of
from rgdiff.surrogates.observations import ANSWERED, EMPTY, INFEASIBLE, Observations
from rgdiff.typing import Params, State


class Batch(NamedTuple):
    """Queries that wait for an answer.

    Args:
      ids: their numbers, NumPy integers [B].
      x0: samples, NumPy [B, ...].
    """

    ids: np.ndarray
    x0: State


class Campaign:
    """Rounds of `ask` and `tell` of one method, in a folder of its own. `open_campaign` makes one for a plain script.

    Args:
      run: the `Run` whose folder, seed, log and checkpoints it uses.
      name: of the campaign within the run.
      method: from `seiko.seiko` or `seiko.steered`; its capacity must hold all queries.
      params: of the model, with which the first round starts; None for `steered`.
      queries: number of queries of every round.
      steps: tuning steps of a round.
      chunk: tuning steps between two checkpoints.

    Raises:
      ValueError: for counts below 1, or more queries than the method's capacity.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        method: Rounds,
        params: Params,
        queries: Sequence[int],
        *,
        steps: int = 100,
        chunk: int = 25,
    ):
        self.queries = _counts(queries, method)
        self.run, self.name, self.method = run, name, method
        self.steps, self._chunk = checks.at_least("steps", steps, 1), chunk
        self._folder = run.folder.path / "campaigns" / name
        self._checkpoints = Checkpoints(self._folder / "rounds")
        self.state: RoundState = method.init(params)
        if self._checkpoints.latest() is not None:
            self.state = self._own(self._checkpoints.restore(self._shared(self.state))[0])

    @property
    def round(self) -> int:
        """Rounds that are finished."""
        return int(self.state.step)

    @property
    def done(self) -> bool:
        """Whether every query of all rounds is answered or skipped."""
        last = len(self.queries) - 1
        return self.round > last or (self.round == last and self._answered(last))

    def ask(self) -> Batch:
        """Return the queries of this round that have no answer yet: the same ones until they are answered or skipped.

        When the round before is answered, it is finished first (`finish`).

        Returns:
          Batch: ids [B] and x0 [B, ...], NumPy.

        Raises:
          ValueError: when all rounds are done, or a file of the campaign is damaged.
        """
        self.finish()
        if self.round == len(self.queries):
            raise ValueError(f"{self.name}: all {len(self.queries)} rounds are done; sample from the campaign")
        ids, x0 = self._queries(self.round)
        waiting = np.array([i not in self._answers(self.round) for i in ids])
        return Batch(ids[waiting], jax.tree.map(lambda leaf: leaf[waiting], x0))

    def tell(self, ids: Iterable[int], values: Iterable[float]) -> None:
        """Take answers in, in any order and in any number; they are on disk when this returns.

        Args:
          ids: numbers of queries that were asked, in this round or skipped in an earlier one.
          values: one for each, in the reward's unit; NaN marks an infeasible query.

        Raises:
          ValueError: for a query that was never asked, a value that is no number or infinite, lengths that differ, or
            another answer than one given before (the same once more is no error). Then nothing is taken in.
        """
        on_first(lambda: self._tell(list(ids), list(values)))

    def _tell(self, ids: list[int], values: list[float]) -> None:
        if len(ids) != len(values):
            raise ValueError(f"tell expects one value for each query, got {len(values)} for {len(ids)}")
        with self._alone():
            known: dict[int, dict[int, float | None]] = {}
            for one, value in zip(ids, values, strict=True):
                number, value = self._number(one), self._value(one, value)
                where = self._round_of(number)
                answers = known.setdefault(where, self._answers(where))
                before = answers.get(number)
                if before is not None and not _same(before, value):
                    raise ValueError(
                        f"query {number} was answered {before:g} before, now {value:g}; nothing was taken in"
                    )
                answers[number] = value
            for where, answers in known.items():
                self._write(where, answers)

    def skip(self, ids: Iterable[int] | None = None) -> None:
        """Skip queries of this round; an answer that comes later counts from the next refit on.

        Args:
          ids: numbers of queries that wait for an answer; None for all of them.

        Raises:
          ValueError: for a query that does not wait for an answer.
        """
        waiting = self.ask().ids
        ids = waiting if ids is None else [self._number(one) for one in ids]
        if unknown := sorted(set(map(int, ids)) - set(map(int, waiting))):
            raise ValueError(f"query {unknown[0]} does not wait for an answer; {len(waiting)} of this round do")

        def write() -> None:
            with self._alone():
                told = self._answers(self.round)
                self._write(self.round, told | {int(one): None for one in ids if int(one) not in told})

        on_first(write)

    @property
    def sampler(self) -> Any:
        """The sampler of the current model: that of the last finished round."""
        return self.method.sampler(self.state)

    def sample(self, count: int, seed: int = 0) -> State:
        """Draw samples of the current model, after finishing a round that is answered; they are no queries.

        Args:
          count: number of samples.
          seed: of the draws, beside the run's own.

        Returns:
          Samples [count, ...].
        """
        self.finish()
        key = jax.random.fold_in(self.run.key(f"{self.name}_samples_{self.round}"), seed)
        return samplers.sample(self.sampler, key, count, self.method.times).x0

    def history(self) -> list[tuple[State, np.ndarray]]:
        """Return queries x0 [B, ...] and rewards [B] of every round asked so far; NaN where infeasible or not answered."""
        out = []
        for where in range(len(self.queries)):
            if self._path(where, "queries.npz").exists():
                ids, x0 = self._queries(where)
                out.append((x0, self._rewards(where, ids)))
        return out

    def finish(self) -> None:
        """Refit and tune, with progress and checkpoints, if the round under way is answered; else do nothing.

        `ask` and `sample` call it. A process that is killed during it continues from the last checkpoint the next time.
        """
        where = self.round
        if where == len(self.queries) or not self._answered(where):
            return
        ids, x0 = self._queries(where)
        answers = self._answers(where)
        answered = np.array([answers[i] is not None for i in ids])
        state, info = self.state, {}
        if answered.any():
            told = Queries(jax.tree.map(lambda leaf: jnp.asarray(leaf[answered]), x0))
            info = jax.device_get(_figures(self.method, state, told, jnp.asarray(self._rewards(where, ids)[answered])))
        state = state._replace(observations=self._observations(), asked=jnp.int32(sum(self.queries[: where + 1])))
        state = _refit(self.method, self.run.key(f"{self.name}_refit_{where}"), state)
        if isinstance(self.method, Seiko):
            phase = f"{self.name}_round_{where + 1}"
            tuner, key = self.method.tuner(state), self.run.key(phase)
            tuned = self.run.fit(phase, tuner, key, state.params, self.steps, chunk=self._chunk)
            best, skipped = self._own((tuned.best, tuned.skipped))
            state = state._replace(params=best, skipped=state.skipped + skipped)
        self.state = state._replace(step=state.step + 1)
        self.run.log.rewind(self.name, where)
        self.run.log.write(self.name, where, {"queries": int(answered.sum())} | info)
        self._checkpoints.save(self.round, self._shared(self.state))
        self._checkpoints.wait()
        self.run.log.table()

    def _shared(self, state: Any) -> Any:
        """Put what every process has on the mesh of several, as checkpoints want it."""
        return placed(gathered(state), shards_of(self.run.mesh)) if several() else state

    def _own(self, state: Any) -> Any:
        """Return arrays of the mesh of several processes as each one's own."""
        return jax.tree.map(jnp.asarray, gathered(state)) if several() else state

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from writing answers meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _answered(self, where: int) -> bool:
        """Whether a round was asked, and every query of it answered or skipped."""
        return len(self._answers(where)) == self.queries[where]

    def _observations(self) -> Observations:
        """All answers so far, each in the row of its number."""
        blank = jax.device_get(self.state.observations)
        x0, y, status = jax.tree.map(np.array, blank.x0), np.array(blank.y), np.array(blank.status)
        for where in range(self.round + 1):
            ids, asked = self._queries(where)
            rewards, answers = self._rewards(where, ids), self._answers(where)
            jax.tree.map(lambda leaf, rows: leaf.__setitem__(ids, rows), x0, asked)  # noqa: B023
            y[ids] = np.nan_to_num(rewards)
            told = np.array([answers[i] is not None for i in ids])
            status[ids] = np.where(told, np.where(np.isnan(rewards), INFEASIBLE, ANSWERED), EMPTY)
        return Observations(jax.tree.map(jnp.asarray, x0), jnp.asarray(y), jnp.asarray(status))

    def _queries(self, where: int) -> tuple[np.ndarray, State]:
        """The queries of a round, from disk; they are drawn and written the first time."""
        path, first = self._path(where, "queries.npz"), sum(self.queries[:where])
        ids = np.arange(first, first + self.queries[where])
        if not agreed(path.exists()):
            key = self.run.key(f"{self.name}_ask_{where}")
            x0 = jax.device_get(_ask(self.method, key, self.state, self.queries[where]).x0)
            arrays, buffer = [np.asarray(leaf) for leaf in jax.tree.leaves(x0)], io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **{f"leaf_{i}": leaf for i, leaf in enumerate(arrays)})
            path.parent.mkdir(parents=True, exist_ok=True)
            on_first(lambda: write_atomic(path, buffer.getvalue()))
        try:
            with np.load(path, allow_pickle=False) as stored:
                leaves = [stored[f"leaf_{i}"] for i in range(len(stored.files))]
            return ids, jax.tree.unflatten(jax.tree.structure(self.state.observations.x0), leaves)
        except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}); restore it from a copy, its answers belong to it") from None

    def _answers(self, where: int) -> dict[int, float | None]:
        """Answers of a round by number: NaN infeasible, None skipped."""
        path = self._path(where, "answers.json")
        if not path.exists():
            return {}
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return {int(i): math.nan if value == "infeasible" else value for i, value in stored.items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f'{path} is damaged ({error}); repair it: query number -> value, "infeasible" or null'
            ) from None

    def _write(self, where: int, answers: dict[int, float | None]) -> None:
        plain = {
            str(i): "infeasible" if value is not None and math.isnan(value) else value for i, value in answers.items()
        }
        write_atomic(self._path(where, "answers.json"), (json.dumps(plain) + "\n").encode())

    def _rewards(self, where: int, ids: np.ndarray) -> np.ndarray:
        answers = self._answers(where)
        values = [answers.get(int(i)) for i in ids]
        return np.array([math.nan if value is None else value for value in values], np.float32)

    def _number(self, one: Any) -> int:
        asked = sum(count for where, count in enumerate(self.queries) if self._path(where, "queries.npz").exists())
        if isinstance(one, bool) or not isinstance(one, int | np.integer) or not 0 <= one < asked:
            raise ValueError(f"query {one!r} was never asked; {asked} were, numbered from 0; nothing was taken in")
        return int(one)

    def _value(self, one: Any, value: Any) -> float:
        try:
            if isinstance(value, bool | np.bool_):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"query {one}: expected a number or NaN (infeasible), got {value!r}; nothing was taken in"
            ) from None
        if abs(number) > float(np.finfo(np.float32).max):
            raise ValueError(
                f"query {one}: an answer must be finite in float32, or NaN if infeasible, got {number:g}; nothing was taken in"
            )
        return number

    def _round_of(self, number: int) -> int:
        return int(np.searchsorted(np.cumsum(self.queries), number, side="right"))

    def _path(self, where: int, name: str) -> Path:
        return self._folder / f"round_{where + 1:03d}" / name


def open_campaign(
    folder: str | os.PathLike[str],
    method: Rounds,
    params: Params,
    queries: Sequence[int],
    *,
    seed: int = 0,
    steps: int | None = None,
) -> Campaign:
    """Begin a campaign in `folder`, or continue the one that is there.

    Args:
      folder: of the campaign; it is made if it does not exist.
      method: from `seiko.seiko` or `seiko.steered`; its capacity must hold all queries.
      params: of the model, with which the first round starts; None for `steered`.
      queries: number of queries of every round. More rounds may follow those that the campaign began with, as many as the
        method's capacity holds: give them behind the same first ones.
      seed: of all draws.
      steps: tuning steps of a round; the method's own by default.

    Returns:
      A `Campaign`: `ask()` -> (ids, x0), `tell(ids, values)`, until `done`; then `sample(count)`.

    Raises:
      ValueError: if the folder holds another campaign: queries, seed, steps, the kind of the method or of its surrogate, or
        one of its numbers differ.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff, tempfile
      >>> from rgdiff import seiko, surrogates, tuners
      >>> from rgdiff.runtime.campaign import open_campaign
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> prior = tuners.standard_normal(process)
      >>> steer = lambda r: rgdiff.samplers.best_of_n(rgdiff.samplers.ancestral(process, prior), r, 2)
      >>> method = seiko.steered(
      ...     process, process.times(2), surrogates.ridge(surrogates.flatten), steer, prior=prior, batch=4, capacity=8)
      >>> campaign = open_campaign(tempfile.mkdtemp(), method, None, queries=[4, 4])
      >>> while not campaign.done:
      ...     ids, x0 = campaign.ask()
      ...     campaign.tell(ids, x0[:, 0])  # an experiment
      >>> print([rewards.shape for _, rewards in campaign.history()])
      [(4,), (4,)]
    """
    steps = int(getattr(method, "steps", 1)) if steps is None else steps
    numbers = ("temperature", "proximal_weight", "schedule", "feasibility_weight", "noise", "capacity")
    config = {
        "method": type(method).__name__,
        "surrogate": type(method.surrogate).__name__,
        "queries": _counts(queries, method),  # refused before the folder holds them
        "steps": steps,
        "seed": seed,
    } | {
        name: value if isinstance(value, str | int) else round(float(value), 9)
        for name in numbers
        if (value := getattr(method, name, None)) is not None
    }
    opened = RunFolder.create(folder, config, resume=True, longer="queries")
    return Campaign(Run(opened, seed, opened.path / "cache"), "campaign", method, params, queries, steps=steps)


def _counts(queries: Sequence[int], method: Rounds) -> list[int]:
    """Queries of every round, refused where they are more than the method holds."""
    counts = [checks.at_least("queries", count, 1) for count in queries]
    if sum(counts) > method.capacity:
        raise ValueError(f"{sum(counts)} queries need capacity={sum(counts)}, the method has {method.capacity}")
    return counts


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@functools.partial(jax.jit, static_argnames=("count",))
def _ask(method: Rounds, key: Any, state: RoundState, count: int) -> Queries:
    return method.ask(key, state, count)


_refit = jax.jit(lambda method, key, state: method.refit(key, state))
_figures = jax.jit(lambda method, state, queries, rewards: method.figures(state, queries, rewards))
