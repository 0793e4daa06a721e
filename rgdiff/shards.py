"""Rows of a batch over the devices of a mesh, with the numbers of one device and one sum of gradients an update.

Programs are written for one device. `Shards`, a static field of samplers and tuners, says over which axes of which mesh rows lie;
what is made inside (chains, drawn rows, minibatches) is constrained by `split`, and XLA's partitioner does the rest: draws,
means and selections mean the same whatever the number of devices. The one thing it does badly is a gradient inside a loop, which
it sums over devices in every turn. So gradients are taken with respect to `Copies` of the parameters, one a device, whose
networks run under `shard_map`; each device's gradient stays its own until the end, where `value_and_grad` sums them once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rgdiff.typing import Array, Params, callable_pytree, pytree, shown, static


@dataclasses.dataclass(frozen=True)
class Shards:
    """A mesh and those of its axes over which rows are split; hashable, so that it can be part of a program's structure."""

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of parts."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def rows(self) -> NamedSharding:
        """The leading axis is split."""
        return NamedSharding(self.mesh, PartitionSpec(self.axes))

    @property
    def everywhere(self) -> NamedSharding:
        """Every device has a copy."""
        return NamedSharding(self.mesh, PartitionSpec())


def shards_of(mesh: Any) -> Shards | None:
    """Return the shards that `mesh=` of `sample`, `fit` and `fit_online` means, or None for None.

    Args:
      mesh: a mesh, whose axes named "data" or "dcn_data", or whose only axis, split rows; or, for any other axes,
        `NamedSharding(mesh, PartitionSpec(("x", "y")))`.

    Raises:
      ValueError: for a mesh without such an axis, axes of type Explicit or Manual, or anything else.

    Example:
      >>> import jax
      >>> from rgdiff.runtime.mesh import data_mesh
      >>> from rgdiff.shards import shards_of
      >>> print(shards_of(data_mesh(jax.devices()[:1])).axes)
      ('data',)
    """
    if mesh is None or isinstance(mesh, Shards):
        return mesh
    if isinstance(mesh, NamedSharding):
        mesh, spec = mesh.mesh, mesh.spec
        if len(spec) != 1 or spec[0] is None:
            raise ValueError(f"mesh=NamedSharding(...) splits the leading axis alone, PartitionSpec(axes), got {spec}")
        axes = (spec[0],) if isinstance(spec[0], str) else tuple(spec[0])
    elif isinstance(mesh, Mesh):
        axes = tuple(name for name in mesh.axis_names if name in ("dcn_data", "data"))
        axes = axes or (mesh.axis_names if len(mesh.axis_names) == 1 else ())
        if not axes:
            raise ValueError(
                f'mesh has the axes {mesh.axis_names} and none named "data"; say which split the batch: '
                "mesh=NamedSharding(mesh, PartitionSpec(names))"
            )
    else:
        raise ValueError(f"mesh must be a jax.sharding.Mesh, e.g. runtime.mesh.data_mesh(), got {shown(mesh)}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "the mesh's axes must be of type Auto: runtime.mesh.data_mesh(), or "
            "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))"
        )
    return Shards(mesh, axes)


def on_mesh(method: Any, shards: Shards | None) -> Any:
    """Return a sampler or tuner all of whose parts know the shards: those with a field `shards`.

    Args:
      method: any; what is no dataclass comes back as it is.
      shards: from `shards_of`; None changes nothing.
    """
    if shards is None or not dataclasses.is_dataclass(method) or isinstance(method, type):
        return method
    changes = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        new = shards if field.name == "shards" else value if field.metadata.get("static") else on_mesh(value, shards)
        if new is not value:
            changes[field.name] = new
    return dataclasses.replace(method, **changes) if changes else method


def split(tree: Any, shards: Shards | None, axis: int = 0) -> Any:
    """Constrain an axis of every leaf to lie over the devices; a leaf without it, or of a length that is no multiple, is left.

    Args:
      tree: leaves with rows on `axis`.
      shards: None changes nothing.
    """
    if shards is None:
        return tree
    sharding = NamedSharding(shards.mesh, PartitionSpec(*(None,) * axis, shards.axes))
    fits = lambda leaf: leaf.ndim > axis and leaf.shape[axis] and leaf.shape[axis] % shards.count == 0  # noqa: E731
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding) if fits(leaf) else leaf, tree)


def in_turn(a: Any, b: Any) -> Any:
    """Join two batches [B, ...] to one [2B, ...] whose rows are theirs in turn; split over devices, rows stay where they are.

    `concatenate` would move rows between devices, since each then has a part of one batch alone.
    """
    return jax.tree.map(lambda u, w: jnp.stack([u, w], 1).reshape(2 * len(u), *u.shape[1:]), a, b)


def whole(tree: Any, shards: Shards | None) -> Any:
    """Constrain every leaf to be copied to all devices.

    Args:
      tree: arrays.
      shards: None changes nothing.
    """
    if shards is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, shards.everywhere), tree)


def placed(tree: Any, shards: Shards | None, *, rows: bool = False) -> Any:
    """Put arrays on the mesh, unless they are there: a copy on every device, or with `rows` the leading axis over them.

    Args:
      tree: leaves that lie on the mesh already stay as they are. Rows that are no multiple of the devices are copied.
      shards: None changes nothing.
    """
    if shards is None:
        return tree
    devices = set(shards.mesh.devices.flat)

    def put(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.sharding.device_set == devices:
            return leaf
        whole = not rows or not jnp.ndim(leaf) or jnp.shape(leaf)[0] % shards.count
        return jax.device_put(leaf, shards.everywhere if whole else shards.rows)

    return jax.tree.map(put, tree)


@pytree
class Copies:
    """Parameters, one copy for each part of the data: leaves [n, ...], each device having its own."""

    tree: Any
    shards: Shards = static()


@pytree
class OnShards:
    """A model at `Copies` of its parameters, as a callable of rows: every device calls its own copy with its own rows."""

    model: Any
    params: Copies
    what: str = static()

    def __call__(self, *args: Any) -> Any:
        shards = self.params.shards
        axes, count = shards.axes, jnp.shape(jax.tree.leaves(args[0])[0])[0]
        local = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
        run = lambda model, copies, args: callable_pytree(model(local(copies)), self.what)(*args)  # noqa: E731
        given = self.model, self.params.tree, args
        if count % shards.count:  # rows that cannot be split are everybody's
            return run(*given)
        spec = lambda leaf: PartitionSpec(axes) if jnp.shape(leaf)[:1] == (count,) else PartitionSpec()  # noqa: E731
        out = jax.tree.map(spec, jax.eval_shape(run, *given))
        return _mapped(run, shards, (PartitionSpec(), PartitionSpec(axes), jax.tree.map(spec, args)), out)(*given)


def bound(model: Any, params: Params, what: str) -> Any:
    """Return model(params) as a callable pytree; for `Copies` of the parameters, one that runs on every device by itself.

    Args:
      model: params -> callable of rows.
      params: a pytree of arrays, or `Copies`.
      what: the callable's name in messages, as in `callable_pytree`.
    """
    if isinstance(params, Copies):
        return OnShards(model, params, what)
    return callable_pytree(model(params), what)


def value_and_grad(function: Callable[..., Any], shards: Shards | None, *, has_aux: bool = False) -> Callable[..., Any]:
    """`jax.value_and_grad` with the gradient summed over devices once, after all loops inside.

    The function gets `Copies` of its first argument and hands them to `bound`; nothing else may read them.

    Args:
      function: (params, ...) -> loss, or (loss, aux).
      shards: None takes the plain gradient.
    """
    run = spread(lambda params, *args: jax.value_and_grad(function, has_aux=has_aux)(params, *args)[::-1], shards)
    return lambda *args: run(*args)[::-1]


def spread(function: Callable[..., Any], shards: Shards | None) -> Callable[..., Any]:
    """Return a function (params, ...) -> (gradients, rest) that is called with `Copies`, its gradients summed over devices.

    Args:
      function: its gradients have the structure of its first argument.
      shards: None returns the function.
    """
    if shards is None:
        return function
    axes = shards.axes
    over, one = PartitionSpec(axes), PartitionSpec()
    out = _mapped(lambda tree: jax.tree.map(lambda leaf: leaf[None], tree), shards, (one,), over)
    back = _mapped(lambda tree: jax.lax.psum(jax.tree.map(lambda leaf: leaf[0], tree), axes), shards, (over,), one)

    @functools.wraps(function)
    def run(params: Params, *args: Any) -> tuple[Params, Any]:
        gradients, rest = function(Copies(out(params), shards), *args)
        return back(gradients.tree), rest

    return run


def take(tree: Any, index: Array, shards: Shards | None, axis: int = 0) -> Any:
    """Return rows of every leaf, none of which leaves its device: row i of n must be from the i-th of n parts, as `strata` are.

    Args:
      tree: leaves with rows on `axis`.
      index: [k] integers.
      shards: None, or numbers that are no multiples of the devices: a plain gather.
    """
    plain = lambda leaf: jnp.take(leaf, index, axis, mode="clip")  # noqa: E731
    lengths = {jnp.shape(leaf)[axis] for leaf in jax.tree.leaves(tree)}
    if shards is None or any(length % shards.count for length in (*lengths, index.shape[0])):
        return split(jax.tree.map(plain, tree), shards, axis)
    axes, spec = shards.axes, PartitionSpec(*(None,) * axis, shards.axes)

    def local(tree: Any, index: Array) -> Any:
        part = jax.lax.axis_index(axes)
        mine = lambda leaf: jnp.take(leaf, index - part * leaf.shape[axis], axis, mode="clip")  # noqa: E731
        return jax.tree.map(mine, tree)

    return _mapped(local, shards, (spec, PartitionSpec(axes)), spec)(tree, index)


def own_rows(tree: Any) -> Any:
    """Return, as NumPy arrays, the rows that this process holds of arrays that several share; of others, all."""

    def own(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        parts = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(parts[begin]) for begin in sorted(parts)])

    return jax.tree.map(own, tree)


def joined_rows(rows: np.ndarray, like: Any, shards: Shards | None) -> Any:
    """Return one array of the rows of all processes, each of which gives those that `own_rows` gave it.

    Args:
      rows: [b, ...] of this process.
      like: the array [B, ...] whose rows they belong to.
      shards: None returns the rows.
    """
    if shards is None or like.is_fully_addressable or like.is_fully_replicated:
        return rows
    return jax.make_array_from_process_local_data(shards.rows, rows, (like.shape[0], *rows.shape[1:]))


def strata(key: Array, batch: int, rows: int) -> Array:
    """Draw `batch` of `rows`: the i-th uniformly from the i-th of `batch` equal parts, so that every row is as probable as any.

    A part that begins or ends within a row has that share of it. The draws do not depend on the number of devices, and over any
    number that divides both counts each device draws from its own rows.

    Args:
      key: a PRNG key.
      batch, rows: counts.

    Returns:
      [batch] integers, ascending.
    """
    begin = np.arange(batch, dtype=np.int64) * rows
    offset = jax.random.randint(key, (batch,), 0, rows)  # of `rows` places in a part, `batch` to a row
    return jnp.asarray(begin // batch, jnp.int32) + (jnp.asarray(begin % batch, jnp.int32) + offset) // batch


def by_rows(function: Callable[..., Any], shards: Shards | None, rows: tuple[int | None, ...], out: Any = 0) -> Any:
    """Return a function that every device calls by itself with its own rows: what it shares among rows, it shares within a device.

    Args:
      function: of pytrees.
      shards: None returns the function.
      rows: for each argument the axis of the rows of its leaves, or None for what every device needs whole.
      out: of the results, likewise; a tuple for a tuple.
    """
    if shards is None:
        return function
    over = lambda axis: PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, shards.axes)  # noqa: E731
    mapped = _mapped(function, shards, tuple(map(over, rows)), jax.tree.map(over, out))

    def run(*args: Any) -> Any:
        lengths = {
            leaf.shape[axis]
            for arg, axis in zip(args, rows, strict=True)
            if axis is not None
            for leaf in jax.tree.leaves(arg)
        }
        return (function if any(length % shards.count for length in lengths) else mapped)(*args)

    return run


def _mapped(function: Any, shards: Shards, in_specs: Any, out_specs: Any) -> Any:
    """`shard_map` over the axes of the rows; others (of sharded parameters) stay the partitioner's."""
    return jax.shard_map(
        function,
        mesh=shards.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(shards.axes),
        check_vma=False,
    )
