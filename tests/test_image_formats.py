"""Every format of the table is told by its first bytes, and decoded where its decoder is installed."""

import io

import numpy as np
import pytest
from PIL import Image

from clip_har_jax import image_formats
from clip_har_jax.image_files import BadImage, decode
from clip_har_jax.image_formats import IMAGE_FORMATS, IMAGE_SUFFIXES, format_titles, readable_formats, sniff

PICTURE = Image.fromarray(np.kron(np.array([[250, 10], [90, 160]], np.uint8), np.ones((32, 48), np.uint8)))


def encoded(kind: str) -> bytes:
    readable_formats()
    buffer = io.BytesIO()
    PICTURE.convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [one.name for one in readable_formats()])
def test_a_format_is_told_and_decoded(kind: str) -> None:
    data = encoded(kind)
    found = sniff(data)
    assert found is not None
    assert found.name == ("JPEG" if kind == "MPO" else kind)
    decoded = decode(data)
    assert decoded.shape == (64, 96, 3)
    assert abs(float(decoded[:20, :30].mean()) - 250) < 6 and abs(float(decoded[40:, 60:].mean()) - 160) < 6


def test_the_suite_runs_with_every_decoder() -> None:
    assert readable_formats() == IMAGE_FORMATS
    assert format_titles() == "JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC"


def test_a_missing_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("HEIF")
    rest = tuple(one for one in IMAGE_FORMATS if one.name != "HEIF")
    monkeypatch.setattr(image_formats, "readable_formats", lambda: rest)
    monkeypatch.setattr("clip_har_jax.image_files.readable_formats", lambda: rest)
    with pytest.raises(BadImage, match=r"decoder isn't installed; pip install 'clip-har-jax\[heif\]'"):
        decode(data)


def test_other_first_bytes_are_no_format() -> None:
    for data in (b"", b"%!PS-Adobe", b"\0\0\1\0icon", b"....ftypisom0000mp42", b"<svg xmlns="):
        assert sniff(data) is None


def test_suffixes_belong_to_one_format_each() -> None:
    assert len(IMAGE_SUFFIXES) == sum(len(one.suffixes) for one in IMAGE_FORMATS)
    assert {".jpe", ".jfif", ".heic", ".avif", ".tif"} <= IMAGE_SUFFIXES
