"""Comparing evaluations: the tests against references, and what can't be compared."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from clip_har_jax.batch import Batch
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.evaluator import evaluate
from clip_har_jax.evaluation.output import predictions_file
from clip_har_jax.evaluation.paired import compare_evaluations
from clip_har_jax.evaluation.result import Scores
from clip_har_jax.evaluation.significance import bootstrap_intervals, holm, mcnemar, paired_differences

ROOT = Path(__file__).parents[2]
LABELS = ("running", "cycling", "sleeping")
COUNT = 400


def logits_and_labels(seed: int, skill: float) -> tuple[np.ndarray, np.ndarray]:
    label = (np.arange(COUNT) % 3).astype(np.int32)
    noise = np.random.default_rng(seed).normal(size=(COUNT, 3))
    return (noise + skill * np.eye(3)[label]).astype(np.float32), label


def write(folder: Path, seed: int, skill: float, labels: tuple[str, ...] = LABELS, first_name: str = "0") -> str:
    logits, label = logits_and_labels(seed, skill)
    index = np.arange(COUNT, dtype=np.int32)
    batch = Batch(np.zeros((COUNT, 2, 2, 3), np.uint8), label, np.ones(COUNT, np.float32), index)
    result = evaluate(lambda _: logits, [batch], labels)
    folder.mkdir()
    names = [first_name, *map(str, range(1, COUNT))]
    with predictions_file(folder / "predictions.parquet", labels, names.__getitem__) as sink:
        sink(result.predictions)
    return str(folder)


def scores_of_one(rank: int, predicted: int, nll: float, score: float) -> Scores:
    whole, real = np.int32, np.float32
    values = zip((0, 1, predicted, score, nll, rank), (whole, whole, whole, real, real, whole), strict=True)
    return Scores(*(np.asarray([value], kind) for value, kind in values))


def test_mcnemar_is_the_exact_binomial_test() -> None:
    a = np.asarray([True] * 20 + [False] * 5 + [True] * 30)
    b = np.asarray([False] * 20 + [True] * 5 + [True] * 30)
    only_a, only_b, p = mcnemar(a, b)
    assert (only_a, only_b) == (20, 5)
    assert p == pytest.approx(2 * binom.cdf(5, 25, 0.5))
    assert mcnemar(a, a) == (0, 0, 1.0)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_the_intervals_of_one_image_are_its_own_values() -> None:
    one = scores_of_one(rank=0, predicted=1, nll=0.25, score=0.75)
    other = scores_of_one(rank=2, predicted=0, nll=1.5, score=0.5)
    found = bootstrap_intervals(one, 3)
    expected = {"top1": 1.0, "top5": 1.0, "macro_f1": 1.0, "nll": 0.25, "ece": 0.25}
    assert found == {name: (value, value) for name, value in expected.items()}
    assert paired_differences(one, other, 3)["top1"] == (-1.0, -1.0, -1.0)
    assert paired_differences(one, other, 3)["nll"] == (1.25, 1.25, 1.25)


def test_paired_intervals_are_narrower_than_unpaired_ones() -> None:
    logits, label = logits_and_labels(0, 1.5)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    nearly = np.roll(probs, 0, axis=0).copy()
    nearly[:5] = nearly[:5, ::-1]
    value, low, high = paired_differences(Scores.of_probs(label, probs), Scores.of_probs(label, nearly), 3)["top1"]
    assert low <= value <= high
    assert high - low < 0.03


def test_a_better_model_is_told_from_chance(tmp_path: Path) -> None:
    same, other, better = (
        write(tmp_path / name, seed, skill) for name, seed, skill in (("a", 0, 1.0), ("b", 1, 1.0), ("c", 2, 3.0))
    )
    result = compare_evaluations([same, other, better], tmp_path / "out")
    chance, sure = result["runs"][1:]
    assert chance["p_corrected"] > 0.05 and "could be chance" in chance["verdict"]
    assert sure["p_corrected"] < 0.001 and sure["verdict"].startswith(f"{better} is better than {same}")
    assert sure["differences"]["top1"][1] > 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"][2]["name"] == better
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "McNemar" in page and "corrected for 2 comparisons" in page and "://" not in page


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good", 0, 1.0)
    others = {
        "actions": write(tmp_path / "actions", 0, 1.0, ("x", "y", "z")),
        "images": write(tmp_path / "images", 0, 1.0, first_name="another"),
    }
    for what, folder in others.items():
        with pytest.raises(UserError, match=f"on the same {what}"):
            compare_evaluations([good, folder], tmp_path / "out")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "predictions.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not the predictions"):
        compare_evaluations([good, str(tmp_path / "damaged")], tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        compare_evaluations([good, str(tmp_path / "none")], tmp_path / "out")
    with pytest.raises(UserError, match="two folders or more"):
        compare_evaluations([good], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, seed, 1.0) for name, seed in (("a", 0), ("b", 1))]

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "scripts/evaluate.py", f"--output={tmp_path / 'out'}", *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    done = run(f"--compare={','.join(folders)}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "could be chance" in done.stdout
    for flags in (("--compare=a,b", "--model=x"), ("--model=x",)):
        refused = run(*flags)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
