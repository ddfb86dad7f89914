"""RandAugment (Cubuk et al. 2020) on uint8 images: several random operations of one strength."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from clip_har_jax.config import MAX_MAGNITUDE

FILL = (124, 116, 104)  # CLIP's mean colour, for pixels from outside of the image

# name -> operation on an image, for a strength from 0 to 1 and a sign of -1 or 1
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, s, sign: image,
    "autocontrast": lambda image, s, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, s, sign: ImageOps.equalize(image),
    "rotate": lambda image, s, sign: image.rotate(30 * s * sign, Image.Resampling.BILINEAR, fillcolor=FILL),
    "posterize": lambda image, s, sign: ImageOps.posterize(image, 8 - round(4 * s)),
    "solarize": lambda image, s, sign: ImageOps.solarize(image, 256 - round(256 * s)),
    "color": lambda image, s, sign: ImageEnhance.Color(image).enhance(1 + 0.9 * s * sign),
    "contrast": lambda image, s, sign: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s * sign),
    "brightness": lambda image, s, sign: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s * sign),
    "sharpness": lambda image, s, sign: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s * sign),
    "shear_x": lambda image, s, sign: _affine(image, (1.0, 0.3 * s * sign, 0.0, 0.0, 1.0, 0.0)),
    "shear_y": lambda image, s, sign: _affine(image, (1.0, 0.0, 0.0, 0.3 * s * sign, 1.0, 0.0)),
    "translate_x": lambda image, s, sign: _affine(image, (1.0, 0.0, 0.3 * s * sign * image.width, 0.0, 1.0, 0.0)),
    "translate_y": lambda image, s, sign: _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, 0.3 * s * sign * image.height)),
}


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def randaugment(
    image: UInt8[np.ndarray, "h w 3"], count: int, magnitude: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Apply `count` random operations of strength `magnitude`, 0 to MAX_MAGNITUDE."""
    names = list(OPERATIONS)
    picture = Image.fromarray(image)
    for _ in range(count):
        name, sign = names[int(rng.integers(len(names)))], 1 if rng.random() < 0.5 else -1
        picture = OPERATIONS[name](picture, magnitude / MAX_MAGNITUDE, sign)
    return np.asarray(picture)
