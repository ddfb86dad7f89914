"""A result is set beside chance, the majority class and zero-shot, and says when it isn't better."""

import numpy as np
import pytest

from clip_har_jax.evaluation.baselines import accuracy_interval, baselines_of, verdict
from clip_har_jax.evaluation.metrics import ClassificationState


def make_metrics(correct: int, total: int) -> dict[str, object]:
    low, high = accuracy_interval(correct, total)
    baselines = {"chance": 1 / 15, "majority": 0.1}
    return {
        "top1": correct / total,
        "top1_interval": [low, high],
        "num_examples": total,
        "baselines": baselines,
    }


def test_baselines_follow_from_the_labels() -> None:
    label = np.asarray([0, 0, 0, 1])
    state = ClassificationState.empty(3).update(np.zeros((4, 3), np.float32), label, np.ones(4, np.float32))
    assert baselines_of(state) == {"chance": pytest.approx(1 / 3), "majority": 0.75}


def test_the_interval_is_wilsons() -> None:
    assert accuracy_interval(1, 30) == pytest.approx((0.0059, 0.1667), abs=1e-4)
    low, high = accuracy_interval(0, 10)
    assert low == 0 and high > 0.2  # no mistake seen isn't no mistake


@pytest.mark.parametrize(
    ("correct", "total", "zero_shot", "said"),
    [
        (1, 30, None, "It isn't shown to be better than guessing (0.067) and the most frequent class (0.100)."),
        (28, 30, None, "It is better than guessing (0.067) and the most frequent class (0.100)."),
        (900, 1000, 0.95, "It is worse than the start without training (0.950)."),
        (0, 1000, None, "It is worse than guessing (0.067) and the most frequent class (0.100)."),
        (2, 3, None, "There are too few images to tell small differences."),
    ],
)
def test_the_verdict(correct: int, total: int, zero_shot: float | None, said: str) -> None:
    assert said in verdict(make_metrics(correct, total), zero_shot)


@pytest.mark.parametrize("total", [1, 3, 30, 600, 100_000])
def test_the_interval_equals_scipys(total: int) -> None:
    from scipy.stats import binomtest

    for correct in {0, 1, total // 2, total - 1, total}:
        expected = binomtest(correct, total).proportion_ci(method="wilson")
        assert accuracy_interval(correct, total) == pytest.approx(tuple(expected), abs=1e-12)
