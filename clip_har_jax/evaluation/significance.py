"""How sure a figure is, and whether one model is better than another, from the predictions on the same examples."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_har_jax.evaluation.calibration import calibration_error

RESAMPLES = 1000
HEADLINES = ("top1", "top5", "macro_f1", "nll", "ece")

Measures = dict[str, float]


def measures(probs: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"]) -> Callable[[np.ndarray], Measures]:
    """Return a function from rows, which may repeat, to the headline metrics of those examples."""
    count, classes = probs.shape
    own = probs[np.arange(count), label]
    earlier = np.arange(classes) < label[:, None]
    rank = ((probs > own[:, None]) | ((probs == own[:, None]) & earlier)).sum(axis=-1)
    predicted = probs.argmax(axis=-1)
    nll, pair = -np.log(np.maximum(own.astype(np.float64), 1e-300)), label * classes + predicted
    confidence = probs.max(axis=-1)[:, None]  # the calibration error looks at the top class alone
    top = np.concatenate([confidence, np.zeros_like(confidence)], axis=1)
    wrong = (rank > 0).astype(np.int64)

    def compute(rows: np.ndarray) -> Measures:
        confusion = np.bincount(pair[rows], minlength=classes * classes).reshape(classes, classes)
        support, given = confusion.sum(axis=1), confusion.sum(axis=0)
        f1 = 2 * np.diag(confusion) / np.maximum(support + given, 1)
        return {
            "top1": float((rank[rows] == 0).mean()),
            "top5": float((rank[rows] < 5).mean()),
            "macro_f1": float(f1[support + given > 0].mean()),
            "nll": float(nll[rows].mean()),
            "ece": calibration_error(top[rows], wrong[rows]),
        }

    return compute


def bootstrap_intervals(
    probs: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of the headline metrics, by drawing the examples again (Efron 1979).

    That of the calibration error is shifted back by the bootstrap's own bias: with bins, resampling adds to it.
    """
    compute, rng, count = measures(probs, label), np.random.default_rng(seed), len(label)
    draws = [compute(rng.integers(count, size=count)) for _ in range(resamples)]
    intervals = {}
    for name, value in compute(np.arange(count)).items():
        values = np.asarray([draw[name] for draw in draws])
        if name == "ece":
            values = np.maximum(values - (values.mean() - value), 0)
        low, high = np.quantile(values, (0.025, 0.975))
        intervals[name] = (float(low), float(high))
    return intervals


def mcnemar(right_a: Bool[np.ndarray, " n"], right_b: Bool[np.ndarray, " n"]) -> tuple[int, int, float]:
    """Examples that only a has right, those that only b has, and the exact two-sided p-value (McNemar 1947)."""
    from scipy.stats import binomtest

    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return only_a, only_b, float(p)


def paired_differences(
    a: Float[np.ndarray, "n c"], b: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"], seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """b less a in each headline metric, and the 95% interval, drawing the same examples for both."""
    first, second, rng, count = measures(a, label), measures(b, label), np.random.default_rng(seed), len(label)
    draws = [_difference(first, second, rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    found = {}
    for name, value in _difference(first, second, np.arange(count)).items():
        low, high = np.quantile([draw[name] for draw in draws], (0.025, 0.975))
        found[name] = (value, float(low), float(high))
    return found


def _difference(
    first: Callable[[np.ndarray], Measures], second: Callable[[np.ndarray], Measures], rows: np.ndarray
) -> Measures:
    a = first(rows)
    return {name: value - a[name] for name, value in second(rows).items()}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of several comparisons, corrected for their number (Holm 1979)."""
    corrected, largest = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}
