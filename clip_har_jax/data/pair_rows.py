"""The rows of batches of pairs: pixels and token ids. A worker process needs this file alone, and no grain or JAX."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from clip_har_jax.batch import PairBatch
from clip_har_jax.config import DataConfig
from clip_har_jax.data.augment import augment
from clip_har_jax.data.batches import BadInput, HostBatch
from clip_har_jax.data.pair_streams import Drawn, PairStream, Position, StreamPlan
from clip_har_jax.data.pairs import BadPair, Found
from clip_har_jax.image_files import BadImage, decode
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.tokenization import TextTokenizer


@dataclass(frozen=True)
class PairTransform:
    """How a pair becomes a row: pixels and token ids."""

    config: DataConfig
    preprocess: Preprocess
    tokenizer: TextTokenizer
    context_length: int

    def pixels(self, image: bytes, key: tuple[int, ...]) -> UInt8[np.ndarray, "a b 3"]:
        """Return an image augmented by its seed; with an empty one transformed as in every evaluation.

        Raises:
          BadImage: it can't be decoded.
        """
        if key:
            rng = np.random.default_rng(key)
            return augment(image, self.preprocess, self.config.augment, rng, (), self.config.max_megapixels)
        return evaluation_transform(decode(image, self.config.max_megapixels), self.preprocess)

    def load(self, found: Found | None, key: tuple[int, ...], image: UInt8[np.ndarray, "..."]) -> tuple[str, str, str]:
        """Write the pixels of a pair into `image`, or zeros if it can't be read.

        Returns:
          The caption, and the name and the reason of a pair that can't be read; empty otherwise.
        """
        if found is None or isinstance(found, BadPair):
            image.fill(0)
            return "", *(found or ("", ""))
        try:
            image[...] = self.pixels(found.image, key)
            return found.caption, "", ""
        except BadImage as error:
            image.fill(0)
            return "", found.name, str(error)
        except Exception as error:  # a bug; the exception may be one that a worker can't send
            raise RuntimeError(f"{found.name}: {type(error).__name__}: {error}") from error

    def batch(
        self, images: UInt8[np.ndarray, "..."], loaded: Sequence[tuple[str, str, str]], first: int
    ) -> tuple[PairBatch, tuple[BadInput, ...]]:
        """Return the rows that `load` wrote into `images`, numbered from `first`, and their errors."""
        captions, names, reasons = zip(*loaded, strict=True)
        ids, _ = self.tokenizer(captions, self.context_length)
        index = np.arange(first, first + len(loaded), dtype=np.int32)
        errors = tuple(
            (int(number), name, reason) for number, name, reason in zip(index, names, reasons, strict=True) if reason
        )
        return PairBatch(images, ids, np.asarray([float(bool(text)) for text in captions], np.float32), index), errors


class StreamRows:
    """The rows of some streams in each global batch, read in order. Sent to a worker before it reads.

    Args:
      plan: of the run's streams.
      transform: of its pairs.
      batch_size: global.
      streams: the numbers of these streams, consecutive.
      positions: of each; None: from the start.
    """

    def __init__(
        self,
        plan: StreamPlan,
        transform: PairTransform,
        batch_size: int,
        streams: Sequence[int],
        positions: Sequence[Position | None],
    ):
        self._plan, self._transform, self._numbers, self._positions = plan, transform, streams, positions
        self._rows = batch_size // plan.num_streams
        self._streams: list[PairStream] = []

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the images: [rows, h, w, 3]."""
        return (self._rows * len(self._numbers), *self._transform.preprocess.shape)

    def read(self, step: int, images: UInt8[np.ndarray, "..."], each: Callable[..., Iterator[Any]] = map) -> HostBatch:
        """Read the next rows and write their images into `images`; `each` is `map` or a parallel version of it."""
        if not self._streams:
            starts = zip(self._numbers, self._positions, strict=True)
            self._streams = [PairStream(self._plan, number, position) for number, position in starts]
        drawn = [next(stream) for stream in self._streams for _ in range(self._rows)]
        loaded = list(each(self._load, drawn, images))
        batch, errors = self._transform.batch(images, loaded, self._numbers[0] * self._rows)
        return HostBatch(batch, errors, tuple(stream.position for stream in self._streams))

    def _load(self, drawn: Drawn, image: UInt8[np.ndarray, "..."]) -> tuple[str, str, str]:
        return self._transform.load(drawn.found, drawn.key, image)
