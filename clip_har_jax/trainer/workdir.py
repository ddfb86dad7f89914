"""The work folder of a run, on a disk or in an object store: its files, and the settings that a resume may change."""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from etils import epath

from clip_har_jax import remote
from clip_har_jax.config import RunConfig
from clip_har_jax.errors import UserError
from clip_har_jax.files import is_local, read_json, write_json
from clip_har_jax.settings import FREE, REFUSED, WARNED, leaves, settings_of
from clip_har_jax.training.checkpoint_seals import probe, was_saved

os.environ.setdefault("EPATH_USE_TF", "false")  # else epath reads object stores through TensorFlow if it is installed

_FAULTS_OF_DISKS = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO".split()
}  # faults of the disk, not of programs


@dataclass(frozen=True)
class Change:
    """A config key whose value differs from the run so far."""

    key: str
    old: Any
    new: Any
    policy: str


@contextmanager
def disk_faults(workdir: epath.Path) -> Iterator[None]:
    """Turn errors of a full, read-only or broken disk, or of an object store, into one line, wherever a run writes.

    Raises:
      UserError: such an error; names the file if the system does.
    """
    if not is_local(workdir):
        with remote.store_faults(os.fspath(workdir)):
            yield
        return
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
    if mistyped := re.match(r"(\w{2,}):/(?!/)", os.fspath(workdir)):  # pathlib makes one slash of two
        raise UserError(f"--workdir={workdir}: write {mistyped[1]}:// for a store, or ./{workdir} for a folder")
    try:
        path = epath.Path(workdir)
        if not is_local(path):
            remote.check_store(os.fspath(path), lambda: probe(path))
        elif path.exists() and not path.is_dir():
            raise UserError(f"--workdir={workdir}: a file, not a folder; name another")
        else:
            probe(path)
    except ImportError as error:  # names the object store's client to install
        raise UserError(f"--workdir={workdir}: {error} (pip)") from error
    except KeyError as error:
        raise UserError(f"--workdir={workdir}: no such kind of store; use a folder or gs://BUCKET/...") from error
    except OSError as error:
        raise UserError(f"--workdir={workdir}: can't be written ({error.strerror or error})") from error
    return path


RUN_FILES = "checkpoints checkpoints_damaged eval model adapter tensorboard wandb config.json run.json".split()
RUN_FILES += "metrics.jsonl trackers.json curves.csv bad_inputs.jsonl retention.json wise_ft.json wise_ft.png".split()


def clear_other_run(workdir: epath.Path, config: RunConfig, fingerprints: Mapping[str, str]) -> None:
    """Remove the files of a finished run, or of one with another config or other data; an unfinished run stays.

    Args:
      fingerprints: of the config's data, by split.
    """
    old, record = read_json(workdir / "config.json"), read_json(workdir / "run.json")
    if old is None or record is None:
        return
    unfinished = not record.get("finished", False)  # its model/ may be missing: DVC removes it before a stage
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
      The differences to the run to resume; empty if it hasn't saved a checkpoint yet.

    Raises:
      UserError: a key differs that would make it another run.
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
    write_json(path, config.to_dict())
    return changes


def _changes(old: Mapping[str, Any], config: RunConfig) -> Iterator[Change]:
    defaults = dict(leaves(RunConfig()))
    at_resume = {key: found.at_resume for key, _, found in settings_of(RunConfig) if found is not None}
    if config.checkpoint.allow_new_batch_size:
        at_resume["train.global_batch_size"] = WARNED
    for key, value in leaves(config):
        node: Any = old
        for name in key.split("."):  # a key of a newer version had its default value
            node = node.get(name, defaults[key]) if isinstance(node, dict) else defaults[key]
        before, new = (json.loads(json.dumps(side)) for side in (node, value))
        if new != before:
            yield Change(key, before, new, at_resume[key])


def _way_out(change: Change) -> str:
    if change.key != "train.global_batch_size":
        return ""
    return "; --config.checkpoint.allow_new_batch_size=true continues after the examples seen, in new batches"
