"""CLIP's normalisation on the host, which the models' graphs hold themselves."""

import numpy as np
from jaxtyping import Float32, UInt8


def normalize(
    images: UInt8[np.ndarray, "*b h w 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float32[np.ndarray, "*b h w 3"]:
    """Return values of 0 to 1, less the mean and over the standard deviation of each channel."""
    return (images.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
