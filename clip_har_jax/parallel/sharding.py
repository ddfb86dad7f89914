"""Shardings: logical axis names are mapped to mesh axes by one table.

A strategy is only the shape of the mesh. The table is the same for all, and a mesh axis of size 1 shards nothing.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_har_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")

# logical name -> (mesh axis, whether to replicate if the axis doesn't divide the size). A vocabulary can have any size.
# For the others, replication would silently disable the strategy, so it is an error.
RULES = {
    "vocab": ("tensor", True),
    "heads": ("tensor", False),
    "mlp": ("tensor", False),
    "embed": ("fsdp", False),
}
Tree = TypeVar("Tree")


def partition_spec(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> P:
    """Return the PartitionSpec of one parameter.

    Raises:
      UserError: the mesh axis doesn't divide a dimension; names the parameter.
    """
    spec: list[str | None] = []
    for size, logical in zip(shape, axes or (None,) * len(shape), strict=True):
        axis, may_stay_whole = RULES.get(logical or "", (None, True))
        if axis is None or mesh.shape[axis] == 1:
            spec.append(None)
        elif size % mesh.shape[axis] == 0:
            spec.append(axis)
        elif may_stay_whole:
            spec.append(None)
        else:
            raise UserError(
                f"config.mesh: {name} has {size} in its {logical!r} dimension, which {mesh.shape[axis]} devices on "
                f"the {axis!r} axis don't divide; choose another mesh shape"
            )
    return P(*spec)


def param_shardings(
    shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, tuple[str | None, ...]], mesh: Mesh
) -> dict[str, NamedSharding]:
    """Return the sharding of each parameter by dotted path.

    Raises:
      UserError: as `partition_spec`.
    """
    return {name: NamedSharding(mesh, partition_spec(name, shapes[name], axes[name], mesh)) for name in shapes}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch's rows over the data and fsdp axes; replicated over the tensor axis."""
    return NamedSharding(mesh, P(BATCH_AXES))


def num_row_shards(mesh: Mesh) -> int:
    """Return the number of shards of a batch's rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(size: int, mesh: Mesh, key: str) -> None:
    """Check that the mesh divides the rows of a global batch.

    Raises:
      UserError: names the config key.
    """
    shards = num_row_shards(mesh)
    if size % shards:
        raise UserError(f"config.{key} is {size}, which {shards} devices don't divide; use a multiple of {shards}")


def process_shard(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Return (index, count) of the part of each global batch that this process reads.

    Processes whose devices hold the same rows (tensor parallelism across hosts) read the same part.
    """
    rows = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts = [index[0].start or 0 for index in rows]  # type: ignore[index]
    stops = [batch_size if index[0].stop is None else index[0].stop for index in rows]  # type: ignore[index]
    size = max(stops) - min(starts)
    assert batch_size % size == 0 and min(starts) % size == 0, "a process's rows are one aligned block"
    return min(starts) // size, batch_size // size


def put_local_rows(tree: Tree, sharding: NamedSharding) -> Tree:
    """Return global arrays from host arrays with each process's own rows."""
    with jax.transfer_guard("allow"):  # with several processes JAX mistakes this transfer for an implicit one
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), tree)


def put_global(tree: Tree, shardings: Any) -> Tree:
    """Put whole host arrays, equal on every process, on the mesh; each device receives only its shard.

    An array with the right sharding is returned unchanged.
    """

    def one(value: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(value, jax.Array) and value.sharding == sharding:
            return value
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    with jax.transfer_guard("allow"):  # as above
        return jax.tree.map(one, tree, shardings)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes of `tree` (arrays, or shapes with shardings) on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
