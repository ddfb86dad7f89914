"""Confidence intervals of metrics, and tests between models, from predictions on the same examples."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from clip_har_jax.evaluation.calibration import confidence_bins
from clip_har_jax.evaluation.metrics import NUM_BINS
from clip_har_jax.evaluation.result import Scores

RESAMPLES = 1000
LEVEL = 0.95
MOST_DRAWN = 10_000_000  # limit of indices in memory
METRIC_NAMES = ("top1", "top5", "macro_f1", "nll", "ece")
ECE = METRIC_NAMES.index("ece")


def headline_metrics(scores: Scores, num_classes: int) -> Callable[[Int[np.ndarray, " n"]], Float64[np.ndarray, " 5"]]:
    """Return a function from rows (with repetitions) to the metrics in `METRIC_NAMES` of those examples."""
    right = scores.rank == 0
    columns = right, scores.rank < 5, scores.nll, confidence_bins(scores.score), right - scores.score.astype(np.float64)
    label, predicted = scores.label, scores.predicted

    def compute(rows: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " 5"]:
        first, among5, nll, bins, gap = (column[rows] for column in columns)
        own = label[rows]
        hits, support, given = (np.bincount(each, minlength=num_classes) for each in (own[first], own, predicted[rows]))
        seen = support + given > 0
        macro_f1 = (2 * hits[seen] / (support + given)[seen]).mean()
        ece = np.abs(np.bincount(bins, gap, NUM_BINS)).sum() / len(rows)
        return np.asarray([first.mean(), among5.mean(), macro_f1, nll.mean(dtype=np.float64), ece])

    return compute


def resample_metrics(
    compute: Callable[[Int[np.ndarray, " n"]], Float64[np.ndarray, " m"]], count: int, resamples: int, seed: int
) -> Float64[np.ndarray, "m r"]:
    """Return the metrics of resamples of `count` examples, drawn with replacement (Efron 1979).

    One example has one resample, itself, which scipy refuses.
    """
    from scipy.stats import bootstrap

    if count == 1:
        return compute(np.arange(1))[:, None]

    def statistic(rows: np.ndarray, axis: int) -> np.ndarray:
        flat = np.moveaxis(rows, axis, -1).reshape(-1, count)
        return np.stack([compute(each) for each in flat], axis=-1).reshape(-1, *rows.shape[:-1])

    found = bootstrap(
        (np.arange(count),),
        statistic,
        n_resamples=resamples,
        batch=max(1, MOST_DRAWN // count),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return found.bootstrap_distribution


def percentile_interval(values: Float64[np.ndarray, " r"]) -> tuple[float, float]:
    """Return the 95% percentile interval of a metric's resamples."""
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def bootstrap_intervals(
    scores: Scores, num_classes: int, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return 95% percentile intervals of the headline metrics.

    The interval of the calibration error is shifted by the bootstrap's bias: resampling increases an error that is
    computed over bins.
    """
    compute, count = headline_metrics(scores, num_classes), len(scores.label)
    draws = resample_metrics(compute, count, resamples, seed)
    draws[ECE] = np.maximum(draws[ECE] - (draws[ECE].mean() - compute(np.arange(count))[ECE]), 0)
    return {name: percentile_interval(values) for name, values in zip(METRIC_NAMES, draws, strict=True)}


def paired_differences(
    a: Scores, b: Scores, num_classes: int, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Return b minus a for each headline metric with its 95% interval; each resample draws the same examples for both.

    Args:
      a: of one model.
      b: of another one, for the same examples in the same order.
      num_classes: of both.
    """
    first, second, count = headline_metrics(a, num_classes), headline_metrics(b, num_classes), len(a.label)
    values = second(np.arange(count)) - first(np.arange(count))
    draws = resample_metrics(lambda rows: second(rows) - first(rows), count, resamples, seed)
    return {
        name: (float(value), *percentile_interval(drawn))
        for name, value, drawn in zip(METRIC_NAMES, values, draws, strict=True)
    }


def mean_interval(values: Float[np.ndarray, " n"], resamples: int = 2000) -> tuple[float, float]:
    """Return the 95% percentile interval of a mean, from a fixed seed; of a single value, the value itself."""
    from scipy.stats import bootstrap

    if len(values) == 1 or (values == values[0]).all():
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, MOST_DRAWN // len(values)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def mcnemar(right_a: Bool[np.ndarray, " n"], right_b: Bool[np.ndarray, " n"]) -> tuple[int, int, float]:
    """Return the number of examples that only a has right, that only b has right, and the exact two-sided p-value
    (McNemar 1947).
    """
    from scipy.stats import binomtest

    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return only_a, only_b, float(p)


def paired_gain(
    pairs: Sequence[tuple[Bool[np.ndarray, " _"], Bool[np.ndarray, " _"]]],
) -> tuple[float, float, float]:
    """Return the gain in accuracy of b over a, summed over data sets, with its 95% interval.

    The interval is the adjusted Wald interval of Bonett and Price (2012), valid for few examples too.

    Args:
      pairs: for each data set, which of its examples a and b have right.
    """
    gain = centre = variance = 0.0
    for right_a, right_b in pairs:
        only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
        count = len(right_a) + 2
        gain += (only_b - only_a) / len(right_a)
        centre += (only_b - only_a) / count
        variance += (only_a + only_b + 2 - (only_b - only_a) ** 2 / count) / count**2
    half = 1.96 * variance**0.5
    return gain, centre - half, centre + half


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values of several comparisons, corrected for their number (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return {}
    corrected = multipletests(list(p_values.values()), method="holm")[1]
    return {name: float(value) for name, value in zip(p_values, corrected, strict=True)}
