"""Training transforms of uint8 images; each is a pure function of its image and generator."""

import math
from collections.abc import Collection

import cv2
import numpy as np
from jaxtyping import UInt8

from clip_har_jax.config import AugmentConfig, DataConfig
from clip_har_jax.data.decode import Box, TrainingImage
from clip_har_jax.data.randaugment import randaugment
from clip_har_jax.preprocess import Preprocess


def augment(
    image: bytes | UInt8[np.ndarray, "h w 3"],
    preprocess: Preprocess,
    config: AugmentConfig,
    rng: np.random.Generator,
    labels: Collection[str] = (),
    max_megapixels: float = DataConfig.max_megapixels,
) -> UInt8[np.ndarray, "a b 3"]:
    """Return a random resized crop (Szegedy et al. 2015), a flip and the other transforms of the config, in this order.

    Args:
      image: encoded bytes, or pixels in RGB.
      preprocess: gives the size and the form of the result.
      config: the transforms and their strengths.
      rng: the generator of the example in its epoch.
      labels: of the example; the config can exclude classes from mirroring.
      max_megapixels: larger encoded images are refused.

    Raises:
      BadImage: as `image_files.decode`.
    """
    source = TrainingImage(image, max_megapixels)
    if config.crop_scale_min == 1 and preprocess.max_num_patches:
        box = 0, 0, source.width, source.height
    else:
        box = _random_box(source.height, source.width, config.crop_scale_min, rng)
    flip = rng.random() < 0.5
    result = source.take(box, preprocess.target_size(box[3] - box[1], box[2] - box[0]))
    if flip and config.flip and set(config.no_flip_labels).isdisjoint(labels):
        result = cv2.flip(result, 1)
    if config.randaugment_operations:
        result = randaugment(result, config.randaugment_operations, config.randaugment_magnitude, rng)
    if config.color_jitter:
        result = _jitter(result, config.color_jitter, rng)
    if rng.random() < config.erase_probability:
        result = _erase(result, rng)
    return preprocess.pack(np.ascontiguousarray(result))


def _random_box(height: int, width: int, scale_min: float, rng: np.random.Generator) -> Box:
    """Return a crop of random area and aspect; with scale_min 1 the centre square."""
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


def _jitter(image: UInt8[np.ndarray, "h w 3"], strength: float, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """Multiply brightness, contrast and saturation by random factors, 1 - strength to 1 + strength, in one pass."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    luma = np.array([0.299, 0.587, 0.114])
    colours = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * luma)
    shift = brightness * (1 - contrast) * float(image.mean(axis=(0, 1)) @ luma)  # contrast keeps the mean grey
    return cv2.transform(image, np.hstack([colours, np.full((3, 1), shift)]))


def _erase(image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """Fill a random box of 2 to 33% of the image with noise: random erasing (Zhong et al. 2020)."""
    height, width = image.shape[:2]
    area, aspect = height * width * rng.uniform(0.02, 0.33), math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
    down = min(max(round(math.sqrt(area * aspect)), 1), height)
    across = min(max(round(math.sqrt(area / aspect)), 1), width)
    top, left = int(rng.integers(0, height - down + 1)), int(rng.integers(0, width - across + 1))
    result = image.copy()
    result[top : top + down, left : left + across] = rng.integers(0, 256, (down, across, 3), np.uint8)
    return result
