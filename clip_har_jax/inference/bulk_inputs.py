"""The inputs of a bulk prediction: a folder, a manifest or a list of paths, as a stream in a fixed order."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_har_jax.errors import UserError
from clip_har_jax.listing import Tally, find_images, read_path_lines, spellings
from clip_har_jax.names import name_key

PATH_COLUMNS = ("path", "filename", "file", "input")
CSV_ENCODING = "utf-8-sig"  # spreadsheets write a byte order mark


def open_inputs(source: str) -> Callable[[Tally | None], Iterator[str]]:
    """Return a function that reads the inputs from the start each time, without storing them.

    Its argument records the kept and left out files of a folder.

    Args:
      source: a folder of images, a manifest (.parquet or .csv with a column `path`, `filename`, `file` or `input`), or
        a text file with one path per line. Paths in a manifest are used as written, or relative to its folder.

    Raises:
      UserError: the source is none of these.
    """
    path = Path(source)
    if path.is_dir():
        return lambda tally: map(str, find_images(path, tally))
    if not path.is_file():
        raise UserError(f"--inputs={source}: not there; name a folder, a manifest (.parquet, .csv) or a list of paths")
    if path.suffix == ".parquet":
        try:
            table = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise UserError(f"--inputs={source}: not Parquet ({error})") from error
        column = _path_column(table.schema_arrow.names, source)
        return lambda _: _from_parquet(path, column)
    if path.suffix == ".csv":
        import csv

        try:
            with path.open(newline="", encoding=CSV_ENCODING) as file:
                header = next(csv.reader(file), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"--inputs={source}: not CSV in UTF-8 ({error})") from error
        column = _path_column(header, source)
        return lambda _: _from_csv(path, column)
    return lambda _: _from_lines(path)


def _path_column(names: list[str], source: str) -> str:
    by_key = {name_key(name): name for name in reversed(names)}
    for name in PATH_COLUMNS:
        if name in by_key:
            return by_key[name]
    raise UserError(f"--inputs={source}: has no column {' or '.join(PATH_COLUMNS)}, but {', '.join(names) or 'none'}")


def _from_parquet(path: Path, column: str) -> Iterator[str]:
    for batch in pq.ParquetFile(path).iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            yield _beside(path, value, column)


def _from_csv(path: Path, column: str) -> Iterator[str]:
    import csv

    try:
        with path.open(newline="", encoding=CSV_ENCODING) as file:
            for row in csv.DictReader(file):
                yield _beside(path, row[column], column)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not CSV in UTF-8 ({error})") from error


def _from_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        yield from read_path_lines(file, str(path))


def _beside(manifest: Path, value: Any, column: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{manifest}: column {column!r} holds {value!r}; each row needs a path")
    if Path(value).is_absolute() or Path(value).exists():
        return value
    beside = (manifest.parent / name for name in spellings(value))
    return str(next((path for path in beside if path.exists()), manifest.parent / value))
