"""The one training loop: `fit` scans a tuner's step in compiled chunks; all tuners share `TrainState` and `update`.

Random numbers and batches depend on the key and the step's index alone, so a run that is interrupted at a chunk and
continued from its state is the same run, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.rewards import failures, host_rewards
from rgdiff.shards import Shards, on_mesh, placed, shards_of, split, strata, take
from rgdiff.tuners.ema import ema_update
from rgdiff.typing import Array, Info, Key, Params, Tuner


class TrainState(NamedTuple):
    """The state between steps. `best` are the parameters to sample with: the average where one is kept.

    Args:
      params: the parameters.
      opt_state: of the optimiser.
      average: the exponential moving average of the parameters, or None.
      step: number of steps taken, int32.
      skipped: number of steps whose gradient was not finite and that changed nothing, int32.
      extra: further state of a tuner: an adapted KL weight, running statistics, a critic.
    """

    params: Params
    opt_state: Any
    average: Params | None
    step: Array
    skipped: Array
    extra: Any = None

    @property
    def best(self) -> Params:
        """The parameters to sample with: the average where one is kept."""
        return self.params if self.average is None else self.average


def start(params: Params, optimizer: Any, *, average: bool = False, extra: Any = None) -> TrainState:
    """Begin training from `params`, which are copied (`fit` donates its state).

    Args:
      params: a pytree of arrays.
      optimizer: an optax gradient transformation.
      average: keep an average of the parameters, `state.average`, which begins at `params`.
      extra: further arrays of the tuner, copied into `state.extra`.

    Returns:
      A `TrainState` at step 0.

    Raises:
      ValueError: for params that are no arrays (a module), or an optimizer that is no optax transformation.

    Example:
      >>> import jax.numpy as jnp, optax, rgdiff
      >>> state = rgdiff.tuners.start({"w": jnp.zeros(2)}, optax.sgd(0.1), average=True)
      >>> print(int(state.step), state.best["w"].shape)
      0 (2,)
    """
    params, optimizer = checks.params(params), checks.optimizer(optimizer)
    average = copied(params) if average else None  # type: ignore[assignment]
    return TrainState(copied(params), optimizer.init(params), average, jnp.int32(0), jnp.int32(0), copied(extra))


def copied(tree: Any) -> Any:
    """Return the tree in buffers of its own."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def update(
    state: TrainState, gradients: Params, optimizer: Any, ema_decay: Array | float | None = None
) -> tuple[TrainState, Info]:
    """Apply one optimiser step, or none and count it as skipped where a gradient is not finite.

    Args:
      state: a `TrainState`.
      gradients: a pytree like `state.params`, of a loss to be lowered.
      optimizer: the optax transformation that the state was started with.
      ema_decay: of the average, where the state keeps one. It warms up: at step n the decay is min(ema_decay, (1 + n) / (10 + n)).
        None leaves the average as it is.

    Returns:
      The next state, and info with `gradient_norm` (before the optimiser clips it) and `skipped` so far.

    Example:
      >>> import jax.numpy as jnp, optax, rgdiff
      >>> adam = optax.sgd(0.5)
      >>> state, info = rgdiff.tuners.update(rgdiff.tuners.start(jnp.zeros(2), adam), jnp.array([3.0, 4.0]), adam)
      >>> print(state.params, float(info["gradient_norm"]))
      [-1.5 -2. ] 5.0
    """
    import optax

    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    safe = jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), gradients)
    updates, opt_state = optimizer.update(safe, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
    params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
    average = state.average
    if average is not None and ema_decay is not None:
        average = keep(ema_update(average, params, ema_decay, state.step), average)
    skipped = state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
    state = TrainState(params, opt_state, average, state.step + 1, skipped, state.extra)
    return state, {"gradient_norm": norm, "skipped": skipped}


def fit(
    tuner: Tuner,
    key: Key,
    state: Any,
    steps: int,
    *,
    data: Any = None,
    batch: int | None = None,
    chunk: int = 50,
    on_chunk: Callable[[Any, Info], None] | None = None,
    mesh: Any = None,
) -> Any:
    """Train until `state.step` is `steps`, or `state.stopped` (`early_stopping`), `chunk` steps to a compiled call.

    Random numbers and rows depend on the key and the step alone: an interrupted run that is continued ends in the same numbers.

    Args:
      tuner: from one of the constructors of `rgdiff.tuners`.
      key: a typed PRNG key; the same key must be given when a run is continued.
      state: from `tuner.init(params)` or a checkpoint; its buffers are donated.
      steps: the total number, so that continuing an interrupted run is the same call.
      data: a pytree of arrays [N, ...] on the device; every step gets `batch` rows of it, one from each of `batch` equal parts, so
        that every row is as probable as any.
      batch: rows per step, where there are data.
      chunk: steps in one compiled call.
      on_chunk: called as (state, infos) between chunks; infos hold one value per step, on the host. Copy the parts of the state
        that you keep: the next chunk donates it.
      mesh: devices over which the rows of every batch are split, as in `samplers.sample`; data whose N is a multiple of their number
        are split too, and each device draws from its own. The state is copied to all of them, except for parameters that lie on
        the mesh in another way. The numbers are those of one device, up to rounding; gradients are summed over devices once an update.

    Returns:
      The final state.

    Raises:
      ValueError: for anything else than a tuner, a batch that is no multiple of the devices, a state whose buffers an earlier call took, data that do not fit the tuner's
        process: another shape, tokens that are not one-hot, images in 0 ... 255.
      RewardFailure: where a reward raises, or returns something else than one number per sample; of a host reward its `state`
        is that of before the chunk, from which the same call continues.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x
      >>> tuner = rgdiff.tuners.pretraining(model, process, optax.sgd(0.5), target="x0", ema_decay=0.0)
      >>> data = {"x0": jnp.full((8, 1), 3.0)}
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2, data=data, batch=4)
      >>> print(state.best)
      [3.]
    """
    hint = "an online method needs its reward: fit(as_tuner(method, reward), ...) or fit_online(method, ..., reward)"
    online = callable(getattr(tuner, "rollout", None)) and not callable(getattr(tuner, "step", None))
    checks.driven("a tuner", tuner, ("init", "step"), hint if online else "see the constructors of rgdiff.tuners")
    checks.key(key)
    checks.state(state)
    steps, chunk = checks.at_least("steps", steps, 0), checks.at_least("chunk", chunk, 1)
    if data is not None:
        checks.rows(data, batch)
    if hasattr(tuner, "suits"):
        tuner.suits(data)  # type: ignore[attr-defined]
    shards = shards_of(mesh)
    tuner, state, data = spread_out(tuner, state, data, batch, shards)
    layout = layout_of(state, shards)
    done = int(state.step)
    while done < steps:
        count = min(chunk - done % chunk, steps - done)
        with failures(tuner) as settle:
            before = copied(state) if host_rewards(tuner) else None  # to go on from, where the reward raises
            state, infos = settle(_advance(tuner, key, state, data, count, batch, shards, layout), before, done)
        done += count
        if on_chunk is not None:
            on_chunk(state, jax.device_get(infos))
        if getattr(state, "stopped", False):
            break
    return state


def spread_out(method: Any, state: Any, data: Any, batch: int | None, shards: Shards | None) -> tuple[Any, Any, Any]:
    """Return a method that knows the shards, with its state and data on their mesh; refuse batches that cannot be split."""
    if shards is None:
        return method, state, data
    own = getattr(method, "batch", None)  # of chains; the rows of data are then their conditions, or data beside them
    checks.divided(*(("batch", batch) if own is None else ("the tuner's batch", own)), shards)
    method, state = on_mesh(method, shards), placed(state, shards)
    if hasattr(method, "over_devices"):  # of a state that holds rows
        state = jax.jit(method.over_devices)(state)
    return method, state, placed(data, shards, rows=True)


def layout_of(state: Any, shards: Shards | None) -> tuple[Any, ...] | None:
    """The shardings of the leaves of a state on a mesh, which its next states have too: no program is compiled twice for another."""
    return None if shards is None else tuple(leaf.sharding for leaf in jax.tree.leaves(state))


def laid_out(state: Any, layout: tuple[Any, ...] | None) -> Any:
    """Constrain a state to a layout."""
    if layout is None:
        return state
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, map(jax.lax.with_sharding_constraint, leaves, layout))


def draw_rows(key: Key, data: Any, batch: int | None, shards: Shards | None = None) -> Any:
    """Draw `batch` rows of the data [N, ...], one from each of as many equal parts (`shards.strata`); None where there are none."""
    if data is None or batch is None:
        return None
    chosen = strata(key, batch, jax.tree.leaves(data)[0].shape[0])
    return take(data, split(chosen, shards), shards)


def train(
    tuner: Tuner,
    key: Key,
    state: Any,
    data: Any,
    count: int,
    batch: int | None,
    shards: Shards | None = None,
    layout: tuple[Any, ...] | None = None,
) -> tuple[Any, Info]:
    """Take `count` steps, inside another program or as `fit`'s; returns the state and infos with one value per step."""

    def one(state: Any, _: None) -> tuple[Any, Info]:
        key_batch, key_step = jax.random.split(jax.random.fold_in(key, state.step))
        state, info = tuner.step(key_step, state, draw_rows(key_batch, data, batch, shards))
        return laid_out(state, layout), info

    if count == 1:  # see samplers._loop.roll
        state, info = one(state, None)
        return state, jax.tree.map(lambda i: i[None], info)
    state, infos = jax.lax.scan(one, state, None, length=count)
    return laid_out(state, layout), infos


_advance = jax.jit(train, static_argnames=("count", "batch", "shards", "layout"), donate_argnames=("state",))
