"""Windows over long videos: which frames each has, what they cost, and the segments that follow, whole or live."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_har_jax import Predictor, UserError, bundle
from clip_har_jax.inference.backends import softmax
from clip_har_jax.inference.live_segments import Change, LiveSegments
from clip_har_jax.inference.sliding_windows import (
    FrameRing,
    Windows,
    choose_windows,
    find_video_segments,
    score_windows,
)
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.video.clips import TimedFrame
from clip_har_jax.video.decoding import BadVideo
from clip_har_jax.video.segments import Segment, SegmentRules, find_segments

LABELS = ("rising", "still", "falling")


class Levels:
    """A model of clips of grey frames: rising, still or falling by the level of the last frame against the first."""

    labels: tuple[str, ...] = LABELS
    num_frames: int | None = None
    takes_clips = True
    digest: str | None = None
    sigmoid: bundle.Sigmoid | None = None
    actions = bundle.Actions(LABELS, {label: (label,) for label in LABELS}, video={"num_frames": 4, "rate_hz": 4.0})
    preprocess, path = Preprocess(8), Path("levels")

    def __init__(self, takes_frames: bool = True):
        self.takes_frames, self.encoded, self.heads, self.wholes = takes_frames, 0, 0, 0

    def embed_frames(self, images: np.ndarray) -> np.ndarray:
        self.encoded += len(images)
        return images.reshape(len(images), -1).mean(axis=1, keepdims=True).astype(np.float32)

    def frame_logits(self, embeds: np.ndarray) -> np.ndarray:
        self.heads += len(embeds)
        change = (embeds[:, -1, 0] - embeds[:, 0, 0]) / 4
        return np.stack([change, np.full_like(change, 2.0), -change], axis=1)

    def logits(self, clips: np.ndarray) -> np.ndarray:
        self.wholes += len(clips)
        flat = clips.reshape(-1, *clips.shape[2:])
        return self.frame_logits(self.embed_frames(flat).reshape(*clips.shape[:2], 1))

    def predict(self, images: np.ndarray) -> np.ndarray:
        return softmax(self.logits(images))

    def embed(self, images: np.ndarray) -> np.ndarray:
        return np.ones((len(images), 1), np.float32)  # in one dimension, each length is the direction

    def explain(self, images: np.ndarray, class_indices: Sequence[int]) -> np.ndarray:
        return np.ones((len(images), 1, 1), np.float32)  # every pixel counts the same


def film(levels: Sequence[float], rate_hz: float = 4.0) -> Iterator[TimedFrame]:
    for i, level in enumerate(levels):
        yield TimedFrame(i / rate_hz, np.full((8, 8, 3), level, np.uint8))


UP_AND_DOWN = [50] * 8 + list(range(50, 210, 20)) + [210] * 8 + list(range(210, 50, -20)) + [50] * 8


def test_a_window_has_the_frames_that_lead_up_to_it() -> None:
    ring: FrameRing[int] = FrameRing(Windows(4, 1.0, 0.5))
    due = [ring.push(i / 4, i) for i in range(9)]
    assert [window.features for window in due if window] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert [(window.time_s, window.end_s) for window in due if window] == [(0.5, 1.0), (1.0, 1.5), (1.5, 2.0)]
    assert ring.rest() is None and len(ring._frames) <= 6


@given(st.lists(st.floats(-0.05, 0.05), min_size=40, max_size=40))
def test_frames_that_come_unevenly_fill_the_same_windows(jitter: list[float]) -> None:
    ring: FrameRing[int] = FrameRing(Windows(4, 1.0, 0.25))
    due = [ring.push(1 + i / 4 + shift, i) for i, shift in enumerate(jitter)]
    given = [window.features for window in due if window is not None]
    assert len(given) >= 30 and all(features == list(range(features[0], features[0] + 4)) for features in given)


def test_a_video_shorter_than_a_window_is_one_window() -> None:
    for count, expected in ((1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 1, 1, 2])):
        ring: FrameRing[int] = FrameRing(Windows(4, 1.0, 0.25))
        assert not any(ring.push(i / 4, i) for i in range(count))
        window = ring.rest()
        assert window is not None and window.features == expected and window.time_s == pytest.approx(count / 8)


def test_each_frame_is_encoded_once_whatever_the_hop() -> None:
    for hop_s, heads in ((1.0, 10), (0.25, 37)):
        model = Levels()
        scored = list(score_windows(film(UP_AND_DOWN), model, Windows(4, 1.0, hop_s), batch_size=7))
        assert (model.encoded, model.heads, model.wholes) == (40, heads, 0) and len(scored) == heads
    whole = Levels(takes_frames=False)
    again = list(score_windows(film(UP_AND_DOWN), whole, Windows(4, 1.0, 0.25), batch_size=7))
    assert (whole.encoded, whole.wholes) == (4 * 37, 37), "without features of frames each window costs a clip"
    np.testing.assert_array_equal([one.logits for one in scored], [one.logits for one in again])


def test_segments_are_where_the_action_is() -> None:
    found = find_video_segments(film(UP_AND_DOWN), Levels(), Windows(4, 1.0, 0.25), SegmentRules())
    moving = [segment for segment in found.segments if segment.label != "still"]
    assert [segment.label for segment in moving] == ["rising", "falling"] and found.frames == 40
    for segment, start_s in zip(moving, (2.0, 6.0), strict=True):
        assert segment.start_s == pytest.approx(start_s, abs=0.5) and segment.end_s == pytest.approx(
            start_s + 2, abs=0.5
        )
    assert found.segments[-1].end_s == found.duration_s == 10.0


def test_damage_after_some_windows_is_told_and_before_them_refused() -> None:
    def broken(count: int) -> Iterator[TimedFrame]:
        yield from film(UP_AND_DOWN[:count])
        raise BadVideo("it breaks off")

    found = find_video_segments(broken(20), Levels(), Windows(4, 1.0, 0.25), SegmentRules())
    assert found.damage == "it breaks off" and found.segments and found.duration_s == 5.0
    with pytest.raises(BadVideo, match="breaks off"):
        find_video_segments(broken(0), Levels(), Windows(4, 1.0, 0.25), SegmentRules())


def test_windows_are_the_models_own_and_wrong_ones_refused() -> None:
    model: Any = Levels()
    assert choose_windows(model) == Windows(4, 1.0, 0.25)
    assert choose_windows(model, 2.0, 1.0).rate_hz == 2.0
    for window_s, hop_s in ((0.0, None), (601.0, None), (1.0, 1.5), (1.0, 0.0), (float("nan"), None)):
        with pytest.raises(UserError, match="_s is"):
            choose_windows(model, window_s, hop_s)


def follow(
    scores: np.ndarray, rules: SegmentRules, max_delay_s: float, hop_s: float = 0.5
) -> list[tuple[float, Change]]:
    """Return each change with the moment at which it is told: the end of its window."""
    live = LiveSegments(LABELS, rules, Windows(4, 2.0, hop_s), max_delay_s)
    told: list[tuple[float, Change]] = []
    for i, row in enumerate(scores):
        middle_s = 1.0 + i * hop_s
        told += [(middle_s + 1.0, change) for change in live.update(middle_s, row)]
    end_s = 2.0 + (len(scores) - 1) * hop_s
    return told + [(end_s, change) for change in live.finish(end_s)]


SCORES = st.lists(st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), min_size=3, max_size=3), min_size=1, max_size=60)


@given(SCORES, st.sampled_from([0.0, 0.6, 1.2, 3.0]), st.sampled_from([0.0, 0.9, 2.0]))
def test_final_events_are_the_segments_of_the_whole_video(
    rows: list[list[float]], max_gap_s: float, min_duration_s: float
) -> None:
    scores, rules = np.asarray(rows), SegmentRules(0.6, 0.4, max_gap_s, min_duration_s)
    told = [change for _, change in follow(scores, rules, max_delay_s=1000.0)]
    final = sorted(Segment(c.start_s, c.end_s or 0, c.label, c.score) for c in told if c.what == "final")
    times, end_s = 1.0 + 0.5 * np.arange(len(scores)), 2.0 + (len(scores) - 1) * 0.5
    expected = find_segments(times, scores, LABELS, rules, end_s)
    assert [segment[:3] for segment in final] == [segment[:3] for segment in expected]
    np.testing.assert_allclose([s.score for s in final], [s.score for s in expected], atol=1e-5)


@given(SCORES, st.sampled_from([0.0, 1.2, 3.0]), st.sampled_from([1.5, 2.0, 4.0]))
def test_nothing_changes_later_than_the_delay(rows: list[list[float]], max_gap_s: float, max_delay_s: float) -> None:
    told = follow(np.asarray(rows), SegmentRules(0.6, 0.4, max_gap_s, 0.9), max_delay_s)
    for number in {change.id for _, change in told}:
        own = [(now, change) for now, change in told if change.id == number]
        kinds = [change.what for _, change in own]
        assert kinds[0] == "start" and kinds[-1] == "final" and kinds.count("final") == kinds.count("start") == 1
        assert set(kinds) <= {"start", "end", "revise", "final"}
        now, last = own[-1]
        assert last.end_s is not None and last.end_s > last.start_s
        assert now <= last.end_s + max_delay_s + 1e-9, (now, last)
        assert len({(change.label, change.start_s) for _, change in own}) == 1


def test_an_action_that_goes_on_after_a_short_gap_is_revised() -> None:
    column = [0.1, 0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1]
    scores = np.stack([column, np.zeros(13), np.zeros(13)], axis=1)
    patient = [change for _, change in follow(scores, SegmentRules(0.6, 0.4, 0.6), 10.0)]
    assert [change.what for change in patient] == ["start", "end", "revise", "end", "final"]
    assert len({change.id for change in patient}) == 1 and patient[-1].start_s == 1.25 and patient[-1].end_s == 4.75
    hasty = [change for _, change in follow(scores, SegmentRules(0.6, 0.4, 0.6), 1.5)]
    assert [change.what for change in hasty] == ["start", "end", "final"] * 2, "the delay is over before the gap is"


def test_a_delay_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_delay_s is 1; an end is seen .* 1.5 or more is needed"):
        LiveSegments(LABELS, SegmentRules(), Windows(4, 2.0, 0.5), 1.0)


def test_the_model_folder_and_its_export_find_the_same(served_folder: Path, tmp_path: Path) -> None:
    from tests.support.videos import write_clip

    write_clip(tmp_path / "clip.mp4", count=60)
    rules, found = SegmentRules(0.3, 0.2), []
    for folder in (served_folder.parent / "model", served_folder):
        backend = Predictor(folder).backend
        from clip_har_jax.video.clips import iter_frames

        windows = choose_windows(backend)
        found.append(find_video_segments(iter_frames(tmp_path / "clip.mp4", windows.rate_hz), backend, windows, rules))
    assert found[0].frames == found[1].frames == 24 and found[0].segments
    for ours, theirs in zip(found[0].segments, found[1].segments, strict=True):
        assert ours[:3] == theirs[:3] and ours.score == pytest.approx(theirs.score, abs=1e-4)
