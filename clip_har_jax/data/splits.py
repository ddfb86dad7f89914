"""Which examples are for training and which for validation."""

import numpy as np
from jaxtyping import Int, Int32


def hold_out(
    label_ids: Int32[np.ndarray, " n"], fraction: float, seed: int
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " val"]]:
    """Splits positions by class: the same share of each class is held out, at least one image where it has two.

    Args:
      label_ids: each example's class.
      fraction: share to hold out, 0 to 1.
      seed: the split is a function of it and of the labels.

    Returns:
      Sorted positions for training and for validation; every class with an image has one for training.
    """
    held: list[np.ndarray] = []
    for label in np.unique(label_ids) if fraction > 0 else []:
        positions = np.flatnonzero(label_ids == label)
        count = min(max(1, round(fraction * len(positions))), len(positions) - 1)
        held.append(np.random.default_rng((seed, int(label))).permutation(positions)[:count])
    val = np.sort(np.concatenate(held)) if held else np.empty(0, np.int64)
    return np.setdiff1d(np.arange(len(label_ids)), val), val
