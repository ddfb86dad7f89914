"""Decoding of every kind of image file, as transformers' own loader does."""

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from clip_har_jax.image_files import BadImage, decode, read_image


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
