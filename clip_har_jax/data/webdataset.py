"""`webdataset:PATTERN`: tar shards of images and captions, read from any byte position on.

A pair is the consecutive members of one name: an image, and its caption as `.txt` or as "caption" in `.json`, or in the
member that `?caption=SUFFIX` names. Other members are skipped, pickles too: nothing of a shard is ever unpickled.

docs/adr/0009-own-pair-streams.md says why the `webdataset` package isn't used.
"""

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from clip_har_jax.data.examples import fingerprint_of
from clip_har_jax.data.pairs import END, BadPair, Found, PairReader, make_pair
from clip_har_jax.data.shards import fault_of, list_shards, open_shard
from clip_har_jax.image_formats import IMAGE_SUFFIXES
from clip_har_jax.specs import Spec

SUFFIXES = (".tar", ".tar.gz", ".tgz")
PICKLES = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz")  # of webdataset's decoders; NumPy's can hold pickles
IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
MAX_MEMBER_BYTES = 256 << 20
BLOCK = tarfile.BLOCKSIZE


class WebDataset(PairReader):
    """The tar shards of a pattern.

    Raises:
      UserError: no such files.
    """

    num_pairs = None

    def __init__(self, spec: Spec):
        shards = list_shards(spec.path, SUFFIXES, str(spec))
        self.names = [shard.path for shard in shards]
        self.caption = spec.options.get("caption", "").lower().removeprefix(".")
        identity = [(name.rpartition("/")[2], shard.size) for name, shard in zip(self.names, shards, strict=True)]
        self.fingerprint = fingerprint_of("webdataset", self.caption, identity)

    def read(self, shard: int, start: int) -> Iterator[tuple[Found, int]]:
        """Yield the pairs of a shard; a position is a byte offset, of a compressed shard in the uncompressed data."""
        path, at = self.names[shard], start
        if start == END:
            return
        try:
            with open_shard(path) as file:
                for found, at in _read_tar(_unpacked(file, path), start, path, self.caption):
                    yield found, at
        except Exception as error:
            reason = fault_of(error, tarfile.TarError, zlib.error)
            yield BadPair(path, f"it can't be read after byte {at} ({reason}); copy the shard again"), END


def _unpacked(file: Any, path: str) -> Any:
    return gzip.GzipFile(fileobj=file) if path.endswith("gz") else file


def _read_tar(file: Any, start: int, path: str, caption: str) -> Iterator[tuple[Found, int]]:
    """Yield the pairs of a tar, each with the offset of the next member.

    Raises:
      tarfile.ReadError: damaged, or cut off.
    """
    file.seek(start)
    tar: Any = tarfile.TarFile(fileobj=file, mode="r")
    key, members = "", dict[str, bytes]()
    for info in tar:
        tar.members.clear()  # it would keep them all
        if not info.isreg():
            continue
        name, suffix = _split(info.name)
        if name != key:
            if members:
                yield _pair(f"{path}: {key}", members, caption), info.offset
            key, members = name, {}
        if suffix in PICKLES:
            members[suffix] = b""
        elif suffix in IMAGES or suffix in ("txt", "json", caption):
            if info.size > MAX_MEMBER_BYTES:
                raise tarfile.ReadError(f"{info.name} has {info.size} bytes, at most {MAX_MEMBER_BYTES} are read")
            file.seek(info.offset_data)
            members[suffix] = file.read(info.size)
            if len(members[suffix]) < info.size:
                raise tarfile.ReadError("unexpected end of data")
    if members:
        yield _pair(f"{path}: {key}", members, caption), tar.offset
    _check_end(file, tar.offset)


def _check_end(file: Any, offset: int) -> None:
    """Check that a tar ends as it should; tarfile takes a damaged or missing header for the end.

    Raises:
      tarfile.ReadError: it doesn't.
    """
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise tarfile.ReadError("unexpected end of data")
    if block.count(0) != BLOCK:
        raise tarfile.ReadError("a damaged header")


def _split(name: str) -> tuple[str, str]:
    """Return the name of a pair and the suffix of a member: up to the first dot of the file's name, and after it.

    >>> _split("train/0001.cls.txt")
    ('train/0001', 'cls.txt')
    """
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def _pair(name: str, members: dict[str, bytes], caption: str) -> Found:
    images = [suffix for suffix in members if suffix in IMAGES]
    if len(images) > 1:
        return BadPair(name, f"it has {len(images)} images ({', '.join(images)}); keep one")
    try:
        text = members.get(caption or "txt")
        if text is None and not caption and "json" in members:
            text = _caption_of(members["json"])
    except ValueError as error:
        return BadPair(name, f"its .json can't be read ({error}); write the caption as .txt")
    pickled = [suffix for suffix in members if suffix in PICKLES]
    if pickled and (not images or text is None):
        missing = "caption" if images else "image"
        return BadPair(
            name,
            f"it has no {missing}, only .{pickled[0]}, which may be a pickle and is never loaded; write it as "
            f"{'.txt' if images else '.jpg'}",
        )
    return make_pair(name, members[images[0]] if images else None, text)


def _caption_of(data: bytes) -> bytes | None:
    """Return the caption in a sample's metadata.

    Raises:
      ValueError: not JSON.
    """
    value = json.loads(data)
    text = value.get("caption") if isinstance(value, dict) else None
    return text.encode() if isinstance(text, str) else None
