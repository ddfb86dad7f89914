"""A pair -> a row of a batch: pixels and token ids; and the count of the pairs that can't be one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from jaxtyping import UInt8

from clip_har_jax.batch import PairBatch
from clip_har_jax.config import DataConfig
from clip_har_jax.data.augment import augment
from clip_har_jax.data.batches import BadInput
from clip_har_jax.data.pairs import BadPair, Found
from clip_har_jax.data.pipeline import append_log
from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import BadImage, Preprocess, decode, evaluation_transform
from clip_har_jax.tokenization import TextTokenizer

FEWEST_ROWS = 1000  # the accepted share of bad pairs is of at least so many
MOST_LOGGED = 10_000  # bad pairs; later ones are only counted


class BadPairs:
    """The pairs that couldn't be read: counted, logged, and an error if there are too many.

    Args:
      max_fraction: accepted share of the pairs read so far, or of `FEWEST_ROWS` if these are fewer.
      log: bad_inputs.jsonl, appended to; None: only count.
    """

    def __init__(self, max_fraction: float, log: epath.PathLike | None = None):
        self._max_fraction, self._log = max_fraction, None if log is None else epath.Path(log)
        self._rows = self._bad = 0
        self._seen: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def record(self, errors: Iterable[BadInput], num_rows: int) -> None:
        """Count the rows of a batch, and count and log its errors.

        Raises:
          UserError: more bad pairs than the config allows.
        """
        errors = list(errors)
        self._rows, self._bad = self._rows + num_rows, self._bad + len(errors)
        new = {name: (index, reason) for index, name, reason in errors if name not in self._seen}
        if len(self._seen) < MOST_LOGGED:
            if new and self._log is not None:
                append_log(self._log, {index: (name, reason) for name, (index, reason) in new.items()})
            self._seen |= {name: reason for name, (_, reason) in new.items()}
        if self._bad > self._max_fraction * max(self._rows, FEWEST_ROWS):
            name, reason = next(iter(self._seen.items()))
            listed = f", all so far in {self._log}" if self._log is not None else ""
            raise UserError(
                f"{self._bad} of the {self._rows} pairs read so far can't be used, first {name}: {reason}{listed}"
                "; mend or remove them, or raise config.data.max_bad_fraction"
            )


@dataclass(frozen=True)
class PairTransform:
    """How a pair becomes a row: pixels and token ids."""

    config: DataConfig
    preprocess: Preprocess
    tokenizer: TextTokenizer
    context_length: int

    @property
    def size_px(self) -> int:
        return self.preprocess.image_size_px

    def pixels(self, image: bytes, key: tuple[int, ...]) -> UInt8[np.ndarray, "size size 3"]:
        """Return an image augmented by its seed; with an empty one transformed as in every evaluation.

        Raises:
          BadImage: it can't be decoded.
        """
        if key:
            rng = np.random.default_rng(key)
            return augment(image, self.size_px, self.config.augment, rng, "", self.config.max_megapixels)
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
