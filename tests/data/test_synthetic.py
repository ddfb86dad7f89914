"""The embedded action set: pure, balanced, disjoint, and honest: colours and layout alone don't give the class away."""

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clip_har_jax.data.synthetic import DEFAULT_SIZE_PX, LABELS, SPLITS, draw, label_of

NUM_TRAIN = 2400


@pytest.fixture(scope="module")
def images():
    counts = {"train": NUM_TRAIN, "test": 600}
    return {split: np.stack([draw(split, i) for i in range(count)]) for split, count in counts.items()}


def accuracy(images, features, c):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500))
    labels = {split: [label_of(split, i) for i in range(len(values))] for split, values in images.items()}
    model.fit(features(images["train"]), labels["train"])
    return model.score(features(images["test"]), labels["test"])


def histograms(images):
    """Each channel in 8 bins, and all three together in 4 x 4 x 4."""
    channels = [[np.bincount(image[..., c].ravel() // 32, minlength=8) for image in images] for c in range(3)]
    joint = [np.bincount((image // 64 @ np.array([16, 4, 1])).ravel(), minlength=64) for image in images]
    return np.concatenate([*channels, joint], axis=1)


def thumbnails(images):
    small = [Image.fromarray(image).resize((8, 8), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float32).ravel() for image in small])


@pytest.mark.parametrize("c", [0.001, 0.01])
def test_colours_do_not_give_the_class_away(images, c):
    assert accuracy(images, histograms, c) < 0.15


@pytest.mark.parametrize("c", [0.001, 0.01])
def test_layout_does_not_give_the_class_away(images, c):
    assert accuracy(images, thumbnails, c) < 0.35


def test_a_draw_is_a_pure_function_of_its_arguments(images):
    for i in (0, 7, 599):
        np.testing.assert_array_equal(draw("test", i), images["test"][i])
    assert draw("val", 3, 32).shape == (32, 32, 3)
    assert draw("val", 3).shape == (DEFAULT_SIZE_PX, DEFAULT_SIZE_PX, 3)


def test_splits_are_balanced_and_share_no_picture(images):
    for split, count in SPLITS.items():
        counts = np.bincount([label_of(split, i) for i in range(count)], minlength=len(LABELS))
        assert set(counts) == {count // len(LABELS)}
    seen = {image.tobytes() for image in images["train"]}
    assert len(seen) == NUM_TRAIN
    assert not seen & {image.tobytes() for image in images["test"]}
    assert not {draw("val", i).tobytes() for i in range(50)} & {image.tobytes() for image in images["test"][:50]}
