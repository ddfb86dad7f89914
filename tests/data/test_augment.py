"""Training pictures: crops, flips, colours and erasing, decoded no larger than they are needed."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clip_har_jax.config import AugmentConfig, make_config
from clip_har_jax.data.augment import augment
from clip_har_jax.data.randaugment import OPERATIONS
from clip_har_jax.errors import UserError
from clip_har_jax.image_files import BadImage, decode
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.trainer.run_data import load_data
from tests.support.batches import (
    jpeg,
    smooth,
)


@pytest.mark.parametrize("size", [(40, 60), (300, 500), (97, 203)])
def test_training_crop_of_a_jpeg_is_that_of_its_pixels(size: tuple[int, int]) -> None:
    """Decoded at a reduced scale, or whole: what is seen is the same, but for half a pixel and the colours' blur."""
    data = jpeg(smooth(*size))
    config = AugmentConfig(crop_scale_min=0.3)
    for seed in range(8):
        of_bytes = augment(data, Preprocess(32), config, np.random.default_rng(seed))
        of_pixels = augment(decode(data), Preprocess(32), config, np.random.default_rng(seed))
        assert of_bytes.shape == (32, 32, 3)
        assert np.abs(of_bytes.astype(int) - of_pixels.astype(int)).mean() < 8  # two random pictures: 70


def test_jpegs_that_must_be_turned_or_converted_are() -> None:
    config, image = AugmentConfig(crop_scale_min=1.0, flip=False), smooth(60, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    turned = augment(jpeg(image, exif=exif), Preprocess(60), config, np.random.default_rng(0))
    assert np.abs(turned.astype(int) - np.rot90(image, -1)).mean() < 6
    Image.fromarray(image).convert("CMYK").save(buffer := io.BytesIO(), "JPEG", quality=95)
    assert (
        np.abs(augment(buffer.getvalue(), Preprocess(60), config, np.random.default_rng(0)).astype(int) - image).mean()
        < 12
    )
    grey = jpeg(image[..., 0])
    assert augment(grey, Preprocess(60), config, np.random.default_rng(0)).shape == (60, 60, 3)


def test_training_refuses_what_evaluation_refuses() -> None:
    whole = jpeg(smooth(100, 160))
    for data in (b"", b"\xff\xd8", whole[:300], whole[:-400], b"GIF89a" + whole, jpeg(smooth(2, 500))[:-1] + b""):
        reasons: list[str | bool] = []
        for read in (
            lambda data: decode(data),
            lambda data: augment(data, Preprocess(8), AugmentConfig(), np.random.default_rng(0)),
        ):
            try:
                reasons.append(read(data) is None)
            except BadImage as error:
                reasons.append(str(error))
        assert reasons[0] == reasons[1]
    with pytest.raises(BadImage, match="megapixels"):
        augment(whole, Preprocess(8), AugmentConfig(), np.random.default_rng(0), max_megapixels=0.01)


def test_flips_are_off_for_classes_where_left_and_right_matter() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255
    config = AugmentConfig(crop_scale_min=1.0, no_flip_labels=("turn left",))

    def mirrored(label: str) -> int:
        return sum(
            augment(image, Preprocess(16), config, np.random.default_rng(i), ("sit", label))[0, 0, 0] == 0
            for i in range(40)
        )

    assert mirrored("turn left") == 0
    assert 8 < mirrored("walk") < 32


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_randaugment_operations_keep_the_picture_a_picture(name: str) -> None:
    image = Image.fromarray(smooth(24, 32))
    for strength in (0.0, 0.3, 1.0):
        for sign in (-1, 1):
            changed = np.asarray(OPERATIONS[name](image, strength, sign))
            assert (changed.dtype, changed.shape) == (np.uint8, (24, 32, 3))
    still = np.asarray(OPERATIONS[name](image, 0.0, 1))
    if name not in ("autocontrast", "equalize", "solarize"):
        assert np.abs(still.astype(int) - np.asarray(image)).max() <= 1
    if name != "identity":
        assert (np.asarray(OPERATIONS[name](image, 1.0, 1)) != np.asarray(image)).any()


def test_jitter_and_erasing_change_what_they_say() -> None:
    image, plain = smooth(32, 32), AugmentConfig(crop_scale_min=1.0, flip=False)
    unchanged = augment(image, Preprocess(32), plain, np.random.default_rng(0))
    np.testing.assert_array_equal(unchanged, image)
    erased = augment(image, Preprocess(32), replace(plain, erase_probability=1.0), np.random.default_rng(0))
    share = (erased != image).any(axis=2).mean()
    assert 0.01 < share < 0.4
    jittered = augment(image, Preprocess(32), replace(plain, color_jitter=0.4), np.random.default_rng(3))
    assert 2 < np.abs(jittered.astype(int) - image).mean() < 90


def test_augmentation_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="from 0 to 30"):
        make_config({"data": {"augment": {"randaugment_magnitude": 31.0}}})
    with pytest.raises(UserError, match="did you mean 'running'"):
        load_data(make_config({"data": {"train": "synthetic?split=test", "augment": {"no_flip_labels": ("runing",)}}}))
