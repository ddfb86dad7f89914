"""The output files of an evaluation."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_har_jax.evaluation.result import EvalResult, Predictions
from clip_har_jax.files import atomic, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetWriter

    from clip_har_jax.evaluation.report import Details

GROUP_VALUES = 4_000_000  # probabilities in a row group, the part held in memory


class PredictionsSink:
    """A sink of `evaluate` that writes predictions at once; made by `predictions_file`.

    Args:
      file: receives the row groups.
      labels: names of the classes.
      name_of: example index -> name for people.
    """

    def __init__(self, file: "ParquetWriter", labels: Sequence[str], name_of: Callable[[int], str]):
        import pyarrow as pa

        self._file, self._name_of, self._classes = file, name_of, pa.array(labels, pa.string())
        self._rows_per_group = max(1, GROUP_VALUES // len(labels))
        self._held: list[Predictions] = []
        self._last = -1

    def __call__(self, part: Predictions) -> None:
        """Write a batch; batches come in the order of the source."""
        if len(part.index):
            assert part.index[0] > self._last, "batches come in the order of the source"
            self._last = int(part.index[-1])
            self._held.append(part)
        if sum(len(each.index) for each in self._held) >= self._rows_per_group:
            self.flush()

    def flush(self) -> None:
        """Write the buffer."""
        import pyarrow as pa

        if not self._held:
            return
        rows, classes = Predictions.join(self._held), self._classes
        self._held.clear()
        offsets = np.arange(len(rows.index) + 1, dtype=np.int32) * len(classes)
        columns = [
            pa.array([self._name_of(i) for i in rows.index.tolist()], pa.string()),
            classes.take(pa.array(rows.label)),
            classes.take(pa.array(rows.predicted)),
            pa.array(rows.score),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.probs.reshape(-1))),
        ]
        self._file.write_table(pa.table(columns, schema=self._file.schema))


@contextmanager
def predictions_file(path: Path, labels: Sequence[str], name_of: Callable[[int], str]) -> Iterator[PredictionsSink]:
    """Yield a sink that writes predictions.parquet, which replaces the old file at the end.

    The columns are input, label, predicted, score and probs; the schema's metadata names the order of probs, `labels`.

    Args:
      path: of the file.
      labels: names of the classes.
      name_of: example index -> name for people.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    text, number = pa.string(), pa.float32()
    fields = [("input", text), ("label", text), ("predicted", text), ("score", number), ("probs", pa.list_(number))]
    with atomic(path) as partial, ParquetWriter(partial, pa.schema(fields, {"labels": json.dumps(labels)})) as file:
        sink = PredictionsSink(file, labels, name_of)
        yield sink
        sink.flush()


def write_result(
    result: EvalResult,
    output: str | Path,
    names: Sequence[str],
    about: Mapping[str, str],
    details: "Details | None" = None,
) -> None:
    """Write predictions.parquet and the pages of a result that kept its predictions.

    Args:
      output: the folder; created if missing.
      names: of the examples, for people, in the order of `result.predictions`.
      about: the evaluation's facts (model, digest, data, command ...), shown unchanged in the report.
      details: further contents of the report.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    name_of = dict(zip(result.predictions.index.tolist(), names, strict=True)).__getitem__
    with predictions_file(output / "predictions.parquet", result.labels, name_of) as sink:
        sink(result.predictions)
    write_pages(result, output, name_of, about, details)


def write_pages(
    result: EvalResult,
    output: Path,
    name_of: Callable[[int], str],
    about: Mapping[str, str],
    details: "Details | None" = None,
) -> None:
    """Write confusion_matrix.png, report.html and, last, metrics.json.

    Args:
      output: a folder that exists.
      name_of: example index -> name for people.
      about: the evaluation's facts, shown unchanged in the report.
      details: further contents of the report.
    """
    from clip_har_jax.evaluation.pages import spoken
    from clip_har_jax.evaluation.plots import draw_confusion
    from clip_har_jax.evaluation.report import make_report

    write_bytes(output / "confusion_matrix.png", draw_confusion(result.confusion, spoken(result.labels)))
    write_text(output / "report.html", make_report(result, name_of, about, details))
    write_json(output / "metrics.json", result.metrics)
