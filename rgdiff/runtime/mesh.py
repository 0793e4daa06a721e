"""A one-dimensional device mesh: examples over devices, parameters everywhere.

Assumes that the leading axis of a batch is the axis to spread, and that compiled programs follow their
arguments' shardings. Larger layouts (parameters over devices, several hosts) are left to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh ("data",) over `devices`, by default all of them; its axis is of type Auto."""
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("data_mesh: no devices given, expected at least one")
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Spread the leading axis of every leaf [B, ...] over the mesh.

    Raises:
      ValueError: if a leaf has no leading axis, or B is not a multiple of the number of devices.
    """
    count = mesh.shape["data"]
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        shape = jax.numpy.shape(leaf)
        if not shape or shape[0] % count:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"shard_batch: leaf {name!r} has shape {shape}, expected a leading axis that is a multiple "
                f"of the {count} devices; change the batch size"
            )
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of every leaf on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
