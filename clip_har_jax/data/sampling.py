"""The example at each position: shuffled in each epoch, with rare classes more often if configured."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from clip_har_jax.data.sources import Source
from clip_har_jax.errors import UserError


class Draw(NamedTuple):
    """An example at a position, and the seed of its augmentation."""

    example: int
    key: tuple[int, ...]


def example_weights(source: Source, sampling: str) -> Float64[np.ndarray, " n"] | None:
    """Return how often each example occurs in an epoch on average; None: once.

    class_balanced: each class equally often. repeat_factor: classes rarer than the mean more often, by the square root
      of the ratio (Gupta et al. 2019, equation 1, with the mean share as threshold). weights: the manifest's.

    Raises:
      UserError: the source has no weights, or none above 0.
    """
    if sampling == "shuffle":
        return None
    if sampling == "weights":
        if source.weights is None:
            raise UserError("config.data.sampling='weights': the training data is no manifest, so it has no weights")
        weights = np.asarray(source.weights, np.float64)
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise UserError("config.data.sampling='weights': weights must be 0 or more, and one above 0")
    else:
        counts = np.bincount(source.label_ids, minlength=len(source.labels))
        share = counts / counts.sum()
        found = np.maximum(share, 1e-12)
        factor = 1 / found if sampling == "class_balanced" else np.maximum(1, np.sqrt(1 / (counts > 0).sum() / found))
        weights = factor[source.label_ids]
    return weights / weights.sum() * len(weights)


class Order:
    """Position -> example, endless and with random access; an epoch has as many positions as there are examples.

    With weights, an epoch is a systematic sample: an example of weight w occurs floor(w) or ceil(w) times.
    """

    def __init__(self, source: Source, sampling: str, seed: int):
        weights = example_weights(source, sampling)
        self._bounds = None if weights is None else np.cumsum(weights)
        self._size, self._seed = len(source), seed

    def __getitem__(self, position: int) -> Draw:
        epoch, place = divmod(position, self._size)
        ranks, offset = _of_epoch(self._seed, epoch, self._size)
        rank = int(ranks[place])
        if self._bounds is None:
            return Draw(rank, (self._seed, epoch, rank))
        index = int(np.searchsorted(self._bounds, rank + offset, side="right"))
        return Draw(min(index, self._size - 1), (self._seed, epoch, index, rank))


@lru_cache(maxsize=4)  # concurrent batches lie in at most two epochs of one or two sources
def _of_epoch(seed: int, epoch: int, size: int) -> tuple[Int[np.ndarray, " n"], float]:
    """Return an epoch's permutation, and the offset of its systematic sample in the first example."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(size), rng.random()
