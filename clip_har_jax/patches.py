"""An image of any aspect as patches in one array of a fixed shape, for SigLIP 2 NaFlex. numpy only.

Increase `preprocess.PREPROCESS_VERSION` when the result changes.
"""

import math

import numpy as np
from jaxtyping import UInt8

GRID_BITS = 12  # of the number of rows and of columns of packed patches


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
