"""One run: its folder, keys, log, clock and checkpointed training. Every phase of a recipe goes through it.

A phase's random numbers depend on the seed and the phase's name alone. Training saves its whole state between chunks,
so a killed run that is resumed restores the newest checkpoint of each phase and ends in the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rgdiff import tuners
from rgdiff.rewards import HostReward, RewardFailure, score
from rgdiff.runtime.checkpoint import Checkpoints, Stopped, interruptible
from rgdiff.runtime.distributed import agreed, first, gathered, largest, several
from rgdiff.runtime.folder import RunFolder
from rgdiff.runtime.mesh import shard_params
from rgdiff.runtime.metrics import MetricsLog
from rgdiff.runtime.progress import pieces, progress, say
from rgdiff.shards import placed, shards_of
from rgdiff.tuners.online import OnlineTuner
from rgdiff.tuners.stopping import EarlyStopping

PATIENCE = 20  # a phase stops after more skipped updates than this since it began or was resumed


class Diverged(ValueError):
    """A method's training was stopped because too many of its updates were not finite; its last good state is on disk.

    `summary` has the figures of the methods that were not, where there are any.
    """

    def __init__(self, message: str, summary: dict[str, Any] | None = None):
        super().__init__(message)
        self.summary = summary or {}


class Clock:
    """Wall seconds of a phase, with those spent compiling apart."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.compile_seconds = 0.0


_compiling = [0.0]
_listening = []


def _listen() -> None:
    """Count the seconds that JAX reports for tracing, lowering and compiling, from now on."""
    if not _listening:

        def count(event: str, duration_secs: float, **_: str | int) -> None:
            if "compile/" in event:
                _compiling[0] += duration_secs

        jax.monitoring.register_event_duration_secs_listener(count)
        _listening.append(True)


def phase_key(seed: int, phase: str) -> jax.Array:
    """Return the PRNG key of a phase of the run of a seed."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(phase.encode()))


class Run:
    """What the phases of a recipe share.

    `cache` holds trained priors and compiled programs between runs; `recipe` is its name; `mesh` is of the devices that share a batch.
    `profile` has the number of training steps of every phase to trace, `steps`, after `skip` others; traces are for XProf or Perfetto.
    """

    def __init__(
        self,
        folder: RunFolder,
        seed: int,
        cache: Path,
        recipe: str = "",
        mesh: Any = None,
        profile: Mapping[str, int] | None = None,
    ):
        self.folder = folder
        self.recipe = recipe
        self.cache = cache
        self.mesh = mesh
        self.profile = profile
        self.log = MetricsLog(folder.path)
        self._seed = seed
        self._save_every = float(os.environ.get("RGDIFF_SAVE_EVERY", 5.0))  # seconds between checkpoints
        _listen()

    def key(self, phase: str) -> jax.Array:
        """Return the PRNG key of a phase."""
        return phase_key(self._seed, phase)

    def say(self, text: str) -> None:
        """Print one line."""
        say(text)

    @contextlib.contextmanager
    def clock(self) -> Iterator[Clock]:
        """Time a phase; whoever uses it blocks on its results first."""
        clock, began, compiled = Clock(), time.monotonic(), _compiling[0]
        yield clock
        clock.compile_seconds = _compiling[0] - compiled
        clock.seconds = max(time.monotonic() - began - clock.compile_seconds, 0.0)

    def _begin(self, tuner: Any, params: Any) -> Any:
        """Return the first state, on the mesh where there is one."""
        if self.mesh is None:
            return tuner.init(params)
        if several() and self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] == 1:
            # By each process alone: what is not compiled as a whole would wait for the others at every operation.
            return shard_params(tuner.init(gathered(params)), self.mesh)
        return tuner.init(shard_params(params, self.mesh))

    @contextlib.contextmanager
    def _tracing(self, phase: str) -> Iterator[Callable[[int, int], None]]:
        """Trace some steps of a phase into profile/PHASE, of several processes the first one's.

        Yields:
          A function (steps done, steps of the last call) -> None, to be called between two compiled calls.
        """
        place = self.folder.path / "profile" / phase
        under_way = False

        def between(done: int, count: int) -> None:
            nonlocal under_way
            if self.profile is None or not first():
                return
            begin = max(self.profile.get("skip", 0), count)  # the first call compiles
            if under_way and done >= begin + self.profile["steps"]:
                stop()
            elif not under_way and begin <= done < begin + self.profile["steps"]:
                under_way = True
                jax.profiler.start_trace(place)

        def stop() -> None:
            nonlocal under_way
            under_way = False
            jax.profiler.stop_trace()
            self.say(f"{phase}: traced into {place}")

        try:
            yield between
        finally:
            if under_way:
                stop()

    def fit(
        self,
        phase: str,
        tuner: Any,
        key: jax.Array,
        params: Any,
        steps: int,
        *,
        data: Any = None,
        batch: int | None = None,
        chunk: int = 25,
    ) -> Any:
        """Train as `tuners.fit` does, with progress, a row of metrics a step, and checkpoints; go on where a killed run was.

        Args:
          chunk: steps to a compiled call, at most: fewer, down to half, where that divides `steps` and saves compiling the rest.

        Raises:
          Diverged: after more than PATIENCE non-finite updates; the newest state that was saved is kept: chunks with such an update
            are not saved, but where there is no other.
        """
        state = self._begin(tuner, params)
        chunk = pieces(steps, chunk, (chunk + 1) // 2) or chunk
        if self.profile is not None:
            chunk = min(chunk, self.profile["steps"])
        with (
            interruptible() as interrupted,
            Checkpoints(self.folder.path / "checkpoints" / phase) as checkpoints,
            self._tracing(phase) as traced,
        ):
            if checkpoints.latest() is not None:
                state = placed(state, shards_of(self.mesh))
                state, step, _ = checkpoints.restore(state)
                self.log.rewind(phase, step)
                if step < steps:
                    self.say(f"{phase}: going on from step {step}")
            else:
                self.log.rewind(phase, 0)
            saved, began, skipped = time.monotonic(), int(state.step), int(state.skipped)
            before = skipped  # the count that the last chunk began with
            with progress(phase, steps, done=began) as advance:

                def on_chunk(state: Any, infos: dict[str, np.ndarray]) -> None:
                    nonlocal saved, before
                    count = len(infos["gradient_norm"])
                    done = int(state.step)
                    traced(done - began, count)
                    for index in range(count):
                        self.log.write(phase, done - count + index, {k: v[index] for k, v in infos.items()})
                    bad = int(infos["skipped"][-1]) - skipped
                    if bad > PATIENCE:
                        checkpoints.wait()
                        kept = checkpoints.latest()
                        if kept is None:  # what was skipped was undone: the state is finite, if no longer good
                            checkpoints.save(kept := done, state)
                        advice = getattr(tuner, "advice", "lower the learning rate or look at the reward")
                        raise Diverged(
                            f"{phase}: {bad} of {done - began} updates before step {done} were not finite or out of bounds and were "
                            f"skipped; {advice} (the last good state that was saved is kept, step {kept})"
                        )
                    clean, before = int(infos["skipped"][-1]) == before, int(infos["skipped"][-1])
                    shown = next(name for name in ("reward", "loss", "gradient_norm") if name in infos)
                    advance(count, f"{shown} {float(np.mean(infos[shown])):.4g}" + (f", {bad} skipped" if bad else ""))
                    over = done == steps or bool(getattr(state, "stopped", False))
                    stop = largest(interrupted())  # a signal to one process stops all, at the same step
                    late = agreed(time.monotonic() - saved > self._save_every)  # by one clock
                    if over or (clean and (stop or late)):
                        checkpoints.save(done, state)
                        saved = time.monotonic()
                    if stop:
                        checkpoints.wait()
                        raise Stopped(stop)

                inner = tuner.tuner if isinstance(tuner, EarlyStopping) else tuner

                def on_step(state: Any, info: dict[str, np.ndarray]) -> None:
                    on_chunk(state, {name: np.asarray(value)[None] for name, value in info.items()})

                try:
                    if not isinstance(inner, OnlineTuner) or not isinstance(inner.reward, HostReward):
                        return tuners.fit(
                            tuner,
                            key,
                            state,
                            steps,
                            data=data,
                            batch=batch,
                            chunk=chunk,
                            on_chunk=on_chunk,
                            mesh=self.mesh,
                        )
                    # A black box is called between two programs, not inside one.
                    online = inner.online if inner is tuner else dataclasses.replace(tuner, tuner=inner.online)
                    return tuners.fit_online(
                        online, key, state, steps, inner.reward.answers, data=data, batch=batch,
                        heldout=None if inner.heldout is None else _judged(inner.heldout), on_step=on_step, mesh=self.mesh,
                    )  # fmt: skip
                except RewardFailure as failure:
                    if failure.step is None:
                        raise ValueError(f"{phase}: {failure}") from None
                    checkpoints.save(failure.step, failure.state)
                    raise ValueError(
                        f"{phase}: {failure} (saved before step {failure.step}; resume=true goes on)"
                    ) from None


def _judged(heldout: Any) -> Any:
    """A held-out reward as a host function."""
    return heldout.answers if isinstance(heldout, HostReward) else partial(score, heldout)


def use_compilation_cache(cache: Path) -> None:
    """Keep compiled programs on disk between runs."""
    os.makedirs(cache / "xla", exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # it compiles without
