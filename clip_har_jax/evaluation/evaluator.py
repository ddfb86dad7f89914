"""One pass over a split -> EvalResult, and the files it becomes."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from clip_har_jax.batch import Batch
from clip_har_jax.bundle import write_json
from clip_har_jax.evaluation.calibration import fit_scores
from clip_har_jax.evaluation.metrics import ClassificationState, log_softmax


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
class Mistake:
    """An example that the model got wrong, with the image as the model saw it."""

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
    mistakes: tuple[Mistake, ...]  # the most confident ones, most confident first


def evaluate(
    logits_fn: Callable[[Batch], np.ndarray], batches: Iterable[Batch], labels: Sequence[str], num_mistakes: int = 0
) -> EvalResult:
    """Evaluates in one pass.

    Args:
      logits_fn: batch -> logits [b, c] of the same rows, temperature included.
      batches: each example in one row of mask 1; rows of mask 0 (padding, unreadable images) count nowhere.
      labels: the names of the c classes.
      num_mistakes: how many confident mistakes to keep with their images.

    Raises:
      UserError: no example could be read, or logits that aren't finite.
    """
    state = ClassificationState.empty(len(labels))
    parts: list[Predictions] = []
    mistakes: list[Mistake] = []
    unreadable = 0
    for batch in batches:
        label, mask, index = (np.asarray(values) for values in (batch.label, batch.mask, batch.index))
        logits = np.asarray(logits_fn(batch))
        assert logits.shape == (len(label), len(labels)), "logits are of the batch's rows and the labels' classes"
        state = state.update(logits, label, mask)
        unreadable += int(((mask == 0) & (index >= 0)).sum())
        part, rows = _predictions(logits, label, index, mask > 0)
        parts.append(part)
        if num_mistakes:
            mistakes = _most_confident([*mistakes, *_mistakes(part, batch.image, rows)], num_mistakes)
    metrics = state.compute(labels) | {"num_unreadable": unreadable}
    predictions = _join(parts)
    for name in ("ece_adaptive", "brier"):
        metrics[name] = fit_scores(predictions.probs, predictions.label)[name]
    return EvalResult(tuple(labels), metrics, state.confusion, predictions, tuple(mistakes))


def _predictions(
    logits: np.ndarray, label: np.ndarray, index: np.ndarray, counts: np.ndarray
) -> tuple[Predictions, np.ndarray]:
    """A batch's predictions, and the rows they stand in."""
    rows = np.flatnonzero(counts)
    own = logits[rows].astype(np.float32)
    return Predictions(
        index[rows].astype(np.int32), label[rows].astype(np.int32), own.argmax(axis=-1).astype(np.int32), own
    ), rows


def _mistakes(part: Predictions, images: Any, rows: np.ndarray) -> list[Mistake]:
    wrong = np.flatnonzero(part.predicted != part.label)
    score = part.score
    return [
        Mistake(int(part.index[i]), int(part.label[i]), int(part.predicted[i]), float(score[i]), _picture(images[row]))
        for i, row in zip(wrong, rows[wrong], strict=True)
    ]


def _picture(image: Any) -> np.ndarray:
    """An image itself; of a clip its middle frame."""
    frames = np.asarray(image)
    frames = frames.reshape(-1, *frames.shape[-3:])
    return frames[len(frames) // 2]


def _most_confident(mistakes: list[Mistake], count: int) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: (-mistake.score, mistake.index))[:count]


def _join(parts: Sequence[Predictions]) -> Predictions:
    order = np.argsort(np.concatenate([part.index for part in parts]), kind="stable")
    fields = ("index", "label", "predicted", "logits")
    return Predictions(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in fields))


def write_result(result: EvalResult, output: str | Path, names: Sequence[str], about: Mapping[str, str]) -> None:
    """Writes predictions.parquet, confusion_matrix.png, report.html and, last, metrics.json.

    Args:
      output: the folder; made if need be.
      names: by which a person finds each example, in the order of `result.predictions`.
      about: what was evaluated (model, digest, data, command ...), shown in the report as it stands.
    """
    from clip_har_jax.evaluation.plots import draw_confusion
    from clip_har_jax.evaluation.report import make_report

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    _write_predictions(output / "predictions.parquet", result, names)
    (output / "confusion_matrix.png").write_bytes(draw_confusion(result.confusion, result.labels))
    (output / "report.html").write_text(make_report(result, names, about), encoding="utf-8")
    write_json(output / "metrics.json", result.metrics)


def _write_predictions(path: Path, result: EvalResult, names: Sequence[str]) -> None:
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
