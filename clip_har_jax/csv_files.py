"""`csv:FILE`: a table of files with labels or captions, checked as a whole before any file is read."""

import codecs
import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from clip_har_jax.errors import UserError
from clip_har_jax.listing import Tally, note_labels, spellings
from clip_har_jax.names import SEPARATOR, check_text, clean_name, name_key, sort_labels, split_labels
from clip_har_jax.specs import Spec

COLUMNS = ("filename", "label")
DELIMITERS = (",", ";", "\t")  # spreadsheets write semicolons where a comma is the decimal point
SHOWN_LINES = 3
MULTI_LABEL = "data.multi_label=True (prepare_data.py: --multi_label)"  # which allows several labels of an image


class Row(NamedTuple):
    """A row of the table."""

    line: int  # in the file, from 1
    filename: str
    label: str


def list_csv(spec: Spec, tally: Tally | None = None) -> list[tuple[Path, str]]:
    """Return the (file, label) pairs of a CSV, in the order of its rows.

    The columns `filename` and `label` are found by name, ignoring case and spaces; other columns are ignored. Files lie
    in `?images=DIR`, or else beside the CSV or in the folder of its name.

    Args:
      spec: a SPEC of kind csv.
      tally: records the kept and left out files, and notes.

    Raises:
      UserError: not a table with these columns, rows that don't match the header, missing files, or one file with two
        labels; names the lines.
    """
    tally = Tally() if tally is None else tally
    with _table(spec) as path:
        rows = _read_rows(path)
        found = _find_files(path, spec, rows, tally)
    files = _once_each(path, rows, found, tally)
    tally.kept = len(files)
    note_labels(tally, [label for _, label in files])
    if joined := sorted({label for _, label in files if SEPARATOR in label}):
        tally.notes.append(
            f"label {joined[0]!r} counts as one class; if {SEPARATOR!r} divides the labels of an image, use "
            f"{MULTI_LABEL}"
        )
    return files


def list_csv_sets(spec: Spec, tally: Tally) -> list[tuple[Path, tuple[str, ...]]]:
    """Return the (file, labels) pairs of a CSV whose labels are joined by `|`, in the order of the files' first rows.

    An empty cell means no label. Rows of one file add up. Otherwise as `list_csv`.

    Raises:
      UserError: not a table with these columns, rows that don't match the header, no filename, an empty label between
        two `|`, or missing files; names the lines.
    """
    with _table(spec) as path:
        rows = [Row(line, cells["filename"], cells["label"]) for line, cells in read_table(path, COLUMNS)]
        if blank := [row.line for row in rows if not row.filename]:
            raise UserError(f"{path}: line {blank[0]} has no filename ({len(blank)} such lines); fill it in")
        found = _find_files(path, spec, rows, tally)
    sets: dict[str, tuple[Path, list[str]]] = {}  # by resolved path: one file can be written in two ways
    for row, file in zip(rows, found, strict=True):
        own = split_labels(row.label, f"{path}, line {row.line}")
        sets.setdefault(os.path.realpath(file), (file, []))[1].extend(own)
    files = [(file, sort_labels(own)) for file, own in sets.values()]
    tally.kept = len(files)
    note_labels(tally, [label for _, own in files for label in own])
    return files


@contextmanager
def _table(spec: Spec) -> Iterator[Path]:
    """Give the path of a table, and turn errors of reading it and finding its files into one line."""
    path = Path(spec.path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}; check the path of {spec}")
    try:
        yield path
    except OSError as error:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); check its permissions") from error


def _read_rows(path: Path) -> list[Row]:
    rows = [Row(line, cells["filename"], cells["label"]) for line, cells in read_table(path, COLUMNS)]
    if blank := [row.line for row in rows if not row.filename or not row.label]:
        raise UserError(f"{path}: line {blank[0]} has no filename or no label ({len(blank)} such lines); fill it in")
    labels = {label: clean_name(label, str(path)) for label in {row.label for row in rows}}
    return [row._replace(label=labels[row.label]) for row in rows]


def read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV as (line number from 1, cells by column); outer spaces of cells are removed.

    Columns are found by name, ignoring case and spaces; other columns are ignored.

    Args:
      path: the CSV file.
      columns: required columns; the first one names a file.
      optional: columns that may be missing.

    Raises:
      UserError: not a table with these columns, or rows that don't match the header; names the lines.
    """
    try:
        with path.open(newline="", encoding=_encoding(path)) as file:
            reader = csv.reader(file, strict=True, delimiter=_delimiter(file, columns))
            header = _header(reader)
            places = _find_columns(path, header, columns, optional)
            numbered = [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as a CSV ({error}); save it as comma-separated UTF-8") from error
    if not numbered:
        raise UserError(f"{path}: no rows below the header; add one for each {'clip' if optional else 'image'}")
    if surplus := [line for line, cells in numbered if len(cells) > len(header)]:
        raise UserError(
            f"{path}: {_lines(surplus)} more cells than the header, which has {len(header)}; put quotes around a cell "
            "that holds a comma"
        )
    rows = [
        (line, {name: cells[at].strip() if at < len(cells) else "" for name, at in places.items()})
        for line, cells in numbered
    ]
    for line, cells_by_name in rows:
        check_text(cells_by_name[columns[0]], f"{path}, line {line}")
    return rows


class Captioned(NamedTuple):
    """A row of a table of image-text pairs."""

    line: int  # in the file, from 1
    file: Path
    caption: str  # may be empty


def list_captions(spec: Spec) -> list[Captioned]:
    """Return the rows of a CSV with the columns `filename` and `caption`, or the one that `?caption=COLUMN` names.

    Files are found as by `list_csv`. A file may have several captions.

    Raises:
      UserError: not a table with these columns, rows that don't match the header, or files that are missing or can't be
        read; names the lines.
    """
    column = spec.options.get("caption", "caption")
    with _table(spec) as path:
        rows = [Row(line, cells["filename"], cells[column]) for line, cells in read_table(path, ("filename", column))]
        files = _find_files(path, spec, rows, Tally())
    return [Captioned(row.line, file, row.label) for row, file in zip(rows, files, strict=True)]


def has_times(path: Path) -> bool:
    """Return whether a table's first line names the column `start_s`."""
    return has_column(path, "start_s")


def has_column(path: str | Path, name: str) -> bool:
    """Return whether a table's first line names a column, ignoring case and spaces."""
    path = Path(path).expanduser()
    try:
        with path.open(newline="", encoding=_encoding(path)) as file:
            reader = csv.reader(file, delimiter=_delimiter(file, (name,)))
            return name_key(name) in map(name_key, _header(reader))
    except (OSError, UnicodeDecodeError, csv.Error):  # the caller's own reading reports it
        return False


def _encoding(path: Path) -> str:
    """Return UTF-16 if there is a byte order mark of it, as in Excel's Unicode text; else UTF-8."""
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _delimiter(file: TextIO, columns: Sequence[str]) -> str:
    """Return the delimiter of the columns: a comma, or a semicolon or tab if the header's columns are found with it."""
    header = next((line for line in file if line.strip() and not line.lower().startswith("sep=")), "")
    file.seek(0)
    for delimiter in DELIMITERS:
        if set(map(name_key, columns)) <= {name_key(name.strip(' "\r\n')) for name in header.split(delimiter)}:
            return delimiter
    return DELIMITERS[0]


def _header(reader: Iterator[list[str]]) -> list[str]:
    """Return the first row that isn't Excel's own line `sep=;`."""
    return next((cells for cells in reader if cells and not cells[0].lower().startswith("sep=")), [])


def _find_columns(path: Path, header: Sequence[str], columns: Sequence[str], optional: Sequence[str]) -> dict[str, int]:
    """Return the positions of the columns by name."""
    keys = [name_key(name) for name in header]
    for name in (*columns, *optional):
        if (times := keys.count(name_key(name))) > 1:
            raise UserError(f"{path}: its first line names the column {name!r} {times} times; rename one")
        if not times and name not in optional:
            had = ",".join(header) or "nothing"
            raise UserError(f"{path}: its first line must be {','.join(columns)} (comma-separated); it has {had!r}")
    return {name: keys.index(name_key(name)) for name in (*columns, *optional) if name_key(name) in keys}


def _lines(lines: Sequence[int]) -> str:
    """Return "line 3 has", or "lines 3, 5, 8 and 2 more have"."""
    shown = ", ".join(map(str, lines[:SHOWN_LINES]))
    more = f" and {len(lines) - SHOWN_LINES} more" if len(lines) > SHOWN_LINES else ""
    return f"line {shown} has" if len(lines) == 1 else f"lines {shown}{more} have"


def _find_files(path: Path, spec: Spec, rows: Sequence[Row], tally: Tally) -> list[Path]:
    """Return each row's file: in `?images=DIR`, or beside the CSV, or in the folder of its name."""
    places = [path.parent, path.with_suffix("")]
    if "images" in spec.options:
        places = [Path(spec.options["images"]).expanduser()]
    found = [_first_file(places, row.filename) for row in rows]
    for i in [i for i, file in enumerate(found) if file is None]:
        others = (_first_file(places, name) for name in spellings(rows[i].filename))
        found[i] = next((file for file in others if file is not None), None)
    read = [(row, file) for row, file in zip(rows, found, strict=True) if file is not None]
    if turned := [row.line for row, file in read if "\\" in row.filename and "\\" not in str(file)]:
        tally.notes.append(f"{_lines(turned)} a Windows path; its backslashes were read as slashes")
    missing = [row for row, file in zip(rows, found, strict=True) if file is None]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(rows)} files are missing, the first is {missing[0].filename!r} (line "
            f"{missing[0].line}); looked in {' and '.join(map(str, places))}; say csv:{path}?images=DIR if they are "
            "elsewhere"
        )
    return [file for file in found if file is not None]


def _first_file(places: Iterable[Path], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)


def _once_each(path: Path, rows: Sequence[Row], found: Sequence[Path], tally: Tally) -> list[tuple[Path, str]]:
    """Return each file once; note repeated rows, and refuse two labels of one file."""
    first: dict[str, tuple[Path, Row]] = {}  # by resolved path: one file can be written in two ways
    repeated: list[int] = []
    for row, file in zip(rows, found, strict=True):
        _, earlier = first.setdefault(os.path.realpath(file), (file, row))
        if earlier.label != row.label:
            raise UserError(
                f"{path}: {row.filename!r} is {earlier.label!r} in line {earlier.line} and {row.label!r} in line "
                f"{row.line}; an image has one label, so keep one of the lines, or set {MULTI_LABEL}"
            )
        if earlier is not row:
            repeated.append(row.line)
    if repeated:
        tally.ignored["repeated rows"] = len(repeated)
        tally.first["repeated rows"] = f"line {repeated[0]}"
    return [(file, row.label) for file, row in first.values()]
