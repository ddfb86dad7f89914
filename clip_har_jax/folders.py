"""Folders written by one process at a time, in place or as a new one that replaces the old; unchanged while read."""

import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from clip_har_jax.errors import UserError
from clip_har_jax.lock import FolderLock, sibling_lock


@contextmanager
def output_folder(path: str | Path, flag: str = "--output") -> Iterator[Path]:
    """Make a folder for output files and lock it against other writers.

    Raises:
      UserError: the folder can't be made or written, or another process writes there.
    """
    folder = Path(path)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FolderLock(folder, flag))
        except OSError as error:
            raise UserError(f"{flag}={path}: can't be made or written ({error.strerror})") from error
        yield folder


@contextmanager
def replacing(target: str | Path, flag: str = "--output") -> Iterator[Path]:
    """Give an empty temporary folder; what is written there replaces `target` at the end.

    The old contents stay until the new ones are complete; an error removes the new ones. A kill at any moment leaves
    the old folder or the new one; the next call removes the remains.

    Raises:
      UserError: another process writes `target`.
      OSError: the folder of `target` can't be written.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with sibling_lock(target, flag):
        _clear_leftovers(target)
        token = secrets.token_hex(6)  # a writer that lost its lock while suspended doesn't collide with the next one
        partial, old = (target.with_name(f".{target.name}.{token}.{word}") for word in ("partial", "old"))
        partial.mkdir()
        try:
            yield partial
            if target.exists():
                target.rename(old)
            partial.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def replace_folder(target: str | Path, fill: Callable[[Path], object], flag: str = "--output") -> Path:
    """Replace `target` by a folder that `fill` writes, see `replacing`."""
    with replacing(target, flag) as folder:
        fill(folder)
    return Path(target)


def _clear_leftovers(target: Path) -> None:
    """Remove the remains of killed writers; the caller holds the lock, so no living writer loses files."""
    names = re.compile(rf"\.{re.escape(target.name)}(\.[0-9a-f]{{12}})?\.(partial|old)")
    leftovers = [path for path in target.parent.iterdir() if names.fullmatch(path.name)]
    for path in leftovers:
        if path.suffix == ".old" and not target.exists():  # killed between the two renames
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Check that nobody changes a folder that is read several times, such as a model of which each format reads parts.

    Raises:
      UserError: a file was added, removed, replaced or written to.
    """
    before = _states(folder)
    try:
        yield
    except Exception as error:
        if _states(folder) != before:
            raise _changed(folder) from error
        raise
    if _states(folder) != before:
        raise _changed(folder)


def _states(folder: Path) -> dict[Path, tuple[int, int, int]]:
    states = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        with suppress(FileNotFoundError):  # removed meanwhile
            state = path.stat()
            states[path] = (state.st_size, state.st_mtime_ns, state.st_ino)
    return states


def _changed(folder: Path) -> UserError:
    return UserError(f"{folder}: its files changed while they were read; wait until its writer ends, then start again")
