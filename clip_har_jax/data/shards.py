"""Shards of a pattern: files on a disk or in an object store, listed and opened through fsspec.

A pattern may have braces (`train-{0000..0331}.tar`, `{cc3m,cc12m}/*.tar`) and stars. `gs://` needs gcsfs, `s3://` s3fs.
"""

import glob
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
    paths = [pattern] if is_local(pattern) and os.path.exists(os.path.expanduser(pattern)) else _expand(pattern, where)
    with _faults(paths[0], where):
        if is_local(paths[0]):
            by_path = {path: _find_local(path, suffixes) for path in paths}
        else:
            by_path = _find_remote(paths, suffixes, where)
    if missing := [path for path, found in by_path.items() if found is None]:
        more = f" and {len(missing) - SHOWN_MISSING} more" if len(missing) > SHOWN_MISSING else ""
        raise UserError(
            f"{where}: {len(missing)} of {len(paths)} files are missing: {', '.join(missing[:SHOWN_MISSING])}{more}; "
            "copy them there, or correct the pattern"
        )
    if not any(by_path.values()):
        raise UserError(f"{where}: no files match; check the path (files named {' or '.join(suffixes)} are needed)")
    return list(dict.fromkeys(shard for found in by_path.values() for shard in found or ()))


def _expand(pattern: str, where: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(
            f"{where}: the braces of the pattern don't match; write e.g. train-{{0000..0031}}.tar"
        ) from error


def _find_local(text: str, suffixes: Sequence[str]) -> list[Shard] | None:
    """Return the files that a path means; None if there is no such file."""
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        names = [os.path.join(path, name) for name in os.listdir(path) if name.endswith(tuple(suffixes))]
    elif "*" in path:
        names = glob.glob(path)
    elif os.path.exists(path):
        names = [path]
    else:
        return None
    return [Shard(name, os.stat(name).st_size) for name in sorted(names) if os.path.isfile(name)]


def _find_remote(paths: Sequence[str], suffixes: Sequence[str], where: str) -> dict[str, list[Shard] | None]:
    """Return the objects that each address means; None if there is no such object."""
    system, first = _file_system(paths[0])
    remote.check_store(paths[0], lambda: system.exists(_parent(first)), remote.store(where, remote.CHECK_STORE))
    listed: dict[str, dict[str, int]] = {}  # sizes by path, by folder: one request for all files of a folder
    found: dict[str, list[Shard] | None] = {}
    for text in paths:
        system, path = _file_system(text)
        protocol, folder = text.partition("://")[0] + "://", _parent(path)
        if "*" in path:
            sizes = {name: info["size"] for name, info in system.glob(path, detail=True).items() if _is_file(info)}
        else:
            if folder not in listed:
                listed[folder] = _sizes(system, folder)
            if path in listed[folder]:
                sizes = {path: listed[folder][path]}
            elif system.isdir(path):
                sizes = {name: size for name, size in _sizes(system, path).items() if name.endswith(tuple(suffixes))}
            else:
                found[text] = None
                continue
        found[text] = [Shard(protocol + name, size) for name, size in sorted(sizes.items())]
    return found


def _file_system(path: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    return url_to_fs(os.path.expanduser(path))


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _is_file(info: dict[str, Any]) -> bool:
    return info["type"] == "file"


def _sizes(system: Any, folder: str) -> dict[str, int]:
    try:
        return {info["name"]: info["size"] for info in system.ls(folder, detail=True) if _is_file(info)}
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
