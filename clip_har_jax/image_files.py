"""Bytes -> uint8 image, within limits. numpy and PIL only, so that servers stay small.

Increase `preprocess.PREPROCESS_VERSION` when the result changes.
"""

import io
import threading
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from clip_har_jax.image_formats import format_of, format_titles, is_arithmetic_jpeg, missing_decoder, readable_formats

MAX_MEGAPIXELS = 50.0
MIN_SIDE_PX = 2
MAX_ASPECT = 200  # longer side over shorter


class BadImage(ValueError):  # noqa: N818  the image is bad, the program is right
    """An image that can't be used. The message is only the reason: the caller knows the file's name."""


class _QuietPillow:
    """Hide Pillow's warnings while any thread decodes.

    `warnings.catch_warnings` isn't safe in threads: the last thread to leave would restore the filters that another one
    had set.
    """

    def __init__(self) -> None:
        self._lock, self._threads, self._filters = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._threads == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._threads += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                self._filters.__exit__(None, None, None)


quiet_pillow = _QuietPillow()


def decode(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image to RGB and apply its EXIF orientation, as transformers' own loader does.

    The header is checked before any pixel is decoded, because a small file can hold a huge image. Thread-safe.

    Args:
      data: the bytes of an image file.
      max_megapixels: larger images are refused; Pillow itself refuses above 178.

    Raises:
      BadImage: not an image, truncated, several frames or pages, too large, too small or too elongated.
    """
    if not data:
        raise BadImage("empty file")
    formats = [one.name for one in readable_formats() if one.name != "MPO"]  # Pillow opens MPO as JPEG
    with quiet_pillow:
        try:
            with Image.open(io.BytesIO(data), formats=formats) as image:
                _check_header(image, max_megapixels)
                if image.format in ("JPEG", "MPO") and is_arithmetic_jpeg(data):
                    raise BadImage("a JPEG with arithmetic coding, which few programs read; save it again")
                image.load()
                return np.asarray(_to_rgb(_upright(image)))
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage(f"over {max_megapixels:g} megapixels; make it smaller") from error
        except Image.UnidentifiedImageError as error:
            if install := missing_decoder(data):
                raise BadImage(f"its decoder isn't installed; {install}, or convert it") from error
            raise BadImage(f"not an image that can be read ({format_titles()}); convert or remove it") from error
        except Exception as error:  # Pillow's decoders raise many kinds of exceptions for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadImage(f"damaged ({reason}); save it again") from error


def _check_header(image: Image.Image, max_megapixels: float) -> None:
    check_size(*image.size, max_megapixels)
    kind = format_of(image.format)
    count = getattr(image, "n_frames", 1)
    if kind is None or not kind.further or count == 1:
        return
    if kind.further == "pages":
        raise BadImage(f"a file of {count} pages; save each page as an image")
    raise BadImage(f"animated ({count} {kind.further}); save one frame as an image")


def check_size(width: int, height: int, max_megapixels: float) -> None:
    """Refuse an image by the size in its header.

    Raises:
      BadImage: too large, too small or too elongated.
    """
    if width * height > max_megapixels * 1e6:
        raise BadImage(f"{width}x{height} px, over {max_megapixels:g} megapixels; make it smaller")
    if min(width, height) < MIN_SIDE_PX:
        raise BadImage(f"{width}x{height} px is too small to show anything; remove it")
    if max(width, height) > MAX_ASPECT * min(width, height):  # resizing by the shorter side would fill the memory
        raise BadImage(f"{width}x{height} px, one side over {MAX_ASPECT} times the other; crop it")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata; the pixels are decoded already
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. Pillow's own conversion clips 16-bit, 32-bit and float values to white or black."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
        # These modes don't say their range: 0 to 1 (floats only), 0 to 255, or 16 bits.
        scales = (255, 1, 1 / 257) if image.mode == "F" else (1, 1 / 257)
        scale = next((scale for scale in scales if values.max() * scale <= 255), scales[-1])
        image = Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8))
    return image.convert("RGB")


def read_image(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image file.

    Raises:
      BadImage: as `decode`, or the file can't be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"can't be read ({error.strerror})") from error
    return decode(data, max_megapixels)
