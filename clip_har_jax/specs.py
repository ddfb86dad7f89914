"""SPEC -> list of (file, label): what a person types to name data, the same in every flag and config."""

import csv
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.formats import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"})

# kind -> (what follows the colon, the options after the question mark)
KINDS = {
    "synthetic": ("", ("split",)),
    "folder": ("PATH", ("split",)),
    "csv": ("FILE", ("images",)),
    "manifest": ("FILE", ("split", "images", "cache")),
    "video": ("PATH", ("split", "fold")),
    "tfds": ("NAME", ("split", "data_dir")),
    "hf": ("OWNER/NAME", ("split",)),
}

# What the folders of a split, or the splits of a prepared data set, are called; the first one found serves.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Spec:
    """A parsed SPEC: `kind:path?option=value`."""

    kind: str
    path: str
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "&".join(f"{name}={value}" for name, value in self.options.items())
        return self.kind + (f":{self.path}" if self.path else "") + (f"?{options}" if options else "")


def parse_spec(text: str) -> Spec:
    """Parse a SPEC; its options are taken as typed, without the escapes of an address.

    Raises:
      UserError: an unknown kind or option, an option without a value, a path missing or where none goes.
    """
    head, mark, query = text.partition("?")
    kind, _, path = head.partition(":")
    if kind not in KINDS:
        raise UserError(f"data {text!r}: unknown kind {kind!r}; {_kind_hint(kind, head)}")
    wanted, options = KINDS[kind]
    if bool(path) != bool(wanted):
        raise UserError(f"data {text!r}: write {f'{kind}:{wanted}' if wanted else kind}")
    given = dict(_option(text, item) for item in query.split("&")) if mark else {}
    if unknown := [name for name in given if name not in options]:
        raise UserError(f"data {text!r}: unknown option {unknown[0]!r}; {nearest(unknown[0], list(options))}")
    return Spec(kind, path, given)


def _kind_hint(kind: str, head: str) -> str:
    if os.path.isdir(head):
        return f"write folder:{head}"
    return f"write csv:{head}" if head.endswith(".csv") else nearest(kind, list(KINDS))


def _option(text: str, item: str) -> tuple[str, str]:
    name, _, value = item.partition("=")
    if not name or not value:
        raise UserError(f"data {text!r}: option {item!r} has no value; write ?name=value")
    return name, value


def find_split(split: str, available: Sequence[str], exactly: bool) -> str | None:
    """What the split asked for is called among those available; None where there is no such.

    Args:
      split: a name; where it isn't meant `exactly`, train, val or test, which go by several names.
      available: the names to choose from.
      exactly: whether a person named the split, so that no other serves.
    """
    names = (split,) if exactly else SPLIT_NAMES.get(split, (split,))
    return next((name for name in names if name in available), None)


def list_files(spec: Spec, split: str) -> list[tuple[Path, str]]:
    """Return the (file, label) pairs of a folder or CSV, in an order that is the same on every machine.

    Args:
      spec: of kind folder or csv.
      split: train, val or test; what a folder with such sub-folders gives where the spec says nothing. Without
        validation images, val is test.

    Raises:
      UserError: nothing is there, or it isn't what it should be; says what to do.
    """
    try:
        return list_folder(spec, split) if spec.kind == "folder" else _list_csv(spec)
    except OSError as error:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); check its permissions") from error


def list_folder(
    spec: Spec, split: str, suffixes: Collection[str] = IMAGE_SUFFIXES, noun: str = "images"
) -> list[tuple[Path, str]]:
    """Return the (file, label) pairs of one folder a class.

    Raises:
      UserError: there are none.
    """
    root = _split_folder(Path(spec.path).expanduser(), spec, split)
    classes = _class_folders(root)
    if not classes:
        raise UserError(f"{root}: no class folders in it; put the {noun} of each class in a folder of its name")
    files = [(file, folder.name) for folder in classes for file in find_files(folder, suffixes)]
    if not files:
        ends = " ".join(sorted(suffixes))
        raise UserError(f"{root}: no {noun} in its {len(classes)} class folders; names that end in {ends} count")
    return files


def _class_folders(root: Path) -> list[Path]:
    """Return the folders in `root` by name, less hidden ones and links back to where they lie."""
    here = root.resolve()
    folders = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted((path for path in folders if not here.is_relative_to(path.resolve())), key=lambda path: path.name)


def _split_folder(root: Path, spec: Spec, split: str) -> Path:
    """Return the folder that holds the classes: PATH, or its sub-folder of a split."""
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; check the path of {spec}")
    exactly = "split" in spec.options
    split = spec.options.get("split", split)
    folders = {path.name: path for path in _class_folders(root)}
    known = {name for names in SPLIT_NAMES.values() for name in names}
    # An action may be called "test" or "train": a split's folder holds folders, an action's holds images.
    splits = [name for name, path in folders.items() if (exactly or name in known) and _class_folders(path)]
    found = find_split(split, splits, exactly)
    if found is None and (splits or exactly):
        raise UserError(
            f"{root}: no folder {split!r} of class folders in it; it has {', '.join(map(repr, folders)) or 'none'}; "
            f"{'say another' if exactly else 'choose one with'} folder:{root}?split=NAME"
        )
    return root if found is None else folders[found]


def find_images(folder: Path) -> Iterator[Path]:
    """Return the image files below a folder, as `find_files` finds them."""
    return find_files(folder, IMAGE_SUFFIXES)


def find_files(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Return the files below a folder whose names end so, sorted; follows symbolic links, but none back up, no folder
    twice.

    Raises:
      UserError: a folder that can't be read.
    """
    seen = {str(parent) for parent in folder.resolve().parents}
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(parent, n) for n in sorted(names) if Path(n).suffix.lower() in suffixes)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: can't be read ({error.strerror}); check its permissions") from error


def _list_csv(spec: Spec) -> list[tuple[Path, str]]:
    path = Path(spec.path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}; check the path of {spec}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"filename", "label"} <= set(columns):
                had = ",".join(columns) or "nothing"
                raise UserError(f"{path}: its first line must be filename,label (comma-separated); it has {had!r}")
            rows = [(reader.line_num, (r["filename"] or "").strip(), (r["label"] or "").strip()) for r in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as a CSV ({error}); save it as comma-separated UTF-8") from error
    if not rows:
        raise UserError(f"{path}: no rows below the header; add one for each image")
    if blank := [line for line, name, label in rows if not name or not label]:
        raise UserError(f"{path}: line {blank[0]} has no filename or no label ({len(blank)} such lines); fill it in")
    return _beside(path, spec, rows)


def _beside(path: Path, spec: Spec, rows: Sequence[tuple[int, str, str]]) -> list[tuple[Path, str]]:
    """Return the rows' files: in `?images=DIR`, or beside the CSV, or in the folder of its name."""
    places = [path.parent, path.with_suffix("")]
    if "images" in spec.options:
        places = [Path(spec.options["images"]).expanduser()]
    found = [next((p / name for p in places if (p / name).is_file()), None) for _, name, _ in rows]
    missing = [row for row, file in zip(rows, found, strict=True) if file is None]
    if missing:
        line, name, _ = missing[0]
        raise UserError(
            f"{path}: {len(missing)} of {len(rows)} files are missing, the first is {name!r} (line {line}); looked in "
            f"{' and '.join(map(str, places))}; say csv:{path}?images=DIR if they are elsewhere"
        )
    return [(file, label) for file, (_, _, label) in zip(found, rows, strict=True) if file is not None]


def label_ids(names: Sequence[str], labels: Sequence[str], where: str) -> list[int]:
    """Return the position of each example's label in the list of classes.

    Raises:
      UserError: a label outside the list (names it and the nearest one), a class listed twice, or two that differ only
        in case, which a model can't tell apart by their names.
    """
    ids = {label: i for i, label in enumerate(labels)}
    by_case: dict[str, str] = {}
    for label in labels:
        if (other := by_case.setdefault(label.casefold(), label)) != label:
            raise UserError(f"{where}: classes {other!r} and {label!r} differ only in case; give both one name")
    if len(ids) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"{where}: class {twice!r} is listed twice; list each class once")
    if unknown := sorted(set(names) - set(ids)):
        raise UserError(
            f"{where}: label {unknown[0]!r} ({names.count(unknown[0])} images) is none of the {len(labels)} classes; "
            f"{nearest(unknown[0], list(labels))}"
        )
    return [ids[name] for name in names]
