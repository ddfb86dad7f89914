"""Devices -> a Mesh with the axes data, fsdp and tensor."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from clip_har_jax.config import MeshConfig
from clip_har_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Nominal dense bfloat16 FLOP/s of one chip, from the makers' data sheets (NVIDIA A100, H100; Google Cloud TPU pages).
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """The number of devices on each of `AXES`.

    The strategy puts all devices on its axis (fsdp_tp: pairs on tensor, the rest on fsdp); sizes set explicitly
    override it, and those left out are then 1.

    Raises:
      UserError: sizes whose product isn't the number of devices.
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
    """The mesh of a run over `devices` (default: all of all processes), neighbours on the innermost axis.

    Raises:
      UserError: as `mesh_shape`.
    """
    shape = mesh_shape(config, len(devices or jax.devices()))
    auto = (AxisType.Auto,) * len(AXES)
    if devices is not None:
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=auto)
    return jax.make_mesh(shape, AXES, axis_types=auto)


def peak_flops(device: jax.Device) -> float | None:
    """The chip's nominal dense bfloat16 FLOP/s; None where it isn't known."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)
