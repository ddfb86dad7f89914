"""Receivers of metrics: the Sink protocol, the JSONL file with all of them, and the screen."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO, runtime_checkable

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clip_har_jax import remote
from clip_har_jax.files import is_local

Metrics = Mapping[str, float | None]


@runtime_checkable
class Sink(Protocol):
    """A receiver of the metrics of a run."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Receive the metrics of one step."""

    def close(self) -> None:
        """Write buffered metrics; the last call."""


class JsonlSink:
    """metrics.jsonl: one object a line, {"step": 10, "train/loss": ...}.

    A run that resumes at `resume_step` drops the lines after that step, since it writes them again. Object stores can't
    append, so they get the whole file every `UPLOAD_EVERY_S` and at the end.
    """

    UPLOAD_EVERY_S = 30.0

    def __init__(self, path: epath.PathLike, resume_step: int = 0):
        path = epath.Path(path)
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_step]
        self._remote: epath.Path | None = None if is_local(path) else path
        self._local = epath.Path(tempfile.mkdtemp()) / path.name if self._remote is not None else path
        self._uploaded = time.monotonic()
        partial = self._local.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept))
        partial.replace(self._local)  # a kill leaves either the old lines or these
        self._file = self._local.open("a")

    def write(self, step: int, metrics: Metrics) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()  # a killed run keeps its metrics
        if self._remote is not None and time.monotonic() - self._uploaded > self.UPLOAD_EVERY_S:
            self._upload(self._remote)

    def close(self) -> None:
        self._file.close()
        if self._remote is not None:
            self._upload(self._remote)
            self._local.parent.rmtree()

    def _upload(self, target: epath.Path) -> None:
        text = self._local.read_text()
        remote.while_reachable(os.fspath(target), lambda: target.write_text(text))
        self._uploaded = time.monotonic()


def _whole_lines(path: epath.Path) -> list[str]:
    """Return the complete lines of a file, without a partial last one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def write_curves(jsonl: epath.PathLike, csv: epath.PathLike) -> None:
    """Write the metrics of a run as a table, one row per step, for tools that don't read JSON lines."""
    rows: dict[int, dict[str, Any]] = {}
    for line in _whole_lines(epath.Path(jsonl)):
        values = json.loads(line)
        rows.setdefault(values["step"], {}).update(values)
    names = dict.fromkeys(name for row in rows.values() for name in row)
    table = [",".join(names)]
    for row in rows.values():
        table.append(",".join("" if row.get(name) is None else repr(row[name]) for name in names))
    epath.Path(csv).write_text("\n".join(table) + "\n")


class ConsoleSink:
    """A progress bar with the main metrics; plain lines if the output isn't a terminal."""

    def __init__(self, num_steps: int, start_step: int, stream: TextIO | None = None):
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._num_steps, self._start_step, self._begin = num_steps, start_step, time.monotonic()
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=num_steps, completed=start_step, status="compiling")
            self._progress.start()

    def write(self, step: int, metrics: Metrics) -> None:
        status = describe(metrics)
        if self._progress is None:
            self._console.print(f"step {step}/{self._num_steps}  {status}{self._left(step)}")
        elif any(name.startswith("train/") for name in metrics):
            self._progress.update(self._task, completed=step, status=status)
        else:
            self._progress.console.print(f"step {step}  {status}")

    def _left(self, step: int) -> str:
        done = step - self._start_step
        if done <= 0:
            return ""
        left_s = (time.monotonic() - self._begin) / done * (self._num_steps - step)
        return f"  left {int(left_s // 60)}:{int(left_s % 60):02d}"

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


_SHOWN = {
    "train/loss": "loss {:.3f}",
    "train/images_per_s": "{:.0f} images/s",
    "train/data_wait_fraction": "waiting for data {:.0%}",
    "train/mfu": "MFU {:.1%}",
    "val/top1": "val top-1 {:.3f}",
    "val/map": "val mAP {:.3f}",
    "val/nll": "val nll {:.3f}",
}


def describe(metrics: Metrics) -> str:
    """Return the main metrics as text."""
    shown = [(form, metrics.get(name)) for name, form in _SHOWN.items()]
    return "  ".join(form.format(value) for form, value in shown if value is not None)


def to_jsonable(value: Any) -> float | None:
    """Return a Python float; None for NaN and infinity, which JSON lacks."""
    value = float(value)
    return value if value == value and abs(value) != float("inf") else None
