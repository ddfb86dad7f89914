"""Train-only transforms on uint8 images; each is a function of its generator alone."""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clip_har_jax.config import AugmentConfig


def augment(
    image: UInt8[np.ndarray, "h w 3"], size_px: int, config: AugmentConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """A random resized crop (Szegedy et al. 2015) and a flip, as the config says."""
    box = _random_box(image.shape[0], image.shape[1], config.crop_scale_min, rng)
    flip = config.flip and rng.random() < 0.5
    whole = (0, 0, image.shape[1], image.shape[0])
    if box != whole or image.shape[:2] != (size_px, size_px):
        resized = Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)
        image = np.asarray(resized)
    return np.ascontiguousarray(image[:, ::-1] if flip else image)


def _random_box(height: int, width: int, scale_min: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop of random area and aspect; with scale_min 1 the centre square."""
    if scale_min < 1:
        for _ in range(10):
            area = height * width * rng.uniform(scale_min, 1)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(rng.integers(0, width - crop_width + 1))
                top = int(rng.integers(0, height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
