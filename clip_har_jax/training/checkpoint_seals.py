"""The files of checkpoints, on a disk or in an object store: their digests, and the handling of damaged ones.

Beside each checkpoint stands `<step>.manifest.json` with the SHA-256 of its files.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from clip_har_jax.errors import UserError
from clip_har_jax.files import is_local, sha256_file, write_json

LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")  # files that Orbax writes last, after its callback


def probe(folder: epath.Path) -> None:
    """Make a folder and check that it can be written.

    Raises:
      OSError: it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".probe.{secrets.token_hex(4)}"
    path.write_text("")
    path.unlink()


def steps_on_disk(folder: epath.Path) -> list[int]:
    """Return all steps, listed without Orbax, which can fail at a damaged file."""
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def was_saved(folder: epath.Path) -> bool:
    """Return whether any checkpoint exists, intact or damaged."""
    return bool(steps_on_disk(folder)) or aside(folder).exists()


def aside(folder: epath.Path) -> epath.Path:
    """Return the folder to which damaged checkpoints are moved."""
    return folder.parent / f"{folder.name}_damaged"


def manifest_path(folder: epath.Path, step: int) -> epath.Path:
    return folder / f"{step}.manifest.json"


def write_manifest(folder: epath.Path, step: int, files: Mapping[str, str]) -> None:
    write_json(manifest_path(folder, step), {"step": step, "files": dict(files)})


def seal_late(folder: epath.Path, step: int) -> None:
    """Add the files that Orbax writes last to a checkpoint's manifest; remove the manifests of deleted checkpoints."""
    files = json.loads(manifest_path(folder, step).read_text())["files"]
    late = [name for name in LATE if (folder / str(step) / name).exists()]
    write_manifest(folder, step, files | {name: sha256_file(folder / str(step) / name) for name in late})
    for manifest in folder.glob("*.manifest.json"):
        if not (folder / manifest.name.partition(".")[0]).exists():
            manifest.unlink(missing_ok=True)


def problem(folder: epath.Path, step: int) -> str | None:
    """Return how the files of a checkpoint differ from its manifest; None: they don't.

    Raises:
      UserError: the files can't be read for lack of permission.
    """
    try:
        return _difference(folder, step)
    except PermissionError as error:
        raise UserError(f"{error.filename or folder}: checkpoint {step} may not be read") from error


def _difference(folder: epath.Path, step: int) -> str | None:
    try:
        files = json.loads(manifest_path(folder, step).read_text())["files"]
    except FileNotFoundError:
        return "its manifest is missing"
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    try:
        # A kill may have come before these were added. They hold no part of the state.
        unsealed = tuple(name for name in LATE if name not in files)
        found = hashes(folder / str(step), leave_out=unsealed)
    except PermissionError:
        raise
    except OSError as error:
        return f"can't be read: {error}"
    if differing := sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name)):
        name = differing[0]
        what = "is missing" if name not in found else "was added" if name not in files else "was changed"
        return f"{name} {what}"
    return None


def hashes(folder: epath.Path, leave_out: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of each file by its relative name; several are read at once."""
    assert folder.exists(), folder
    files = {name: path for name, path in _files(folder, "") if name not in leave_out}
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(sha256_file, files.values()), strict=True))


def _files(folder: epath.Path, prefix: str) -> Iterator[tuple[str, epath.Path]]:
    """Yield (name, path) of the files below `folder`; epath's own `walk` drops an object store's scheme."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        name = f"{prefix}{path.name}"
        if path.is_dir():
            yield from _files(path, f"{name}/")
        else:
            yield name, path


def move_folder(source: epath.Path, target: epath.Path) -> None:
    if is_local(source):
        source.rename(target)
        return
    for name, path in _files(source, ""):  # object stores have neither folders nor renames
        path.copy(target / name, overwrite=True)
    source.rmtree()
