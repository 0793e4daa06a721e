"""The one denoising loop: `roll` scans a sampler over a time grid, `sample` is its compiled public door.

Every sampler, and every tuner that differentiates through sampling, goes through `roll`. Random numbers depend on the
key and the index of the move alone, so a chain cut into chunks, or into a dead head and a live tail, is the same chain;
arrays are global, so results do not depend on how many devices hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.denoisers import needs_signal
from rgdiff.typing import Array, Cond, Info, Key, Sampler, State, pytree

Keep = Callable[[Any, Info], Any]

REMAT = ("none", "everything", "dots", "offload")


def rematerialize(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wrap a function so that reverse mode recomputes it: `none`, `everything`, or all but matrix products.

    Those stay on the device (`dots`) or go to the host's pinned memory (`offload`).
    """
    checks.one_of("remat", remat, REMAT)
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = {
        "everything": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[remat]
    return jax.checkpoint(function, policy=policy)  # type: ignore[return-value]


def roll(
    sampler: Sampler,
    key: Key,
    carry: Any,
    times: Array,
    cond: Cond = None,
    *,
    first: Array | int = 0,
    keep: Keep | None = None,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Advance `carry` through the moves times[0] -> times[1] -> ... of one chain.

    Args:
      times: [n + 1], decreasing.
      first: index of the first of these moves in the whole chain; it selects the random numbers.
      keep: (carry, info) -> what to store after every move; stacked on a leading axis [n].
      remat: see `rematerialize`; applies to each move.

    Returns:
      The carry, and what was kept.
    """
    moves = times.shape[0] - 1

    def move(carry: Any, where: tuple[Key, Array, Array]) -> tuple[Any, Any]:
        key, t, s = where
        carry, info = sampler.step(key, carry, t, s, cond)
        return carry, None if keep is None else keep(carry, info)

    move = rematerialize(move, remat)
    # All keys at once: on a CPU, folding one in at every move took longer than a small kernel's step.
    keys = jax.vmap(lambda index: jax.random.fold_in(key, 1 + index))(first + jnp.arange(moves))
    where = (keys, times[:-1], times[1:])
    if moves == 1:  # a scan of length one costs a loop and, on a CPU, the fast convolution gradients
        carry, kept = move(carry, jax.tree.map(lambda w: w[0], where))
        return carry, jax.tree.map(lambda k: k[None], kept)
    return jax.lax.scan(move, carry, where)


class Samples(NamedTuple):
    """What `sample` returns: x0 [B, ...], what `keep` stored, [T, ...] per leaf (None without `keep`), and the sampler's last word.

    `samplers.divergent(process, x0)` says which samples diverged, as under a guide that is too strong.
    `info` is what `final` reports: nothing for most methods; log-weights, ESS and log Z for particle methods.
    """

    x0: State
    kept: Any
    info: Info


@pytree
class Drawing:
    """A sampler on its grid as a function (key, batch) -> x0, for use inside another program. Build it with `drawing`."""

    sampler: Sampler
    times: Array

    def __call__(self, key: Key, batch: int, cond: Cond = None) -> State:
        return _run(self.sampler, key, self.times, cond, batch, None, None)[0]


def drawing(sampler: Sampler, times: Array) -> Drawing:
    """Make a sampler the law of another chain's beginning (`processes.started_from`): the draws of `sample`, key for key."""
    times = checks.times(times, sampler.process)  # type: ignore[attr-defined]
    needs_signal(sampler, times)
    return Drawing(sampler, times)


def sample(
    sampler: Sampler,
    key: Key,
    batch: int,
    times: Array,
    cond: Cond = None,
    *,
    keep: Keep | None = None,
    chunk: int | None = None,
    on_chunk: Callable[[int, int], None] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Samples:
    """Draw `batch` samples in one compiled program.

    Numbers inside the sampler (temperatures, scales, network parameters) and the times can change without a
    recompilation; `batch`, the length of `times`, `keep` and counts inside the sampler cannot.

    Args:
      sampler: from one of the constructors of `rgdiff.samplers`.
      key: a typed PRNG key.
      batch: B, number of samples.
      times: [T + 1], decreasing from noise; `process.times(steps)` makes it.
      cond: conditions, a pytree of [B, ...], or None.
      keep: (carry, info) -> pytree to store after each move, e.g. `lambda carry, info: info["value"]`; None stores nothing.
      chunk: moves per compiled call; with it `on_chunk(done, T)` is called between chunks to show progress. The
        result is the same.
      mesh: a mesh with an axis named "data" over which the batch is split.

    Returns:
      Samples(x0, kept, info).

    Raises:
      ValueError: for a legacy key, a batch below 1, a bad time grid, or conditions that are not [B, ...].

    Example:
      >>> import jax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (2,))
      >>> sampler = rgdiff.samplers.ancestral(process, lambda x, t, cond: x * process.schedule.alpha(t))
      >>> rgdiff.samplers.sample(sampler, jax.random.key(0), 4, process.times(10)).x0.shape
      (4, 2)
    """
    checks.key(key)
    batch = checks.at_least("batch", batch, 1)
    times = checks.times(times, sampler.process)  # type: ignore[attr-defined]
    needs_signal(sampler, times)
    for leaf in jax.tree.leaves(cond):
        if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != batch:
            raise ValueError(f"cond must have a leading axis of {batch} examples, got shape {list(jnp.shape(leaf))}")
    if chunk is None or times.shape[0] == 1:  # a chain of one network call has no moves to cut
        return Samples(*_whole(sampler, key, times, cond, batch, keep, mesh))
    chunk = checks.at_least("chunk", chunk, 1)
    carry = _begin(sampler, key, times[0], cond, batch, mesh)
    moves, pieces = times.shape[0] - 1, []
    for done in range(0, moves, chunk):
        stop = min(done + chunk, moves)
        carry, kept = _advance(sampler, key, carry, times[done : stop + 1], cond, done, keep)
        pieces.append(kept)
        if on_chunk is not None:
            jax.block_until_ready(carry)
            on_chunk(stop, moves)
    kept = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces) if keep is not None else None
    x0, info = _finish(sampler, carry, times[-1], cond)
    return Samples(x0, kept, info)


def _start(sampler: Sampler, key: Key, t: Array, cond: Cond, batch: int, mesh: jax.sharding.Mesh | None) -> Any:
    carry = sampler.init(jax.random.fold_in(key, 0), batch, t, cond)
    if mesh is None:
        return carry
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    split = lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding)  # noqa: E731
    rows = lambda leaf: leaf.ndim > 0 and leaf.shape[0] % batch == 0  # noqa: E731 - of examples, or of N chains each
    return jax.tree.map(lambda leaf: split(leaf) if rows(leaf) else leaf, carry)


def _run(
    sampler: Sampler, key: Key, times: Array, cond: Cond, batch: int, keep: Keep | None, mesh: jax.sharding.Mesh | None
) -> tuple[State, Any, Info]:
    carry = _start(sampler, key, times[0], cond, batch, mesh)
    carry, kept = roll(sampler, key, carry, times, cond, keep=keep)
    x0, info = sampler.final(carry, times[-1], cond)
    return x0, kept, info


_whole = jax.jit(_run, static_argnames=("batch", "keep", "mesh"))
_begin = jax.jit(_start, static_argnames=("batch", "mesh"))
_finish = jax.jit(lambda sampler, carry, t, cond: sampler.final(carry, t, cond))


def _advance_chunk(
    sampler: Sampler, key: Key, carry: Any, times: Array, cond: Cond, first: Array, keep: Keep | None
) -> tuple[Any, Any]:
    return roll(sampler, key, carry, times, cond, first=first, keep=keep)


_advance = jax.jit(_advance_chunk, static_argnames=("keep",))
