"""Batch number -> batch: read, decoded and transformed in the calling thread or process."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from clip_har_jax.batch import Batch
from clip_har_jax.config import DataConfig
from clip_har_jax.data.augment import augment
from clip_har_jax.data.examples import ClipData, ClipViews, Example, Source
from clip_har_jax.data.sampling import Order
from clip_har_jax.image_files import BadImage, decode
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.video.sampling import FrameSampling

BadInput = tuple[int, str, str]  # index, name, reason


class HostBatch(NamedTuple):
    """A batch in host memory, and the inputs of it that couldn't be read."""

    batch: Any  # a `Batch` or a `PairBatch`
    errors: tuple[BadInput, ...]
    positions: tuple[Any, ...] = ()  # of the streams that it was read from, after it


class BatchSource:
    """Batch number -> this process's rows of that batch, with random access.

    Args:
      seed: of order and augmentation; None: evaluation, in the source's order, each example once.
      rows: (first, last) row of each global batch that this process reads.
      first_example: position at which batch 0 begins; not 0 after the batch size was changed at resume.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        preprocess: Preprocess,
        seed: int | None,
        global_batch_size: int,
        rows: tuple[int, int],
        first_example: int = 0,
    ):
        self.source, self.config, self.preprocess, self.seed = source, config, preprocess, seed
        self.global_batch_size, self.rows, self.first_example = global_batch_size, rows, first_example
        self._clips = source.clips
        self._no_label: int | np.ndarray = 0 if source.targets is None else np.zeros(len(source.labels), bool)
        self._order = None if seed is None else Order(source, config.sampling, seed)

    def __len__(self) -> int:
        if self.seed is not None:
            return 2**40 // self.global_batch_size  # practically endless
        return -(-len(self.source) // self.global_batch_size)

    def __getitem__(self, step: int) -> HostBatch:
        return self.read(step, np.empty(self.shape, np.uint8))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of images: [rows, h, w, 3], clips [rows, frames, h, w, 3]; with views [rows, views, frames, ...]."""
        return (self.rows[1] - self.rows[0], *self._example_shape())

    def read(self, step: int, images: UInt8[np.ndarray, "..."], each: Callable[..., Iterator[Any]] = map) -> HostBatch:
        """Read batch `step` and write its images into `images`; `each` is `map` or a parallel version of it."""
        first, last = (self.first_example + step * self.global_batch_size + row for row in self.rows)
        loaded = each(self._load, range(first, last), images)
        labels, mask, index, errors = zip(*loaded, strict=True)
        kind = np.int32 if self.source.targets is None else np.uint8
        batch = Batch(images, np.asarray(labels, kind), np.asarray(mask, np.float32), np.asarray(index, np.int32))
        return HostBatch(batch, tuple(error for error in errors if error is not None))

    def _load(
        self, position: int, image: UInt8[np.ndarray, "..."]
    ) -> tuple[int | np.ndarray, float, int, BadInput | None]:
        """Write an example into `image`, or zeros if there is none; return its label, mask, index and error."""
        if self._order is None and position >= len(self.source):
            image.fill(0)
            return self._no_label, 0.0, -1, None
        index, key = (position, ()) if self._order is None else self._order[position]
        label, name = self.source.label_of(index), ""
        try:
            example = self.source[index]
            name = example.name
            image[...] = self._transform(example, index, key)
            return label, 1.0, index, None
        except BadImage as error:
            name, reason = name or self.source.name(index), str(error)
        except OSError as error:
            name = str(error.filename or name or self.source.name(index))
            reason = f"can't be read ({error.strerror or error})"
        except Exception as error:  # a bug; the exception may be one that a worker can't send
            raise RuntimeError(f"{name or self.source.name(index)}: {type(error).__name__}: {error}") from error
        image.fill(0)
        return label, 0.0, index, (index, name, reason)

    def _example_shape(self) -> tuple[int, ...]:
        """Return the shape of one example: an image, the frames of one view of a clip, or of several views."""
        image, video = self.preprocess.shape, self.config.video
        views = (video.num_views,) if video.num_views > 1 and self.seed is None else ()
        return (*views, video.num_frames, *image) if self._clips else image

    def _read_frames(self, clip: ClipData, labels: tuple[str, ...], key: tuple[int, ...]) -> np.ndarray:
        """Return the frames of a clip, all transformed in the same way."""
        config, video = self.config, self.config.video
        sampling = FrameSampling(video.num_frames, video.sampling, video.rate_hz, video.num_views)

        def each(image: np.ndarray) -> np.ndarray:
            if not key:
                return evaluation_transform(image, self.preprocess)
            return augment(image, self.preprocess, config.augment, np.random.default_rng(key), labels)

        rng = np.random.default_rng((*key, 1)) if key else None
        views = range(1 if key else video.num_views)
        read = clip.read(ClipViews(sampling, views, rng, each, config.max_megapixels))
        frames = np.stack([np.stack(view.frames) for view in read])
        return frames.reshape(self._example_shape())

    def _transform(self, example: Example, index: int, key: tuple[int, ...]) -> np.ndarray:
        image, config, labels = example.data, self.config, self.source.names_of(index)
        if isinstance(image, ClipData):
            return self._read_frames(image, labels, key)
        if key:
            rng = np.random.default_rng(key)
            return augment(image, self.preprocess, config.augment, rng, labels, config.max_megapixels)
        if isinstance(image, bytes):
            image = decode(image, config.max_megapixels)
        return evaluation_transform(image, self.preprocess)
