"""Mergeable classification metrics, exact under padding and over any split into batches or hosts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int32, Int64
from scipy.sparse import coo_array, csr_array

from clip_har_jax.errors import UserError

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017


def log_softmax(logits: Float[np.ndarray, "b c"]) -> Float64[np.ndarray, "b c"]:
    """Return log-probabilities in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax_float64(logits: Float[np.ndarray, "b c"]) -> Float64[np.ndarray, "b c"]:
    """Return probabilities in float64."""
    return np.exp(log_softmax(logits))


def rank_of_label(values: Float[np.ndarray, "b c"], label: Int[np.ndarray, " b"]) -> Int32[np.ndarray, " b"]:
    """Return the position of the true class by descending logit or probability; among equals, the first class leads."""
    own = values[np.arange(len(label)), label][:, None]
    earlier = np.arange(values.shape[1]) < label[:, None]
    return ((values > own) | ((values == own) & earlier)).sum(axis=-1).astype(np.int32)


def confidence_bins(confidence: Float[np.ndarray, " b"], num_bins: int = NUM_BINS) -> Int64[np.ndarray, " b"]:
    """Return the index of the equal-width bin of each confidence; a bin includes its upper bound."""
    return np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)


@dataclass(frozen=True)
class ClassificationState:
    """Sums from which the metrics are computed; those of two sets of examples can be added.

    Attributes:
      confusion: number of examples by true class (row) and predicted class (column), [c, c]; sparse.
      in_top5: number of examples whose class is among the 5 most probable.
      nll: sum of the negative log-likelihoods, in nats.
      bin_count, bin_correct, bin_confidence: number of examples, of correct ones, and summed confidence in each bin.
    """

    confusion: csr_array
    in_top5: int
    nll: float
    bin_count: Int64[np.ndarray, " bins"]
    bin_correct: Int64[np.ndarray, " bins"]
    bin_confidence: Float64[np.ndarray, " bins"]

    @classmethod
    def empty(cls, num_classes: int) -> "ClassificationState":
        """Return the state of no examples."""
        counts = np.zeros(NUM_BINS, np.int64)
        return cls(csr_array((num_classes, num_classes), dtype=np.int64), 0, 0.0, counts, counts, np.zeros(NUM_BINS))

    @property
    def num_examples(self) -> int:
        return int(self.confusion.sum())

    def update(
        self, logits: Float[np.ndarray, "b c"], label: Int[np.ndarray, " b"], mask: Float[np.ndarray, " b"]
    ) -> "ClassificationState":
        """Return the state with a batch added; rows of mask 0 are ignored. Of equal logits, the first is predicted.

        Raises:
          UserError: logits aren't finite, as with damaged weights or after divergence.
        """
        counts = mask > 0
        logits, label = logits[counts], label[counts]
        if not np.isfinite(logits).all():
            raise UserError("the model's logits hold NaN or infinity: its weights are damaged, or training diverged")
        log_probs, rows = log_softmax(logits), np.arange(len(label))
        predicted = logits.argmax(axis=-1)
        confidence = np.exp(log_probs[rows, predicted])
        bins = confidence_bins(confidence)
        ones = np.ones(len(label), np.int64)
        batch = ClassificationState(
            coo_array((ones, (label, predicted)), self.confusion.shape).tocsr(),
            int((rank_of_label(logits, label) < 5).sum()),
            float(-log_probs[rows, label].sum()),
            np.bincount(bins, minlength=NUM_BINS),
            np.bincount(bins[predicted == label], minlength=NUM_BINS),
            np.bincount(bins, confidence, NUM_BINS).astype(np.float64),  # without rows it would count in ints
        )
        return self.merge(batch)

    def merge(self, other: "ClassificationState") -> "ClassificationState":
        """Return the state of both sets of examples."""
        return ClassificationState(
            self.confusion + other.confusion,
            self.in_top5 + other.in_top5,
            self.nll + other.nll,
            self.bin_count + other.bin_count,
            self.bin_correct + other.bin_correct,
            self.bin_confidence + other.bin_confidence,
        )

    def compute(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the metrics, under the names of metrics.json.

        `macro_f1` is the mean over classes that occur as label or prediction; a division by 0 counts as 0. `ece` is the
        expected calibration error of the top class over 15 bins of equal width (Guo et al. 2017, equation 3).

        Raises:
          UserError: no examples.
        """
        total = self.num_examples
        if total == 0:
            raise UserError("no examples to evaluate on: none could be read")
        support, predicted = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        correct = self.confusion.diagonal()
        precision, recall = correct / np.maximum(predicted, 1), correct / np.maximum(support, 1)
        f1 = 2 * correct / np.maximum(support + predicted, 1)
        columns = zip(labels, precision, recall, f1, support, strict=True)
        return {
            "num_examples": total,
            "top1": float(correct.sum() / total),
            "top5": self.in_top5 / total,
            "macro_f1": float(f1[support + predicted > 0].mean()),
            "nll": self.nll / total,
            "ece": float(np.abs(self.bin_correct - self.bin_confidence).sum() / total),
            "per_class": {
                label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
                for label, p, r, f, n in columns
            },
        }
