"""Localisers judged by annotations: fitted thresholds, frame mAP, a boundary head, and the picture."""

import io

import numpy as np
import pytest
from PIL import Image

from clip_har_jax.evaluation.localization import (
    Track,
    annotated_in,
    by_hysteresis,
    fit_rules,
    found_in,
    frame_average_precisions,
    judge,
    mean_map,
    summarize,
)
from clip_har_jax.evaluation.timeline import draw_timelines
from clip_har_jax.training.boundaries import by_boundaries, fit_boundaries
from clip_har_jax.video.segments import BACKGROUND, Segment, SegmentRules

LABELS = (BACKGROUND, "jump", "wave")


def drawn_track(seed, lag_s=0.0, noise=0.0):
    """A video with answers that are right but for a lag and noise; its features tell the boundaries."""
    rng = np.random.default_rng(seed)
    times_s = np.arange(80) * 0.25 + 0.125
    segments, start_s = [], 1.0
    while start_s < 17:
        end_s = start_s + rng.uniform(1.5, 3.0)
        segments.append(Segment(float(start_s), float(min(end_s, 20.0)), LABELS[rng.integers(1, 3)]))
        start_s = end_s + rng.uniform(0.6, 2.0)
    probs = np.full((80, 3), 0.05)
    probs[:, 0] = 0.9
    for segment in segments:
        inside = (times_s >= segment.start_s + lag_s) & (times_s < segment.end_s + lag_s)
        probs[inside] = [0.05, 0.05, 0.05]
        probs[inside, LABELS.index(segment.label)] = 0.9
    probs = np.clip(probs + rng.normal(0, noise, probs.shape), 0.01, 0.99)
    going_on = np.array([any(s.start_s <= t < s.end_s for s in segments) for t in times_s], np.float32)
    embeddings = np.stack([going_on, 1 - going_on, *rng.normal(size=(2, 80)) * 0.1], axis=1)
    return Track(
        f"v{seed}", 20.0, tuple(segments), times_s, probs.astype(np.float32), embeddings.astype(np.float32) / 2
    )


def test_right_answers_have_a_map_of_one_where_boundaries_are_near():
    tracks = [drawn_track(seed) for seed in range(6)]
    maps = judge(tracks, by_hysteresis(LABELS, SegmentRules(0.5, 0.5)))
    assert maps[0.3] == maps[0.5] == 1.0
    assert all(frame == pytest.approx(1.0) for frame in frame_average_precisions(tracks, LABELS).values())
    assert set(frame_average_precisions(tracks, LABELS)) == {"jump", "wave"}


def test_thresholds_are_those_with_the_highest_map():
    tracks = [drawn_track(seed, noise=0.2) for seed in range(6)]
    rules = fit_rules(tracks, LABELS)
    fitted = mean_map(tracks, by_hysteresis(LABELS, rules))
    for other in (SegmentRules(), SegmentRules(0.9, 0.9), SegmentRules(0.2, 0.08)):
        assert fitted >= mean_map(tracks, by_hysteresis(LABELS, other))
    assert fitted > mean_map(tracks, by_hysteresis(LABELS, SegmentRules(0.9, 0.9)))


def test_a_boundary_head_mends_answers_that_lag():
    """Where probabilities lag by 0.75 s but features tell the boundaries, thresholds can't do it and the head does."""
    train, test = ([drawn_track(seed, 0.75, 0.05) for seed in seeds] for seeds in (range(8), range(20, 24)))
    labels = by_hysteresis(LABELS, fit_rules(train, LABELS))
    head = by_boundaries(LABELS, fit_boundaries(train, steps=120))
    assert judge(test, head)[0.7] > judge(test, labels)[0.7] + 0.2
    assert mean_map(test, head) > 0.8


def test_frame_map_by_hand():
    probs = np.array([[0.1, 0.9, 0.0], [0.3, 0.7, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]], np.float32)
    track = Track("v", 4.0, (Segment(0.0, 2.0, "jump"),), np.arange(4) + 0.5, probs, np.zeros((4, 2), np.float32))
    # By falling probability: right, wrong, right.
    assert frame_average_precisions([track], LABELS) == {"jump": pytest.approx((1 + 2 / 3) / 2)}


def test_the_summary_and_the_picture():
    tracks = [drawn_track(seed) for seed in range(3)]
    localise = by_hysteresis(LABELS, SegmentRules(0.5, 0.5))
    result = summarize(tracks, LABELS, {"hysteresis": found_in(tracks, localise)})
    assert result["num_videos"] == 3 and result["hours"] == pytest.approx(60 / 3600)
    assert list(result["localisers"]["hysteresis"]["map"]) == ["0.3", "0.4", "0.5", "0.6", "0.7"]
    assert result["frame_map"] == pytest.approx(1.0)
    drawn = draw_timelines(annotated_in(tracks), found_in(tracks, localise), LABELS)
    empty = draw_timelines(annotated_in(tracks), {}, LABELS)
    image = Image.open(io.BytesIO(drawn))
    assert image.width > 800 and image.height > 200 and drawn != empty
