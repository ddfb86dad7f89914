"""Compiled programs on disk, so that the next start needs no compilation.

JAX's persistent cache writes entries in place, never replaces a damaged one, doesn't check the machine code that it
loads, and grows without limit. So the first process that opens the unused folder removes the damaged entries and the
least recently used ones. A shared lock marks the folder as in use; the kernel releases it when the process ends.
"""

import fcntl
import logging
import os
import stat
import zlib
from pathlib import Path

import jax

from clip_har_jax.caches import cache_folder
from clip_har_jax.files import sha256

MAX_BYTES = 512 * 2**20
_ENTRY, _SEAL, _LOCK = "-cache", ".sha256", ".in-use"
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # magic number of a frame: RFC 8878, section 3.1.1

_log = logging.getLogger(__name__)
_held: list[int] = []  # file descriptors; their locks last as long as the process


def keep_compiled() -> Path | None:
    """Keep compiled programs in the user's cache folder; a folder that JAX was given already has precedence.

    The programs are machine code, so a folder that others can write to isn't used.

    Returns:
      The folder; None if it can't be used, and each process compiles for itself.
    """
    if given := jax.config.values["jax_compilation_cache_dir"]:
        return Path(given)
    try:
        folder = cache_folder("compiled")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"others can write to {folder}")
        _held.append(_lock(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        _log.info("compiled programs aren't kept: %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _lock(folder: Path) -> int:
    """Return the descriptor of a shared lock on the folder; clean it first if no other process uses it."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            clean(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)  # wait while another process cleans
    except OSError:
        os.close(lock)
        raise
    return lock


def clean(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Remove damaged entries, and the least recently used ones beyond `max_bytes`; no process may use the folder.

    The first time that an entry is seen, its SHA-256 is stored. Before that, only a process killed while writing can
    have damaged it, which the compression's own format detects.
    """
    entries = []
    for path in folder.glob(f"*{_ENTRY}"):
        seal, found, content = _seal_of(path), path.stat(), path.read_bytes()
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # this reading doesn't count as a use
        digest = sha256(content)
        if seal.exists():
            whole = seal.read_text() == digest
        elif whole := _is_whole(content):
            seal.write_text(digest)
        if whole:
            entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
        else:
            _log.info("a damaged compiled program is removed: %s", path)
            _remove(path)
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= max_bytes:
            break
        _remove(path)
        total -= size


def _is_whole(content: bytes) -> bool:
    """Return whether an entry decompresses to its end: JAX uses Zstandard if Python has it, else zlib."""
    if content.startswith(_ZSTANDARD):
        try:
            from compression import zstd  # Python 3.14
        except ImportError:
            try:
                import zstandard as zstd
            except ImportError:
                return False  # JAX couldn't read it either
        try:
            zstd.decompress(content)
        except zstd.ZstdError:
            return False
        return True
    try:
        zlib.decompress(content)
    except zlib.error:
        return False
    return True


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + _SEAL)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _seal_of(path).unlink(missing_ok=True)
