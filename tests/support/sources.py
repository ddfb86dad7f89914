"""Pictures of one value each, and the contract that every source of examples keeps."""

import io
import pickle
from collections.abc import Sequence

import numpy as np
from PIL import Image

from clip_har_jax.data.sources import Source

CLASSES = ("run", "sit")


def encoded(value: int) -> bytes:
    """Return a PNG whose pixels all hold `value`."""
    buffer = io.BytesIO()
    Image.new("RGB", (10, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def check_source(source: Source, labels: Sequence[str], ids: Sequence[int]) -> None:
    """What holds of every source: labels known beforehand, examples that agree with them, a copy for a worker."""
    assert source.labels == tuple(labels)
    assert source.label_ids.dtype == np.int32
    assert source.label_ids.tolist() == list(ids)
    assert len(source) == len(ids)
    assert source.tally.kept >= len(ids)  # more where the source is a part of another
    source[0]  # opens what it reads from
    copy = pickle.loads(pickle.dumps(source))
    for i, label in enumerate(ids):
        example = source[i]
        assert example.label == label
        assert isinstance(example.data, bytes)
        assert example.name
        assert copy[i] == example
    assert len({source[i].name for i in range(len(source))}) == len(source)
    assert len(source.fingerprint) == 64
