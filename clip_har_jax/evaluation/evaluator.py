"""One pass over a split -> EvalResult, and the files it becomes."""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from clip_har_jax.batch import Batch
from clip_har_jax.bundle import write_json
from clip_har_jax.evaluation.calibration import fit_scores
from clip_har_jax.evaluation.metrics import ClassificationState, log_softmax

if TYPE_CHECKING:
    from clip_har_jax.evaluation.report import Details


@dataclass(frozen=True)
class Predictions:
    """What the model says of each example that counts, in the order of the source."""

    index: Int32[np.ndarray, " n"]  # position in the source
    label: Int32[np.ndarray, " n"]
    predicted: Int32[np.ndarray, " n"]
    logits: Float32[np.ndarray, "n c"]  # temperature included

    @cached_property
    def probs(self) -> Float32[np.ndarray, "n c"]:
        """Class probabilities."""
        return np.exp(log_softmax(self.logits)).astype(np.float32)

    @property
    def score(self) -> Float32[np.ndarray, " n"]:
        """The probability of the predicted class."""
        return np.take_along_axis(self.probs, self.predicted[:, None], axis=1)[:, 0]


@dataclass(frozen=True)
class Shown:
    """An example that a person is shown, with the image as the model saw it."""

    index: int
    label: int
    predicted: int
    score: float
    image: UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class EvalResult:
    """The outcome of an evaluation."""

    labels: tuple[str, ...]
    metrics: dict[str, Any]  # the contents of metrics.json
    confusion: Int[np.ndarray, "c c"]  # number of examples by true (row) and predicted (column) class
    predictions: Predictions
    mistakes: tuple[Shown, ...]  # the most confident ones, most confident first
    unsure: tuple[Shown, ...] = ()  # right, but with the lowest probability; the lowest first
    sample: tuple[Shown, ...] = ()  # drawn at random


def evaluate(
    logits_fn: Callable[[Batch], np.ndarray], batches: Iterable[Batch], labels: Sequence[str], num_shown: int = 0
) -> EvalResult:
    """Evaluate in one pass.

    Args:
      logits_fn: batch -> logits [b, c] of the same rows, temperature included.
      batches: each example in one row of mask 1; rows of mask 0 (padding, unreadable images) count nowhere.
      labels: the names of the c classes.
      num_shown: how many confident mistakes, uncertain hits and random examples each to keep with their images.

    Raises:
      UserError: no example could be read, or logits that aren't finite.
    """
    state = ClassificationState.empty(len(labels))
    parts: list[Predictions] = []
    shown: dict[str, list[Shown]] = {name: [] for name in KEPT}
    unreadable = 0
    for batch in batches:
        label, mask, index = (np.asarray(values) for values in (batch.label, batch.mask, batch.index))
        logits = np.asarray(logits_fn(batch))
        assert logits.shape == (len(label), len(labels)), "logits are of the batch's rows and the labels' classes"
        state = state.update(logits, label, mask)
        unreadable += int(((mask == 0) & (index >= 0)).sum())
        part, rows = _predictions(logits, label, index, mask > 0)
        parts.append(part)
        if num_shown:
            for name, (wanted, order) in KEPT.items():
                shown[name] = sorted([*shown[name], *_shown(part, batch.image, rows, wanted)], key=order)[:num_shown]
    metrics = state.compute(labels) | {"num_unreadable": unreadable}
    predictions = _join(parts)
    for name in ("ece_adaptive", "brier"):
        metrics[name] = fit_scores(predictions.probs, predictions.label)[name]
    kept = {name: tuple(examples) for name, examples in shown.items()}
    return EvalResult(tuple(labels), metrics, state.confusion, predictions, **kept)


def _predictions(
    logits: np.ndarray, label: np.ndarray, index: np.ndarray, counts: np.ndarray
) -> tuple[Predictions, np.ndarray]:
    """Return a batch's predictions, and the rows they stand in."""
    rows = np.flatnonzero(counts)
    own = logits[rows].astype(np.float32)
    return Predictions(
        index[rows].astype(np.int32), label[rows].astype(np.int32), own.argmax(axis=-1).astype(np.int32), own
    ), rows


def _shown(
    part: Predictions, images: Any, rows: np.ndarray, wanted: Callable[[Predictions], np.ndarray]
) -> list[Shown]:
    chosen, score = np.flatnonzero(wanted(part)), part.score
    return [
        Shown(int(part.index[i]), int(part.label[i]), int(part.predicted[i]), float(score[i]), _picture(images[row]))
        for i, row in zip(chosen, rows[chosen], strict=True)
    ]


def _picture(image: Any) -> np.ndarray:
    """Return an image itself; of a clip its middle frame."""
    frames = np.asarray(image)
    frames = frames.reshape(-1, *frames.shape[-3:])
    return frames[len(frames) // 2]


def _lot(example: Shown) -> int:
    """Return a number that follows from the example's position alone, so that the sample doesn't depend on the
    batches.
    """
    return zlib.crc32(example.index.to_bytes(8, "little"))


# field of EvalResult -> (which examples, what puts first those that are kept)
KEPT: dict[str, tuple[Callable[[Predictions], np.ndarray], Callable[[Shown], Any]]] = {
    "mistakes": (lambda part: part.predicted != part.label, lambda example: (-example.score, example.index)),
    "unsure": (lambda part: part.predicted == part.label, lambda example: (example.score, example.index)),
    "sample": (lambda part: part.index >= 0, _lot),
}


def _join(parts: Sequence[Predictions]) -> Predictions:
    order = np.argsort(np.concatenate([part.index for part in parts]), kind="stable")
    fields = ("index", "label", "predicted", "logits")
    return Predictions(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in fields))


def write_result(
    result: EvalResult,
    output: str | Path,
    names: Sequence[str],
    about: Mapping[str, str],
    details: "Details | None" = None,
) -> None:
    """Write predictions.parquet, confusion_matrix.png, report.html and, last, metrics.json.

    Args:
      output: the folder; made if need be.
      names: by which a person finds each example, in the order of `result.predictions`.
      about: what was evaluated (model, digest, data, command ...), shown in the report as it stands.
      details: what else the report can tell of the model.
    """
    from clip_har_jax.evaluation.plots import draw_confusion
    from clip_har_jax.evaluation.report import make_report

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_predictions(output / "predictions.parquet", result, names)
    (output / "confusion_matrix.png").write_bytes(draw_confusion(result.confusion, result.labels))
    (output / "report.html").write_text(make_report(result, names, about, details), encoding="utf-8")
    write_json(output / "metrics.json", result.metrics)


def write_predictions(path: Path, result: EvalResult, names: Sequence[str]) -> None:
    """Columns input, label, predicted, score, probs; the order of probs stands in the schema's metadata, `labels`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, classes = result.predictions, pa.array(result.labels, pa.string())
    columns = {
        "input": pa.array(names, pa.string()),
        "label": classes.take(pa.array(rows.label)),
        "predicted": classes.take(pa.array(rows.predicted)),
        "score": pa.array(rows.score),
        "probs": pa.ListArray.from_arrays(
            pa.array(np.arange(len(rows.probs) + 1, dtype=np.int32) * len(classes)), pa.array(rows.probs.reshape(-1))
        ),
    }
    table = pa.table(columns).replace_schema_metadata({"labels": json.dumps(result.labels)})
    pq.write_table(table, path)
