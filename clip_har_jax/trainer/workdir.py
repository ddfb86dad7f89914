"""The work folder of a run, on a disk or an object store: who may write it, and what may differ when it continues."""

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from clip_har_jax import bundle
from clip_har_jax.config import RunConfig, leaves
from clip_har_jax.errors import UserError
from clip_har_jax.training.sealing import probe, was_saved

os.environ.setdefault("EPATH_USE_TF", "false")  # else an object store is read through TensorFlow where it is installed

_FAULTS_OF_DISKS = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO".split()
}  # not of programs

# What a changed key means when a run continues; the first prefix that fits counts, and anything else is refused:
# another model, other data or another order of them isn't the same run.
FREE = "free"
WARNED = "warned"
REFUSED = "refused"
AT_RESUME = (
    ("checkpoint.", FREE),
    ("eval.", FREE),
    ("trackers", FREE),
    ("retention.max_drop", FREE),
    ("retention.fail", FREE),
    ("method.wise_ft", FREE),
    ("train.patience", FREE),
    ("mesh.", FREE),
    ("data.max_", FREE),
    ("data.num_", FREE),
    ("data.prefetch", FREE),
    ("model.attention", FREE),
    ("model.remat", FREE),
    ("train.log_every_steps", FREE),
    ("train.accumulation_steps", FREE),
    ("train.max_skipped_steps", FREE),
    ("optim.ema_decay", REFUSED),  # an average that wasn't kept can't be continued
    ("optim.", WARNED),
    ("train.num_", WARNED),
    ("data.augment.", WARNED),
    ("method.label_smoothing", WARNED),
    ("model.compute_dtype", WARNED),
)


@dataclass(frozen=True)
class Change:
    """A config key whose value differs from that of the run so far."""

    key: str
    old: Any
    new: Any
    policy: str


def read_json(path: epath.Path) -> dict[str, Any] | None:
    """Return the contents of a JSON file; None where there is none.

    Raises:
      UserError: not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); mend or remove it") from error


@contextmanager
def disk_faults(workdir: epath.Path) -> Iterator[None]:
    """Make one line of what a full, read-only or broken disk raises wherever a run writes.

    Raises:
      UserError: names the file where the system does.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FAULTS_OF_DISKS:
            raise
        raise UserError(
            f"{error.filename or workdir}: {error.strerror}; what was saved stays whole. Mend that, then start again"
        ) from error


def make_workdir(workdir: str | os.PathLike[str]) -> epath.Path:
    """Make the folder.

    Raises:
      UserError: it can't be written.
    """
    if not os.fspath(workdir):
        raise UserError("--workdir is empty; name a folder, e.g. --workdir=runs/demo")
    path = epath.Path(workdir)
    if bundle.is_local(path) and path.exists() and not path.is_dir():
        raise UserError(f"--workdir={workdir}: a file, not a folder; name another")
    try:
        probe(path)
    except ImportError as error:  # says which client of the object store to install
        raise UserError(f"--workdir={workdir}: {error} (pip)") from error
    except KeyError as error:
        raise UserError(f"--workdir={workdir}: no such kind of store; use a folder or gs://BUCKET/...") from error
    except OSError as error:
        raise UserError(f"--workdir={workdir}: can't be written ({error.strerror or error})") from error
    return path


RUN_FILES = "checkpoints checkpoints_damaged eval model tensorboard wandb config.json run.json metrics.jsonl".split()
RUN_FILES += "trackers.json curves.csv bad_inputs.jsonl retention.json wise_ft.json wise_ft.png".split()


def clear_other_run(workdir: epath.Path, config: RunConfig, fingerprints: Mapping[str, str]) -> None:
    """Clear a finished run out of a folder, or one of another config or other data; an unfinished one stays.

    Args:
      fingerprints: of the data that the config names now, by split.
    """
    old, record = read_json(workdir / "config.json"), read_json(workdir / "run.json")
    if old is None or record is None:
        return
    unfinished = not record.get("finished", False)  # its model/ may be gone by now: DVC removes it before a stage
    same_config = all(change.policy == FREE for change in _changes(old, config))
    same_data = fingerprints == {name: part["fingerprint"] for name, part in record["data"].items()}
    if unfinished and same_config and same_data:
        return
    for name in RUN_FILES:
        path = workdir / name
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def claim_config(workdir: epath.Path, config: RunConfig) -> list[Change]:
    """Write config.json.

    Returns:
      What differs from the run that is to be continued; nothing where none has saved a checkpoint yet.

    Raises:
      UserError: a key differs that can't without being another run.
    """
    path = workdir / "config.json"
    old = read_json(path)
    changes = list(_changes(old, config)) if old is not None and was_saved(workdir / "checkpoints") else []
    for change in changes:
        if change.policy == REFUSED:
            raise UserError(
                f"{workdir} holds a run with {change.key}={change.old!r}, this one says {change.new!r}; use another "
                f"--workdir, or --config.{change.key}={change.old}{_way_out(change)}"
            )
    bundle.write_json(path, config.to_dict())
    return changes


def _changes(old: Mapping[str, Any], config: RunConfig) -> Iterator[Change]:
    defaults = dict(leaves(RunConfig()))
    for key, value in leaves(config):
        node: Any = old
        for name in key.split("."):  # a key that came with a newer version stood at its default
            node = node.get(name, defaults[key]) if isinstance(node, dict) else defaults[key]
        before, new = (json.loads(json.dumps(side)) for side in (node, value))
        if new != before:
            yield Change(key, before, new, _policy(key, config))


def _policy(key: str, config: RunConfig) -> str:
    if key == "train.global_batch_size" and config.checkpoint.allow_new_batch_size:
        return WARNED
    return next((policy for prefix, policy in AT_RESUME if key.startswith(prefix)), REFUSED)


def _way_out(change: Change) -> str:
    if change.key != "train.global_batch_size":
        return ""
    return "; --config.checkpoint.allow_new_batch_size=true continues after the examples seen, in new batches"


class WorkdirLock:
    """Keeps a second run out of a work folder; a context manager.

    A file `lock.json` names the run that writes the folder, which renews it every few seconds; that works on disks,
    network file systems and object stores alike, and compares no clocks. A killed run stops renewing: on its own host
    that is seen at once, from another after `patience_s` of watching.

    Raises:
      UserError: another run is alive; names its host, process and start time.
    """

    def __init__(self, workdir: epath.Path, renew_s: float = 3.0, patience_s: float = 15.0):
        self._path, self._renew_s, self._patience_s = workdir / "lock.json", renew_s, patience_s
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

    def __enter__(self) -> "WorkdirLock":
        holder = self._read()
        if holder is not None and self._is_alive(holder):
            raise UserError(
                f"{self._path.parent}: {_describe(holder)} is writing here; stop it, or use another --workdir"
            )
        self._write()
        time.sleep(0.2)  # of two that start together, the one whose file stays goes on
        holder = self._read()
        if holder is None or holder["token"] != self._mine["token"]:
            raise UserError(f"{self._path.parent}: {_describe(holder or {})} started here too; use another --workdir")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.lost_to is None:
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Call now and then.

        Raises:
          UserError: another run took the folder while this one was suspended.
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
        bundle.write_json(self._path, {**self._mine, "renewed": self._count})

    def _is_alive(self, holder: Mapping[str, Any]) -> bool:
        if holder.get("host") == self._mine["host"]:
            # The start time tells a reused number, as that of a container's only process.
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
            except OSError:  # a full disk: the run itself will say so
                continue


def _describe(holder: Mapping[str, Any]) -> str:
    return (
        f"the run on host {holder.get('host', '?')}, process {holder.get('process', '?')}, started "
        f"{holder.get('started', '?')},"
    )


def _process_started(pid: int) -> str | None:
    """When a process of this machine began, and in which boot, in the system's own units; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _process_exists(pid)
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"  # a zombie was killed and not waited for


def _process_exists(pid: int) -> str | None:
    """As `_process_started`, on systems without /proc: only whether there is such a process."""
    if pid <= 0 or Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
