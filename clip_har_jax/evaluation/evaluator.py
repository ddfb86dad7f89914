"""Evaluation in one pass over a split -> EvalResult."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from clip_har_jax.batch import Batch
from clip_har_jax.evaluation.baselines import accuracy_interval, baselines_of
from clip_har_jax.evaluation.calibration import brier_scores, calibration_error
from clip_har_jax.evaluation.metrics import ClassificationState
from clip_har_jax.evaluation.result import EvalResult, Predictions, Scores, Shown


def evaluate(
    logits_fn: Callable[[Batch], np.ndarray],
    batches: Iterable[Batch],
    labels: Sequence[str],
    num_shown: int = 0,
    sinks: Sequence[Callable[[Predictions], None]] = (),
) -> EvalResult:
    """Evaluate in one pass over the data.

    Args:
      logits_fn: batch -> logits [b, c] of its rows, divided by the temperature.
      batches: each example in one row of mask 1; rows of mask 0 (padding, unreadable images) are ignored.
      labels: the names of the c classes.
      num_shown: number of confident mistakes, of uncertain hits and of random examples to keep with their images.
      sinks: receive the predictions of each batch. With sinks, logits aren't kept: memory grows by 28 bytes per
        example.

    Raises:
      UserError: no example could be read, or logits aren't finite.
    """
    state = ClassificationState.empty(len(labels))
    kept: list[Predictions] = []
    sinks = sinks or (kept.append,)
    scores: list[Scores] = []
    shown: dict[str, list[Shown]] = {name: [] for name in KEPT}
    unreadable, brier = 0, 0.0
    for batch in batches:
        label, mask, index = (np.asarray(values) for values in (batch.label, batch.mask, batch.index))
        logits = np.asarray(logits_fn(batch))
        assert logits.shape == (len(label), len(labels)), "logits are of the batch's rows and the labels' classes"
        state = state.update(logits, label, mask)
        unreadable += int(((mask == 0) & (index >= 0)).sum())
        part, rows = _predictions(logits, label, index, mask > 0)
        scores.append(part.scores)
        brier += float(brier_scores(part.probs, part.label).sum())
        for sink in sinks:
            sink(part)
        if num_shown:
            for name, (wanted, order) in KEPT.items():
                shown[name] = sorted([*shown[name], *_shown(part, batch.image, rows, wanted)], key=order)[:num_shown]
    metrics = state.compute(labels) | {"num_unreadable": unreadable, "baselines": baselines_of(state)}
    correct = round(metrics["top1"] * metrics["num_examples"])
    metrics["top1_interval"] = list(accuracy_interval(correct, metrics["num_examples"]))
    joined = Scores.join(scores)
    metrics["ece_adaptive"] = calibration_error(joined.score, joined.rank == 0, adaptive=True)
    metrics["brier"] = brier / metrics["num_examples"]
    examples = {name: tuple(found) for name, found in shown.items()}
    predictions = Predictions.join(kept) if kept else None
    return EvalResult(tuple(labels), metrics, state.confusion, joined, predictions, **examples)


def _predictions(
    logits: np.ndarray, label: np.ndarray, index: np.ndarray, counts: np.ndarray
) -> tuple[Predictions, np.ndarray]:
    """Return a batch's predictions and their rows."""
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
    """Return an image itself, or the frames of a clip; of several views, those of the middle one."""
    pixels = np.asarray(image)
    return pixels[len(pixels) // 2] if pixels.ndim > 4 else pixels


def _lot(example: Shown) -> int:
    """Return a random number that depends only on the example's position, so that batches don't change the sample."""
    return zlib.crc32(example.index.to_bytes(8, "little"))


# field of EvalResult -> (condition on examples, sort key of those to keep)
KEPT: dict[str, tuple[Callable[[Predictions], np.ndarray], Callable[[Shown], Any]]] = {
    "mistakes": (lambda part: part.predicted != part.label, lambda example: (-example.score, example.index)),
    "unsure": (lambda part: part.predicted == part.label, lambda example: (example.score, example.index)),
    "sample": (lambda part: part.index >= 0, _lot),
}
