"""Image settings, and the evaluation transform against transformers' CLIP image processor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, evaluation_transform
from clip_har_jax.text import Tokenizer
from tests.support.normalization import normalize


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def theirs(image: np.ndarray, processor: CLIPImageProcessorPil) -> np.ndarray:
    """transformers' transform before rescaling and normalisation, [size, size, 3]."""
    values = processor(Image.fromarray(image), do_rescale=False, do_normalize=False)["pixel_values"][0]
    return np.asarray(values).transpose(1, 2, 0)


SIZES = [
    *((2, 2), (2, 3), (3, 2), (5, 7), (31, 33), (32, 32), (33, 32), (32, 33), (64, 64), (223, 225), (300, 200)),
    *((183, 275), (275, 183), (2, 400), (400, 2), (17, 999), (999, 17), (101, 100), (640, 480), (500, 333)),
]


@pytest.mark.parametrize("size", [7, 32, 224])
@pytest.mark.parametrize("resize", [None, 5, 33, 48])
def test_transform_is_bit_equal_to_transformers(size: int, resize: int | None) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": resize or size}, crop_size=size)
    preprocess = Preprocess(size, resize)
    for seed, (height, width) in enumerate(SIZES):
        image = noise(height, width, seed)
        ours = evaluation_transform(image, preprocess)
        np.testing.assert_array_equal(ours, theirs(image, processor), err_msg=f"{height}x{width}")
        assert ours.dtype == np.uint8


def test_transform_is_bit_equal_over_random_sizes() -> None:
    rng = np.random.default_rng(1)
    for seed in range(150):
        height, width, size, resize = (int(number) for number in rng.integers((2, 2, 1, 1), (300, 300, 130, 130)))
        image = noise(height, width, seed)
        processor = CLIPImageProcessorPil(size={"shortest_edge": resize}, crop_size=size)
        ours = evaluation_transform(image, Preprocess(size, resize))
        np.testing.assert_array_equal(ours, theirs(image, processor), err_msg=f"{height}x{width} {resize} {size}")


def test_normalize_equals_transformers() -> None:
    image = noise(40, 60)
    expected = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)(Image.fromarray(image))["pixel_values"]
    preprocess = Preprocess(32)
    ours = normalize(evaluation_transform(image, preprocess)[None], preprocess.mean, preprocess.std)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), np.stack(expected), atol=1e-6, rtol=0)


# preprocessor_config.json

PLAIN = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}
PUBLISHED: dict[str, dict[str, Any]] = {
    "openai": PLAIN | {"size": 32, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"},
    "shortest edge": PLAIN | {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "larger resize": PLAIN | {"size": {"shortest_edge": 40}, "crop_size": 32},
    "squeezed": PLAIN | {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}},
    "squeezed, larger": PLAIN | {"size": {"height": 40, "width": 40}, "crop_size": 32},
    "squeezed, no crop": PLAIN | {"size": {"height": 32, "width": 32}, "do_center_crop": False, "crop_size": 224},
    "own mean": PLAIN | {"size": 32, "crop_size": 32, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.6]},
    "not normalised": PLAIN | {"size": 32, "crop_size": 32, "do_normalize": False},
    "rescale factor": PLAIN | {"size": 32, "crop_size": 32, "do_rescale": True, "rescale_factor": 0.00392156862745098},
    "nulls": PLAIN | {"size": {"shortest_edge": 32, "height": None}, "crop_size": 32, "resample": None},
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_settings(name: str, tmp_path: Path) -> None:
    settings = {key: value for key, value in PUBLISHED[name].items() if value is not None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED[name]))
    ours = Preprocess.from_folder(tmp_path, 32)
    ours.save(tmp_path)
    assert Preprocess.from_folder(tmp_path, 32) == ours
    reference = {**settings, "size": {"shortest_edge": 32}} if name == "nulls" else settings
    for processor in (CLIPImageProcessorPil(**reference), CLIPImageProcessorPil.from_pretrained(tmp_path)):
        for height, width in ((20, 50), (50, 20), (33, 47)):
            image = noise(height, width)
            transformed = evaluation_transform(image, ours)
            np.testing.assert_array_equal(transformed, theirs(image, processor))
            expected = np.asarray(processor(Image.fromarray(image))["pixel_values"][0]).transpose(1, 2, 0)
            np.testing.assert_allclose(normalize(transformed, ours.mean, ours.std), expected, atol=1e-6, rtol=0)


def test_without_settings_clip_defaults_hold(tmp_path: Path) -> None:
    preprocess = Preprocess.from_folder(tmp_path, 336)
    assert preprocess == Preprocess(336, None, CLIP_MEAN, CLIP_STD, True)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert Preprocess.from_folder(tmp_path, 336) == preprocess


def test_settings_saved_by_transformers(tmp_path: Path) -> None:
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1, 0.2, 0.3])
    expected = Preprocess(32, 40, (0.1, 0.2, 0.3))
    image_processor.save_pretrained(tmp_path / "alone")
    assert Preprocess.from_folder(tmp_path / "alone", 32) == expected
    Tokenizer.train(["a"], 520).save(tmp_path / "text")
    whole = tmp_path / "whole"
    CLIPProcessor(
        image_processor, CLIPProcessor.from_pretrained(_clip_folder(tmp_path / "text")).tokenizer
    ).save_pretrained(whole)
    assert not (whole / "preprocessor_config.json").exists()  # else it wouldn't be the newer layout
    assert Preprocess.from_folder(whole, 32) == expected
    Preprocess(32).save(whole)
    assert Preprocess.from_folder(whole, 32) == expected  # the newer file counts first, as in transformers


def _clip_folder(folder: Path) -> Path:
    Preprocess(32).save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    return folder


def test_older_processor_config_without_image_part(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    Preprocess(32, 48).save(tmp_path)
    assert Preprocess.from_folder(tmp_path, 32) == Preprocess(32, 48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": 64, "size": 64}, "images of 64 px, but the model takes 32 px"),
        ({"size": {"height": 32, "width": 48}}, "size {'height': 32, 'width': 48}; a number"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "a shortest_edge, or an equal height and width"),
        ({"size": "32"}, "size '32'"),
        ({"size": 0}, "size 0"),
        ({"size": True}, "size True"),
        ({"size": {"shortest_edge": [32]}}, "size {'shortest_edge': [32]}"),
        ({"do_resize": False}, "do_resize False"),
        ({"do_rescale": False}, "do_rescale False"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
        ({"resample": 1}, "resample 1; use 2 (bilinear) or 3 (bicubic)"),
        ({"resample": "bicubic"}, "resample 'bicubic'"),
        ({"do_center_crop": False}, "do_center_crop false leaves images that aren't square"),
        ({"image_mean": [0.5, 0.5]}, "image_mean [0.5, 0.5]; three numbers"),
        ({"image_std": "grey"}, "image_std 'grey'; three numbers"),
        ([], "not an object"),
    ],
)
def test_settings_refused(settings: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        Preprocess.from_folder(tmp_path, 32)
    assert message in str(caught.value)
    assert "preprocessor_config.json" in str(caught.value)


def test_settings_that_are_no_json(tmp_path: Path) -> None:
    for content in (b"{ cut", b"\xff\xfe\x00"):
        (tmp_path / "preprocessor_config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"preprocessor_config.json: not JSON"):
            Preprocess.from_folder(tmp_path, 32)
