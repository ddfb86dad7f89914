"""Calibration of probabilities, conformal sets and abstention, fitted on validation data."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from clip_har_jax.bundle import Sigmoid
from clip_har_jax.evaluation.metrics import NUM_BINS, confidence_bins, log_softmax, softmax_float64

COVERAGE = 0.9  # of the conformal sets
WITHHELD = 0.5  # share of the validation mistakes to withhold ...
MAX_WITHHELD = 0.2  # ... unless that would withhold a larger share of all answers
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class CalibrationResult:
    """The result of a calibration.

    Attributes:
      temperature: divides the model's logits.
      thresholds: for `actions.json`: `abstain` (answers with a lower probability are withheld), `coverage` (of the
        conformal sets), `split_conformal` (the lowest probability of a class in a set) and `aps` (the cumulative
        probability of a set).
      sigmoid: of a model with a logit bias; None: the model has none.
      report: the contents of calibration.json: the scores before and after, and the effect of abstaining.
      label_thresholds: of multi-label data, the probability from which on each label is predicted.
    """

    temperature: float
    thresholds: dict[str, float]
    report: dict[str, Any]
    sigmoid: Sigmoid | None = None
    label_thresholds: dict[str, float] = field(default_factory=dict)


def fit_temperature(logits: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"]) -> float:
    """Return the temperature that minimises the negative log-likelihood (Guo et al. 2017, section 4.2) in
    `TEMPERATURES`.

    If every example is right, the likelihood grows as the temperature falls, without an optimum; then it stays 1.
    """
    from scipy.optimize import minimize_scalar

    if (logits.argmax(axis=-1) == label).all():
        return 1.0
    own = np.arange(len(label))

    def nll(log_temperature: float) -> float:
        return -float(log_softmax(logits / np.exp(log_temperature))[own, label].mean())

    # Convex in 1 / T, so it has one minimum in log T.
    found = minimize_scalar(nll, bounds=tuple(np.log(TEMPERATURES)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def fit_sigmoid(logits: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"]) -> Sigmoid:
    """Return the sigmoid that minimises the cross-entropy over all pairs of an example and a class (Platt 1999).

    A pair is true if the class is the example's. With Platt's targets, which are a little above 0 and below 1, the
    optimum is finite even if one threshold separates all pairs.
    """
    from scipy.optimize import minimize

    true = is_own_class(logits, label)
    count = int(true.sum())
    target = np.where(true, (count + 1) / (count + 2), 1 / (true.size - count + 2))
    mean, width = float(logits.mean(dtype=np.float64)), float(logits.std(dtype=np.float64)) or 1.0
    x = (logits.astype(np.float64) - mean) / width  # so that both parameters have steps of like size

    def loss(parameters: Float64[np.ndarray, "2"]) -> tuple[float, Float64[np.ndarray, "2"]]:
        z = parameters[0] * x + parameters[1]
        difference = np.exp(-np.logaddexp(0.0, -z)) - target
        value = (np.logaddexp(0.0, z) - target * z).mean()
        return float(value), np.asarray([(difference * x).mean(), difference.mean()])

    start = np.asarray([1.0, np.log(count / (true.size - count))])
    options = {"ftol": 1e-14, "gtol": 1e-9}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None), (None, None)], options=options)
    slope = float(found.x[0]) / width
    return Sigmoid(slope, float(found.x[1]) - slope * mean)


def is_own_class(logits: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "n c"]:
    """Return for each pair of an example and a class whether the class is the example's."""
    return np.arange(logits.shape[1]) == label[:, None]


def sigmoid_scores(probs: Float[np.ndarray, "n c"], true: Bool[np.ndarray, "n c"]) -> dict[str, float]:
    """Return the cross-entropy and the calibration error of probabilities of pairs; lower is better."""
    own = np.where(true, probs, 1 - probs)
    return {
        "nll": float(-np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean()),
        "ece": calibration_error(probs.ravel(), true.ravel()),
    }


def calibration_error(
    confidence: Float[np.ndarray, " n"],
    right: Bool[np.ndarray, " n"],
    adaptive: bool = False,
    num_bins: int = NUM_BINS,
) -> float:
    """Return the expected calibration error of the top class.

    Args:
      confidence: probability of the predicted class.
      right: whether the prediction is true.
      adaptive: use bins of equal counts (Nguyen and O'Connor 2015) instead of equal width.
      num_bins: number of bins.
    """
    if adaptive:
        parts = np.array_split(np.argsort(confidence, kind="stable"), num_bins)
        gaps = [abs(float((right[part] - confidence[part]).sum())) for part in parts]
        return sum(gaps) / len(right)
    bins = confidence_bins(confidence, num_bins)
    return float(np.abs(np.bincount(bins, right - confidence, num_bins)).sum() / len(right))


def brier_scores(probs: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Return each example's squared distance from the truth, summed over classes (Brier 1950): 0 to 2."""
    own = probs[np.arange(len(label)), label].astype(np.float64)
    return (probs.astype(np.float64) ** 2).sum(axis=-1) - 2 * own + 1


def calibration_scores(probs: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Return four scores of how well probabilities match the truth; lower is better."""
    own = probs[np.arange(len(label)), label].astype(np.float64)
    confidence, right = probs.max(axis=-1), probs.argmax(axis=-1) == label
    return {
        "nll": float(-np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean()),
        "ece": calibration_error(confidence, right),
        "ece_adaptive": calibration_error(confidence, right, adaptive=True),
        "brier": float(brier_scores(probs, label).mean()),
    }


def conformal_quantile(scores: Float[np.ndarray, " n"], coverage: float) -> float:
    """Return the ceil((n + 1) coverage)-th smallest score; infinity if there are too few."""
    rank = int(np.ceil((len(scores) + 1) * coverage))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else float("inf")


def fit_split_conformal(
    probs: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"], coverage: float = COVERAGE
) -> float:
    """Return the lowest probability of a class in a set (Sadinle et al. 2019); 0 with too few examples."""
    scores = 1 - probs[np.arange(len(label)), label].astype(np.float64)
    return max(0.0, 1 - conformal_quantile(scores, coverage))


def fit_aps(
    probs: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"], coverage: float = COVERAGE, seed: int = 0
) -> float:
    """Return the cumulative probability of a set (Romano et al. 2020, equation 8); at most 1.

    The scores are randomised as in the paper. Sets contain whole classes, so they are at least as large as the paper's,
    and equal for equal images.
    """
    own = probs[np.arange(len(label)), label][:, None]
    earlier = np.arange(probs.shape[1]) < label[:, None]
    before = np.where((probs > own) | ((probs == own) & earlier), probs, 0).sum(axis=-1)
    scores = before + np.random.default_rng(seed).random(len(label)) * own[:, 0]
    return min(1.0, conformal_quantile(scores, coverage))


def split_conformal_sets(probs: Float[np.ndarray, "n c"], lowest: float) -> Bool[np.ndarray, "n c"]:
    """Return the classes of each set: those with at least the probability `lowest`."""
    return probs >= lowest


def aps_sets(probs: Float[np.ndarray, "n c"], together: float) -> Bool[np.ndarray, "n c"]:
    """Return the classes of each set: the most probable ones until their sum reaches `together`; at least one."""
    order = np.argsort(-probs, axis=-1, kind="stable")
    ordered = np.take_along_axis(probs, order, axis=-1).astype(np.float64)
    taken = np.cumsum(ordered, axis=-1) - ordered < together
    taken[:, 0] = True
    sets = np.zeros_like(taken)
    np.put_along_axis(sets, order, taken, axis=-1)
    return sets


def fit_abstention(probs: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"]) -> float:
    """Return the top probability below which an answer is withheld: it withholds `WITHHELD` of the mistakes, at most
    `MAX_WITHHELD` of all answers.

    Without mistakes it is the lowest top probability that occurred.
    """
    confidence, right = probs.max(axis=-1), probs.argmax(axis=-1) == label
    if right.all():
        return float(confidence.min())
    mistakes, answers = np.sort(confidence[~right]), np.sort(confidence)
    return float(min(mistakes[int(WITHHELD * len(mistakes))], answers[int(MAX_WITHHELD * len(answers))]))


def calibrate(
    logits: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"], logit_bias: float | None = None
) -> CalibrationResult:
    """Fit temperature and thresholds, and the sigmoid of a model with a logit bias.

    Args:
      logits: of the validation examples, at temperature 1, without the bias.
      label: their true classes.
      logit_bias: of a model whose texts are compared with images one by one; None: it has none.
    """
    temperature = fit_temperature(logits, label)
    before, probs = softmax_float64(logits), softmax_float64(logits / temperature)
    thresholds = {
        "abstain": fit_abstention(probs, label),
        "coverage": COVERAGE,
        "split_conformal": fit_split_conformal(probs, label),
        "aps": fit_aps(probs, label),
    }
    answered, right = probs.max(axis=-1) >= thresholds["abstain"], probs.argmax(axis=-1) == label
    report = {
        "num_examples": len(label),
        "temperature": temperature,
        "thresholds": thresholds,
        "before": calibration_scores(before, label),
        "after": calibration_scores(probs, label),
        "abstention": {
            "answered": float(answered.mean()),
            "accuracy": float(right.mean()),
            "accuracy_of_answered": float(right[answered].mean()) if answered.any() else None,
            "mistakes": int((~right).sum()),
            "mistakes_withheld": int((~right & ~answered).sum()),
        },
    }
    sigmoid = None
    if logit_bias is not None:
        scaled, true = logits / temperature, is_own_class(logits, label)
        sigmoid = fit_sigmoid(scaled, label)
        report["sigmoid"] = {
            **sigmoid._asdict(),
            "before": sigmoid_scores(Sigmoid(1.0, logit_bias)(logits), true),
            "after": sigmoid_scores(sigmoid(scaled), true),
        }
    return CalibrationResult(temperature, thresholds, report, sigmoid)
