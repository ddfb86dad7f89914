"""The fast decoder of training and Pillow agree on orientation, size and readability, over JPEGs of odd structure."""

import base64
import io
import struct
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from clip_har_jax.data.decode import TrainingImage
from clip_har_jax.image_files import BadImage, decode
from clip_har_jax.image_formats import is_arithmetic_jpeg

RNG = np.random.default_rng(0)
TAKEN_PX = 96
# 24 x 16 px, written by libjpeg-turbo's cjpeg -arithmetic
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpR"
    "Uk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAQABgDASIAAhEB"
    "AxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ACXzliB0ASNsZeV4My7OkReYlW/h+KCIKMwqu8zTb3EOLqV70uLMZixmNHzGofxFxdAgmFq2F38z"
    "mMoe9Ht5V0wlXtHo/9k="
)


def smooth(height: int, width: int) -> np.ndarray:
    return cv2.resize(RNG.integers(0, 256, (5, 7, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(image: Image.Image, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), "JPEG", quality=92, **options)
    return buffer.getvalue()


def segment(marker: int, contents: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(contents) + 2) + contents


def exif(orientation: int, order: str) -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return segment(0xE1, b"Exif\0\0" + head + entry)


def bare(jpeg: bytes) -> bytes:
    """Return a JPEG without its application segments."""
    at = 2
    while 0xE0 <= jpeg[at + 1] <= 0xEF:
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg[:2] + jpeg[at:]


def insert(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


XMP = b"http://ns.adobe.com/xap/1.0/\0"
XMP_TURNED = XMP + (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="r"><rdf:Description tiff:Orientation="6" xmlns:tiff="t"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


def marked(jpeg: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the JPEG with markers in many orders and of many lengths."""
    plain = bare(jpeg)
    for orientation in (1, 3, 6, 8, 0, 9):
        for order in "<>":
            turn = exif(orientation, order)
            name = f"turned {orientation}{order}"
            yield name, insert(plain, turn)
            yield name + " behind 195 KB of comments", insert(plain, *[segment(0xFE, bytes(65000))] * 3, turn)
            yield (
                name + " behind an ICC profile",
                insert(plain, segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60000)), turn),
            )
            yield name + " and XMP", insert(plain, segment(0xE1, XMP + b"<x/>"), turn, exif(3, order))
            yield name + " with fill bytes", plain[:2] + b"\xff\xff\xff" + turn[1:] + plain[2:]
    for transform in (0, 1, 2):
        yield f"adobe {transform}", insert(plain, segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)))
    yield "turned by XMP", insert(plain, segment(0xE1, XMP_TURNED))
    yield "a comment that names Exif", insert(jpeg, segment(0xFE, b"Exif\0\0"))
    yield "damaged Exif", insert(jpeg, segment(0xE1, b"Exif\0\0garbage"))
    yield "cut off Exif", insert(jpeg, segment(0xE1, exif(6, "<")[4:24]))
    yield "bytes behind the end", jpeg + b"junk" * 100


def damaged(jpeg: bytes) -> Iterator[tuple[str, bytes]]:
    frame = jpeg.index(b"\xff\xc0")
    for marker in (0xC1, 0xC3, 0xC9, 0xCA):
        yield f"frame {marker:x}", jpeg[: frame + 1] + bytes([marker]) + jpeg[frame + 2 :]
    yield "12 bits", jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :]
    yield "no height", jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :]
    for length in (2, 20, len(jpeg) // 3, len(jpeg) - 40, len(jpeg) - 3, len(jpeg) - 1):
        yield f"cut off at {length}", jpeg[:length]


def structures(height: int, width: int) -> Iterator[tuple[str, bytes]]:
    image = Image.fromarray(smooth(height, width))
    for progressive in (False, True):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
            options = {"progressive": progressive, "subsampling": subsampling}
            name = f"{subsampling}{' progressive' if progressive else ''}"
            for other, data in marked(encoded(image, **options)):
                yield f"{name}, {other}", data
            for blocks in (1, 4):
                yield f"{name}, restart {blocks}", encoded(image, restart_marker_blocks=blocks, **options)
    yield "grey", encoded(image.convert("L"))
    yield "CMYK", encoded(image.convert("CMYK"))
    yield "CMYK turned", insert(encoded(image.convert("CMYK")), exif(6, "<"))
    yield "RGB", encoded(image, keep_rgb=True)
    yield from damaged(encoded(image))
    yield "arithmetic", ARITHMETIC


def read(data: bytes) -> np.ndarray | str:
    """Return what Pillow reads, or why it doesn't."""
    try:
        return decode(data)
    except BadImage as error:
        return str(error)


def take_all(data: bytes | np.ndarray) -> tuple[tuple[int, int], np.ndarray] | str:
    """Return the size and the pixels that training takes, or why it doesn't."""
    try:
        image = TrainingImage(data, 50.0)
        return (image.height, image.width), image.take((0, 0, image.width, image.height), (TAKEN_PX, TAKEN_PX))
    except BadImage as error:
        return str(error)


@pytest.mark.parametrize("size", [(48, 80), (33, 17), (200, 301)])
def test_both_decoders_agree(size: tuple[int, int]) -> None:
    count = 0
    for name, data in structures(*size):
        count += 1
        whole, taken = read(data), take_all(data)
        if isinstance(whole, str) or isinstance(taken, str):
            assert whole == taken, name
            continue
        slow = take_all(whole)
        assert taken[0] == whole.shape[:2], name
        difference = np.abs(taken[1].astype(int) - slow[1]).mean()
        assert difference < 8, name  # an image turned wrongly differs by 40 and more
    assert count > 500


def test_arithmetic_coding_is_refused() -> None:
    assert is_arithmetic_jpeg(ARITHMETIC) and not is_arithmetic_jpeg(encoded(Image.fromarray(smooth(9, 9))))
    with pytest.raises(BadImage, match="arithmetic coding"):
        decode(ARITHMETIC)
