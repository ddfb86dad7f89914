"""Sums over all class probabilities for the report, computed batch by batch so that memory stays bounded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from clip_har_jax.evaluation.calibration import aps_sets, split_conformal_sets
from clip_har_jax.evaluation.metrics import NUM_BINS, confidence_bins, softmax_float64
from clip_har_jax.evaluation.result import Predictions

MOST_COUNTED = 5  # sizes of conformal sets with their own column


@dataclass(frozen=True)
class ReliabilityBins:
    """Counts of examples by confidence, in bins of equal width: all, correct ones, and summed confidence."""

    count: Int64[np.ndarray, " bins"]
    correct: Int64[np.ndarray, " bins"]
    confidence: Float64[np.ndarray, " bins"]

    @classmethod
    def of(cls, confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> "ReliabilityBins":
        """Return the bins of some examples."""
        bins = confidence_bins(confidence)
        count, correct = (np.bincount(each, minlength=NUM_BINS) for each in (bins, bins[right]))
        return cls(count, correct, np.bincount(bins, confidence.astype(np.float64), NUM_BINS).astype(np.float64))

    def merge(self, other: "ReliabilityBins") -> "ReliabilityBins":
        """Return the bins of both sets of examples."""
        return ReliabilityBins(
            self.count + other.count, self.correct + other.correct, self.confidence + other.confidence
        )

    @property
    def ece(self) -> float:
        """Expected calibration error."""
        return float(np.abs(self.correct - self.confidence).sum() / self.count.sum())


class ReportSums:
    """A sink of `evaluate`: reliability without the temperature, and size and coverage of the conformal sets.

    Args:
      temperature: by which the logits are divided already; 1: no difference.
      thresholds: as in `actions.json`; conformal sets need `coverage`, `split_conformal` and `aps`.
    """

    def __init__(self, temperature: float, thresholds: Mapping[str, float]):
        self.temperature, self.thresholds = temperature, thresholds
        self.unscaled: ReliabilityBins | None = None
        self._sizes: dict[str, Int64[np.ndarray, " s"]] = {}
        self._covered: dict[str, int] = {}
        self._size_sum: dict[str, int] = {}

    def __call__(self, part: Predictions) -> None:
        """Add a batch."""
        if not len(part.label):
            return
        if self.temperature != 1.0:
            confidence = softmax_float64(part.logits * self.temperature).max(axis=-1)
            bins = ReliabilityBins.of(confidence, part.predicted == part.label)
            self.unscaled = bins if self.unscaled is None else self.unscaled.merge(bins)
        if not {"coverage", "split_conformal", "aps"} <= set(self.thresholds):
            return
        own = np.arange(len(part.label))
        for title, sets in (
            ("all that are probable enough", split_conformal_sets(part.probs, self.thresholds["split_conformal"])),
            ("the most probable until it is enough (APS)", aps_sets(part.probs, self.thresholds["aps"])),
        ):
            sizes = sets.sum(axis=1)
            counts = np.bincount(np.minimum(sizes, MOST_COUNTED + 1), minlength=MOST_COUNTED + 2)
            self._sizes[title] = self._sizes.get(title, 0) + counts
            self._covered[title] = self._covered.get(title, 0) + int(sets[own, part.label].sum())
            self._size_sum[title] = self._size_sum.get(title, 0) + int(sizes.sum())

    def conformal(self) -> dict[str, Any] | None:
        """Return the table of the conformal sets, one row per method; None: the model has no thresholds."""
        if not self._sizes:
            return None
        rows = []
        for title, counts in self._sizes.items():
            total = counts.sum()
            shares, mean = counts / total, self._size_sum[title] / total
            rows.append({"title": title, "covered": self._covered[title] / total, "mean": mean, "shares": shares})
        sizes_shown = [*map(str, range(MOST_COUNTED + 1)), f"over {MOST_COUNTED}"]
        return {"coverage": self.thresholds["coverage"], "sizes": sizes_shown, "rows": rows}
