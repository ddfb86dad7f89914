"""What sources give: an example, and the protocol of whatever holds them."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from clip_har_jax.files import sha256


class ClipFile(NamedTuple):
    """A video, of which frames are read when it is known which."""

    path: str


class Example(NamedTuple):
    """One example as its source gives it."""

    data: bytes | np.ndarray | ClipFile  # an encoded image, uint8 [h, w, 3], or a video
    label: int
    name: str  # by which a person finds it


@runtime_checkable
class Source(Protocol):
    """Labelled examples with random access."""

    labels: tuple[str, ...]
    label_ids: np.ndarray  # int32 [n], known without reading an image
    fingerprint: str  # SHA-256 over what is listed

    def __len__(self) -> int:
        """How many examples there are."""

    def __getitem__(self, i: int) -> Example:
        """Read one example; OSError where its file can't be read."""


def fingerprint_of(*parts: object) -> str:
    """Return one digest of values, by how Python writes them."""
    return sha256(repr(part) + "\0" for part in parts)
