"""Windows of untrimmed videos: labelled by what happens at their middles, drawn anew while training."""

from pathlib import Path

import numpy as np
import pytest

from clip_har_jax.config import DataConfig, VideoConfig
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.examples import ClipViews
from clip_har_jax.data.pipeline import eval_batches
from clip_har_jax.data.sources import make_source
from clip_har_jax.data.untrimmed import LABELS, SPLITS, DrawnVideo
from clip_har_jax.data.windows import DrawnFile, Window, WindowSource, list_windows
from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.video.decoding import BadVideo
from clip_har_jax.video.sampling import FrameSampling
from clip_har_jax.video.segments import BACKGROUND
from tests.support.videos import level, write_clip


def labels_at(video, time_s):
    return {s.label for s in video.segments if s.start_s <= time_s < s.end_s} or {BACKGROUND}


@pytest.mark.parametrize("number", range(5))
def test_a_window_belongs_to_what_happens_at_its_middle(number):
    video = DrawnFile("train", number)
    windows = list_windows(video, 2.0)
    for window, label in windows:
        for time_s in np.linspace(window.first_s, window.last_s, 7)[1:-1]:
            assert label in labels_at(video, time_s)
        assert window.last_s - window.first_s <= 1.5
    covered = sum(window.last_s - window.first_s for window, label in windows)
    assert covered >= video.duration_s - 1e-6  # all of the video; more where two actions overlap


def test_training_draws_the_middle_anew():
    window = Window(DrawnFile("train", 0), 3.0, 4.0, 2.0)
    sampling = FrameSampling(8)

    def middle(rng):
        return np.mean(window.read(ClipViews(sampling, [0], rng, lambda image: image, 50.0))[0].times_s)

    drawn = [middle(np.random.default_rng(seed)) for seed in range(20)]
    assert 3.0 <= min(drawn) < 3.3 and 3.7 < max(drawn) <= 4.0
    assert middle(None) == pytest.approx(3.5)


def test_drawn_videos_have_gaps_overlaps_and_repeats():
    videos = [DrawnVideo("train", i) for i in range(60)]
    pairs = [(a, b) for video in videos for a, b in zip(video.segments, video.segments[1:], strict=False)]
    assert any(a.end_s > b.start_s for a, b in pairs)
    assert any(b.start_s - a.end_s > 2 for a, b in pairs)
    assert any(a.label == b.label and b.start_s > a.end_s for a, b in pairs)
    assert {segment.label for video in videos for segment in video.segments} == set(LABELS)
    for video in videos:
        assert all(0 <= s.start_s < s.end_s <= video.duration_s for s in video.segments)
    again = DrawnVideo("train", 3)
    np.testing.assert_array_equal(again.frame_at(5.0), videos[3].frame_at(5.0))
    assert not np.array_equal(again.frame_at(5.0), DrawnVideo("test", 3).frame_at(5.0))


def test_nothing_moves_but_a_little_where_nothing_happens():
    video = DrawnVideo("val", 0)
    segment = video.segments[0]
    shot = next(shot for shot in video.shots if shot.start_s <= segment.start_s < shot.end_s)

    def change(a, b):
        return np.abs(video.frame_at(a).astype(int) - video.frame_at(b)).mean()

    rest = change(shot.start_s, segment.start_s - 0.05)
    acting = max(change(segment.start_s, t) for t in np.linspace(segment.start_s, segment.end_s, 5)[1:])
    assert acting > 2 * rest


def test_the_embedded_set_by_its_spec():
    source = make_source("motion?untrimmed&split=val", "train")
    assert isinstance(source, WindowSource) and source.clips
    assert len(source.videos) == SPLITS["val"] and set(source.labels) == {*LABELS, BACKGROUND}
    assert str(source.videos[1].name) in source.name(len(source.windows) - 1) or len(source.videos) > 1
    assert len(make_source("motion?untrimmed&split=val&window_s=4", "train")) < len(source)
    for spec, said in [
        ("motion?untrimmed&reversed", "untrimmed videos aren't reversed"),
        ("motion?window_s=2", "only untrimmed videos have windows"),
        ("motion?untrimmed&window_s=0", "window_s=0; it is the length of a window in seconds"),
    ]:
        with pytest.raises(UserError, match=said.split(";")[0].replace("?", r"\?")):
            make_source(spec, "train")


def test_windows_of_files_show_the_frames_of_their_times(tmp_path: Path):
    write_clip(tmp_path / "a.mp4")  # 30 frames in 3 s, grey by number
    (tmp_path / "a.csv").write_text("filename,start_s,end_s,label\na.mp4,1,2,jump\n")
    source = make_source(f"video:{tmp_path / 'a.csv'}?window_s=1", "train")
    assert [source.labels[i] for i in source.label_ids] == ["jump"] * 2 + ["background"] * 4
    config = DataConfig(video=VideoConfig(num_frames=2, sampling="uniform"))
    bad = BadInputs(source, 0.0)
    with eval_batches(source, config, Preprocess(16), batch_size=6, bad_inputs=bad) as batches:
        batch = next(batches)
    # The first window of the action is that of the times 0.75 to 1.75 s, of which 1.0 and 1.5 s are shown.
    np.testing.assert_allclose(batch.image[0, :, :, 12:].mean(axis=(1, 2, 3)), [level(10, 30), level(15, 30)], atol=3)
    # The last window of the video reaches behind its end, where its last frame stands.
    np.testing.assert_allclose(batch.image[5, :, :, 12:].mean(axis=(1, 2, 3)), [level(25, 30), level(29, 30)], atol=8)


def test_a_window_outside_its_video_is_a_bad_input(tmp_path: Path):
    write_clip(tmp_path / "a.mp4")
    from clip_har_jax.video.clips import read_clip

    with pytest.raises(BadVideo, match=r"4\.0 to 6\.0 s lies outside of it; it has 3\.0 s"):
        read_clip(tmp_path / "a.mp4", FrameSampling(2), span_s=(4.0, 6.0))


def test_reversed_clips_are_the_partners():
    from clip_har_jax.data import motion
    from clip_har_jax.data.examples import MotionClip

    forwards, backwards = make_source("motion?split=test", "test"), make_source("motion?split=test&reversed", "test")
    assert len(backwards) == 30 * 14 and backwards.fingerprint != forwards.fingerprint
    clip = backwards[40].data
    assert isinstance(clip, MotionClip)
    number = clip.number
    assert backwards.labels[backwards.label_ids[40]] == motion.PARTNER[forwards.labels[forwards.label_ids[number]]]

    def frames(example):
        return np.stack(example.data.read(ClipViews(FrameSampling(6), [0], None, lambda image: image, 50.0))[0].frames)

    np.testing.assert_array_equal(frames(backwards[40]), frames(forwards[number])[::-1])
