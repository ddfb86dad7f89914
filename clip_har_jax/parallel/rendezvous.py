"""Finding the other processes of a run, and connecting to them within a bounded time.

JAX's own cluster detection does the finding wherever it can. Its client doesn't raise when connecting fails: it aborts
the process with a C++ stack trace. Here that becomes one line.
"""

import importlib.util
import os
import time
from dataclasses import dataclass

import jax

from clip_har_jax.errors import UserError

_CLIENT_SLACK_S = 5  # JAX's client waits this much longer than it was told


@dataclass(frozen=True)
class Group:
    """The processes of a run, seen by one of them."""

    coordinator_address: str  # host:port, where process 0 listens
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None  # None: all that there are
    source: str  # who said so

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.coordinator_address.rpartition(":")
        return host.strip("[]"), int(port)


def find_group(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout_s: int
) -> Group | None:
    """The run's processes by the flags, or else by the environment; None for a single process.

    Of the environment, `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` come first; in an indexed
    job of Kubernetes the last defaults to `JOB_COMPLETION_INDEX`. What they leave out, JAX's cluster detection says:
    Slurm, Open MPI, Cloud TPU, and Kubernetes where the `kubernetes` package is installed.

    Args:
      timeout_s: how long detection may wait for the coordinator's name to be known.

    Raises:
      UserError: flags or variables that are incomplete or contradict one another.
    """
    flags = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if any(value is not None for value in flags.values()):
        return _checked(flags, None, "the flags")
    found = {
        "JAX_COORDINATOR_ADDRESS": os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "JAX_NUM_PROCESSES": _number("JAX_NUM_PROCESSES"),
        "JAX_PROCESS_ID": _number("JAX_PROCESS_ID"),
    }
    if found["JAX_NUM_PROCESSES"] == 1:
        return None
    if found["JAX_NUM_PROCESSES"] is not None and found["JAX_PROCESS_ID"] is None:
        found["JAX_PROCESS_ID"] = _number("JOB_COMPLETION_INDEX")
    local_device_ids = None
    if None in found.values():
        local_device_ids = _detect(found, timeout_s)
    if all(value is None for value in found.values()):
        if _number("JOB_COMPLETION_INDEX"):
            raise UserError(
                "this is an indexed job of Kubernetes with several pods, which can't find one another: set "
                "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, as kubernetes/train/ does"
            )
        return None
    return _checked(found, local_device_ids, "the environment")


def connect(group: Group, join_timeout_s: int, heartbeat_timeout_s: int, shutdown_timeout_s: int) -> None:
    """Connects this process with the others; where that fails, the process may end here, with a line and exit code 2.

    Raises:
      UserError: the coordinator can't be reached, or can't listen.
    """
    deadline = time.monotonic() + join_timeout_s
    if group.process_id == 0:
        _check_port_is_free(group)
    else:
        _wait_for_coordinator(group, deadline, join_timeout_s)
    left_s = round(deadline - time.monotonic()) - _CLIENT_SLACK_S
    with _default_signals(), _abort_as_one_line(lambda output: _why(output, group, join_timeout_s)):
        jax.distributed.initialize(
            group.coordinator_address,
            group.num_processes,
            group.process_id,
            local_device_ids=group.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, left_s),
            heartbeat_timeout_seconds=heartbeat_timeout_s,
            shutdown_timeout_seconds=shutdown_timeout_s,
        )


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise UserError(f"{name}={value!r} isn't a number")
    return None if value is None else int(value)


def _detect(found: dict[str, str | int | None], timeout_s: int) -> tuple[int, ...] | None:
    """Asks JAX's cluster detection for what isn't found yet; gives the devices meant for this process."""
    method = None
    open_mpi_5 = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ
    if open_mpi_5 and importlib.util.find_spec("mpi4py"):
        method = "mpi4py"
    elif open_mpi_5:  # JAX 0.10 doesn't know it, and it doesn't say where rank 0 runs
        for name, variable in (("JAX_NUM_PROCESSES", "SIZE"), ("JAX_PROCESS_ID", "RANK")):
            found[name] = _number(f"OMPI_COMM_WORLD_{variable}")
        if found["JAX_NUM_PROCESSES"] > 1 and found["JAX_COORDINATOR_ADDRESS"] is None:
            raise UserError("Open MPI 5: install mpi4py, or mpirun -x JAX_COORDINATOR_ADDRESS=HOST_OF_RANK_0:PORT")
        return (int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]),)
    elif not _jax_knows_cluster():
        return None
    address, *rest = found.values()
    try:
        # First without the address: finding it may take a while, and a single process doesn't need it.
        _, count, index, local = _ask_jax(address or "", *rest, method, timeout_s)
        if address is None and count is not None and count > 1:
            address, *_ = _ask_jax(None, count, index, method, timeout_s)
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"JAX's cluster detection: {message}; JAX_NUM_PROCESSES=1 for a single process") from error
    found.update(zip(found, (address, count, index), strict=True))
    return None if local is None or "JAX_LOCAL_DEVICE_IDS" in os.environ else tuple(local)
