"""SPEC -> list of (file, label): what a person types to name data, the same in every flag and config."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from clip_har_jax.errors import UserError, nearest

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

# kind -> (what follows the colon, the options after the question mark)
KINDS = {
    "synthetic": ("", ("split",)),
    "folder": ("PATH", ("split",)),
    "csv": ("FILE", ("images",)),
    "tfds": ("NAME", ("split", "data_dir")),
    "hf": ("OWNER/NAME", ("split",)),
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
    """Parses a SPEC.

    Raises:
      UserError: an unknown kind or option, or a path where none goes; names the nearest that is known.
    """
    head, _, query = text.partition("?")
    kind, _, path = head.partition(":")
    if kind not in KINDS:
        hint = f"folder:{text}" if Path(head).is_dir() else nearest(kind, list(KINDS))
        raise UserError(f"data {text!r}: unknown kind {kind!r}; {hint if 'folder:' not in hint else f'write {hint}'}")
    wanted, options = KINDS[kind]
    if bool(path) != bool(wanted):
        raise UserError(f"data {text!r}: write {f'{kind}:{wanted}' if wanted else kind}")
    given = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := [name for name in given if name not in options]:
        raise UserError(f"data {text!r}: unknown option {unknown[0]!r}; {nearest(unknown[0], list(options))}")
    return Spec(kind, path, given)


def list_files(spec: Spec, split: str) -> list[tuple[Path, str]]:
    """The (file, label) pairs of a folder or CSV, in an order that is the same on every machine.

    Args:
      spec: of kind folder or csv.
      split: train, val or test; what a folder with such sub-folders gives where the spec says nothing.

    Raises:
      UserError: nothing is there, or it isn't what it should be; says what to do.
    """
    return _list_folder(spec, split) if spec.kind == "folder" else _list_csv(spec)


def _list_folder(spec: Spec, split: str) -> list[tuple[Path, str]]:
    root = _split_folder(Path(spec.path).expanduser(), spec, split)
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UserError(f"{root}: no class folders in it; one folder for each class of images is needed")
    files = [(file, folder.name) for folder in classes for file in find_images(folder)]
    if not files:
        raise UserError(f"{root}: no images in its {len(classes)} class folders ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _split_folder(root: Path, spec: Spec, split: str) -> Path:
    """The folder that holds the classes: PATH, or its sub-folder of a split."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder" if not root.exists() else f"{root}: a file, not a folder")
    if "split" in spec.options:
        if not (root / spec.options["split"]).is_dir():
            raise UserError(f"{root}: no folder {spec.options['split']!r} in it, which {str(spec)!r} asks for")
        return root / spec.options["split"]
    candidates = {"val": ("val", "validation", "valid", "test")}.get(split, (split,))
    found = [root / name for name in candidates if (root / name).is_dir()]
    return found[0] if found and (root / "train").is_dir() else root


def find_images(folder: Path) -> Iterator[Path]:
    """The image files below a folder, sorted; follows symbolic links, but no folder twice."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(parent, n) for n in sorted(names) if Path(n).suffix.lower() in IMAGE_SUFFIXES)


def _list_csv(spec: Spec) -> list[tuple[Path, str]]:
    path = Path(spec.path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"filename", "label"} <= set(columns):
                raise UserError(f"{path}: columns filename,label are needed; it has {', '.join(columns) or 'none'}")
            rows = [(row["filename"], row["label"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as a CSV ({error})") from error
    if not rows:
        raise UserError(f"{path}: no rows below the header")
    if blank := [i for i, (name, label) in enumerate(rows, 2) if not name or not label]:
        raise UserError(f"{path}: line {blank[0]} has no filename or no label")
    return _beside(path, spec, rows)


def _beside(path: Path, spec: Spec, rows: Sequence[tuple[str, str]]) -> list[tuple[Path, str]]:
    """The rows' files: in `?images=DIR`, or beside the CSV, or in the folder of its name."""
    if "images" in spec.options:
        places = [Path(spec.options["images"]).expanduser()]
    else:
        places = [path.parent, path.with_suffix("")]
    root = next((place for place in places if (place / rows[0][0]).is_file()), places[0])
    missing = [name for name, _ in rows if not (root / name).is_file()]
    if missing:
        looked = " and ".join(str(place) for place in places)
        raise UserError(
            f"{path}: {len(missing)} of {len(rows)} files are missing, the first is {missing[0]!r}; looked in {looked}; "
            f"say csv:{path}?images=DIR if they are elsewhere"
        )
    return [(root / name, label) for name, label in rows]


def label_ids(names: Sequence[str], labels: Sequence[str], where: str) -> list[int]:
    """The position of each example's label in the list of classes.

    Raises:
      UserError: a label outside the list; names it and the nearest one.
    """
    ids = {label: i for i, label in enumerate(labels)}
    if unknown := sorted(set(names) - set(ids)):
        raise UserError(
            f"{where}: label {unknown[0]!r} ({names.count(unknown[0])} images) is none of the {len(labels)} classes; "
            f"{nearest(unknown[0], list(labels))}"
        )
    return [ids[name] for name in names]
