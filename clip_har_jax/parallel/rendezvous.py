"""Finding the other processes of a run, and connecting to them within a bounded time.

Where possible, JAX's own cluster detection finds them. When connecting fails, JAX's client doesn't raise an exception
but aborts the process with a C++ stack trace; here the abort becomes one line.
"""

import ctypes
import importlib.util
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import jax

from clip_har_jax import cli
from clip_har_jax.errors import UserError
from clip_har_jax.parallel import jax_private

_CLIENT_SLACK_S = 5  # JAX's client waits this much longer than its timeout


@dataclass(frozen=True)
class Group:
    """The processes of a run, from the view of one of them."""

    coordinator_address: str  # host:port, where process 0 listens
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None  # None: all

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.coordinator_address.rpartition(":")
        return host.strip("[]"), int(port)


def find_group(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout_s: int
) -> Group | None:
    """Return the processes of the run from the first of these sources that is set; None for a single process.

    1. the flags `--coordinator_address`, `--num_processes` and `--process_id`
    2. the variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; in an indexed job of
       Kubernetes the last defaults to `JOB_COMPLETION_INDEX`
    3. the variables of Open MPI 5, which JAX 0.10 doesn't detect, with `JAX_COORDINATOR_ADDRESS`
    4. JAX's cluster detection: Slurm, Open MPI 4, Cloud TPU, and Kubernetes with the `kubernetes` package

    Args:
      coordinator_address, num_processes, process_id: the flags; None where not given.
      timeout_s: limit of the time that detection waits for the coordinator's name.

    Raises:
      UserError: flags or variables are incomplete or contradict one another.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    local: tuple[int, ...] | None = None
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if (coordinator_address, num_processes, process_id) != (None, None, None):
        address, names = coordinator_address, ("--coordinator_address", "--num_processes", "--process_id")
    elif names[1] in os.environ or names[2] in os.environ:
        num_processes, process_id = _number(names[1]), _number(names[2], "JOB_COMPLETION_INDEX")
    elif "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        num_processes, process_id = _number("OMPI_COMM_WORLD_SIZE"), _number("OMPI_COMM_WORLD_RANK")
        local = (_number("OMPI_COMM_WORLD_LOCAL_RANK") or 0,)
    elif _jax_knows_the_cluster():
        address, num_processes, process_id, local = _detect(address, timeout_s)
    elif _number("JOB_COMPLETION_INDEX"):
        raise UserError(
            "one pod of several in an indexed job, and no variable names the others: set " + ", ".join(names[:2])
        )
    else:
        return None
    if num_processes == 1:
        return None
    values = zip(names, (address, num_processes, process_id), strict=True)
    if missing := [name for name, value in values if value is None]:
        raise UserError(f"{', '.join(missing)}: not given; a run of several processes needs {', '.join(names)}")
    assert address is not None and num_processes is not None and process_id is not None
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"{names[0]}={address}: should be HOST:PORT, e.g. 10.0.0.1:8476")
    if num_processes < 1:
        raise UserError(f"{names[1]}={num_processes}: should be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(f"{names[2]}={process_id}: should be 0 to {names[1]} - 1, which is {num_processes - 1}")
    return Group(address, num_processes, process_id, local)


def connect(group: Group, join_timeout_s: int, heartbeat_timeout_s: int, shutdown_timeout_s: int) -> None:
    """Connect this process with the others. Some failures end the process here, with one line and status 2.

    Raises:
      UserError: the coordinator can't be reached, or process 0 can't listen on its port.
    """
    deadline = time.monotonic() + join_timeout_s
    if group.process_id == 0:
        _check_port_is_free(group)
    else:
        _wait_for_coordinator(group, deadline, join_timeout_s)
    left_s = round(deadline - time.monotonic()) - _CLIENT_SLACK_S
    with _own_signals(), _abort_as_one_line(lambda output: _explain(output, group, join_timeout_s)):
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


def _number(*names: str) -> int | None:
    """Return the number in the first of these variables that is set; None if none is."""
    for name in names:
        value = os.environ.get(name)
        if value is not None and not value.isdecimal():
            raise UserError(f"{name}={value!r} isn't a number")
        if value is not None:
            return int(value)
    return None


def _jax_knows_the_cluster() -> bool:
    # JAX takes any Kubernetes pod for one of many, and warns where the `kubernetes` package is missing.
    many_pods = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
    package = importlib.util.find_spec("kubernetes")
    return (
        "SLURM_STEP_NODELIST" in os.environ
        or "OMPI_MCA_orte_hnp_uri" in os.environ
        or jax_private.is_cloud_tpu()
        or (many_pods and package is not None and package.origin is not None)  # else the project's folder
    )


def _detect(address: str | None, timeout_s: int) -> tuple[str | None, int | None, int | None, tuple[int, ...] | None]:
    """Return JAX's cluster detection: coordinator's address, number of processes, process id, local device ids."""
    try:
        # First without the address: it takes time to find, and a single process doesn't need it.
        _, count, index, local = jax_private.detect_cluster(address or "unknown", None, None, None, timeout_s)
        if address is None and count is not None and count > 1:
            address, *_ = jax_private.detect_cluster(None, count, index, local, timeout_s)
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"JAX's cluster detection: {message} (JAX_NUM_PROCESSES=1 for one process)") from error
    if local is not None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        return address, count, index, tuple(local)
    return address, count or 1, index, None


def _check_port_is_free(group: Group) -> None:
    """Check that process 0 can listen; JAX's coordination service crashes with a segmentation fault if it can't."""
    _, port = group.host_and_port
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(f"process 0 can't listen on port {port} ({error.strerror}); choose another port") from error


def _wait_for_coordinator(group: Group, deadline: float, timeout_s: int) -> None:
    while True:
        try:
            socket.create_connection(group.host_and_port, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() + 0.5 > deadline:
                raise UserError(
                    f"process {group.process_id} can't reach the coordinator {group.coordinator_address} within "
                    f"{timeout_s} s ({error.strerror}); does process 0 run there?"
                ) from error
        time.sleep(0.5)


def _explain(output: str, group: Group, timeout_s: int) -> str:
    """Return one line in place of the text that JAX's client wrote before it aborted."""
    reason = re.search(r"absl::Status: (.*)|(RPC: .*)", output)
    status = reason[0] if reason else output[-300:]
    if "ALREADY_EXISTS" in status:
        why = f"another process has the process id {group.process_id} too"
    elif "Unexpected task" in status:
        why = f"process 0 was told of fewer than {group.num_processes} processes"
    elif "DEADLINE_EXCEEDED" in status:
        why = f"not all {group.num_processes} processes came within {timeout_s} s; see the others' logs"
    else:
        why = " ".join(status.split())
    return f"process {group.process_id} can't join the others at {group.coordinator_address}: {why}"


@contextmanager
def _own_signals() -> Iterator[None]:
    """Let Ctrl-C end a process that waits for the others, and restore Python's signal handlers afterwards.

    JAX's preemption service replaces the handler of SIGTERM. It would swallow a SIGTERM during compilation, when there
    is nothing to save yet.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _abort_as_one_line(explain: Callable[[str], str]) -> Iterator[None]:
    """Print `error: ` and `explain(standard error)` if the block aborts, and exit with the status of a mistake."""
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as captured:
        stderr = os.dup(2)

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def on_abort(_: int) -> None:
            os.write(stderr, f"error: {explain(_read(captured))}\n".encode())
            os._exit(cli.EXIT_MISTAKE)

        os.dup2(captured.fileno(), 2)
        previous = libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))
        try:
            yield
        finally:
            libc.signal(signal.SIGABRT, previous)
            os.dup2(stderr, 2)
            os.close(stderr)
            sys.stderr.write(_read(captured))


def _read(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
