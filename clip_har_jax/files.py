"""Reading and writing files: JSON, digests, and atomic writes."""

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from clip_har_jax.errors import UserError


@runtime_checkable
class TextFile(Protocol):
    """A path on a disk (`pathlib.Path`) or in an object store (`epath.Path`)."""

    def read_text(self, encoding: Any = None) -> str:
        """Return the file's text."""


def lacks_temporary_folder() -> bool:
    """Return whether no folder for temporary files can be written, as in a container with a read-only root."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return True
    return False


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is on a mounted file system rather than an object store."""
    return "://" not in os.fspath(path)


def sha256(data: bytes | str | Iterable[bytes | str]) -> str:
    """Return the SHA-256 in hex of bytes or text (UTF-8), or of several parts joined."""
    digest = hashlib.sha256()
    for part in (data,) if isinstance(data, bytes | str) else data:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def sha256_file(path: Any) -> str:
    """Return the SHA-256 in hex of a file, on a disk or in an object store.

    Raises:
      OSError: the file can't be read.
    """
    with open(path, "rb") if isinstance(path, str) else path.open("rb") as file:
        if hasattr(file, "readinto"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return sha256(iter(lambda: file.read(1 << 20), b""))  # some object store clients support only read()


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the same folder; what is written there replaces `path` at the end.

    Readers see the old contents or the new, never a part. Write into the given file; don't rename another file over it,
    since the lock that keeps other writers from removing it belongs to the file. Each call has its own temporary file,
    so two writers don't collide. An error removes it and keeps the old contents.
    """
    path = Path(path)
    _clear_leftovers(path)
    partial, file = _open_partial(path)
    try:
        with file:  # holds the lock until the file is in place
            yield partial
            os.fsync(file.fileno())
            if os.name == "nt":
                file.close()  # Windows can't rename an open file
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _open_partial(path: Path) -> tuple[Path, IO[bytes]]:
    """Create a temporary file that no other writer removes; return its path and the open file that holds its lock."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
        file = partial.open("xb")
        with suppress(FileNotFoundError):
            if _claim(file) is not False and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                return partial, file
        file.close()  # another writer removed it as a leftover before it was locked


def _clear_leftovers(path: Path) -> None:
    """Remove the temporary files of killed writers of `path`."""
    names = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.partial")
    for leftover in [other for other in path.parent.iterdir() if names.fullmatch(other.name)]:
        with suppress(OSError), leftover.open("rb") as file:
            if _claim(file):
                leftover.unlink()


def _claim(file: IO[bytes]) -> bool | None:
    """Try to lock a temporary file; return whether it succeeded. The kernel releases the lock when the process ends.

    Return None if the system has no such locks, as on Windows.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, see `atomic`; object stores replace whole objects themselves."""
    if not is_local(path):
        from etils import epath

        epath.Path(path).write_text(text)
        return
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically, see `atomic`."""
    with atomic(path) as partial:
        partial.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically, see `write_text`.

    Raises:
      ValueError: `value` holds NaN or an infinity, which JSON lacks; the old file stays.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: TextFile) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no such file.

    Raises:
      UserError: the file can't be read, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path}: not JSON ({error}); mend or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is needed, not a {type(value).__name__}")
    return value


def read_object(path: TextFile) -> dict[str, Any]:
    """Return the object in a JSON file that must exist.

    Raises:
      UserError: the file is missing, can't be read, or holds no JSON object.
    """
    value = read_json(path)
    if value is None:
        raise UserError(f"{path}: no such file")
    return value
