"""Predictions for any number of files, written as Parquet in parts; a kill loses at most the parts in progress.

The inputs are a stream in a fixed order; shard I of N takes every N-th. A part holds the next `part_size` inputs of a
shard. An engine computes the missing parts, in any order; this process alone writes them, each when it is whole.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from clip_har_jax.errors import UserError
from clip_har_jax.files import write_json
from clip_har_jax.folders import output_folder
from clip_har_jax.inference.bulk_engine import Engine, LocalEngine, Outcome, Part, Piece
from clip_har_jax.inference.bulk_inputs import open_inputs
from clip_har_jax.inference.bulk_parts import PartFiles
from clip_har_jax.inference.predictor import Predictor
from clip_har_jax.listing import Tally


@dataclass(frozen=True)
class Progress:
    """Progress of a shard, over all starts."""

    done: int
    failed: int
    total: int | None  # None: not counted yet
    images_per_s: float  # since this start
    busy: Mapping[str, float] = field(default_factory=dict)  # by stage: busy share of its lanes since this start
    tally: Tally | None = None  # of the whole listing, at the end


def predict_bulk(
    predictor: Predictor,
    source: str,
    output: Path,
    shard: tuple[int, int] = (0, 1),
    part_size: int = 10_000,
    workers: int = os.cpu_count() or 1,
    report: Callable[[Progress], None] = lambda progress: None,
    engine: Engine | None = None,
) -> Progress:
    """Predict a shard of the inputs, continuing where earlier starts ended.

    Writes `predictions-III-of-NNN/PPPPPP.parquet` (input, label, score, probs), for unreadable files
    `bad_inputs-III-of-NNN/PPPPPP.parquet` (input, error), and at the end `predictions-III-of-NNN/summary.json`.

    Args:
      predictor: the model.
      source: as for `open_inputs`.
      output: the folder to write, one for all shards.
      shard: (index, count).
      part_size: inputs of a part; determines the memory and the loss by a kill.
      workers: decoding threads of the local engine.
      report: called after each batch.
      engine: computes the parts; None: the local engine.

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
    with output_folder(output / f"predictions-{name}") as folder:
        files = PartFiles(folder, output / f"bad_inputs-{name}", predictor.backend.actions)
        files.check_same_run(_about(predictor, source, part_size))
        meter, tally = _Meter(engine or LocalEngine(predictor, workers), report), Tally()
        with ThreadPoolExecutor(1) as counter:
            meter.total = counter.submit(lambda: len(range(index, sum(1 for _ in read(tally)), count)))
            _compute(islice(read(None), index, None, count), part_size, files, meter)
        if Path(source).is_dir():
            write_json(folder / "listing.json", tally.to_json())
        if not meter.done and shard == (0, 1):
            raise UserError(f"--inputs={source}: names no images")
        write_json(folder / "summary.json", meter.summary() | {"errors": files.count_errors()})
    return meter.progress(meter.done, tally)


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


def _compute(inputs: Iterator[str], part_size: int, files: PartFiles, meter: "_Meter") -> None:
    """Let the engine compute the missing parts, and write each of them when it is whole."""
    unfinished: dict[int, _UnfinishedPart] = {}
    earlier = set(files.finished)

    def missing() -> Iterator[Part]:
        number = 0
        while chunk := list(islice(inputs, part_size)):
            part = Part(number, chunk)
            if number in earlier:
                files.check(part)
                meter.skip(len(chunk), files.count_bad(number))
            else:
                unfinished[number] = _UnfinishedPart(part)
                yield part
            number += 1
        if beyond := [other for other in earlier if other >= number]:
            raise files.changed(min(beyond))

    for piece in meter.engine.run(missing()):
        part = unfinished[piece.part]
        part.add(piece)
        meter.add(piece)
        if not part.missing:
            files.write(part.part, part.outcomes)
            del unfinished[piece.part]
    assert not unfinished, "the engine left out inputs"


class _UnfinishedPart:
    """A part whose outcomes arrive in pieces."""

    def __init__(self, part: Part):
        self.part, self.missing = part, len(part.inputs)
        self.outcomes: list[Outcome] = [""] * self.missing

    def add(self, piece: Piece) -> None:
        self.outcomes[piece.start : piece.start + len(piece.outcomes)] = piece.outcomes
        self.missing -= len(piece.outcomes)


class _Meter:
    """Count inputs and seconds, and report progress after each piece."""

    def __init__(self, engine: Engine, report: Callable[[Progress], None]):
        self.engine, self._report = engine, report
        self.done, self.failed, self.total = 0, 0, Future[int]()
        self._before, self._start = 0, time.perf_counter()
        self._stage_s: dict[str, float] = {}

    def skip(self, count: int, failed: int) -> None:
        """Count a part that an earlier start finished."""
        self.done, self.failed, self._before = self.done + count, self.failed + failed, self._before + count

    def add(self, piece: Piece) -> None:
        """Count a piece and report the progress."""
        self.done += len(piece.outcomes)
        self.failed += sum(isinstance(outcome, str) for outcome in piece.outcomes)
        for stage, seconds in piece.seconds.items():
            self._stage_s[stage] = self._stage_s.get(stage, 0.0) + seconds
        counted = self.total.done() and not self.total.exception()
        self._report(self.progress(self.total.result() if counted else None))

    def progress(self, total: int | None, tally: Tally | None = None) -> Progress:
        """Return the progress until here."""
        wall_s = max(time.perf_counter() - self._start, 1e-9)
        lanes = self.engine.lanes
        busy = {stage: min(1.0, seconds / (wall_s * lanes[stage])) for stage, seconds in self._stage_s.items()}
        return Progress(self.done, self.failed, total, (self.done - self._before) / wall_s, busy, tally)

    def summary(self) -> dict[str, Any]:
        """Return counts over all starts, and the speed of this one: of the whole, and of one lane of each stage."""
        end, computed = self.progress(self.done), self.done - self._before
        return {
            "inputs": self.done,
            "unreadable": self.failed,
            "this_start": {
                "engine": self.engine.name,
                "inputs": computed,
                "seconds": round(time.perf_counter() - self._start, 3),
                "images_per_s": round(end.images_per_s, 1),
                "stages": {
                    stage: {
                        "lanes": self.engine.lanes[stage],
                        "busy": round(end.busy[stage], 3),
                        "images_per_s_of_a_lane": round(computed / max(seconds, 1e-9), 1),
                    }
                    for stage, seconds in self._stage_s.items()
                },
                "bottleneck": max(end.busy, key=lambda stage: end.busy[stage], default=None),
            },
        }
