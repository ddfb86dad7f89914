"""The settings and the exact evaluation transform from an image to a model's input. numpy and PIL only.

All images for a model come from `image_files.py`, this file and `patches.py`. Increase `PREPROCESS_VERSION` when the
result of one of them changes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clip_har_jax.errors import UserError
from clip_har_jax.patches import pack_patches, patched_size

PREPROCESS_VERSION = 1
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of openai/CLIP's clip.py, in RGB, of values 0 to 1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and deviation of SigLIP's
RESAMPLING = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}


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
      patch_size_px, max_num_patches: of images that keep their aspect (SigLIP 2 NaFlex), see `patches.py`; 0: images
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
