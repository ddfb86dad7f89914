"""The embedded motion set: the same seed draws the same clip, and only the order of its frames tells a pair apart."""

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clip_har_jax.data import motion
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError

TIMES = (np.arange(8) + 0.5) / 8 * motion.DURATION_S


def frames_of(index, split="train", times=TIMES, size_px=32):
    return np.stack([motion.DrawnClip(split, index, size_px).frame_at(time_s) for time_s in times])


def test_a_clip_is_a_function_of_its_seed():
    np.testing.assert_array_equal(frames_of(5), frames_of(5))
    assert not np.array_equal(frames_of(5), frames_of(5 + len(motion.LABELS)))
    assert not np.array_equal(frames_of(5), frames_of(5, "test"))
    frames = frames_of(5)
    assert frames.shape == (8, 32, 32, 3) and frames.dtype == np.uint8 and not np.array_equal(frames[0], frames[-1])


def test_the_source_lists_every_clip_with_its_class():
    source = make_source("motion", "test")
    assert source.clips and len(source) == motion.SPLITS["test"] and source.labels == motion.LABELS
    assert np.bincount(source.label_ids).tolist() == [30] * 16
    assert source[17].label == 1 and source[17].name == "motion/test/17"
    assert make_source("motion?split=val", "train").fingerprint != source.fingerprint
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        make_source("motion?split=tset", "test")


@pytest.mark.parametrize("pair", motion.PAIRS[:-1], ids=lambda pair: pair[0])
def test_a_reversed_clip_is_one_that_the_partner_can_draw(pair):
    """Of any clip: swap its two rests and play the path the other way, and its frames come in the other order."""
    label = pair[0]
    clip = motion.DrawnClip("train", motion.LABELS.index(label) + 160, 32)
    forwards = [clip.frame_at(time_s) for time_s in TIMES]
    scene = clip.scene
    begin_s, end_s = motion.DURATION_S - scene.course.end_s, motion.DURATION_S - scene.course.begin_s
    scene.course = replace(scene.course, begin_s=begin_s, end_s=end_s, backwards=not scene.course.backwards)
    amount, rate_hz, phase = scene.sway
    scene.sway = (amount, rate_hz, math.pi - (2 * math.pi * rate_hz * motion.DURATION_S + phase))
    np.testing.assert_array_equal([clip.frame_at(time_s) for time_s in TIMES], forwards[::-1])


@pytest.fixture(scope="module")
def drawn():
    """Clips as gray thumbnails [clips, frames, 8 * 8], and their classes, for fitting and for judging."""

    def thumbnails(split, count):
        clips = np.stack([frames_of(i, split) for i in range(count)]).astype(np.float32).mean(axis=-1)
        return clips.reshape(count, 8, 8, 4, 8, 4).mean(axis=(3, 5)).reshape(count, 8, -1), np.arange(count) % 16

    return thumbnails("train", 960), thumbnails("test", 320)


def accuracy(drawn, features):
    (train, train_labels), (test, test_labels) = drawn
    model = make_pipeline(StandardScaler(), PCA(32, random_state=0), LogisticRegression(C=0.01, max_iter=1000))
    return model.fit(features(train), train_labels).score(features(test), test_labels)


@pytest.mark.slow
def test_no_classifier_without_the_order_of_frames_gets_far(drawn):
    """Single frames, or sets of frames without their order, tell which pair it is at best: half of the answers."""
    assert accuracy(drawn, lambda clips: clips[:, 4]) < 0.6
    assert accuracy(drawn, lambda clips: np.sort(clips, axis=1).reshape(len(clips), -1)) < 0.6


def test_differences_of_pixels_do_not_give_it_away(drawn):
    def change(clips):
        return np.abs(np.diff(clips, axis=1)).mean(axis=1)

    assert accuracy(drawn, change) < 0.7
    assert accuracy(drawn, lambda clips: clips[:, -1] - clips[:, 0]) < 0.7
    assert accuracy(drawn, lambda clips: np.diff(clips, axis=1).reshape(len(clips), -1)) < 0.7
