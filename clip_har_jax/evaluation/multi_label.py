"""Evaluation of multi-label data: average precision, F1 at thresholds, coverage error, label-wise calibration."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32

from clip_har_jax.batch import Batch
from clip_har_jax.bundle import Sigmoid
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.calibration import TEMPERATURES, CalibrationResult, calibration_error
from clip_har_jax.evaluation.significance import percentile_interval, resample_metrics

ABSENT = -1.0  # the average precision of a label that a resample doesn't hold; scipy warns of NaN
DEFAULT_THRESHOLD = 0.5  # of a label that no validation image has


@dataclass(frozen=True)
class MultiLabelResult:
    """The result of an evaluation of multi-label data, in the order of the source.

    Attributes:
      labels: names of the c labels.
      metrics: the contents of metrics.json.
      index: position of each example in the source.
      target: the labels that each example has.
      logits: divided by the temperature.
      thresholds: the probability from which on each label is predicted.
    """

    labels: tuple[str, ...]
    metrics: dict[str, Any]
    index: Int32[np.ndarray, " n"]
    target: Bool[np.ndarray, "n c"]
    logits: Float32[np.ndarray, "n c"]
    thresholds: Float64[np.ndarray, " c"]

    @property
    def probs(self) -> Float64[np.ndarray, "n c"]:
        """The probability of each label."""
        return sigmoid(self.logits)


def sigmoid(logits: Float[np.ndarray, "*b c"]) -> Float64[np.ndarray, "*b c"]:
    """Return the probability of each label in float64."""
    return Sigmoid(1.0, 0.0)(logits)


class _Ranking:
    """Examples sorted by the score of each label, from which average precision is computed for any resample.

    Equal to scikit-learn's `average_precision_score`: no interpolation, equal scores count as one threshold.
    """

    def __init__(self, score: Float[np.ndarray, "n c"], target: Bool[np.ndarray, "n c"]):
        self._order = np.argsort(-score, axis=0, kind="stable")
        self._target = np.take_along_axis(target, self._order, axis=0)
        ranked = np.take_along_axis(score, self._order, axis=0)
        self._last = np.vstack([ranked[1:] != ranked[:-1], np.ones((1, score.shape[1]), bool)])

    def average_precision(self, weight: Int[np.ndarray, "n *c"]) -> Float64[np.ndarray, " c"]:
        """Return the average precision of each label; NaN for a label that no example has.

        Args:
          weight: how often each example counts, [n] or [n, c].
        """
        given = weight[self._order] if weight.ndim == 1 else np.take_along_axis(weight, self._order, axis=0)
        found, seen = np.cumsum(given * self._target, axis=0), np.cumsum(given, axis=0)
        precision = found / np.maximum(seen, 1)
        # The recall grows at the end of each run of equal scores by what the run holds.
        ends = np.where(self._last, found, 0)
        gained = np.diff(np.maximum.accumulate(ends, axis=0), axis=0, prepend=0)
        total = found[-1]
        with np.errstate(invalid="ignore"):
            return np.where(total > 0, (gained * precision).sum(axis=0) / total, np.nan)


def average_precision(score: Float[np.ndarray, "n c"], target: Bool[np.ndarray, "n c"]) -> Float64[np.ndarray, " c"]:
    """Return the average precision of each label; NaN for a label that no example has."""
    return _Ranking(score, target).average_precision(np.ones(len(score), np.int64))


def precision_intervals(
    score: Float[np.ndarray, "n c"], target: Bool[np.ndarray, "n c"], resamples: int, seed: int = 0
) -> tuple[list[tuple[float, float] | None], tuple[float, float], tuple[float, float]]:
    """Return 95% bootstrap intervals of each label's average precision, and of mAP over labels and over all answers.

    A label that no example has gets None. Resamples in which a label doesn't occur are left out for that label.
    """
    by_label, together = _Ranking(score, target), _Ranking(score.reshape(-1, 1), target.reshape(-1, 1))
    count, width = score.shape

    def compute(rows: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " m"]:
        weight = np.bincount(rows, minlength=count)
        own = by_label.average_precision(weight)
        micro = together.average_precision(np.repeat(weight, width))
        return np.nan_to_num(np.concatenate([own, [_mean(own)], micro]), nan=ABSENT)

    *own, macro, micro = resample_metrics(compute, count, resamples, seed)
    return [_interval(values) for values in own], _interval(macro) or (0.0, 0.0), _interval(micro) or (0.0, 0.0)


def _interval(values: Float64[np.ndarray, " r"]) -> tuple[float, float] | None:
    known = values[values != ABSENT]
    return percentile_interval(known) if len(known) else None


def _mean(values: Float64[np.ndarray, " c"]) -> float:
    """Return the mean over the labels that occur; NaN if none does."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def coverage_error(score: Float[np.ndarray, "n c"], target: Bool[np.ndarray, "n c"]) -> float:
    """Return how many labels, the most probable first, must be given on average to cover all true ones.

    Equal to scikit-learn's: a label with the same score as the least probable true one counts, and an example without a
    label needs none (Tsoumakas et al. 2010).
    """
    least = np.where(target, score, np.inf).min(axis=1, keepdims=True)
    return float((score >= least).sum(axis=1).mean())


def fit_thresholds(probs: Float[np.ndarray, "n c"], target: Bool[np.ndarray, "n c"]) -> Float64[np.ndarray, " c"]:
    """Return the probability of each label from which on predicting it gives the best F1 on these examples.

    The threshold lies halfway between two probabilities, so that rounding changes no answer; of equal F1 the highest is
    taken. A label that no example has gets `DEFAULT_THRESHOLD`.
    """
    thresholds = np.full(probs.shape[1], DEFAULT_THRESHOLD)
    for k in np.flatnonzero(target.any(axis=0)):
        order = np.argsort(-probs[:, k], kind="stable")
        score, found = probs[order, k].astype(np.float64), np.cumsum(target[order, k])
        f1 = 2 * found / (np.arange(1, len(score) + 1) + found[-1])
        below = np.append(score[1:], 0.0)
        best = int(np.where(score > below, f1, -1.0).argmax())
        thresholds[k] = (score[best] + below[best]) / 2
    return thresholds


def label_nll(logits: Float[np.ndarray, "n c"], target: Bool[np.ndarray, "n c"]) -> float:
    """Return the mean binary negative log-likelihood over examples and labels, in nats."""
    return float(np.logaddexp(0, np.where(target, -logits, logits).astype(np.float64)).mean())


def fit_label_temperature(logits: Float[np.ndarray, "n c"], target: Bool[np.ndarray, "n c"]) -> float:
    """Return the temperature in `TEMPERATURES` that minimises the binary negative log-likelihood.

    If every answer is right, the likelihood grows as the temperature falls, without an optimum; then it stays 1.
    """
    from scipy.optimize import minimize_scalar

    if ((logits > 0) == target).all():
        return 1.0
    bounds = tuple(np.log(TEMPERATURES))

    def nll(log_temperature: float) -> float:
        return label_nll(logits / np.exp(log_temperature), target)

    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def calibrate_labels(
    labels: Sequence[str], logits: Float[np.ndarray, "n c"], target: Bool[np.ndarray, "n c"]
) -> CalibrationResult:
    """Fit the temperature and each label's threshold.

    Args:
      labels: names of the c labels.
      logits: of the validation examples, at temperature 1.
      target: the labels that they have.
    """
    temperature = fit_label_temperature(logits, target)
    before, after = sigmoid(logits), sigmoid(logits / temperature)
    thresholds = dict(zip(labels, fit_thresholds(after, target).tolist(), strict=True))
    report = {
        "num_examples": len(target),
        "temperature": temperature,
        "label_thresholds": thresholds,
        "before": {"nll": label_nll(logits, target), "label_ece": float(np.mean(label_errors(before, target)))},
        "after": {
            "nll": label_nll(logits / temperature, target),
            "label_ece": float(np.mean(label_errors(after, target))),
        },
    }
    return CalibrationResult(temperature, {}, report, label_thresholds=thresholds)


def label_errors(probs: Float[np.ndarray, "n c"], target: Bool[np.ndarray, "n c"]) -> list[float]:
    """Return the calibration error of each label: how far its probability is from its frequency, over 15 bins."""
    return [calibration_error(probs[:, k], target[:, k]) for k in range(probs.shape[1])]


def evaluate_multi_label(
    logits_fn: Callable[[Batch], np.ndarray],
    batches: Iterable[Batch],
    labels: Sequence[str],
    thresholds: Mapping[str, float] | None = None,
    resamples: int = 0,
) -> MultiLabelResult:
    """Evaluate in one pass over the data.

    The pass holds 5 bytes for each example and label; the metrics then need several float64 arrays of this size.

    Args:
      logits_fn: batch -> logits [b, c] of its rows, divided by the temperature.
      batches: each example in one row of mask 1; rows of mask 0 are ignored.
      labels: the names of the c labels.
      thresholds: the probability from which on each label is predicted; None: fitted to these examples.
      resamples: of the bootstrap intervals; 0: none.

    Raises:
      UserError: no example could be read, or logits aren't finite.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    unreadable = 0
    for batch in batches:
        target, mask, index = (np.asarray(values) for values in (batch.label, batch.mask, batch.index))
        logits = np.asarray(logits_fn(batch), np.float32)
        assert logits.shape == target.shape == (len(mask), len(labels)), "logits and labels are of the batch's rows"
        unreadable += int(((mask == 0) & (index >= 0)).sum())
        rows = mask > 0
        parts.append((index[rows].astype(np.int32), target[rows].astype(bool), logits[rows]))
    index, target, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(index):
        raise UserError("no examples to evaluate on: none could be read")
    if not np.isfinite(logits).all():
        raise UserError("the model's logits hold NaN or infinity: its weights are damaged, or training diverged")
    order = np.argsort(index, kind="stable")
    index, target, logits = index[order], target[order], logits[order]
    probs = sigmoid(logits)
    chosen = fit_thresholds(probs, target) if thresholds is None else np.array([thresholds[name] for name in labels])
    metrics = _metrics(labels, logits, probs, target, chosen, resamples) | {"num_unreadable": unreadable}
    return MultiLabelResult(tuple(labels), metrics, index, target, logits, chosen)


def _metrics(
    labels: Sequence[str],
    logits: Float32[np.ndarray, "n c"],
    probs: Float64[np.ndarray, "n c"],
    target: Bool[np.ndarray, "n c"],
    thresholds: Float64[np.ndarray, " c"],
    resamples: int,
) -> dict[str, Any]:
    """Return the contents of metrics.json.

    A label that no example has doesn't count in `map` and the chance, and in `macro_f1` only if it was predicted, as 0.
    """
    if not target.any():
        raise UserError("none of the examples has a label, so no precision can be measured; choose others")
    predicted, support = probs >= thresholds[None], target.sum(axis=0)
    hits, given = (predicted & target).sum(axis=0), predicted.sum(axis=0)
    f1 = 2 * hits / np.maximum(support + given, 1)
    precision, recall = hits / np.maximum(given, 1), hits / np.maximum(support, 1)
    own, errors = average_precision(probs, target), label_errors(probs, target)
    micro = average_precision(probs.reshape(-1, 1), target.reshape(-1, 1))[0]
    per_class: dict[str, dict[str, Any]] = {
        name: {
            "ap": None if np.isnan(own[k]) else float(own[k]),
            "precision": float(precision[k]),
            "recall": float(recall[k]),
            "f1": float(f1[k]),
            "threshold": float(thresholds[k]),
            "support": int(support[k]),
            "ece": errors[k],
        }
        for k, name in enumerate(labels)
    }
    metrics = {
        "num_examples": len(target),
        "labels_per_image": float(target.sum() / len(target)),
        "map": _mean(own),
        "map_micro": float(micro),
        "macro_f1": float(f1[support + given > 0].mean()),
        "micro_f1": float(2 * hits.sum() / max((support + given).sum(), 1)),
        "coverage_error": coverage_error(probs, target),
        "nll": label_nll(logits, target),
        "label_ece": float(np.mean(errors)),
        # A ranking by chance has the share of the images with the label as its average precision.
        "baselines": {"chance": float((support / len(target))[support > 0].mean())},
        "per_class": per_class,
    }
    if resamples:
        intervals, macro, both = precision_intervals(probs, target, resamples)
        metrics |= {"map_interval": list(macro), "map_micro_interval": list(both)}
        for name, interval in zip(labels, intervals, strict=True):
            per_class[name]["ap_interval"] = None if interval is None else list(interval)
    return metrics
