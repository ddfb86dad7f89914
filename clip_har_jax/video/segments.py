"""Segments of untrimmed videos: actions with start and end, found from scores over time, and their evaluation.

A localiser gives a score for each class at evenly spaced times. `find_segments` turns them into segments by hysteresis:
a class starts where its score reaches one threshold and ends where it falls below a lower one, so that a score that
varies around a threshold gives one segment. Classes are processed separately, so segments of different classes can
overlap. `mean_average_precision` evaluates segments like ActivityNet (Caba Heilbron et al. 2015).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from clip_har_jax.errors import UserError

IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
BACKGROUND = "background"  # the label of times without an action; never of a segment


class Segment(NamedTuple):
    """An action with its times, from the start of its video.

    Attributes:
      start_s, end_s: start_s is less than end_s.
      label: the action.
      score: 0 to 1; 1 for an annotation.
    """

    start_s: float
    end_s: float
    label: str
    score: float = 1.0


@dataclass(frozen=True)
class SegmentRules:
    """The rules that turn scores into segments.

    Attributes:
      start_score: least score at which a class starts.
      end_score: least score at which it continues; at most start_score.
      max_gap_s: two segments of one class with a shorter gap are merged.
      min_duration_s: shorter segments are dropped, after merging.
    """

    start_score: float = 0.6
    end_score: float = 0.4
    max_gap_s: float = 0.0
    min_duration_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.end_score <= self.start_score <= 1:
            raise UserError(f"0 <= end_score ({self.end_score}) <= start_score ({self.start_score}) <= 1 is needed")
        if not 0 <= self.max_gap_s < float("inf") or not 0 <= self.min_duration_s < float("inf"):
            raise UserError(
                f"max_gap_s ({self.max_gap_s}) and min_duration_s ({self.min_duration_s}) must be 0 or more"
            )


def find_segments(
    times_s: Float[np.ndarray, " n"],
    scores: Float[np.ndarray, "n c"],
    labels: Sequence[str],
    rules: SegmentRules = SegmentRules(),
    duration_s: float | None = None,
) -> list[Segment]:
    """Return the segments of a video, in the order of their starts.

    Each time covers the interval up to the midpoints to its neighbours.

    Args:
      times_s: the middles of the windows that were scored, in rising order.
      scores: of each window and class, 0 to 1.
      labels: the classes; `BACKGROUND` among them is never a segment.
      rules: the thresholds.
      duration_s: of the video; None: the last window is symmetric around its time.

    >>> find_segments(np.array([0.5, 1.5, 2.5]), np.array([[0.1], [0.9], [0.5]]), ["waving"])
    [Segment(start_s=1.0, end_s=3.0, label='waving', score=0.7)]
    """
    if not len(times_s):
        return []
    edges = _edges(np.asarray(times_s, np.float64), duration_s)
    found: list[Segment] = []
    for index, label in enumerate(labels):
        if label != BACKGROUND:
            column = np.asarray(scores[:, index], np.float64)
            found += _of_class(edges, column, label, rules)
    return sorted(found)


def _edges(times_s: Float64[np.ndarray, " n"], duration_s: float | None) -> Float64[np.ndarray, " edges"]:
    """Return the borders of the intervals that the times cover."""
    middles = (times_s[1:] + times_s[:-1]) / 2
    reach_s = times_s[-1] - middles[-1] if len(middles) else times_s[0]
    first_s = max(0.0, 2 * times_s[0] - middles[0]) if len(middles) else 0.0
    last_s = times_s[-1] + reach_s if duration_s is None else max(duration_s, times_s[-1])
    return np.concatenate([[first_s if duration_s is None else 0.0], middles, [last_s]])


def runs(scores: Float[np.ndarray, " n"], start_score: float, end_score: float) -> list[tuple[int, int]]:
    """Return the runs [first, last + 1) that hysteresis finds in the scores of one class.

    A run starts at the first score of at least `start_score` and continues while scores are at least `end_score`.

    >>> runs(np.array([0.5, 0.7, 0.5, 0.3, 0.5]), 0.6, 0.4)
    [(1, 3)]
    """
    found: list[tuple[int, int]] = []
    first: int | None = None
    for i, score in enumerate(scores.tolist()):
        if first is None and score >= start_score:
            first = i
        elif first is not None and score < end_score:
            found.append((first, i))
            first = None
    return found if first is None else [*found, (first, len(scores))]


def _of_class(
    edges: Float64[np.ndarray, " edges"], scores: Float64[np.ndarray, " n"], label: str, rules: SegmentRules
) -> list[Segment]:
    merged: list[tuple[int, int]] = []
    for first, behind in runs(scores, rules.start_score, rules.end_score):
        if merged and edges[first] - edges[merged[-1][1]] < rules.max_gap_s:
            merged[-1] = merged[-1][0], behind
        else:
            merged.append((first, behind))
    return [
        Segment(float(edges[first]), float(edges[behind]), label, round(float(scores[first:behind].mean()), 6))
        for first, behind in merged
        if edges[behind] - edges[first] >= max(rules.min_duration_s, 1e-9)
    ]


def suppress_overlaps(segments: Iterable[Segment], max_iou: float) -> list[Segment]:
    """Return segments without those that overlap a better one of their class, by greedy non-maximum suppression.

    Args:
      segments: of one video.
      max_iou: the temporal IoU above which the segment with the lower score is dropped.
    """
    kept: dict[str, list[Segment]] = defaultdict(list)
    for segment in sorted(segments, key=lambda segment: -segment.score):
        others = kept[segment.label]
        if not others or temporal_iou([segment], others).max() <= max_iou:
            others.append(segment)
    return sorted(segment for others in kept.values() for segment in others)


def temporal_iou(found: Sequence[Segment], true: Sequence[Segment]) -> Float64[np.ndarray, "n m"]:
    """Return the length of the intersection divided by that of the union, for each pair of segments.

    >>> temporal_iou([Segment(0, 2, "a")], [Segment(1, 3, "a"), Segment(2, 3, "a")]).round(3).tolist()
    [[0.333, 0.0]]
    """
    start, end = (np.asarray([segment[i] for segment in found], np.float64)[:, None] for i in (0, 1))
    true_start, true_end = (np.asarray([segment[i] for segment in true], np.float64)[None] for i in (0, 1))
    shared = np.clip(np.minimum(end, true_end) - np.maximum(start, true_start), 0, None)
    union = (end - start) + (true_end - true_start) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def mean_average_precision(
    found: Mapping[str, Sequence[Segment]],
    true: Mapping[str, Sequence[Segment]],
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> dict[float, float]:
    """Return the mAP at each temporal IoU: the mean of `average_precisions` over the annotated classes.

    >>> true = {"v": [Segment(0, 2, "a")]}
    >>> mean_average_precision({"v": [Segment(0, 1.2, "a", 0.9)]}, true, (0.5, 0.7))
    {0.5: 1.0, 0.7: 0.0}
    """
    return mean_over_classes(average_precisions(found, true, thresholds), thresholds)


def mean_over_classes(
    by_class: Mapping[str, Float64[np.ndarray, " t"]], thresholds: Sequence[float] = IOU_THRESHOLDS
) -> dict[float, float]:
    """Return the mAP at each threshold from the result of `average_precisions`.

    Raises:
      UserError: no class is annotated.
    """
    if not by_class:
        raise UserError("the annotations hold no segment, so there is nothing to judge by")
    means = np.mean(list(by_class.values()), axis=0)
    return {float(threshold): float(mean) for threshold, mean in zip(thresholds, means, strict=True)}


def average_precisions(
    found: Mapping[str, Sequence[Segment]],
    true: Mapping[str, Sequence[Segment]],
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> dict[str, Float64[np.ndarray, " t"]]:
    """Return each annotated class's average precision at each temporal IoU.

    Predictions of a class are processed by descending score over all videos. Each is matched with the unmatched
    annotation of its class and video that it overlaps most, if their IoU reaches the threshold; else it is wrong.
    Precision is made non-increasing in recall and integrated over it (ActivityNet's `eval_detection`).

    Args:
      found: predictions by video; in videos without annotations they are wrong, classes without any are ignored.
      true: annotations by video.
      thresholds: of temporal IoU.
    """
    labels = sorted({segment.label for segments in true.values() for segment in segments})
    return {label: _average_precision(_only(found, label), _only(true, label), thresholds) for label in labels}


def _only(segments: Mapping[str, Sequence[Segment]], label: str) -> dict[str, list[Segment]]:
    return {video: [segment for segment in ones if segment.label == label] for video, ones in segments.items()}


def _average_precision(
    found: Mapping[str, Sequence[Segment]], true: Mapping[str, Sequence[Segment]], thresholds: Sequence[float]
) -> Float64[np.ndarray, " t"]:
    """Return the average precision of one class at each threshold."""
    ranked = [(segment.score, video, i) for video, ones in found.items() for i, segment in enumerate(ones)]
    ranked.sort(key=lambda row: -row[0])
    num_true = sum(map(len, true.values()))
    if not ranked:
        return np.zeros(len(thresholds))
    ious = {video: temporal_iou(ones, true.get(video, ())) for video, ones in found.items() if ones}
    averages = []
    for threshold in thresholds:
        taken: dict[str, set[int]] = defaultdict(set)
        right = np.zeros(len(ranked))
        for rank, (_, video, i) in enumerate(ranked):
            row = ious[video][i]
            free = [j for j in np.argsort(-row, kind="stable") if row[j] >= threshold and j not in taken[video]]
            if free:
                taken[video].add(int(free[0]))
                right[rank] = 1
        averages.append(interpolated_precision(right, num_true))
    return np.asarray(averages)


def interpolated_precision(right: Float[np.ndarray, " n"], num_true: int) -> float:
    """Return the area under precision over recall, with precision made non-increasing (PASCAL VOC from 2010 on).

    Args:
      right: 1 for each prediction that is right, 0 for each that isn't, by falling score.
      num_true: number of annotations; more than 0.
    """
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(best_from_here * right) / num_true)
