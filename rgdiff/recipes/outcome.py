"""What a method returns, and how samples are drawn inside a run: with progress, the phase's keys and the prior's conditions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from rgdiff import samplers
from rgdiff.recipes.typing import Outcome, ReadyPrior
from rgdiff.rewards import RewardFailure
from rgdiff.runtime.distributed import gathered, several
from rgdiff.runtime.progress import pieces, progress
from rgdiff.runtime.run import Clock, Diverged, Run
from rgdiff.samplers._projection import merged
from rgdiff.shards import shards_of
from rgdiff.typing import Array, Denoiser, Process, Sampler


def outcome(x0: Any, network_calls: int, clock: Clock, kl: float = math.nan, **more: Any) -> Outcome:
    """Build an outcome from samples (an array, or `samplers.Samples`), a count of network calls and a stopped clock."""
    if isinstance(x0, samplers.Samples):
        more = {"lineages": x0.info.get("lineages"), **more}
        x0 = x0.x0
    return Outcome(np.asarray(x0), network_calls, kl, clock.seconds, clock.compile_seconds, **more)


@contextlib.contextmanager
def shown(phase: str, moves: int, calls: int | None = None) -> Iterator[dict[str, Any]]:
    """Show the progress of a chain, whose loop makes as many calls as moves or another number: options for `samplers.sample`."""
    calls = moves if calls is None else calls
    with progress(f"{phase}: sampling", moves) as advance:
        done = 0

        def on_chunk(stop: int, total: int) -> None:
            nonlocal done
            advance(stop - done)
            done = stop

        quarter = max(
            1, -(-calls // 4)
        )  # pieces of a quarter or less; a short chain that has no such divisor stays whole
        chunk = pieces(calls, quarter, max(2, calls // 10)) or (calls if calls < 100 else quarter)
        yield {"chunk": chunk, "on_chunk": on_chunk}


def draw(
    run: Run,
    phase: str,
    sampler: Sampler,
    prior: ReadyPrior,
    count: int,
    *,
    times: Array | None = None,
    keep: Any = None,
) -> samplers.Samples:
    """Draw `count` samples on the prior's times or others, under its conditions, with progress; the keys are the phase's."""
    times = prior.times if times is None else times
    with shown(phase, times.shape[0] - 1, merged(sampler, times)[1].shape[0] - 1) as options:
        try:
            out = samplers.sample(
                sampler,
                run.key(phase),
                count,
                times,
                prior.conditions(count),
                keep=keep,
                mesh=_divided(run.mesh, count),
                **options,
            )
        except RewardFailure as failure:
            raise RewardFailure(f"{phase}: {failure} (resume=true goes on)") from failure
        return jax.block_until_ready(gathered(out) if several() else out)


def _divided(mesh: Any, count: int) -> Any:
    """The mesh, where the samples can be split over it evenly; else every device draws them all."""
    return None if mesh is None or count % shards_of(mesh).count else mesh  # type: ignore[union-attr]


def draw_with_kl(run: Run, phase: str, sampler: Any, prior: ReadyPrior, count: int) -> tuple[np.ndarray, float]:
    """Draw samples and, of the same chains, their mean path KL in nats to the prior."""
    compared = dataclasses.replace(sampler, reference=prior.denoiser)
    out = draw(run, phase, compared, prior, count, keep=samplers.path_kl)
    return np.asarray(out.x0), float(samplers.total_path_kl(out).mean())


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Samples of a tuned model, and `path_kl()`: its mean path KL in nats to the prior."""

    x0: np.ndarray
    path_kl: Callable[[], float]


def draw_tuned(run: Run, phase: str, prior: ReadyPrior, tuned: Denoiser, process: Process, count: int) -> Tuned:
    """Draw samples of a tuned model on this process.

    The path KL is of the same chains where the process has a law. Where it has none (eta = 0), asking for it draws others, of the
    prior's process with eta = 1.
    """
    sampler = samplers.ancestral(process, tuned)
    if process.stochastic:
        x0, kl = draw_with_kl(run, phase, sampler, prior, count)
        return Tuned(x0, lambda: kl)
    x0 = np.asarray(draw(run, phase, sampler, prior, count).x0)
    process = prior.process if prior.process.stochastic else prior.with_eta(1.0)
    lawful = samplers.ancestral(process, tuned)
    return Tuned(x0, lambda: draw_with_kl(run, f"{phase}_kl", lawful, prior, count)[1])


def without_divergence(run: Run, key: str, prior: ReadyPrior, outcome: Outcome) -> Outcome:
    """Count the samples that diverged, among the outcome's figures, and say so.

    Raises:
      Diverged: where fewer than two samples are left.
    """
    count, gone = len(outcome.x0), int(samplers.divergent(prior.process, outcome.x0).sum())
    if not gone:
        return outcome
    said = f"{key}: {gone} of {count} samples diverged; lower its learning rate or its scale (a higher temperature), or take more steps"
    if count - gone < 2:
        raise Diverged(said)
    run.say(said)
    return dataclasses.replace(outcome, figures=outcome.figures | {"divergent": float(gone)})


def _nothing(*_: Any) -> Any:
    raise AssertionError("a stand-in is never called")


nothing: Any = _nothing  # stands in for a denoiser, a value or a reward while settings are checked
