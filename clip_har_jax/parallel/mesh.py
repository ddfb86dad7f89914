"""The mesh of a run: its devices on the axes data, fsdp and tensor."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from clip_har_jax.config import MeshConfig
from clip_har_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Return the number of devices on each of `AXES`.

    The strategy puts all devices on its axis (fsdp_tp: 2 on tensor, the rest on fsdp). Explicit sizes override it;
    axes without a size then have 1.

    Raises:
      UserError: the product of the sizes isn't the number of devices.
    """
    explicit = (config.data, config.fsdp, config.tensor)
    if any(size is not None for size in explicit):
        data, fsdp, tensor = (size or 1 for size in explicit)
        if data * fsdp * tensor != num_devices:
            raise UserError(
                f"config.mesh: data={data} x fsdp={fsdp} x tensor={tensor} is {data * fsdp * tensor} devices, "
                f"this run has {num_devices}"
            )
        return data, fsdp, tensor
    if config.strategy == "fsdp_tp":
        tensor = 2 if num_devices % 2 == 0 else 1
        return 1, num_devices // tensor, tensor
    shapes = {"dp": (num_devices, 1, 1), "fsdp": (1, num_devices, 1), "tp": (1, 1, num_devices)}
    return shapes[config.strategy]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a run over `devices` (default: all of all processes), neighbours on the innermost axis.

    Raises:
      UserError: as `mesh_shape`.
    """
    shape = mesh_shape(config, len(devices or jax.devices()))
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
