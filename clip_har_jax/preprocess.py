"""Bytes -> uint8 image, and the exact CLIP evaluation transform. numpy and PIL only, so that servers stay small.

All images for a model are read by this file. Increase `PREPROCESS_VERSION` when its result changes.
It stays one file, over 300 lines, so that the version covers exactly one file.
"""

import io
import json
import math
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from clip_har_jax.errors import UserError
from clip_har_jax.image_formats import format_of, format_titles, is_arithmetic_jpeg, missing_decoder, readable_formats

PREPROCESS_VERSION = 1
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of openai/CLIP's clip.py, in RGB, of values 0 to 1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and deviation of SigLIP's
RESAMPLING = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}
MAX_MEGAPIXELS = 50.0
MIN_SIDE_PX = 2
GRID_BITS = 12  # of the number of rows and of columns of packed patches
MAX_ASPECT = 200  # longer side over shorter


class BadImage(ValueError):  # noqa: N818  the image is bad, the program is right
    """An image that can't be used. The message is only the reason: the caller knows the file's name."""


@dataclass(frozen=True)
class Preprocess:
    """The transform from an image to a model's input.

    Attributes:
      image_size_px: side of the model's square input.
      resize_px: size of the shorter side before the centre crop; None: image_size_px.
      mean, std: of the normalisation, for values 0 to 1 in RGB.
      keep_aspect: False: resize both sides to resize_px, for folders that give a height and a width.
      resample: Pillow's number of the way to resize, of `RESAMPLING`.
      round_crop: an odd rest is halved by rounding to even, as torchvision and so open_clip do; a key of this project's
        own in preprocessor_config.json. False: rounded down, as transformers does.
      patch_size_px, max_num_patches: of images that keep their aspect (SigLIP 2 NaFlex), see `pack_patches`; 0: images
        are squares.
    """

    image_size_px: int
    resize_px: int | None = None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    keep_aspect: bool = True
    resample: int = int(Image.Resampling.BICUBIC)
    round_crop: bool = False
    patch_size_px: int = 0
    max_num_patches: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the model's input: a square image, or packed patches."""
        if self.max_num_patches:
            return 1 + self.max_num_patches, self.patch_size_px**2, 3
        return self.image_size_px, self.image_size_px, 3

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which a part of an image is resized as the model's whole input."""
        if self.max_num_patches:
            return patched_size(height, width, self.patch_size_px, self.max_num_patches)
        return self.image_size_px, self.image_size_px

    def pack(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "a b 3"]:
        """Return an image of `target_size` in the form of the model's input."""
        return pack_patches(image, self.patch_size_px, self.max_num_patches) if self.max_num_patches else image

    @staticmethod
    def is_in(folder: str | Path) -> bool:
        """Return whether the folder has image settings."""
        return any((Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))

    @classmethod
    def from_folder(cls, folder: str | Path, image_size_px: int) -> "Preprocess":
        """Read preprocessor_config.json in its published forms; without it, use CLIP's values for `image_size_px`.

        transformers 5 saves the same settings in processor_config.json, which has precedence, as there.

        Raises:
          UserError: an unsupported step, or a size that isn't the model's.
        """
        for path, part in (
            (Path(folder) / "processor_config.json", "image_processor"),
            (Path(folder) / "preprocessor_config.json", None),
        ):
            values = _read_settings(path)
            values = values.get(part) if part and values else values
            if values is not None:
                return cls._from_settings(values, path, image_size_px)
        return cls(image_size_px)

    @classmethod
    def _from_settings(cls, values: dict[str, Any], path: Path, image_size_px: int) -> "Preprocess":
        _refuse_other_transforms(values, path)
        if str(values.get("image_processor_type", "")).startswith("Siglip2"):
            return cls._of_patches(values, path, image_size_px)
        crop, _ = _side(values.get("crop_size", image_size_px), path)
        resize, keep_aspect = _side(values.get("size", crop), path)
        if not values.get("do_center_crop", True):
            if keep_aspect:
                raise UserError(f"{path}: do_center_crop false leaves images that aren't square; set it to true")
            crop = resize
        if crop != image_size_px:
            raise UserError(f"{path}: images of {crop} px, but the model takes {image_size_px} px")
        siglip = str(values.get("image_processor_type", "")).startswith("Siglip")
        default_mean, default_std = (HALF, HALF) if siglip else (CLIP_MEAN, CLIP_STD)
        mean, std = _triple(values, "image_mean", default_mean, path), _triple(values, "image_std", default_std, path)
        if not values.get("do_normalize", True):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        resample = int(values.get("resample") or Image.Resampling.BICUBIC)
        size = None if resize == crop else resize
        return cls(crop, size, mean, std, keep_aspect, resample, bool(values.get("round_crop", False)))

    @classmethod
    def _of_patches(cls, values: dict[str, Any], path: Path, image_size_px: int) -> "Preprocess":
        """Read the settings of transformers' Siglip2ImageProcessor."""
        patch_size, most = values.get("patch_size", 16), values.get("max_num_patches", 256)
        for key, value in (("patch_size", patch_size), ("max_num_patches", most)):
            if type(value) is not int or value < 1:
                raise UserError(f"{path}: {key} {value!r}; a whole number of 1 or more is needed")
        if not values.get("do_normalize", True):
            raise UserError(f"{path}: do_normalize false; set it to true, with image_mean and image_std")
        mean, std = (_triple(values, key, HALF, path) for key in ("image_mean", "image_std"))
        resample = int(values.get("resample") or Image.Resampling.BILINEAR)
        return cls(image_size_px, None, mean, std, False, resample, False, patch_size, most)

    def to_json(self) -> str:
        """Return the contents of preprocessor_config.json, readable by transformers."""
        if self.max_num_patches:
            settings = {
                "image_processor_type": "Siglip2ImageProcessor",
                "patch_size": self.patch_size_px,
                "max_num_patches": self.max_num_patches,
                "resample": self.resample,
                "image_mean": list(self.mean),
                "image_std": list(self.std),
            }
            return json.dumps(settings, indent=2) + "\n"
        side, resize = self.image_size_px, self.resize_px or self.image_size_px
        values = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": resize} if self.keep_aspect else {"height": resize, "width": resize},
            "resample": self.resample,
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.round_crop:
            values["round_crop"] = True
        return json.dumps(values, indent=2) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json."""
        (Path(folder) / "preprocessor_config.json").write_text(self.to_json(), encoding="utf-8")


def _read_settings(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not an object of settings; copy it again")
    return values


def _refuse_other_transforms(values: dict[str, Any], path: Path) -> None:
    expected = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    }
    resample = values.get("resample")
    if resample is not None and resample not in RESAMPLING:
        accepted = " or ".join(f"{number} ({name})" for number, name in RESAMPLING.items())
        raise UserError(f"{path}: resample {resample!r}; use {accepted}")
    for name, value in expected.items():
        given = values.get(name)
        if given is not None and (not isinstance(given, int | float) or abs(given - value) > 1e-6):
            raise UserError(f"{path}: {name} {given!r}; only CLIP's own transform is done here, with {value!r}")


def _side(value: Any, path: Path) -> tuple[int, bool]:
    """Return side and keep_aspect of a published size: 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    side, keep_aspect = value, True
    if isinstance(value, dict):
        given = {key: number for key, number in value.items() if number is not None}
        keep_aspect = set(given) == {"shortest_edge"}
        square = set(given) == {"height", "width"} and given["height"] == given["width"]
        side = next(iter(given.values())) if keep_aspect or square else None
    if type(side) is not int or side < 1:
        raise UserError(f"{path}: size {value!r}; a number, a shortest_edge, or an equal height and width are needed")
    return side, keep_aspect


def _triple(
    values: dict[str, Any], key: str, default: tuple[float, float, float], path: Path
) -> tuple[float, float, float]:
    given = values.get(key) or default
    try:
        red, green, blue = (float(number) for number in given)
        return check_triple((red, green, blue), key)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {key} {given!r}; three numbers are needed") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_triple(values: tuple[float, ...], key: str) -> tuple[float, float, float]:
    """Return the three values of the channels of a mean or a deviation.

    Raises:
      UserError: another number of them, infinite ones, or a deviation that isn't above 0.
    """
    if len(values) != 3 or not np.isfinite(values).all() or (key.endswith("std") and min(values) <= 0):
        above = " above 0" if key.endswith("std") else ""
        raise UserError(f"{key} {list(values)}; three finite numbers{above} are needed")
    return values[0], values[1], values[2]


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


def evaluation_transform(image: UInt8[np.ndarray, "h w 3"], preprocess: Preprocess) -> UInt8[np.ndarray, "a b 3"]:
    """Return the model's input: the image resized by PIL and cropped, or its patches.

    It is bit-equal to the output of transformers' image processors on Pillow, before their normalisation.
    """
    height, width = image.shape[:2]
    if preprocess.max_num_patches:
        height, width = preprocess.target_size(height, width)
        resampling = Image.Resampling(preprocess.resample)
        return preprocess.pack(np.asarray(Image.fromarray(image).resize((width, height), resampling)))
    size, resize = preprocess.image_size_px, preprocess.resize_px or preprocess.image_size_px
    long = int(resize * max(height, width) / min(height, width)) if preprocess.keep_aspect else resize
    shape = (resize, long) if width <= height else (long, resize)  # width, height
    resized = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling(preprocess.resample)))
    halved = (lambda rest: round(rest / 2)) if preprocess.round_crop else (lambda rest: rest // 2)
    top, left = halved(resized.shape[0] - size), halved(resized.shape[1] - size)
    return _crop(resized, top, left, size)


def _crop(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """Return a square crop; outside the image it is black (Hugging Face's rule)."""
    if top >= 0 and left >= 0:
        return np.ascontiguousarray(image[top : top + size, left : left + size])
    height, width = image.shape[:2]
    canvas = np.zeros((max(size, height), max(size, width), 3), np.uint8)
    row, column = -(-(canvas.shape[0] - height) // 2), -(-(canvas.shape[1] - width) // 2)
    canvas[row : row + height, column : column + width] = image
    return _crop(canvas, max(top + row, 0), max(left + column, 0), size)


def patched_size(height: int, width: int, patch_size: int, most: int) -> tuple[int, int]:
    """Return the largest size of nearly the same aspect that has whole patches, at most `most`, and at least one.

    Both sides are rounded up to patches; the scale is found by bisection, with transformers' limits and precision.
    """

    def scaled(side: int, scale: float) -> int:
        return max(1, math.ceil(side * scale / patch_size))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        if scaled(height, scale) * scaled(width, scale) <= most:
            low = scale
        else:
            high = scale
    return scaled(height, low) * patch_size, scaled(width, low) * patch_size


def pack_patches(image: UInt8[np.ndarray, "h w 3"], patch_size: int, most: int) -> UInt8[np.ndarray, "n p 3"]:
    """Return the patches of an image of whole patches as one array of a fixed shape, for images of any aspect.

    Row 0 tells the grid: its first pixel is black, and pixel k + 1 is red where bit k of the number of rows is set, and
    green where bit k of the number of columns is. So normalised pixels tell it too, see `models.naflex.unpack`. Each
    further row is a patch, row by row of the image; the rest is black.
    """
    rows, columns = image.shape[0] // patch_size, image.shape[1] // patch_size
    packed = np.zeros((1 + most, patch_size**2, 3), np.uint8)
    for channel, count in enumerate((rows, columns)):
        packed[0, 1 : 1 + GRID_BITS, channel] = 255 * (count >> np.arange(GRID_BITS) & 1)
    patches = image.reshape(rows, patch_size, columns, patch_size, 3).swapaxes(1, 2)
    packed[1 : 1 + rows * columns] = patches.reshape(rows * columns, patch_size**2, 3)
    return packed


def unpack_patches(packed: UInt8[np.ndarray, "n p 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return the image that `pack_patches` packed, for people to look at."""
    bits = packed[0, 1 : 1 + GRID_BITS, :2] > 0
    rows, columns = (int(count) for count in (bits * 2 ** np.arange(GRID_BITS)[:, None]).sum(axis=0))
    side = math.isqrt(packed.shape[1])
    patches = packed[1 : 1 + rows * columns].reshape(rows, columns, side, side, 3)
    return np.ascontiguousarray(patches.swapaxes(1, 2).reshape(rows * side, columns * side, 3))
