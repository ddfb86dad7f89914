"""Evaluation of actions found in untrimmed videos: fitted thresholds, mAP at temporal IoU and over frames."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from clip_har_jax.video.segments import (
    BACKGROUND,
    IOU_THRESHOLDS,
    Segment,
    SegmentRules,
    average_precisions,
    find_segments,
    interpolated_precision,
    mean_average_precision,
    mean_over_classes,
)

START_SCORES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)
END_SHARES = (0.2, 0.4, 0.6, 0.8)  # of the start score
MIN_DURATIONS_S = (0.0, 0.3, 0.6, 1.0, 1.5)
MAX_GAPS_S = (0.0, 0.3, 0.6)


@dataclass(frozen=True)
class Track:
    """A model's output over the time of one video, and the video's annotations.

    Attributes:
      name: of the video.
      duration_s: of the video.
      segments: the annotated actions.
      times_s: the middles of the model's windows.
      probs: of the classes, for each window.
      embeddings: of the windows.
    """

    name: str
    duration_s: float
    segments: tuple[Segment, ...]
    times_s: Float64[np.ndarray, " n"]
    probs: Float32[np.ndarray, "n c"]
    embeddings: Float32[np.ndarray, "n d"]


Found = Mapping[str, Sequence[Segment]]  # segments by video
Localiser = Callable[[Track], list[Segment]]  # finds the segments of a video


def by_hysteresis(labels: Sequence[str], rules: SegmentRules) -> Localiser:
    """Return the localiser that applies two thresholds to each class's probability."""
    return lambda track: find_segments(track.times_s, track.probs, labels, rules, track.duration_s)


def fit_rules(tracks: Sequence[Track], labels: Sequence[str]) -> SegmentRules:
    """Return the thresholds of a grid with the highest mean mAP over `IOU_THRESHOLDS`.

    Args:
      tracks: of validation videos, which must not be test videos.
      labels: of the classes.
    """
    best, highest = SegmentRules(), -1.0
    for start, share, gap_s, duration_s in product(START_SCORES, END_SHARES, MAX_GAPS_S, MIN_DURATIONS_S):
        rules = SegmentRules(start, start * share, gap_s, duration_s)
        score = mean_map(tracks, by_hysteresis(labels, rules))
        if score > highest:
            best, highest = rules, score
    return best


def mean_map(tracks: Sequence[Track], localise: Localiser) -> float:
    """Return the mean of the mAP at `IOU_THRESHOLDS`."""
    return float(np.mean(list(judge(tracks, localise).values())))


def judge(tracks: Sequence[Track], localise: Localiser) -> dict[float, float]:
    """Return the mAP at each of `IOU_THRESHOLDS`.

    Raises:
      UserError: the annotations have no segments.
    """
    return mean_average_precision(found_in(tracks, localise), annotated_in(tracks))


def found_in(tracks: Sequence[Track], localise: Localiser) -> dict[str, list[Segment]]:
    """Return the segments found in each video."""
    return {track.name: localise(track) for track in tracks}


def annotated_in(tracks: Sequence[Track]) -> dict[str, Sequence[Segment]]:
    """Return the annotated segments of each video."""
    return {track.name: track.segments for track in tracks}


def frame_average_precisions(tracks: Sequence[Track], labels: Sequence[str]) -> dict[str, float]:
    """Return each class's average precision over single times, by its probability that the action is going on.

    Classes that never happen, and `BACKGROUND`, are left out. The frame mAP is their mean.
    """
    found = {}
    for index, label in enumerate(labels):
        if label == BACKGROUND:
            continue
        going_on = np.concatenate([_going_on(track, label) for track in tracks])
        order = np.argsort(-np.concatenate([track.probs[:, index] for track in tracks]), kind="stable")
        if going_on.any():
            found[label] = interpolated_precision(going_on[order].astype(np.float64), int(going_on.sum()))
    return found


def _going_on(track: Track, label: str) -> np.ndarray:
    times_s, shown = track.times_s, np.zeros(len(track.times_s), bool)
    for segment in track.segments:
        if segment.label == label:
            shown |= (times_s >= segment.start_s) & (times_s < segment.end_s)
    return shown


def summarize(tracks: Sequence[Track], labels: Sequence[str], found: Mapping[str, Found]) -> dict[str, Any]:
    """Return the metrics for localisation.json, of each localiser and over frames.

    Args:
      tracks: of the test videos.
      labels: of the classes.
      found: the segments in each video, by the name of the localiser.

    Raises:
      UserError: the annotations have no segments.
    """
    frames = frame_average_precisions(tracks, labels)
    result: dict[str, Any] = {
        "num_videos": len(tracks),
        "hours": sum(track.duration_s for track in tracks) / 3600,
        "num_segments": sum(len(track.segments) for track in tracks),
        "frame_map": float(np.mean(list(frames.values()))) if frames else None,
        "frame_average_precision": frames,
        "localisers": {},
    }
    for name, segments in found.items():
        by_class = average_precisions(segments, annotated_in(tracks))
        maps = mean_over_classes(by_class)
        result["localisers"][name] = {
            "map": {f"{threshold:g}": value for threshold, value in maps.items()},
            "mean_map": float(np.mean(list(maps.values()))),
            "num_segments": sum(map(len, segments.values())),
            "average_precision": {
                label: dict(zip(map("{:g}".format, IOU_THRESHOLDS), map(float, values), strict=True))
                for label, values in by_class.items()
            },
        }
    return result


def rules_to_json(rules: SegmentRules) -> dict[str, float]:
    """Return the thresholds as a JSON object."""
    return asdict(rules)
