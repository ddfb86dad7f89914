"""Segments from scores over time, and their mAP, equal to ActivityNet's published evaluation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_har_jax.errors import UserError
from clip_har_jax.video.segments import (
    IOU_THRESHOLDS,
    Segment,
    SegmentRules,
    average_precisions,
    find_segments,
    mean_average_precision,
    runs,
    suppress_overlaps,
    temporal_iou,
)

RULES = SegmentRules(0.6, 0.4)


def test_a_score_that_wavers_about_a_threshold_gives_one_segment():
    scores = np.array([0.1, 0.65, 0.5, 0.62, 0.45, 0.3, 0.5, 0.1])[:, None]
    found = find_segments(np.arange(8) + 0.5, scores, ["waving"], RULES)
    (segment,) = found
    assert segment[:3] == (1.0, 5.0, "waving")
    assert segment[3] == pytest.approx(np.mean([0.65, 0.5, 0.62, 0.45]))


def test_classes_are_followed_apart_and_background_is_none():
    scores = np.array([[0.9, 0.1, 0.9], [0.9, 0.9, 0.1], [0.1, 0.9, 0.1]])
    found = find_segments(np.array([0.0, 1.0, 2.0]), scores, ["a", "b", "background"], RULES, duration_s=2.2)
    assert [segment[:3] for segment in found] == [(0.0, 1.5, "a"), (0.5, 2.2, "b")]


def test_short_gaps_close_and_short_segments_go():
    scores = np.array([0.9, 0.1, 0.9, 0.1, 0.1, 0.1, 0.9])[:, None]
    times_s = np.arange(7) + 0.5
    spans = [s[:2] for s in find_segments(times_s, scores, ["a"], SegmentRules(max_gap_s=1.5, min_duration_s=2.0))]
    assert spans == [(0.0, 3.0)]
    # A gap of exactly max_gap_s stays.
    assert len(find_segments(times_s, scores, ["a"], SegmentRules(max_gap_s=1.0))) == 3


def test_few_windows():
    assert find_segments(np.zeros(0), np.zeros((0, 1)), ["a"]) == []
    one = find_segments(np.array([1.0]), np.array([[1.0]]), ["a"], duration_s=2.0)
    assert one == [Segment(0.0, 2.0, "a", 1.0)]
    assert find_segments(np.array([1.0]), np.array([[1.0]]), ["a"]) == one
    assert runs(np.array([0.7]), 0.6, 0.4) == [(0, 1)]


@pytest.mark.parametrize(
    "values", [(0.4, 0.6, 0.0, 0.0), (1.2, 0.1, 0.0, 0.0), (0.6, 0.4, -1.0, 0.0), (0.6, 0.4, 0.0, float("nan"))]
)
def test_rules_out_of_range_are_refused(values):
    with pytest.raises(UserError):
        SegmentRules(*values)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_hysteresis_by_its_definition(scores, a, b):
    """Each stretch starts at `start_score`, never falls below `end_score`, and is ended by a score below it."""
    start, end = max(a, b), min(a, b)
    found = runs(np.asarray(scores), start, end)
    covered = {i for first, behind in found for i in range(first, behind)}
    for first, behind in found:
        assert scores[first] >= start and min(scores[first:behind]) >= end
        assert behind == len(scores) or scores[behind] < end
    assert all(score < start for i, score in enumerate(scores) if i not in covered)


def test_suppression_keeps_the_best_of_a_class():
    segments = [Segment(0, 2, "a", 0.5), Segment(0.1, 2, "a", 0.9), Segment(0, 2, "b", 0.1), Segment(2, 3, "a", 0.2)]
    assert suppress_overlaps(segments, 0.5) == sorted(segments[1:])


def test_temporal_iou():
    ious = temporal_iou([Segment(0, 4, "a"), Segment(5, 6, "a")], [Segment(2, 6, "a")])
    np.testing.assert_allclose(ious, [[2 / 6], [1 / 4]])
    assert temporal_iou([], [Segment(0, 1, "a")]).shape == (0, 1)


def published_evaluation(found, true, threshold):
    """ActivityNet's evaluation, step by step as it is published: sort, match greedily, interpolate, average."""
    labels = sorted({segment.label for segments in true.values() for segment in segments})
    averages = []
    for label in labels:
        predictions = [(s.score, video, s) for video, ones in found.items() for s in ones if s.label == label]
        predictions.sort(key=lambda row: row[0], reverse=True)
        num_true = sum(s.label == label for ones in true.values() for s in ones)
        locked, hits, misses = set(), [], []
        for _, video, segment in predictions:
            candidates = []
            for k, other in enumerate(true.get(video, [])):
                if other.label == label:
                    shared = max(0.0, min(segment.end_s, other.end_s) - max(segment.start_s, other.start_s))
                    union = segment.end_s - segment.start_s + other.end_s - other.start_s - shared
                    candidates.append((shared / union, (video, k)))
            candidates.sort(key=lambda row: -row[0])
            match = next((key for iou, key in candidates if iou >= threshold and key not in locked), None)
            locked.add(match) if match else None
            hits.append(bool(match))
            misses.append(not match)
        recall = [0.0, *(np.cumsum(hits) / num_true), 1.0]
        precision = [0.0, *(np.cumsum(hits) / np.maximum(np.cumsum(hits) + np.cumsum(misses), 1)), 0.0]
        for i in reversed(range(len(precision) - 1)):
            precision[i] = max(precision[i], precision[i + 1])
        averages.append(sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall))))
    return float(np.mean(averages))


def drawn_case(seed):
    """Annotations of a few videos, and predictions near them, doubled, of wrong classes and in unknown videos."""
    rng = np.random.default_rng(seed)
    true, found = {}, {}
    for v in range(rng.integers(1, 5)):
        starts = rng.uniform(0, 20, rng.integers(1, 6))
        true[f"v{v}"] = [Segment(float(s), float(s + rng.uniform(0.5, 5)), rng.choice(["a", "b", "c"])) for s in starts]
        near = [
            Segment(s.start_s + rng.normal(0, 0.5), s.end_s + 0.1 + abs(rng.normal(0, 1)), s.label, rng.random())
            for s in true[f"v{v}"] * 2
        ]
        other = [Segment(0.0, 3.0, label, rng.random()) for label in ("a", "d")]
        found[f"v{v}"] = [s for s in near if s.end_s > s.start_s] + other
    found["unknown"] = [Segment(0.0, 1.0, "a", rng.random())]
    return found, true


@pytest.mark.parametrize("seed", range(40))
def test_map_is_that_of_the_published_evaluation(seed):
    found, true = drawn_case(seed)
    ours = mean_average_precision(found, true, IOU_THRESHOLDS)
    for threshold in IOU_THRESHOLDS:
        assert ours[threshold] == pytest.approx(published_evaluation(found, true, threshold), abs=1e-12)


def test_map_by_hand():
    true = {"v": [Segment(0, 1, "a"), Segment(2, 3, "a")]}
    found = {"v": [Segment(0, 1, "a", 0.9), Segment(0, 1, "a", 0.8), Segment(2, 3, "a", 0.7)]}
    # Right, wrong (taken already), right: precision 1, then 2/3 for the second half of the recall.
    assert average_precisions(found, true, [0.5])["a"][0] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert mean_average_precision({}, true, [0.5]) == {0.5: 0.0}
    with pytest.raises(UserError, match="no segment"):
        mean_average_precision(found, {"v": []})
