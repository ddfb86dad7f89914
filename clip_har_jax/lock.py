"""One writer at a time in a folder, on disks, network file systems and object stores alike."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from clip_har_jax.errors import UserError


class FolderLock:
    """Keep a second writer out of a folder; a context manager.

    A file `lock.json` names the process that writes the folder, which renews the file every few seconds; no clocks are
    compared. A killed writer stops renewing: its own host sees that at once, another one after `patience_s` of
    watching.

    Args:
      folder: exists already.
      flag: the command line's name for the folder, which an error tells the person to change.
      renew_s: seconds between two renewals.
      patience_s: how long a writer on another host may stay silent before it counts as dead.

    Raises:
      UserError: another process writes there; names its host, process and start time.
    """

    def __init__(self, folder: epath.Path, flag: str = "--workdir", renew_s: float = 3.0, patience_s: float = 15.0):
        self._path, self._flag, self._renew_s, self._patience_s = folder / "lock.json", flag, renew_s, patience_s
        self._mine = {
            "host": socket.gethostname(),
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
        holder = self._read()
        if holder is not None and self._is_alive(holder):
            raise UserError(
                f"{self._path.parent}: {_describe(holder)} is writing here; stop it, or use another {self._flag}"
            )
        self._write()
        time.sleep(0.2)  # of two that start together, the one whose file stays goes on
        holder = self._read()
        if holder is None or holder["token"] != self._mine["token"]:
            raise UserError(
                f"{self._path.parent}: {_describe(holder or {})} started here too; use another {self._flag}"
            )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.lost_to is None:
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Check that the folder is still this writer's; cheap, to be called now and then.

        Raises:
          UserError: another process took the folder while this one was suspended.
        """
        if self.lost_to is not None:
            raise UserError(f"{self._path.parent}: taken over by {_describe(self.lost_to)}; this run stops writing")

    def _read(self) -> dict[str, Any] | None:
        try:
            holder = json.loads(self._path.read_text())
        except (OSError, ValueError):  # none, or damaged: nobody's
            return None
        return holder if isinstance(holder, dict) and "token" in holder else None

    def _write(self) -> None:
        self._count += 1
        text = json.dumps({**self._mine, "renewed": self._count}, indent=2) + "\n"
        if "://" in os.fspath(self._path):  # an object store replaces whole objects
            self._path.write_text(text)
            return
        partial = self._path.with_name(f".{self._path.name}.{self._mine['token']}.partial")
        try:
            partial.write_text(text)
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)

    def _is_alive(self, holder: Mapping[str, Any]) -> bool:
        if holder.get("host") == self._mine["host"]:
            # The start time tells a reused number, such as that of a container's only process.
            process = holder.get("process")
            return isinstance(process, int) and _process_started(process) == holder.get("process_started")
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            time.sleep(0.5)
            if (now := self._read()) is None:
                return False
            if now.get("renewed") != holder.get("renewed") or now.get("token") != holder.get("token"):
                return True
        return False

    def _keep_renewing(self) -> None:
        while not self._end.wait(self._renew_s):
            holder = self._read()
            if holder is not None and holder.get("token") != self._mine["token"]:
                self.lost_to = holder
                return
            try:
                self._write()
            except OSError:  # a full disk: the writer itself will report it
                continue


def _describe(holder: Mapping[str, Any]) -> str:
    return (
        f"the run on host {holder.get('host', '?')}, process {holder.get('process', '?')}, started "
        f"{holder.get('started', '?')},"
    )


def _process_started(pid: int) -> str | None:
    """Return the boot and the time since it when a process of this machine began, in the kernel's units.

    None: there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _process_exists(pid)
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"  # a zombie was killed, and its parent didn't wait


def _process_exists(pid: int) -> str | None:
    """Return "alive" where there is such a process, for systems without /proc; None: there is none."""
    if pid <= 0 or Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
