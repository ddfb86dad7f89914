"""Decoding of every kind of image file, and the evaluation transform against transformers' CLIP image processor."""

import io
import json
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers import CLIPProcessor
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import CLIP_MEAN, CLIP_STD, BadImage, Preprocess, decode, evaluation_transform, read_image
from clip_har_jax.text import Tokenizer
from tests.support.normalization import normalize


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def empty_png(width: int, height: int) -> bytes:
    """Return a PNG whose header promises an image, and whose pixels are one byte: decoding them would fail."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def reason(data: bytes, **options: float) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **options)
    text = str(caught.value)
    assert 0 < len(text) < 200
    assert "\n" not in text
    return text


def theirs(image: np.ndarray, processor: CLIPImageProcessorPil) -> np.ndarray:
    """transformers' transform before rescaling and normalisation, [size, size, 3]."""
    values = processor(Image.fromarray(image), do_rescale=False, do_normalize=False)["pixel_values"][0]
    return np.asarray(values).transpose(1, 2, 0)


# Decoding


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats(kind: str) -> None:
    image = noise(9, 14)
    decoded = decode(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_array_equal(decoded, image)
    assert decoded.dtype == np.uint8


def palette(transparency: bytes | None = None) -> Image.Image:
    image = Image.fromarray(noise(8, 12)).quantize(16)
    if transparency:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(noise(8, 12)), "JPEG"),
        (Image.fromarray(noise(8, 12)).convert("CMYK"), "JPEG"),
        (Image.fromarray(noise(8, 12)).convert("CMYK"), "TIFF"),
        (Image.fromarray(noise(8, 12)).convert("YCbCr"), "TIFF"),
        (Image.fromarray(noise(8, 12)).convert("L"), "JPEG"),
        (Image.fromarray(noise(8, 12)).convert("LA"), "PNG"),
        (Image.fromarray(np.concatenate([noise(8, 12), noise(8, 12, 1)[..., :1]], -1)), "PNG"),
        (Image.fromarray(noise(8, 12)).convert("1"), "PNG"),
        (palette(), "PNG"),
        (palette(), "GIF"),
        (palette(bytes(range(0, 160, 10))), "PNG"),
    ],
    ids=["rgb", "cmyk", "cmyk tiff", "ycbcr", "grey", "la", "rgba", "1 bit", "palette", "gif", "palette with alpha"],
)
def test_modes_equal_transformers_loader(image: Image.Image, kind: str, tmp_path: Path) -> None:
    data = encode(image, kind)
    (tmp_path / "image").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of palettes with transparency
        expected = np.asarray(load_image(str(tmp_path / "image")))
    np.testing.assert_array_equal(decode(data), expected)
    assert expected.std() > 0


def test_cmyk_has_the_right_colours() -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 1:3] = 255  # magenta and yellow make red
    pixel = decode(encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=95))[8, 8].astype(int)
    assert pixel[0] > 245
    assert pixel[1:].max() < 10


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    decoded = decode(encode(ramp, kind))
    np.testing.assert_array_equal(decoded, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, -1))


def test_big_endian_16_bits() -> None:
    ramp = np.linspace(0, 65535, 64).astype(">u2").reshape(8, 8)
    image = Image.frombytes("I;16B", (8, 8), ramp.tobytes())
    np.testing.assert_array_equal(decode(encode(image, "TIFF"))[..., 0], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("dtype", "white"),
    [(np.float32, 1), (np.float32, 255), (np.float32, 65535), (np.int32, 255), (np.int32, 65535)],
)
def test_wide_pixels_are_scaled_by_their_range(dtype: type[np.generic], white: int) -> None:
    values: np.ndarray = np.linspace(0, white, 64).reshape(8, 8).astype(dtype)
    decoded = decode(encode(Image.fromarray(values), "TIFF"))[..., 0].astype(float)
    np.testing.assert_allclose(decoded, values / white * 255, atol=1.01)


def test_floats_that_are_no_numbers_are_black() -> None:
    values = np.full((4, 4), 200, np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    decoded = decode(encode(Image.fromarray(values), "TIFF"))[..., 0]
    assert list(decoded[0]) == [0, 0, 0, 200]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(8, 20), kind, exif=exif)
    (tmp_path / "image").write_bytes(data)
    np.testing.assert_array_equal(decode(data), np.asarray(load_image(str(tmp_path / "image"))))
    assert decode(data).shape == ((8, 20, 3) if orientation < 5 else (20, 8, 3))


def test_orientation_of_16_bits() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.linspace(0, 65535, 8 * 20).astype(np.uint16).reshape(8, 20)
    np.testing.assert_array_equal(
        decode(encode(ramp, "PNG", exif=exif))[..., 0], np.rot90((ramp >> 8).astype(np.uint8), -1)
    )


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01"]
)
def test_damaged_exif_is_no_damaged_image(exif: bytes) -> None:
    assert decode(encode(noise(8, 20), "JPEG", exif=exif)).shape == (8, 20, 3)


def test_phone_photographs_with_a_second_picture_are_read() -> None:
    first, second = (Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (200, 20))
    data = encode(first, "MPO", save_all=True, append_images=[second])
    np.testing.assert_allclose(decode(data).astype(int), 200, atol=3)


# Refusals


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"\xff\xd8\xff", "damaged|not an image"),
        (b"\x00" * 5000, "not an image"),
    ],
    ids=["empty", "text", "html", "three bytes", "zeros"],
)
def test_no_image(data: bytes, expected: str) -> None:
    assert any(part in reason(data) for part in expected.split("|"))


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PPM", "PDF"])
def test_formats_not_asked_for(kind: str) -> None:
    assert "not an image that can be read (JPEG" in reason(encode(noise(32, 32), kind))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),  # turned
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_cut_off_files(kind: str, options: dict) -> None:
    data = encode(noise(40, 40), kind, **options)
    assert decode(data).shape == (40, 40, 3)
    for length in np.linspace(1, len(data) * 0.98, 60).astype(int):
        reason(data[:length])
    assert "damaged" in reason(data[: len(data) * 9 // 10]) or kind == "TIFF"  # its directory stands at the end


def test_corrupt_bytes_end_in_an_image_or_bad_image() -> None:
    rng = np.random.default_rng(0)
    bad = 0
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
        data = encode(noise(24, 24), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 8):
                damaged[position] = rng.integers(256)
            try:
                assert decode(bytes(damaged)).ndim == 3
            except BadImage:
                bad += 1
    assert bad > 50


def test_pages_are_no_animation() -> None:
    pages = [Image.fromarray(noise(12, 12, seed)) for seed in range(3)]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert reason(data) == "a file of 3 pages; save each page as an image"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animated(kind: str) -> None:
    frames = [Image.fromarray(noise(12, 12, seed)) for seed in range(3)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert reason(data) == "animated (3 frames); save one frame as an image"


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (50, 1)])
def test_one_pixel_sides(width: int, height: int) -> None:
    assert reason(encode(noise(height, width))).startswith(f"{width}x{height} px is too small")


def test_two_pixels_are_enough() -> None:
    assert decode(encode(noise(2, 2))).shape == (2, 2, 3)


def test_sides_too_unequal() -> None:
    assert decode(encode(noise(2, 400))).shape == (2, 400, 3)
    assert reason(encode(noise(2, 401))) == "401x2 px, one side over 200 times the other; crop it"
    assert "one side over 200" in reason(encode(noise(1000, 2)))


@pytest.mark.parametrize("side", [10_000, 9_500, 20_000, 2**31 - 1])
def test_huge_headers_are_refused_without_decoding(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.size))
    assert "over 50 megapixels; make it smaller" in reason(empty_png(side, side))
    assert not decoded


def test_a_real_image_of_100_megapixels() -> None:
    data = encode(Image.new("1", (10_000, 10_000)))
    assert len(data) < 100_000
    assert reason(data) == "10000x10000 px, over 50 megapixels; make it smaller"


def test_the_ceiling_is_the_callers() -> None:
    data = encode(noise(100, 101))
    assert decode(data, max_megapixels=0.0101).shape == (100, 101, 3)
    assert reason(data, max_megapixels=0.01) == "101x100 px, over 0.01 megapixels; make it smaller"


def test_threads_leave_the_warning_filters_alone() -> None:
    # A cut-off EXIF block warns in each decode; one warning that came through would be an error here.
    good = encode(noise(64, 64), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01")
    huge = empty_png(10_000, 10_000)
    before, failures = list(warnings.filters), []

    def work() -> None:
        for _ in range(40):
            try:
                decode(good)
                reason(huge)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="still seen"):
        warnings.warn("still seen", UserWarning, stacklevel=1)


def test_read_image(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(noise(6, 7)))
    np.testing.assert_array_equal(read_image(path), noise(6, 7))
    path.write_bytes(b"text")
    for bad in (path, tmp_path / "secret_missing.png", tmp_path):
        with pytest.raises(BadImage) as caught:
            read_image(bad)
        assert "secret" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(BadImage, match="No such file"):
        read_image(tmp_path / "missing.png")


# The evaluation transform

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
