"""TensorBoard's event files, in tensorboard/ of the work folder, without TensorFlow.

`tensorboard.summary.Writer` imports TensorFlow if it is installed, so the records are written here, with TensorBoard's
own format and messages.
"""

import html
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.text import metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from clip_har_jax.mlops.tracking import Handle, Metrics, RunInfo

_COUNT = itertools.count()  # distinguishes two files of the same second


class TensorBoard:
    """One event file per start; its first record tells TensorBoard to drop records after `resume_step`."""

    def __init__(self, info: RunInfo):
        self.handle: Handle = {"logdir": os.fspath(info.workdir / "tensorboard")}
        folder = Path(self.handle["logdir"])
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_COUNT)}"
        self._writer, self._step = RecordWriter((folder / name).open("wb")), info.resume_step
        self._add(event_pb2.Event(file_version="brain.Event:2"))
        if info.resume_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(event_pb2.Event(step=info.resume_step + 1, session_log=start))
        self._write_text("config", _table(info.params))
        self.tag(info.tags)

    def write(self, records: Sequence[tuple[int, Metrics]]) -> None:
        for step, metrics in records:
            self._step = step
            given = ((name, value) for name, value in metrics.items() if value is not None)
            self._summarise(*(summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in given))

    def tag(self, tags: Mapping[str, str]) -> None:
        self._write_text("run", _table(tags))

    def log_folder(self, name: str, folder: Path) -> None:
        """Show the pictures; other files aren't copied."""
        for path in _pictures(folder):
            with Image.open(path) as picture:
                width, height = picture.size
            image = summary_pb2.Summary.Image(
                height=height, width=width, colorspace=4, encoded_image_string=path.read_bytes()
            )
            self._summarise(summary_pb2.Summary.Value(tag=f"{name}/{path.stem}", image=image))

    def close(self, status: str) -> None:
        try:
            self._write_text("status", status)
        finally:
            self._writer.close()

    def _write_text(self, tag: str, text: str) -> None:
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, tensor_shape=tensor_shape_pb2.TensorShapeProto(), string_val=[text.encode()]
        )
        about = metadata.create_summary_metadata(display_name=tag, description="")
        self._summarise(summary_pb2.Summary.Value(tag=tag, metadata=about, tensor=tensor))

    def _summarise(self, *values: summary_pb2.Summary.Value) -> None:
        self._add(event_pb2.Event(step=self._step, summary=summary_pb2.Summary(value=values)))

    def _add(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def _pictures(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.rglob("*.png"))


def _table(values: Mapping[str, object]) -> str:
    """Return a Markdown table for the text page."""
    rows = (f"| {key} | `{html.escape(str(value), quote=False)}` |" for key, value in values.items())
    return "\n".join(("| key | value |", "|---|---|", *rows))


def open_tracker(info: RunInfo, handle: Handle | None) -> TensorBoard:
    """Return a new event file beside those of earlier starts."""
    return TensorBoard(info)
