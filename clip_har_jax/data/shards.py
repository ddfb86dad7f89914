"""Shards of a pattern: files on a disk or in an object store, listed and opened through fsspec.

A pattern may have braces (`train-{0000..0331}.tar`, `{cc3m,cc12m}/*.tar`) and stars. `gs://` needs gcsfs, `s3://` s3fs.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from clip_har_jax import remote
from clip_har_jax.errors import UserError
from clip_har_jax.files import is_local

BLOCK_BYTES = 4 << 20  # read at once from an object store, and ahead of a sequential reader
BUFFER_BYTES = 1 << 20  # of a file on a disk
SHOWN_MISSING = 3


@dataclass(frozen=True)
class Shard:
    """A file of a pattern, with its size in bytes."""

    path: str
    size: int


def list_shards(pattern: str, suffixes: Sequence[str], where: str) -> list[Shard]:
    """Return the files of a pattern, each once, in the order of the pattern.

    Args:
      pattern: a path or address with braces and stars; a folder means all its files with one of the suffixes.
      suffixes: of the files in a folder.
      where: the SPEC, for messages.

    Raises:
      UserError: a file that isn't there, no file at all, or a store that can't be reached.
    """
    from braceexpand import braceexpand

    try:
        paths = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(
            f"{where}: the braces of the pattern don't match; write e.g. train-{{0000..0031}}.tar"
        ) from error
    with _faults(paths[0], where):
        found = list(_find(paths, suffixes, where))
    if not found:
        raise UserError(f"{where}: no files match; check the path (files named {' or '.join(suffixes)} are needed)")
    return list(dict.fromkeys(found))


def _find(paths: Sequence[str], suffixes: Sequence[str], where: str) -> Iterator[Shard]:
    if not is_local(paths[0]):
        system, first = _file_system(paths[0])
        remote.check_store(paths[0], lambda: system.exists(_parent(first)), remote.store(where, remote.CHECK_STORE))
    listed: dict[str, dict[str, int]] = {}  # sizes by path, by folder: one request for all files of a folder
    missing = []
    for text in paths:
        system, path = _file_system(text)
        protocol = "" if is_local(text) else text.partition("://")[0] + "://"
        if "*" in path:
            yield from _sized(system.glob(path, detail=True), protocol)
            continue
        folder = _parent(path)
        if folder not in listed:
            listed[folder] = _sizes(system, folder)
        if path in listed[folder]:
            yield Shard(protocol + path, listed[folder][path])
        elif system.isdir(path):
            inside = {name: size for name, size in _sizes(system, path).items() if name.endswith(tuple(suffixes))}
            yield from (Shard(protocol + name, size) for name, size in sorted(inside.items()))
        else:
            missing.append(text)
    if missing:
        more = f" and {len(missing) - SHOWN_MISSING} more" if len(missing) > SHOWN_MISSING else ""
        raise UserError(
            f"{where}: {len(missing)} of {len(paths)} files are missing: {', '.join(missing[:SHOWN_MISSING])}{more}; "
            "copy them there, or correct the pattern"
        )


def _file_system(path: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    return url_to_fs(os.path.expanduser(path))


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _sized(found: dict[str, dict[str, Any]], protocol: str) -> Iterator[Shard]:
    for name, info in sorted(found.items()):
        if info["type"] == "file":
            yield Shard(protocol + name, info["size"])


def _sizes(system: Any, folder: str) -> dict[str, int]:
    try:
        return {info["name"]: info["size"] for info in system.ls(folder, detail=True) if info["type"] == "file"}
    except FileNotFoundError:
        return {}


@contextmanager
def _faults(path: str, where: str) -> Iterator[None]:
    """Turn errors of listing into one line."""
    try:
        if is_local(path):
            yield
        else:
            with remote.store_faults(path, remote.store(where, remote.CHECK_STORE)):
                yield
    except ImportError as error:  # names the client to install
        raise UserError(f"{where}: {error} (pip)") from error
    except (KeyError, ValueError) as error:
        if not str(error).strip("'").startswith("Protocol"):
            raise
        raise UserError(f"{where}: no such kind of store; use a path, gs://BUCKET/... or s3://BUCKET/...") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{error.filename or where}: can't be listed ({reason}); check its permissions") from error


def open_shard(path: str) -> Any:
    """Return a binary file opened for reading; from an object store, blocks are read ahead.

    Raises:
      OSError: it can't be read.
    """
    if is_local(path):
        return open(path, "rb", buffering=BUFFER_BYTES)
    system, name = _file_system(path)
    return system.open(name, "rb", block_size=BLOCK_BYTES, cache_type="readahead")


def beside(path: str, name: str) -> str:
    """Return the address of a file that is named relative to the folder of another one."""
    return name if "://" in name or os.path.isabs(name) else f"{_parent(path)}/{name}"


def fault_of(error: Exception, *kinds: type[Exception]) -> str:
    """Return the reason why a shard can't be read, in one line.

    Args:
      error: the exception.
      kinds: the exceptions of the format's library; those of disks and object stores are known here.

    Raises:
      Exception: the given one, if it is of none of these kinds.
    """
    if not isinstance(error, (OSError, EOFError, *kinds)) and not remote.is_of_store(error):
        raise error
    return getattr(error, "strerror", None) or remote.one_line(error)
