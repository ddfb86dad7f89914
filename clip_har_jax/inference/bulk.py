"""Predictions for any number of files, written as Parquet in parts; a kill loses at most one part.

The inputs are a stream in a fixed order; shard I of N takes every N-th. A part holds the next `part_size` inputs of a
shard and is written atomically, so the number of parts says where to continue. Reading, predicting, writing and
resuming share these rules, so they stand in one file, over 300 lines.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_har_jax.errors import UserError
from clip_har_jax.files import atomic, write_json
from clip_har_jax.folders import output_folder
from clip_har_jax.inference.predictor import Predictor
from clip_har_jax.listing import Tally, find_images, read_path_lines, spellings
from clip_har_jax.names import name_key

Row = tuple[str, str | np.ndarray]  # an input, and its probabilities or the error
PATH_COLUMNS = ("path", "filename", "file", "input")
CSV_ENCODING = "utf-8-sig"  # spreadsheets write a byte order mark


@dataclass(frozen=True)
class Progress:
    """Progress of a shard, over all starts."""

    done: int
    failed: int
    total: int | None  # None: not counted yet
    images_per_s: float  # since this start
    tally: Tally | None = None  # of the whole listing, at the end of a start that read inputs


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


def predict_bulk(
    predictor: Predictor,
    source: str,
    output: Path,
    shard: tuple[int, int] = (0, 1),
    part_size: int = 10_000,
    workers: int = os.cpu_count() or 1,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Predict a shard of the inputs, continuing where an earlier start ended.

    Writes `predictions-III-of-NNN/PPPPPP.parquet` (input, label, score, probs) and, for unreadable files,
    `bad_inputs-III-of-NNN/PPPPPP.parquet` (input, error).

    Args:
      predictor: the model.
      source: as for `open_inputs`.
      output: the folder to write, one for all shards.
      shard: (index, count).
      part_size: inputs of a part; determines the memory and the loss by a kill.
      workers: decoding threads.
      report: called after each batch.

    Raises:
      UserError: the folder holds predictions of another model or other inputs, or another process writes to it.
    """
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"--shard={index}/{count}: the first number must be 0 to {count - 1}")
    if part_size < 1 or workers < 1:
        raise UserError(f"--part_size={part_size}, --workers={workers}: 1 or more is needed")
    read = open_inputs(source)
    name = f"{index:05d}-of-{count:05d}"
    bad_folder = output / f"bad_inputs-{name}"
    with output_folder(output / f"predictions-{name}") as folder:
        bad_folder.mkdir(exist_ok=True)
        _check_same_run(folder / "about.json", _about(predictor, source, part_size))
        parts = _finished_parts(folder)
        inputs = islice(read(None), index, None, count)
        done = _skip(inputs, parts, part_size, folder)
        failed = _count_failed(bad_folder, parts)
        if parts and done < parts * part_size:  # the last part was the end of the inputs
            if next(inputs, None) is not None:
                raise UserError(f"{folder}: more inputs have come behind the last part; name another --output for them")
            return Progress(done, failed, done, 0.0)
        meter, tally = _Meter(done, failed, report), Tally()
        with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as counter:
            meter.total = counter.submit(lambda: len(range(index, sum(1 for _ in read(tally)), count)))
            while chunk := list(islice(inputs, part_size)):
                rows = list(meter.watch(_predict(predictor, chunk, pool)))
                _write_part(rows, folder, bad_folder, parts, predictor.labels)
                parts += 1
        if Path(source).is_dir():
            write_json(folder / "listing.json", tally.to_json())
    if not meter.done and shard == (0, 1):
        raise UserError(f"--inputs={source}: names no images")
    return replace(meter.progress(meter.done), tally=tally)


def _about(predictor: Predictor, source: str, part_size: int) -> dict[str, Any]:
    """Return the contents of about.json: the facts that a later start must share."""
    graphs = getattr(predictor.backend, "graphs", None)
    return {
        "model": str(predictor.backend.path),
        "digest": predictor.backend.digest,
        "labels": list(predictor.labels),
        "format": graphs.format if graphs else None,
        "inputs": str(Path(source).resolve()),
        "part_size": part_size,
    }


def _count_failed(bad_folder: Path, parts: int) -> int:
    """Return the number of unreadable inputs in the finished parts."""
    finished = [path for path in bad_folder.glob("*.parquet") if int(path.stem) < parts]
    return sum(pq.read_metadata(path).num_rows for path in finished)


class _Meter:
    """Count inputs and report progress after each batch."""

    def __init__(self, done: int, failed: int, report: Callable[[Progress], None]):
        self.done, self.failed, self.total = done, failed, Future[int]()
        self._before, self._start, self._report = done, time.perf_counter(), report

    def watch(self, batches: Iterable[tuple[list[str], list[str | np.ndarray]]]) -> Iterator[Row]:
        """Yield the rows of the batches of `_predict`: names, and for each its class probabilities [c] or an error."""
        for names, outcomes in batches:
            self.done += len(names)
            self.failed += sum(isinstance(outcome, str) for outcome in outcomes)
            counted = self.total.done() and not self.total.exception()
            self._report(self.progress(self.total.result() if counted else None))
            yield from zip(names, outcomes, strict=True)

    def progress(self, total: int | None) -> Progress:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return Progress(self.done, self.failed, total, (self.done - self._before) / seconds)


def _predict(
    predictor: Predictor, chunk: list[str], pool: ThreadPoolExecutor
) -> Iterator[tuple[list[str], list[str | np.ndarray]]]:
    """Yield (inputs, probabilities or errors) by batch; the next batch is decoded at the same time."""
    size = predictor.batch_size
    batches = [chunk[start : start + size] for start in range(0, len(chunk), size)]
    loading = [pool.submit(predictor.try_load, path) for path in batches[0]]
    for i, names in enumerate(batches):
        following = batches[i + 1] if i + 1 < len(batches) else []
        ahead = [pool.submit(predictor.try_load, path) for path in following]
        loaded = [future.result() for future in loading]
        images = [image for image in loaded if not isinstance(image, str)]
        probs = iter(predictor.backend.predict(np.stack(images)) if images else ())
        yield names, [image if isinstance(image, str) else next(probs) for image in loaded]
        loading = ahead


def _write_part(rows: list[Row], folder: Path, bad_folder: Path, part: int, labels: tuple[str, ...]) -> None:
    """Write a part's files, the bad inputs first: the file of predictions marks the part as done."""
    bad = [(_text(name), outcome) for name, outcome in rows if isinstance(outcome, str)]
    good = [(_text(name), outcome) for name, outcome in rows if not isinstance(outcome, str)]
    if bad:
        _write_table(
            bad_folder / f"{part:06d}.parquet", {"input": [n for n, _ in bad], "error": [e for _, e in bad]}, {}
        )
    else:  # a file that was unreadable before a kill can be readable now
        (bad_folder / f"{part:06d}.parquet").unlink(missing_ok=True)
    probs = np.stack([outcome for _, outcome in good]) if good else np.zeros((0, len(labels)), np.float32)
    best = probs.argmax(axis=-1)
    columns = {
        "input": [name for name, _ in good],
        "label": [labels[i] for i in best],
        "score": probs[np.arange(len(probs)), best].astype(np.float32),
        "probs": pa.FixedSizeListArray.from_arrays(pa.array(probs.astype(np.float32).ravel()), len(labels)),
    }
    about = {"labels": json.dumps(labels), "count": str(len(rows)), "last_input": _text(rows[-1][0])}
    _write_table(folder / f"{part:06d}.parquet", columns, about)


def _text(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()  # names may not be UTF-8


def _write_table(path: Path, columns: dict[str, Any], about: dict[str, str]) -> None:
    table = pa.table(
        {
            name: pa.array(values, pa.string()) if name in ("input", "label", "error") else values
            for name, values in columns.items()
        }
    )
    try:
        with atomic(path) as partial:
            pq.write_table(table.replace_schema_metadata(about), partial)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); earlier parts are whole") from error


def _check_same_run(path: Path, about: dict[str, Any]) -> None:
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for key, value in about.items():
            # A sealed model may have moved: its digest shows that it is the same.
            if earlier.get(key, value) != value and (key != "model" or about["digest"] is None):
                raise UserError(
                    f"{path.parent}: holds predictions with another {key} ({str(earlier.get(key))[:80]!r}, now "
                    f"{str(value)[:80]!r}); name another --output"
                )
    else:
        write_json(path, about)


def _finished_parts(folder: Path) -> int:
    count = 0
    while (folder / f"{count:06d}.parquet").is_file():
        count += 1
    return count


def _skip(inputs: Iterator[str], parts: int, part_size: int, folder: Path) -> int:
    """Skip the inputs of finished parts, and check that they haven't changed."""
    skipped = 0
    for part in range(parts):
        about = pq.read_schema(folder / f"{part:06d}.parquet").metadata
        chunk = list(islice(inputs, int(about[b"count"])))
        skipped += len(chunk)
        if len(chunk) < int(about[b"count"]) or _text(chunk[-1]) != about[b"last_input"].decode():
            raise UserError(f"{folder}: the inputs have changed since part {part} was written; name another --output")
    return skipped
