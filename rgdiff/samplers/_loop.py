"""The denoising loop: `roll` scans a sampler over a time grid, `sample` compiles it and is what users call.

Every sampler, and every tuner that differentiates through sampling, uses `roll`. Random numbers depend on the
key and the index of the move alone, so a chain cut into chunks, or into a head without and a tail with gradients, is the same
chain. Arrays are global, so results do not depend on the number of devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.denoisers import needs_signal
from rgdiff.rewards import failures
from rgdiff.samplers._projection import arrived, merged
from rgdiff.shards import Shards, on_mesh, shards_of, split
from rgdiff.typing import Array, Cond, Info, Key, Sampler, State, pytree, static

Keep = Callable[[Any, Info], Any]

REMAT = ("none", "everything", "dots", "offload")


def rematerialize(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wrap a function so that reverse mode recomputes its intermediate values.

    Args:
      function: any function of arrays.
      remat: `none` stores all; `everything` recomputes all; `dots` stores the results of matrix products on the device;
        `offload` stores those in the host's pinned memory.

    Returns:
      A function with the same values and gradients.
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
    """Advance a sampler's carry through the moves times[0] -> times[1] -> ... of one chain.

    Args:
      sampler: from one of the constructors of `rgdiff.samplers`.
      key: a typed PRNG key, that of the whole chain.
      carry: from `sampler.init`, or from an earlier `roll`.
      times: [n + 1], decreasing.
      cond: conditions, a pytree of [B, ...], or None.
      first: index of the first of these moves in the whole chain; it selects the random numbers.
      keep: (carry, info) -> pytree to store after every move; stacked on a leading axis [n].
      remat: see `rematerialize`; applies to each move.

    Returns:
      The carry after the moves, and the stored pytree (None without `keep`).

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (2,), eta=0.0)
      >>> sampler = rgdiff.samplers.ancestral(process, lambda x, t, cond: 0 * x)  # x_t = sigma_t eps
      >>> x = sampler.init(jax.random.key(0), 1, process.times(4)[0])
      >>> y, _ = rgdiff.samplers.roll(sampler, jax.random.key(0), x, jnp.array([0.5, 0.1]))
      >>> print(jnp.allclose(y / x, process.schedule.sigma(0.1) / process.schedule.sigma(0.5), rtol=1e-4))
      True
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
    """Samples of a chain and what the sampler reports; returned by `sample`.

    Args:
      x0: the samples, leaves [B, ...]. `samplers.divergent(process, x0)` finds those that diverged.
      kept: what `keep` returned after every move, leaves [T, ...]; None without `keep`.
      info: what the sampler's `final` reports: nothing for most methods; log-weights, ESS and log Z for particle methods.
    """

    x0: State
    kept: Any
    info: Info


@pytree
class Drawing:
    """A sampler on its grid as a function (key, batch) -> x0, for use inside another program. Build it with `drawing`."""

    sampler: Sampler
    times: Array
    shards: Shards | None = static(default=None)

    def __call__(self, key: Key, batch: int, cond: Cond = None) -> State:
        return _run(self.sampler, key, self.times, cond, batch, None, self.shards)[0]


def drawing(sampler: Sampler, times: Array) -> Drawing:
    """Make a sampler on its grid a function (key, batch) -> x0, e.g. the start of another chain (`processes.started_from`).

    Args:
      sampler: from one of the constructors of `rgdiff.samplers`.
      times: [T + 1], decreasing; `process.times(steps)` makes it.

    Returns:
      A callable pytree, (key, batch) -> x0 [B, ...], with the samples of `sample` for the same key.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (2,))
      >>> sampler = rgdiff.samplers.ancestral(process, lambda x, t, cond: jnp.full_like(x, 3.0))
      >>> print(rgdiff.samplers.drawing(sampler, process.times(4))(jax.random.key(0), 1))
      [[3. 3.]]
    """
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
    mesh: Any = None,
) -> Samples:
    """Draw `batch` samples in one compiled program.

    Numbers inside the sampler (temperatures, scales, network parameters) and the times can change without a
    recompilation; `batch`, the length of `times`, `keep` and counts inside the sampler cannot.

    Samples of `ancestral` in Gaussian chains have the gradient of the whole chain. Those of other samplers, whose draws and
    selections have none, raise where they are differentiated; tuners take gradients through chains of every kind.

    Args:
      sampler: from one of the constructors of `rgdiff.samplers`.
      key: a typed PRNG key.
      batch: B, number of samples.
      times: [T + 1], decreasing from noise; `process.times(steps)` makes it.
      cond: conditions, a pytree of [B, ...], or None.
      keep: (carry, info) -> pytree to store after each move, e.g. `lambda carry, info: info["value"]`; None stores nothing.
      chunk: moves per compiled call; None compiles the chain as one call. The result is the same.
      on_chunk: (done, T) -> None, called between chunks to show progress.
      mesh: devices over which the batch is split: a mesh with an axis named "data", e.g. `runtime.mesh.data_mesh()`, or
        `NamedSharding(mesh, PartitionSpec(axes))` for axes of other names. The samples are those of one device.

    Returns:
      Samples(x0, kept, info).

    Raises:
      ValueError: for a legacy key, a batch below 1, a bad time grid, conditions that are not [B, ...], or a reward, value or
        denoiser that returns something else than [B] and a prediction of the state's shape.
      RewardFailure: a ValueError, where a reward raises.

    Example:
      >>> import jax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (2,))
      >>> sampler = rgdiff.samplers.ancestral(process, lambda x, t, cond: x * process.schedule.alpha(t))
      >>> rgdiff.samplers.sample(sampler, jax.random.key(0), 4, process.times(10)).x0.shape
      (4, 2)
    """
    checks.driven(
        "a sampler",
        sampler,
        ("init", "step", "final"),
        "see the constructors of rgdiff.samplers: sample(sampler, key, batch, times)",
    )
    checks.key(key)
    batch = checks.at_least("batch", batch, 1)
    times = checks.times(times, sampler.process)  # type: ignore[attr-defined]
    needs_signal(sampler, times)
    checks.conditions(cond, batch)
    shards = shards_of(mesh)
    checks.divided("batch", batch, shards)
    sampler = on_mesh(sampler, shards)
    with failures(sampler) as settle:
        if chunk is None or times.shape[0] == 1:  # a chain of one network call has no moves to cut
            return settle(Samples(*_whole(sampler, key, times, cond, batch, keep, shards)))
        chunk = checks.at_least("chunk", chunk, 1)
        carry = settle(_begin(sampler, key, times[0], cond, batch, shards))
        moving, grid = merged(sampler, times)
        keeping = keep if moving is sampler else WithInfo(keep)
        total, moves, pieces = grid.shape[0] - 1, times.shape[0] - 1, []
        for done in range(0, total, chunk):
            stop = min(done + chunk, total)
            carry, kept = settle(_advance(moving, key, carry, grid[done : stop + 1], cond, done, keeping))
            pieces.append(kept)
            if on_chunk is not None and done < moves:
                jax.block_until_ready(carry)
                on_chunk(min(stop, moves), moves)
        kept = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces) if keeping is not None else None
        if moving is not sampler:
            return Samples(arrived(moving.process, carry), *without_last(kept))
        x0, info = settle(_finish(sampler, carry, times[-1], cond))
        return Samples(x0, kept, info)


@dataclasses.dataclass(frozen=True)
class WithInfo:
    """Keeps what `keep` does, and the move's own info."""

    keep: Keep | None

    def __call__(self, carry: Any, info: Info) -> Any:
        return None if self.keep is None else self.keep(carry, info), info


def without_last(kept: Any) -> tuple[Any, Info]:
    """Return what is kept of the moves of a merged chain, and the info of its projection."""
    chosen, info = kept
    return jax.tree.map(lambda leaf: leaf[:-1], chosen), jax.tree.map(lambda leaf: leaf[-1], info)


@jax.custom_jvp
def _constant(leaf: Array) -> Array:
    return leaf


@_constant.defjvp
def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "these samples have no gradient: draws of tokens, candidates and particles cut it; take ancestral(..., differentiable=True), "
        "a tuner of rgdiff.tuners, or hand the sampler jax.lax.stop_gradient(params) where none is meant"
    )


def without_gradient(tree: Any) -> Any:
    """Return the same numbers, whose differentiation raises: a gradient that would be cut in silence further on."""
    floats = lambda leaf: isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: _constant(leaf) if floats(leaf) else leaf, tree)


def _cut(sampler: Sampler, tree: Any) -> Any:
    """Return numbers that samples depend on, or samples: without a gradient where the sampler gives them none."""
    return tree if getattr(sampler, "differentiable", False) else without_gradient(tree)


def _start(sampler: Sampler, key: Key, t: Array, cond: Cond, batch: int, shards: Shards | None) -> Any:
    sampler, cond = _cut(sampler, (sampler, cond))
    carry = sampler.init(jax.random.fold_in(key, 0), batch, t, cond)
    if hasattr(sampler, "over_devices"):  # not all that it carries is of one sample
        return sampler.over_devices(carry)  # type: ignore[attr-defined]
    rows = lambda leaf: leaf.ndim > 0 and leaf.shape[0] % batch == 0  # noqa: E731 - of examples, or of N chains each
    return jax.tree.map(lambda leaf: split(leaf, shards) if rows(leaf) else leaf, carry)


def _run(
    sampler: Sampler, key: Key, times: Array, cond: Cond, batch: int, keep: Keep | None, shards: Shards | None
) -> tuple[State, Any, Info]:
    carry = _start(sampler, key, times[0], cond, batch, shards)
    moving, grid = merged(sampler, times)
    keeping = keep if moving is sampler else WithInfo(keep)
    carry, kept = _advance_chunk(moving, key, carry, grid, cond, 0, keeping)
    if moving is not sampler:
        return _cut(sampler, arrived(moving.process, carry)), *without_last(kept)
    x0, info = _end(sampler, carry, times[-1], cond)
    return x0, kept, info


_whole = jax.jit(_run, static_argnames=("batch", "keep", "shards"))
_begin = jax.jit(_start, static_argnames=("batch", "shards"))


def _end(sampler: Sampler, carry: Any, t: Array, cond: Cond) -> tuple[State, Info]:
    given, t, cond = _cut(sampler, (sampler, t, cond))
    return _cut(sampler, given.final(carry, t, cond))


_finish = jax.jit(_end)


def _advance_chunk(
    sampler: Sampler, key: Key, carry: Any, times: Array, cond: Cond, first: Array | int, keep: Keep | None
) -> tuple[Any, Any]:
    sampler, times, cond = _cut(sampler, (sampler, times, cond))
    return roll(sampler, key, carry, times, cond, first=first, keep=keep)


_advance = jax.jit(_advance_chunk, static_argnames=("keep",))
