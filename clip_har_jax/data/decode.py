"""Bytes -> a resized part of an image, for training. JPEGs are decoded at the smallest sufficient scale.

The resize kernels differ from evaluation's: they are faster, and never used to evaluate a model.
"""

import io
import math

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from clip_har_jax.image_files import check_size, decode, quiet_pillow
from clip_har_jax.image_formats import is_arithmetic_jpeg

ORIENTATION = 0x0112  # of Exif; 1: upright
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the whole image

cv2.setNumThreads(1)  # batches are decoded in parallel already


class TrainingImage:
    """An image from which a part will be taken; encoded data is decoded when the part is known.

    Raises:
      BadImage: as `image_files.decode`, here or in `take`.
    """

    def __init__(self, image: bytes | UInt8[np.ndarray, "h w 3"], max_megapixels: float):
        self._max_megapixels = max_megapixels
        self._image: bytes | np.ndarray = image
        size = _plain_jpeg_size(image) if isinstance(image, bytes) else None
        if size is not None:
            self.height, self.width = size
            check_size(self.width, self.height, max_megapixels)
            return
        array = decode(image, max_megapixels) if isinstance(image, bytes) else image
        self._image = array
        self.height, self.width = array.shape[:2]

    def take(self, box: Box, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
        """Return the part in `box`, resized to `size`, a height and a width."""
        left, top, right, bottom = box
        height, width = size
        image = self._image
        if isinstance(image, bytes):
            need = max(height / (bottom - top), width / (right - left))
            pixels = _decode_jpeg(image, math.ceil(self.height * need), math.ceil(self.width * need))
            # None: damaged, or a kind of JPEG that this decoder can't read
            image = decode(image, self._max_megapixels) if pixels is None else pixels
            down, across = image.shape[0] / self.height, image.shape[1] / self.width
            top, bottom = round(top * down), max(round(bottom * down), round(top * down) + 1)
            left, right = round(left * across), max(round(right * across), round(left * across) + 1)
        part = image[top:bottom, left:right]
        if part.shape[:2] == size:
            return part
        # Cubic interpolation would skip pixels and produce moiré.
        shrinks = part.shape[0] > height and part.shape[1] > width
        return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that needs no rotation and no colour conversion; None for any other image."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "Gray", "RGB") or is_arithmetic_jpeg(data):
        return None
    if (b"Exif\0" in data or b"tiff:Orientation" in data) and _is_turned(data):  # segments can have any order
        return None
    return height, width


def _is_turned(data: bytes) -> bool:
    """Return whether the metadata of a JPEG may rotate the image; True if it can't be read."""
    try:
        with quiet_pillow, Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # damaged metadata: Pillow decides when it decodes the whole image
        return True


def _decode_jpeg(data: bytes, min_height: int, min_width: int) -> np.ndarray | None:
    try:
        return simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width)
    except ValueError:
        return None
