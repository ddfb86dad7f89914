"""A lock on a folder, on a disk or in an object store: one writer at a time, and an error that names it."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_har_jax import remote
from clip_har_jax.errors import UserError
from clip_har_jax.files import is_local, write_json

NAME = "lock.json"


class FolderLock:
    """Keep other writers out of a folder; a context manager.

    The lock is a file that names its process, which renews it every few seconds. That works on disks, network file
    systems and object stores, and compares no clocks. A killed process stops renewing: its own host detects that at
    once, another host after it watched for `patience_s`.

    Args:
      folder: the folder that is written.
      flag: the flag that names the folder, for the message.
      file: the lock file; default: lock.json in the folder. For a folder that is replaced as a whole it stands beside
        the folder, see `sibling_lock`.

    Raises:
      UserError: another process writes there; names its host, process id and start time.
    """

    def __init__(
        self,
        folder: Any,
        flag: str = "--workdir",
        file: Any = None,
        renew_s: float = 3.0,
        patience_s: float = 15.0,
    ):
        self._folder, self._flag, self._path = folder, flag, file or folder / NAME
        self._renew_s, self._patience_s = renew_s, patience_s
        self._mine = {
            "host": socket.gethostname(),
            "pid_namespace": _pid_namespace(),
            "process": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "token": secrets.token_hex(8),
        }
        self._count = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)
        self.lost_to: dict[str, Any] | None = None

    def __enter__(self) -> "FolderLock":
        while True:
            holder = self._read()
            if holder is not None and self._is_alive(holder):
                raise UserError(
                    f"{self._folder}: {_describe(holder)} is writing here; wait for it or stop it, or use another "
                    f"{self._flag}"
                )
            with _one_claim_at_a_time(self._path.parent) as alone:
                if _token(self._read()) != _token(holder):
                    continue  # someone else was faster
                self._write()
            break
        if not alone:
            time.sleep(0.2)  # of two processes that start together, the one whose file remains continues
            holder = self._read()
            if _token(holder) != self._mine["token"]:
                raise UserError(f"{self._folder}: {_describe(holder or {})} started here too; use another {self._flag}")
        self._thread.start()
        return self

    def __exit__(self, _: object, error: object, __: object) -> None:
        self._end.set()
        remote.leave(self._path, error, self._release)

    def _release(self) -> None:
        if self._thread.is_alive():
            self._thread.join()
        if self.lost_to is None:
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise an error if another process took the folder; call it from time to time.

        Raises:
          UserError: another process took the folder while this one was suspended.
        """
        if self.lost_to is not None:
            raise UserError(f"{self._folder}: taken over by {_describe(self.lost_to)}; this process stops writing")

    def _read(self) -> dict[str, Any] | None:
        try:
            holder = json.loads(self._path.read_text())
        except (OSError, ValueError):  # no lock file, or a damaged one
            return None
        return holder if isinstance(holder, dict) and "token" in holder else None

    def _write(self) -> None:
        self._count += 1
        write_json(self._path, {**self._mine, "renewed": self._count})

    def _is_alive(self, holder: Mapping[str, Any]) -> bool:
        where = ("host", "pid_namespace")  # containers with the same host name can have the same process ids
        if all(holder.get(name, self._mine[name]) == self._mine[name] for name in where):
            # The start time detects a reused process id, such as that of a container's only process.
            process = holder.get("process")
            started = _process_started(process) if isinstance(process, int) else None
            return started is not None and started == holder.get("process_started")
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            time.sleep(0.5)
            if (seen := self._read()) is None:
                return False
            if seen.get("renewed") != holder.get("renewed") or _token(seen) != _token(holder):
                return True
        return False

    def _keep_renewing(self) -> None:
        while not self._end.wait(self._renew_s):
            holder = self._read()
            if holder is not None and _token(holder) != self._mine["token"]:
                self.lost_to = holder
                return
            try:
                self._write()
            except Exception:  # a full disk, or a store that doesn't answer: the writer itself reports it
                continue


def sibling_lock(folder: Path, flag: str = "--output") -> FolderLock:
    """Return the lock of a folder that is replaced as a whole; its file stands beside the folder."""
    return FolderLock(folder, flag, folder.with_name(f".{folder.name}.{NAME}"))


@contextmanager
def _one_claim_at_a_time(folder: Any) -> Iterator[bool]:
    """Exclude other processes of this machine while one takes the lock; yield whether that was possible.

    The kernel releases its lock on the folder when the process ends. Object stores, Windows and some network file
    systems have no such lock.
    """
    try:
        import fcntl

        number = os.open(folder, os.O_RDONLY) if is_local(folder) else -1
    except (ImportError, OSError):
        number = -1
    if number < 0:
        yield False
        return
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(number, fcntl.LOCK_UN)  # closing isn't enough: a forked child can hold the file open
    finally:
        os.close(number)


def _token(holder: Mapping[str, Any] | None) -> Any:
    return holder.get("token") if holder is not None else None


def _describe(holder: Mapping[str, Any]) -> str:
    return (
        f"process {holder.get('process', '?')} on host {holder.get('host', '?')}, started {holder.get('started', '?')},"
    )


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return None


def _process_started(pid: int) -> str | None:
    """Return the boot and the start time of a process of this machine, in system units; None: no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _process_exists(pid)
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"  # a zombie was killed and not waited for


def _process_exists(pid: int) -> str | None:
    """Return "alive" if the process exists, on systems without /proc; else None."""
    if pid <= 0 or Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
