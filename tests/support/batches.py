"""Sources of small pictures, and the batches that the input pipeline makes of them."""

import io
import time
import zlib
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from clip_har_jax.batch import Batch
from clip_har_jax.config import AugmentConfig, DataConfig
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.pipeline import eval_batches, train_batches
from clip_har_jax.data.sources import Example, Source
from clip_har_jax.preprocess import Preprocess

SIZE_PX = 16

PREPROCESS = Preprocess(SIZE_PX)


class ArraySource(Source):
    """Images of 12 x 20 px made from their numbers; some are damaged, missing, or a bug."""

    labels = ("run", "sit", "walk")

    def __init__(self, count: int, damaged: Iterable[int] = (), missing: Iterable[int] = (), bug: int | None = None):
        self.label_ids = np.arange(count, dtype=np.int32) % len(self.labels)
        self.fingerprint = "0" * 64
        self.damaged, self.missing, self.bug = set(damaged), set(missing), bug

    def __len__(self) -> int:
        return len(self.label_ids)

    def __getitem__(self, i: int) -> Example:
        name = f"image-{i}"
        if i in self.missing:
            raise FileNotFoundError(2, "No such file or directory", name)
        if i == self.bug:
            raise ZeroDivisionError("made by the test")
        image = np.random.default_rng(i).integers(0, 256, (12, 20, 3), np.uint8)
        return Example(b"no image" if i in self.damaged else image, int(self.label_ids[i]), name)


def counting_only(source: Source) -> BadInputs:
    return BadInputs(source, 1.0)


def train(source: Source, steps: int, config: DataConfig = DataConfig(), **options: Any) -> list[Batch]:  # noqa: B008
    given: dict[str, Any] = {"seed": 0, "global_batch_size": 4, "bad_inputs": counting_only(source), **options}
    with train_batches(source, config, PREPROCESS, **given) as batches:
        return list(islice(batches, steps))


def evaluation(source: Source, batch_size: int, config: DataConfig = DataConfig(), **options: Any) -> list[Batch]:  # noqa: B008
    options = {"bad_inputs": counting_only(source)} | options
    with eval_batches(source, config, PREPROCESS, batch_size=batch_size, **options) as batches:
        return list(batches)


def read_bytes(source: Source, i: int) -> bytes:
    """Return an example that is an encoded image."""
    data = source[i].data
    assert isinstance(data, bytes)
    return data


def read_pixels(source: Source, i: int) -> np.ndarray:
    """Return an example that is an array."""
    data = source[i].data
    assert isinstance(data, np.ndarray)
    return data


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def assert_differ(first: list[Batch], second: list[Batch]) -> None:
    assert any((one.image != other.image).any() for one, other in zip(first, second, strict=True))


def joined(parts: Iterable[list[Batch]]) -> list[Batch]:
    """Return the global batches of which each process has a part."""
    return [Batch(*map(np.concatenate, zip(*shares, strict=True))) for shares in zip(*parts, strict=True)]


def wait_until(done: Any, limit_s: float = 20.0) -> bool:
    end = time.monotonic() + limit_s
    while not (result := done()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(result)


def checksum(batches: Iterable[Batch]) -> int:
    return zlib.crc32(b"".join(np.asarray(values).tobytes() for batch in batches for values in batch))


def jpeg(image: np.ndarray, quality: int = 95, **options: Any) -> bytes:
    Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=quality, **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC))


EVERYTHING = AugmentConfig(
    randaugment_operations=2, color_jitter=0.4, erase_probability=0.5, no_flip_labels=("run",), crop_scale_min=0.3
)


class PhotoSource(ArraySource):
    """JPEGs, larger than what is made of them."""

    def __getitem__(self, i: int) -> Example:
        example = super().__getitem__(i)
        if isinstance(example.data, bytes):
            return example
        return example._replace(data=jpeg(np.kron(example.data, np.ones((8, 8, 1), np.uint8))))


def digest(batches: list[Batch]) -> list[int]:
    return [zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in batch)) for batch in batches]
