"""The only file that imports `jax._src`: JAX has no public name for these parts of its distributed runtime.

- The client of the coordination service. Its key-value store and barriers need no device, so they can't wait for, or
  delay, a training step. `multihost_utils.sync_global_devices` runs a collective on the devices instead.
- The number of this process. `jax.process_index()` initialises the devices, which must not happen before joining.
- Cluster detection without joining. `jax.distributed.initialize` does both at once and aborts the process on failure.

`tests/parallel/test_jax_private.py` fails when JAX gives one of them a public name; then use that name and remove the
function here.
"""

from collections.abc import Sequence
from typing import Any

from jax._src import cloud_tpu_init, xla_bridge
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state


def coordination_client() -> Any | None:
    """Return the client of the coordination service; None in a run of a single process."""
    return global_state.client


def process_id() -> int:
    """Return the number of this process, without initialising the devices; 0 in a run of a single process."""
    return global_state.process_id


def is_cloud_tpu() -> bool:
    """Return whether this machine is a Cloud TPU VM."""
    return cloud_tpu_init.running_in_cloud_tpu_vm


def devices_are_initialized() -> bool:
    """Return whether JAX has started a backend; flags of XLA have no effect after that."""
    return xla_bridge.backends_are_initialized()


def detect_cluster(
    address: str | None,
    num_processes: int | None,
    process_id: int | None,
    local_device_ids: Sequence[int] | None,
    timeout_s: int,
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Return (coordinator's address, number of processes, process id, local device ids), with unknown ones detected.

    Raises:
      RuntimeError, ValueError, LookupError, OSError: the environment of the cluster can't be understood.
    """
    return ClusterEnv.auto_detect_unset_distributed_params(
        address, num_processes, process_id, local_device_ids, None, timeout_s
    )
