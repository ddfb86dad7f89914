"""Which interpolated weights are kept: others than the fine-tuned ones only where the images prove them better."""

import numpy as np
import pytest

from clip_har_jax.evaluation.significance import paired_gain
from clip_har_jax.trainer.retention import Point, choose_point


def point(alpha, right, count, retained=None):
    kept = None if retained is None else np.arange(retained[1]) < retained[0]
    return Point(alpha, np.arange(count) < right, kept)


@pytest.mark.parametrize(
    ("points", "chosen", "reason"),
    [
        ([(0.25, 20, 30), (0.5, 20, 30), (1.0, 20, 30)], 1.0, "no other alpha is more accurate"),  # a tie
        ([(0.25, 18, 30), (1.0, 20, 30)], 1.0, "no other alpha is more accurate"),
        ([(0.25, 21, 30), (1.0, 20, 30)], 1.0, "may be chance"),  # one image of thirty
        ([(0.0, 3, 3), (1.0, 0, 3)], 1.0, "may be chance"),  # all of three
        ([(0.25, 27, 30), (1.0, 15, 30)], 0.25, "more accurate than the fine-tuned weights by 0.400"),
        ([(0.25, 700, 1000), (0.5, 720, 1000), (1.0, 640, 1000)], 0.5, "by 0.080"),
    ],
)
def test_a_tie_or_a_chance_difference_keeps_the_fine_tuned_weights(points, chosen, reason):
    found, said = choose_point([point(*each) for each in points])
    assert found.alpha == chosen
    assert reason in said


def test_of_equally_better_ones_the_nearest_to_the_fine_tuned_is_kept():
    assert choose_point([point(0.25, 900, 1000), point(0.5, 900, 1000), point(1.0, 500, 1000)])[0].alpha == 0.5


def test_retained_accuracy_counts_as_much():
    points = [point(0.25, 580, 1000, (900, 1000)), point(1.0, 600, 1000, (300, 1000))]
    found, said = choose_point(points)
    assert found.alpha == 0.25
    assert "by 0.580" in said
    lost = [point(0.25, 500, 1000, (350, 1000)), point(1.0, 600, 1000, (300, 1000))]
    assert choose_point(lost)[0].alpha == 1.0


def test_a_paired_gain_counts_only_what_differs():
    a, b = np.arange(100) < 50, np.arange(100) < 60  # ten that only b has
    gain, low, high = paired_gain([(a, b)])
    assert gain == pytest.approx(0.1)
    n = 102
    half = 1.96 * np.sqrt((12 - 10**2 / n) / n**2)  # one is added to each of the two counts that differ
    assert (low, high) == pytest.approx((10 / n - half, 10 / n + half))
    assert paired_gain([(a, a)])[1] < 0 < paired_gain([(a, a)])[2]
    both = paired_gain([(a, b), (b, a)])
    assert both[0] == pytest.approx(0)
    assert both[1] < 0 < both[2]
