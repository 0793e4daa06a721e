"""Methods of recipes: what `method/*.yaml` name. Each takes a prior and a task and returns samples and what they cost.

A method here only assembles the library's own samplers and tuners; the mathematics is theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rgdiff import samplers
from rgdiff.rewards import RewardFailure, Task
from rgdiff.runtime.priors import Prior
from rgdiff.runtime.progress import pieces, progress
from rgdiff.runtime.run import Run

Curves = dict[str, tuple[Sequence[float], Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Samples x0 [N, ...] of one method, its costs, curves for the report, name -> (x, y), and figures of its own for the table.

    `shown` are other samples that the report draws beside x0, by what they are; `pictures` are drawn already, 8-bit
    [N, H, W, C] by title.
    """

    x0: np.ndarray
    network_calls: int
    kl: float
    seconds: float
    compile_seconds: float
    tuning_network_calls: int = 0
    curves: Curves = dataclasses.field(default_factory=dict)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    shown: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    temperature: float | None = None  # of the law that the method aims at, p(x) exp(r(x)/temperature)/Z, if it has one


@contextlib.contextmanager
def shown(phase: str, moves: int) -> Iterator[dict[str, Any]]:
    """Show the progress of a chain: options for `samplers.sample`."""
    with progress(f"{phase}: sampling", moves) as advance:
        done = 0

        def on_chunk(stop: int, total: int) -> None:
            nonlocal done
            advance(stop - done)
            done = stop

        quarter = max(
            1, -(-moves // 4)
        )  # pieces of a quarter or less; a short chain that has no such divisor stays whole
        chunk = pieces(moves, quarter, max(2, moves // 10)) or (moves if moves < 100 else quarter)
        yield {"chunk": chunk, "on_chunk": on_chunk}


def draw(run: Run, phase: str, sampler: Any, prior: Prior, count: int, keep: Any = None) -> Any:
    """Draw `count` samples on the prior's times, and under its conditions, with progress; the keys are the phase's."""
    with shown(phase, prior.times.shape[0] - 1) as options:
        try:
            out = samplers.sample(
                sampler, run.key(phase), count, prior.times, prior.conditions(count), keep=keep, **options
            )
        except RewardFailure as failure:
            raise RewardFailure(f"{phase}: {failure} (resume=true goes on)") from failure
        return jax.block_until_ready(out)


def draw_with_kl(run: Run, phase: str, sampler: Any, prior: Prior, count: int) -> tuple[np.ndarray, float]:
    """Draw samples and, of the same chains, their mean path KL in nats to the prior."""
    compared = dataclasses.replace(sampler, reference=prior.denoiser)
    out = draw(run, phase, compared, prior, count, keep=samplers.path_kl)
    return np.asarray(out.x0), float(samplers.total_path_kl(out).mean())


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """The prior itself."""

    def run(self, run: Run, phase: str, prior: Prior, task: Task, count: int) -> Outcome:
        sampler = samplers.ancestral(prior.process, prior.denoiser)
        with run.clock() as clock:
            out = draw(run, phase, sampler, prior, count)
        calls = sampler.network_calls(len(prior.times) - 1)
        return Outcome(np.asarray(out.x0), calls, 0.0, clock.seconds, clock.compile_seconds)


def nothing(*_: Any) -> Any:
    """Stand in for a denoiser, a value or a reward while settings are checked; it is never called."""
