"""The connection to Ray: a cluster by its address, or one started on this machine for this process alone."""

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_har_jax import remote
from clip_har_jax.cores import usable_cores
from clip_har_jax.errors import UserError

FLAG = "--ray_address"
ANSWER_S = 5.0
STORE_BYTES, STORE_BYTES_PER_CORE = 256 << 20, 128 << 20  # of the own Ray; a piece in progress holds some 20 MB
MAX_FOLDER = 40  # characters; Ray's sockets lie in it, whose paths have at most 107
# A client of HTTP/2 begins so (RFC 9113, 3.4), here with empty settings; a server answers with its own settings.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
HTTP2_SETTINGS = 4


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to Ray, and disconnect at the end.

    Args:
      address: HOST:PORT of a cluster, `auto` for the one that runs on this machine, or None for an own Ray, which ends
        with this process. It listens on the loopback interface and asks for a random token, since whoever reaches Ray
        can run code.

    Raises:
      UserError: Ray isn't installed or can't start, nothing answers at the address, or its versions are others.
    """
    found = None if address in (None, "local") else find_address(address)
    if found is None:
        # Before the import, which reads them. The names are Ray's; the second one makes it use the loopback interface.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_ray()
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    # Of its own, so that no logs stay behind and `auto` of another command doesn't take this Ray for a cluster.
    folder = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
    if found is None:
        if len(folder.name) <= MAX_FOLDER:
            options["_temp_dir"] = folder.name
        options |= {"num_cpus": usable_cores(), "include_dashboard": False}
        options["object_store_memory"] = STORE_BYTES + STORE_BYTES_PER_CORE * usable_cores()
    with folder:
        try:
            ray.init(address=found or "local", **options)
        except (RuntimeError, ConnectionError, ValueError, ray.exceptions.RayError) as error:
            if found is None:
                raise UserError(f"--engine=ray: Ray can't start on this machine ({remote.one_line(error)})") from error
            raise UserError(f"{FLAG}={address}: {explain_refusal(error)}") from error
        try:
            yield
        finally:
            ray.shutdown()


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
      UserError: it isn't installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError(f"--engine=ray needs Ray ({error}); pip install 'clip-har-jax[ray]'") from error
    return ray


def only_on(node_id: str) -> Any:
    """Return the scheduling strategy of an actor that belongs to one node and ends with it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def find_address(address: str | None) -> str:
    """Return HOST:PORT of a cluster that answers.

    Raises:
      UserError: there is none.
    """
    if address == "auto":
        running = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
        found = os.environ.get("RAY_ADDRESS") or (running.read_text().strip() if running.is_file() else "")
        if not found:
            raise UserError(f"{FLAG}=auto: no Ray runs on this machine (ray start --head); name HOST:PORT of a cluster")
    else:
        found = address or ""
    host, colon, port = found.rpartition(":")
    if not (host and colon and port.isdecimal()) or "://" in found:
        raise UserError(f"{FLAG}={address}: write HOST:PORT of the head node, e.g. 10.0.0.1:6379, or auto")
    _check_answers(host.strip("[]"), int(port), f"{FLAG}={address}")
    return found


def _check_answers(host: str, port: int, flag: str) -> None:
    """Check that a gRPC server listens: Ray itself would wait for minutes.

    Raises:
      UserError: nothing listens there, or something else.
    """
    advice = "start it with `ray start --head`, or correct the address"
    try:
        with socket.create_connection((host, port), timeout=ANSWER_S) as connection:
            connection.sendall(HTTP2_PREFACE)
            header = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise UserError(f"{flag}: {host}:{port} doesn't answer ({remote.one_line(error)}); {advice}") from error
    if len(header) < 4 or header[3] != HTTP2_SETTINGS:
        raise UserError(f"{flag}: {host}:{port} isn't the head of a Ray cluster; {advice}")


def explain_refusal(error: BaseException) -> str:
    """Return in one line why a cluster refused the connection."""
    text = " ".join(str(error).split())
    if "Version mismatch" in text or "version mismatch" in text:
        return f"{text}; install the same versions of Ray and Python here and on all nodes"
    if "token" in text.lower() and "auth" in text.lower():
        return (
            f"the cluster asks for a token ({remote.one_line(error)}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        )
    return f"can't connect ({remote.one_line(error)}); `ray status` on its head node tells more"
