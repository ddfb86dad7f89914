"""Data sheets of chips, and the devices of a TPU slice for ahead-of-time compilation."""

import importlib.util
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from clip_har_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a GPU, a TPU chip, or one of the two halves of a TPU7x chip."""

    peak_flops: float  # nominal dense bfloat16 FLOP/s
    memory_bytes: int  # for a TPU: usable by a program, a little less than the chip has
    memory_bandwidth: float  # bytes/s
    interconnect_bandwidth: float  # bytes/s sent over all its links together
    clock_hz: float | None = None  # for a TPU: peak / (2 * 128 * 128 operations per cycle and matrix unit)
    devices_per_chip: int = 1  # prices are for whole chips


# By prefix of JAX's `device_kind`; the first match counts. Sources: NVIDIA's data sheets of A100, H100, H200 (half of
# NVLink's bidirectional figure); docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (half of the bidirectional ICI
# figure; number of matrix units). The memory of TPUs is from libtpu 0.0.42's message when a program is too large.
CHIPS = {
    "NVIDIA A100": Chip(312e12, 80 * GIB, 2039e9, 300e9),
    "NVIDIA H100": Chip(989e12, 80 * GIB, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141 * 10**9, 4800e9, 450e9),
    "TPU v4": Chip(275e12, 32 * GIB, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, round(15.75 * GIB), 819e9, 200e9, clock_hz=197e12 / (4 * 2 * 128 * 128)),
    "TPU v5": Chip(459e12, round(95.74 * GIB), 2765e9, 600e9, clock_hz=459e12 / (8 * 2 * 128 * 128)),
    "TPU v6 lite": Chip(918e12, round(31.25 * GIB), 1638e9, 400e9),
    "TPU7x": Chip(2307e12 / 2, round(94.75 * GIB), 7380e9 / 2, 600e9 / 2, devices_per_chip=2),
}
# generation -> (dimensions of its torus, an example)
GENERATIONS = {"v5e": (2, "v5e:4x4"), "v6e": (2, "v6e:2x4"), "v5p": (3, "v5p:2x2x4"), "tpu7x": (3, "tpu7x:2x2x1")}
EXAMPLES = ", ".join(example for _, example in GENERATIONS.values())


def find_chip(device: jax.Device) -> Chip | None:
    """Return the figures of a device; None for a kind that `CHIPS` doesn't list."""
    return next((chip for kind, chip in CHIPS.items() if device.device_kind.startswith(kind)), None)


def memory_bytes(device: jax.Device, num_local: int) -> int | None:
    """Return the memory of a local device that a program can use; None if unknown.

    Args:
      device: a device of this machine.
      num_local: number of devices of this machine; CPU devices share its memory.
    """
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_local
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    return chip.memory_bytes if (chip := find_chip(device)) else None


def tpu_devices(topology: str) -> list[jax.Device]:
    """Return the devices of a TPU slice that isn't present; programs can be compiled for them but not run.

    Args:
      topology: generation and shape in chips, e.g. v5e:4x4.

    Raises:
      UserError: not a slice that exists, or libtpu, which holds the compiler, isn't installed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if found is None or found[1] not in GENERATIONS:
        raise UserError(f"--topology={topology} is unknown; examples: local, {EXAMPLES}")
    dims, example = GENERATIONS[found[1]]
    if found[2].count("x") + 1 != dims:
        raise UserError(f"--topology={topology}: a slice of {found[1]} has {dims} dimensions, e.g. {example}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f'--topology={topology} needs libtpu, which holds the compiler; pip install "jax[tpu]"')
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        message = str(error).strip().splitlines()[0]
        raise UserError(f"--topology={topology}: {message}; examples: {EXAMPLES}") from error


# When libtpu is loaded it looks for the TPU that its machine is part of, and locks it. As a compiler it needs neither;
# these variables switch both off, and with them warnings on stderr.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
