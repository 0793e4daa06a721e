"""Device meshes: examples over the data axes, and parameters everywhere or over axes of their own.

A mesh goes to `samplers.sample`, `tuners.fit` and `fit_online` as `mesh=`; programs follow their arguments' shardings. The axes are
named as MaxText's and Levanter's users know them: data, fsdp, tensor, and dcn_data over slices or hosts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rgdiff.shards import shards_of

AXES = ("dcn_data", "data", "fsdp", "tensor")
SMALL = 2**14  # numbers; smaller leaves are copied


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh ("data",) over `devices`, by default all of them; its axis is of type Auto."""
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("data_mesh: no devices given, expected at least one")
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Spread the leading axis of every leaf [B, ...] over the data axes of the mesh.

    Raises:
      ValueError: if a leaf has no leading axis, or B is not a multiple of the number of devices.
    """
    shards: Any = shards_of(mesh)
    count = shards.count
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        shape = jax.numpy.shape(leaf)
        if not shape or shape[0] % count:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"shard_batch: leaf {name!r} has shape {shape}, expected a leading axis that is a multiple "
                f"of the {count} devices; change the batch size"
            )
    return jax.device_put(tree, shards.rows)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of every leaf on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def device_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, dcn_data: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Make the mesh (dcn_data, data, fsdp, tensor) over all devices, or those given; its axes are of type Auto.

    Args:
      data: devices over which batches are split; -1 for all that the other axes leave.
      fsdp, tensor: devices over which parameters are split, see `shard_params`.
      dcn_data: slices, or hosts, over which batches are split too, so that only sums of gradients pass the slow network.
      devices: by default all of them.

    Raises:
      ValueError: where the product is not the number of devices.

    Example:
      >>> import jax
      >>> from rgdiff.runtime.mesh import device_mesh
      >>> print(dict(device_mesh(devices=jax.devices()[:1]).shape))
      {'dcn_data': 1, 'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"dcn_data": dcn_data, "data": data, "fsdp": fsdp, "tensor": tensor}
    others = math.prod(size for size in sizes.values() if size != -1)
    if list(sizes.values()).count(-1) == 1 and others > 0 and len(devices) % others == 0:
        sizes = {name: len(devices) // others if size == -1 else size for name, size in sizes.items()}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        shown = " x ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise ValueError(f"the mesh {shown} is not of the {len(devices)} devices; give mesh.data=-1 for what is left")
    shape = tuple(sizes[name] for name in AXES)
    if dcn_data > 1 and len({getattr(device, "slice_index", device.process_index) for device in devices}) == dcn_data:
        from jax.experimental import mesh_utils

        slices = hasattr(devices[0], "slice_index")
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (dcn_data, 1, 1, 1), devices=devices, process_is_granule=not slices
        )
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shard_params(params: Any, mesh: Mesh, rules: Callable[[str, tuple[int, ...]], Any] | None = None) -> Any:
    """Split parameters over the axes "fsdp" and "tensor" of a mesh, for networks that are too large for one device.

    By default a leaf's largest dimension that "fsdp" divides is split over it, and the largest of the others that "tensor" divides
    over that; leaves of fewer than 2^14 numbers are copied. What an optimiser makes of the parameters lies as they do. Adam keeps
    its moments in their dtype: give bfloat16 networks float32 parameters (`dtype=` of `rgdiff.nets` computes in bfloat16).

    Args:
      params: a pytree of arrays.
      mesh: from `device_mesh`.
      rules: (name, shape) -> PartitionSpec, or None for the default; a name is a leaf's path with "/" between its parts.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.runtime.mesh import device_mesh, shard_params
      >>> mesh = device_mesh(fsdp=1, devices=jax.devices()[:1])
      >>> print(*shard_params({"kernel": jnp.zeros((128, 256))}, mesh)["kernel"].sharding.spec)
      tensor fsdp
    """

    def place(path: Any, leaf: Any) -> Any:
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf)
        spec = None if rules is None else rules(name, shape)
        if spec is None:
            spec = PartitionSpec(*_largest(shape, mesh)) if math.prod(shape) >= SMALL else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, params)


def _largest(shape: tuple[int, ...], mesh: Mesh) -> list[str | None]:
    names: list[str | None] = [None] * len(shape)
    for axis in ("fsdp", "tensor"):
        size = mesh.shape.get(axis, 1)
        free = [i for i, length in enumerate(shape) if names[i] is None and length % size == 0]
        if axis in mesh.shape and free:
            names[max(free, key=lambda i: (shape[i], i))] = axis
    return names
