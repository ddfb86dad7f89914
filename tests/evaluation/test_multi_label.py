"""Figures of multi-label data are scikit-learn's, and thresholds, temperature and files follow their rules."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

from clip_har_jax.batch import Batch
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.baselines import verdict
from clip_har_jax.evaluation.multi_label import (
    MultiLabelResult,
    average_precision,
    calibrate_labels,
    coverage_error,
    evaluate_multi_label,
    fit_thresholds,
    precision_intervals,
    sigmoid,
)
from clip_har_jax.evaluation.multi_label_report import write_multi_label_pages
from clip_har_jax.mlops.gates import Gates, check_evaluation

LABELS = ("run", "sit", "using_phone", "wave")


def draw(count: int, seed: int = 0, decimals: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits and targets of four labels; rounded logits have ties."""
    rng = np.random.default_rng(seed)
    target = rng.random((count, 4)) < (0.5, 0.3, 0.1, 0.05)
    logits = rng.normal(np.where(target, 1.0, -1.5), 1.5).astype(np.float32)
    return (logits if decimals is None else logits.round(decimals)), target


def evaluate(logits: np.ndarray, target: np.ndarray, resamples: int = 0) -> MultiLabelResult:
    """In batches of 7 rows, whose last one is padded, and with one image that can't be read."""
    batches = []
    for start in range(0, len(target), 7):
        rows = np.arange(start, min(start + 7, len(target)))
        filled = np.append(rows, np.zeros(7 - len(rows), int))
        mask = (np.arange(7) < len(rows)).astype(np.float32)
        index = np.where(mask > 0, filled, -1).astype(np.int32)
        batches.append(Batch(logits[filled], target[filled].astype(np.uint8), mask, index))
    unreadable = Batch(logits[:1], target[:1].astype(np.uint8), np.zeros(1, np.float32), np.array([99], np.int32))
    return evaluate_multi_label(lambda batch: batch.image, [*batches, unreadable], LABELS, None, resamples)


@pytest.mark.parametrize("decimals", [None, 0])
def test_figures_are_those_of_scikit_learn(decimals: int | None) -> None:
    logits, target = draw(300, decimals=decimals)
    result = evaluate(logits, target)
    probs, found = sigmoid(logits), result.metrics
    assert (found["num_examples"], found["num_unreadable"]) == (300, 1)
    own = sk.average_precision_score(target, probs, average=None)
    np.testing.assert_allclose([found["per_class"][name]["ap"] for name in LABELS], own, atol=1e-12)
    assert found["map"] == pytest.approx(sk.average_precision_score(target, probs, average="macro"), abs=1e-12)
    assert found["map_micro"] == pytest.approx(sk.average_precision_score(target, probs, average="micro"), abs=1e-12)
    assert found["coverage_error"] == pytest.approx(sk.coverage_error(target, probs), abs=1e-12)
    predicted = probs >= result.thresholds
    for name, average in (("macro_f1", "macro"), ("micro_f1", "micro")):
        assert found[name] == pytest.approx(sk.f1_score(target, predicted, average=average), abs=1e-12)
    rows = zip(*sk.precision_recall_fscore_support(target, predicted), strict=True)
    for name, (precision, recall, f1, support) in zip(LABELS, rows, strict=True):
        row = found["per_class"][name]
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(
            (precision, recall, f1, support), abs=1e-12
        )
    nll = np.mean([sk.log_loss(target[:, k], probs[:, k]) for k in range(4)])
    assert found["nll"] == pytest.approx(nll, abs=1e-9)
    assert found["baselines"]["chance"] == pytest.approx(target.mean())


def test_label_wise_calibration_is_the_gap_between_probability_and_frequency() -> None:
    logits, target = draw(2000)
    probs, found = sigmoid(logits), evaluate(logits, target).metrics
    for k, name in enumerate(LABELS):
        bins = np.minimum((probs[:, k] * 15).astype(int), 14)
        gaps = [abs(probs[bins == b, k].sum() - target[bins == b, k].sum()) for b in range(15)]
        assert found["per_class"][name]["ece"] == pytest.approx(sum(gaps) / 2000, abs=1e-9)
    assert found["label_ece"] == pytest.approx(np.mean([row["ece"] for row in found["per_class"].values()]))


def test_thresholds_give_the_best_f1_of_all() -> None:
    logits, target = draw(40)
    probs = sigmoid(logits)
    target[:, 3] = False  # a label that no image has
    found = fit_thresholds(probs, target)
    assert found[3] == 0.5
    for k in range(3):
        best = max(sk.f1_score(target[:, k], probs[:, k] >= limit) for limit in probs[:, k])
        assert sk.f1_score(target[:, k], probs[:, k] >= found[k]) == pytest.approx(best, abs=1e-12)
        assert found[k] not in probs[:, k]  # between two probabilities, so that rounding changes no answer


def test_a_label_without_an_image_has_no_precision_and_an_image_without_a_label_needs_none() -> None:
    logits, target = draw(60)
    target[:, 2], target[:5] = False, False
    result = evaluate(logits, target, resamples=50)
    found, predicted = result.metrics, result.probs >= result.thresholds
    assert predicted[:, 2].any()
    f1 = sk.f1_score(target, predicted, average="macro", zero_division=0)  # 0 for a label that is only predicted
    assert found["macro_f1"] == pytest.approx(f1, abs=1e-12)
    assert found["per_class"]["using_phone"]["ap"] is None
    assert found["per_class"]["using_phone"]["ap_interval"] is None
    known = [0, 1, 3]
    own = sk.average_precision_score(target[:, known], sigmoid(logits)[:, known], average="macro")
    assert found["map"] == pytest.approx(own, abs=1e-12)
    assert found["coverage_error"] == pytest.approx(sk.coverage_error(target, sigmoid(logits)), abs=1e-12)
    with pytest.raises(UserError, match="none of the examples has a label"):
        evaluate(logits, np.zeros_like(target))


def test_intervals_are_quantiles_of_resamples() -> None:
    """Each resample's figure is that of the repeated examples themselves."""
    logits, target = draw(80)
    own, macro, micro = precision_intervals(logits, target, resamples=200)
    drawn = []
    for seed in range(200):
        rows = np.random.default_rng(seed).integers(0, 80, 80)
        drawn.append(average_precision(logits[rows], target[rows]))
    for interval, values in zip(own, np.array(drawn).T, strict=True):
        assert interval is not None
        np.testing.assert_allclose(interval, np.nanquantile(values, (0.025, 0.975)), atol=0.08)
    assert macro[0] < np.nanmean(average_precision(logits, target)) < macro[1]
    assert micro[0] < sk.average_precision_score(target, logits, average="micro") < micro[1]


def test_calibration_improves_the_likelihood_and_gives_each_label_a_threshold() -> None:
    logits, target = draw(500)
    found = calibrate_labels(LABELS, 3 * logits, target)
    assert found.temperature > 1.5
    assert found.report["after"]["nll"] < found.report["before"]["nll"]
    assert found.report["after"]["label_ece"] < found.report["before"]["label_ece"]
    assert list(found.label_thresholds) == list(LABELS)
    fitted = fit_thresholds(sigmoid(3 * logits / found.temperature), target)
    assert list(found.label_thresholds.values()) == fitted.tolist()
    assert calibrate_labels(LABELS, np.where(target, 2.0, -2.0), target).temperature == 1.0  # all right: no optimum


def test_coverage_counts_ties_against_the_model() -> None:
    score, target = np.array([[0.5, 0.5, 0.1], [0.9, 0.2, 0.3]]), np.array([[True, False, False], [False, False, True]])
    assert coverage_error(score, target) == sk.coverage_error(target, score) == 2.0


def test_files_of_an_evaluation(tmp_path: Path) -> None:
    logits, target = draw(40)
    result = evaluate(logits, target, resamples=50)
    names = [f"<{i}>.png" for i in range(40)]
    write_multi_label_pages(result, tmp_path, names, {"data": "csv:x.csv", "model": "m"})
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert json.loads(table.schema.metadata[b"labels"]) == list(LABELS)
    row = table.to_pylist()[3]
    assert row["input"] == "<3>.png"
    assert row["labels"] == [name for name, has in zip(LABELS, target[3], strict=True) if has]
    given = result.probs[3] >= result.thresholds
    assert row["predicted"] == [name for name, has in zip(LABELS, given, strict=True) if has]
    np.testing.assert_allclose(row["probs"], result.probs[3], rtol=1e-6)
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.metrics
    page = (tmp_path / "report.html").read_text()
    assert "using phone" in page
    assert f"{result.metrics['map']:.3f}" in page
    assert "<3>" not in page  # names are escaped
    low, high = result.metrics["map_interval"]
    assert f"a 95% interval of {low:.3f} to {high:.3f}" in verdict(result.metrics)


def test_a_champion_of_several_labels_is_no_gate_for_top1(tmp_path: Path) -> None:
    logits, target = draw(40)
    for name in ("candidate", "champion"):
        (tmp_path / name).mkdir()
        result = evaluate(logits, target, resamples=20)
        write_multi_label_pages(result, tmp_path / name, [f"{i}.png" for i in range(40)], {})
    (check,) = check_evaluation(Gates(), tmp_path / "candidate", tmp_path / "champion", tmp_path / "none.json")
    assert not check.passed
    assert "several labels" in check.detail
