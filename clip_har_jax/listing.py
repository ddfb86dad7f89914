"""The walk over folders of images or clips, with a tally of the kept and left out files."""

import codecs
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_har_jax.errors import UserError
from clip_har_jax.image_formats import IMAGE_SUFFIXES
from clip_har_jax.names import check_text, clean_name, like_missing, mixed_scripts, name_key, natural_key
from clip_har_jax.specs import SPLIT_NAMES, Spec, find_split

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"})
# Folders that operating systems and network disks add; compared without case.
SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information")
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini")
HIDDEN, SYSTEM, LOOSE, NO_SUFFIX = "hidden", "of the system", "beside the class folders", "without a suffix"
SPECIAL = "pipes, sockets or devices"


@dataclass
class Tally:
    """The files that a listing kept and left out.

    Attributes:
      kept: files that are examples.
      ignored: number of left out files and folders by kind: a suffix, or a reason.
      first: the first path of each kind.
      empty: class folders without an example.
      notes: sentences on anything else that a person should check.
    """

    kept: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, kind: str, path: str) -> None:
        self.ignored[kind] += 1
        self.first.setdefault(kind, path)

    def to_json(self) -> dict[str, Any]:
        """Return the tally as the commands write it to their records."""
        return {
            "kept": self.kept,
            "ignored": dict(self.ignored.most_common()),
            "empty": self.empty,
            "notes": self.notes,
        }

    @property
    def lines(self) -> list[str]:
        """Lines for a person; empty if nothing was left out."""
        told = []
        if self.ignored:
            kinds = ", ".join(
                f"{count} {kind} ({self.first[kind]}{', ...' if count > 1 else ''})"
                for kind, count in self.ignored.most_common()
            )
            told.append(f"left out: {kinds}")
        if self.empty:
            more = f" and {len(self.empty) - 5} more" if len(self.empty) > 5 else ""
            told.append(f"no examples in the folders {', '.join(map(repr, self.empty[:5]))}{more}")
        return told + self.notes


def _why_ignored(name: str) -> str | None:
    """Return why a file or folder is ignored at any depth; None: it isn't."""
    if name.casefold() in SYSTEM_FOLDERS + SYSTEM_FILES:
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


def _kind_of(name: str, suffixes: Collection[str]) -> str | None:
    """Return the kind under which a file is left out; None: it is kept."""
    if why := _why_ignored(name):
        return why
    suffix = os.path.splitext(name)[1].lower()
    return None if suffix in suffixes else suffix or NO_SUFFIX


def find_files(folder: str | Path, suffixes: Collection[str], tally: Tally | None = None) -> Iterator[Path]:
    """Yield the files below a folder with one of the suffixes, sorted by folder and name.

    Hidden files and those of the system are skipped. Symbolic links are followed, except to a parent, and no folder is
    visited twice.

    Args:
      folder: the top folder.
      suffixes: in lower case.
      tally: records the kept and left out files.

    Raises:
      UserError: a folder that can't be read.
    """
    tally = Tally() if tally is None else tally
    seen = {str(parent) for parent in Path(folder).resolve().parents}
    waiting = [str(folder)]
    while waiting:
        parent = waiting.pop()
        real = os.path.realpath(parent)
        if real in seen:
            continue
        seen.add(real)
        folders = []
        for entry in _entries(parent):
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                if why := _why_ignored(entry.name):
                    tally.leave_out(f"folders {why}", entry.path)
                else:
                    folders.append(entry.path)
                continue
            kind = _kind_of(entry.name, suffixes) or (SPECIAL if _is_special(entry) else None)
            if kind is None:
                tally.kept += 1
                yield Path(entry.path)
            else:
                tally.leave_out(kind, entry.path)
        waiting += reversed(folders)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); check its permissions") from error


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a pipe, socket or device, which can't be read like a file."""
    if entry.is_file(follow_symlinks=False):
        return False
    try:
        return not stat.S_ISREG(os.stat(entry.path).st_mode)
    except OSError:  # a broken link; reported when it is read
        return False


def find_images(folder: str | Path, tally: Tally | None = None) -> Iterator[Path]:
    """Yield the image files below a folder, as `find_files` does."""
    return find_files(folder, IMAGE_SUFFIXES, tally)


def read_path_lines(lines: Iterable[bytes], where: str) -> Iterator[str]:
    """Yield the paths in a list with one path per line; skip blank lines and a byte order mark of UTF-8.

    Args:
      lines: lines of a binary file.
      where: the name of the file in messages.

    Raises:
      UserError: UTF-16, as Windows PowerShell's `>` writes it.
    """
    for number, line in enumerate(lines):
        if number == 0:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(
                    f"{where}: a list in UTF-16; save it as UTF-8, in PowerShell by Out-File -Encoding utf8"
                )
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield os.fsdecode(line.rstrip(b"\r\n"))


def spellings(name: str) -> Iterator[str]:
    """Yield a relative path as written, then as other systems write it: in another Unicode form, with slashes."""
    for path in (name, name.replace("\\", "/")):
        yield from dict.fromkeys((path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)))


def list_folder(
    spec: Spec,
    split: str,
    suffixes: Collection[str] = IMAGE_SUFFIXES,
    noun: str = "images",
    tally: Tally | None = None,
) -> list[tuple[Path, str]]:
    """Return the (file, label) pairs of a folder with one sub-folder per class, in the same order on every machine.

    Args:
      spec: a SPEC of kind folder or video.
      split: train, val or test; used for a folder with such sub-folders if the SPEC names no split. Without validation
        images, val is test.
      suffixes: suffixes of the files to list, in lower case.
      noun: the word for the files in messages.
      tally: records the kept and left out files.

    Raises:
      UserError: no files, or an invalid layout; the message says how to fix it.
    """
    tally = Tally() if tally is None else tally
    try:
        root = _split_folder(Path(spec.path).expanduser(), spec, split, suffixes, tally)
        classes = _class_folders(root)
        if not classes:
            raise UserError(f"{root}: no class folders in it; put the {noun} of each class in a folder of its name")
        _refuse_links(classes, root)
        _tally_loose(root, suffixes, tally)
        files: list[tuple[Path, str]] = []
        deeper: list[tuple[Path, str]] = []
        for folder in classes:
            label = clean_name(folder.name, str(root))
            found = list(find_files(folder, suffixes, tally))
            for file in found:
                check_text(file.relative_to(root).as_posix(), str(root))
            files += [(file, label) for file in found]
            if not found:
                tally.empty.append(folder.name)
            deeper += [(file, label) for file in found if file.parent != folder]
    except OSError as error:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); check its permissions") from error
    if not files:
        ends, seen = " ".join(sorted(suffixes)), f"; {tally.lines[0]}" if tally.ignored else ""
        raise UserError(f"{root}: no {noun} in its {len(classes)} class folders; names that end in {ends} count{seen}")
    if deeper:
        file, label = deeper[0]
        where = file.relative_to(root).parent.as_posix()
        tally.notes.append(
            f"{len(deeper)} {noun} lie in folders below their class folders, as {where}, and "
            f"count as {label!r}; if the inner folders are the classes, name the folder around them"
        )
    note_labels(tally, [label for _, label in files])
    return files


def note_labels(tally: Tally, labels: Collection[str]) -> None:
    """Add a note about labels that look like a missing value, or mix letters of several alphabets."""
    for label in like_missing(sorted(set(labels))):
        count = sum(one == label for one in labels)
        tally.notes.append(f"label {label!r} ({count} examples) reads like a missing value; is it an action?")
    for label in sorted(set(labels)):
        if scripts := mixed_scripts(label):
            tally.notes.append(
                f"label {label!r} mixes {' and '.join(scripts).lower()} letters in a word; was one typed by mistake?"
            )


def _class_folders(root: Path) -> list[Path]:
    """Return the folders in `root` in natural order, without ignored ones and links back to a parent."""
    here = root.resolve()
    folders = (path for path in root.iterdir() if not _why_ignored(path.name) and path.is_dir())
    kept = (path for path in folders if not here.is_relative_to(path.resolve()))
    return sorted(kept, key=lambda path: natural_key(path.name))


def _refuse_links(classes: Sequence[Path], root: Path) -> None:
    """Refuse two class folders that are the same folder by a link: each image has one label."""
    seen: dict[Path, Path] = {}
    for folder in classes:
        other = seen.setdefault(folder.resolve(), folder)
        if other is not folder:
            raise UserError(f"{root}: classes {other.name!r} and {folder.name!r} are one folder by a link; remove it")


def _tally_loose(root: Path, suffixes: Collection[str], tally: Tally) -> None:
    """Count the files and folders beside the class folders of `root`."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        why = _why_ignored(entry.name)
        if os.path.isdir(entry.path):  # entry.is_dir raises for a link to itself
            if why:
                tally.leave_out(f"folders {why}", entry.path)
        else:
            tally.leave_out(_kind_of(entry.name, suffixes) or LOOSE, entry.path)


def _split_folder(root: Path, spec: Spec, split: str, suffixes: Collection[str], tally: Tally) -> Path:
    """Return the folder that holds the classes: PATH, or its sub-folder of a split, named in any case."""
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; check the path of {spec}")
    exactly = "split" in spec.options
    split = spec.options.get("split", split)
    folders = {path.name: path for path in _class_folders(root)}
    known = {name for names in SPLIT_NAMES.values() for name in names}
    # An action may be called "test" or "train": the folder of a split holds folders, that of an action holds images.
    splits = [n for n, path in folders.items() if (exactly or name_key(n) in known) and _class_folders(path)]
    found = find_split(split, splits, exactly)
    if found is None and (splits or exactly):
        raise UserError(
            f"{root}: no folder {split!r} of class folders in it; it has {', '.join(map(repr, folders)) or 'none'}; "
            f"{'say another' if exactly else 'choose one with'} {spec.kind}:{root}?split=NAME"
        )
    if found is None:
        return root
    alike = [name for name in splits if name_key(name) == name_key(found)]
    if len(alike) > 1 and not exactly:
        raise UserError(f"{root}: the folders {' and '.join(map(repr, alike))} are one split by name; join them")
    _tally_loose(root, suffixes, tally)
    if others := [name for name in folders if name_key(name) not in known and name != found]:
        tally.notes.append(f"folders beside the splits, of no split: {', '.join(map(repr, others))}")
    return folders[found]
