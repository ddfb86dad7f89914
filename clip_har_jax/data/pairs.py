"""Image-text pairs, read sequentially from shards: the interface of their readers."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
END = -1  # the position after a shard whose rest can't be read


class Pair(NamedTuple):
    """An encoded image and its caption."""

    name: str  # the shard and the pair's name in it
    image: bytes
    caption: str


class BadPair(NamedTuple):
    """A pair, or the rest of a shard, that can't be read."""

    name: str
    reason: str


Found = Pair | BadPair


class PairReader(ABC):
    """The shards of one SPEC; sent to worker processes, so it holds no open file.

    Attributes:
      names: of the shards.
      num_pairs: of all shards; None: not known before they are read.
      fingerprint: SHA-256 over the identity of the shards.
    """

    names: Sequence[str]
    num_pairs: int | None
    fingerprint: str

    @abstractmethod
    def read(self, shard: int, start: int) -> Iterator[tuple[Found, int]]:
        """Yield the pairs of a shard, each with the position after it.

        What can't be read is a `BadPair`; if the rest of the shard can't be read, it is the last one.

        Args:
          shard: number of the shard.
          start: 0, or a position at which reading continues; `END`: nothing is left.
        """


def decode_caption(data: bytes | None) -> str:
    """Return the text of a caption, without outer spaces.

    Raises:
      ValueError: not UTF-8 (or UTF-16 with its mark), or empty; says what to do.
    """
    if data is None:
        raise ValueError("it has no caption; add one or remove the image")
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding).strip("\0 \t\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption isn't UTF-8 (byte {error.start}); convert it, e.g. with iconv") from error
    if not text:
        raise ValueError("its caption is empty; write one or remove the image")
    return text


def make_pair(name: str, image: bytes | None, caption: bytes | str | None) -> Found:
    """Return a pair, or the reason why it is none; the image isn't decoded."""
    if not image:
        return BadPair(name, "it has no image; add one or remove the caption")
    try:
        return Pair(name, image, decode_caption(caption.encode() if isinstance(caption, str) else caption))
    except ValueError as error:
        return BadPair(name, str(error))
