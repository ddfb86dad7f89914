"""Near duplicates: the same photograph re-encoded, resized, slightly cropped or framed; and groups of them.

A 64-bit perceptual hash finds candidates among all pairs; a comparison of thumbnails at several scales decides. Clips
are compared by some of their frames.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import imagehash
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8, UInt64
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from clip_har_jax.data.hamming import near_pairs

# Of copies of 840 photographs, re-encoded, resized, cropped or bordered, 99.6 to 100% pass both bounds (docs/
# performance.md). Of the 352,380 pairs of different photographs two pass: one copy, and two shots of one scene.
MAX_BITS = 16  # differing bits of 64
MIN_CORRELATION = 0.85
SCALES = (0.92, 0.95, 0.98, 1.0, 1.02, 1.05, 1.08)  # sizes at which a crop is compared with its original
COMPARED = 0.84  # share of a side that is compared, so that both contain it
WORKING_PX, THUMBNAIL_PX = 256, 48
FLAT = 4.0  # standard deviation in grey levels below which a line is a border and a picture is empty
MIN_SIDE_PX = 16  # size after borders are removed
FRAMES = 6  # per clip, evenly spaced
# Frames of copies of drawn clips, re-encoded, rescaled or trimmed, reach 0.95; of different clips 0.90 at most.
MIN_CLIP_CORRELATION = 0.92
MIN_SHARE = 2 / 3  # share of a clip's frames that must be near duplicates of frames of the other
MAX_COMPARED = 100  # largest group in which all pairs are compared
PAIRS_TO_FILTER = 10_000  # pairs looked up in the groups at once
PAIRS_AT_ONCE = 2**24  # bounds the memory
# Images with different labels count as one picture only above this bound: 87% (8% cut off one side) to 100% (half the
# size) of the copies of 60 photographs pass, but no pair of two shots of a scene or two people (0.874 at most).
MIN_CONFLICT_CORRELATION = 0.93
# The thumbnails of 523 such copies, resized to 8 x 8, correlate by 0.93 and more. For blurred pictures, whose hashes
# say little, this check saves 149 of 150 comparisons.
COARSE_PX = 8
MIN_COARSE = 0.8


class Signature(NamedTuple):
    """The data by which pictures are compared."""

    hash: int  # of 64 bits
    thumbnail: UInt8[np.ndarray, "s s"]  # grey, without borders
    flat: bool  # an empty picture, which would look like any other empty one


def make_signature(image: UInt8[np.ndarray, "h w 3"]) -> Signature:
    """Return the signature of a picture without borders: pHash (Zauner 2010, as in imagehash), thumbnail, flatness."""
    grey = Image.fromarray(image).convert("L").resize((WORKING_PX, WORKING_PX), Image.Resampling.BILINEAR)
    inner = _without_borders(np.asarray(grey))
    bits = imagehash.phash(Image.fromarray(inner)).hash
    thumbnail = cv2.resize(inner, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    packed = int.from_bytes(np.packbits(bits.reshape(-1)).tobytes(), "big")
    return Signature(packed, thumbnail, bool(thumbnail.std() < FLAT))


def _without_borders(grey: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:
    """Return the picture without uniform lines at its edges; repeated, since a framed picture may have a margin too."""
    while True:
        top, bottom = _border(grey), _border(grey[::-1])
        left, right = _border(grey.T), _border(grey.T[::-1])
        inner = grey[top : len(grey) - bottom, left : grey.shape[1] - right]
        if inner.shape == grey.shape or min(inner.shape) < MIN_SIDE_PX:
            return np.ascontiguousarray(grey)
        grey = inner


def _border(lines: np.ndarray) -> int:
    """Count the first lines that are a border: uniform and alike, at most half of the picture.

    The line after them counts too, since scaling mixes it with the border.
    """
    lines = lines[: len(lines) // 2].astype(np.float32)
    even = (lines.std(axis=1) < FLAT) & (np.abs(lines.mean(axis=1) - lines[0].mean()) < FLAT)
    count = len(lines) if even.all() else int(even.argmin())
    return count + 1 if count else 0


def similarity(a: UInt8[np.ndarray, "s s"], b: UInt8[np.ndarray, "s s"]) -> float:
    """Return the correlation of two thumbnails, where the middle of one fits best on the other; 1: identical."""
    best = -1.0
    for scale in SCALES:
        side = round(THUMBNAIL_PX * scale)
        resized = cv2.resize(b, (side, side), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        part = round(THUMBNAIL_PX * COMPARED)
        edge = (side - part) // 2
        middle = resized[edge : edge + part, edge : edge + part]
        best = max(best, float(cv2.matchTemplate(a, middle, cv2.TM_CCOEFF_NORMED).max()))
    return best


def find_candidates(
    hashes: UInt64[np.ndarray, " n"], coarse: Float32[np.ndarray, "n d"]
) -> Iterator[tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"], float]]:
    """Yield pairs of positions (first below second) whose hashes differ in few bits and whose tiny thumbnails
    correlate.

    All such pairs are found. The third item is the finished share of the search.
    """
    return near_pairs(hashes, MAX_BITS, coarse, MIN_COARSE)


def _blocks(count: int) -> Iterator[slice]:
    """Yield the rows that are compared at once with all that follow."""
    size = max(1, PAIRS_AT_ONCE // max(count, 1))
    return (slice(start, start + size) for start in range(0, count, size))


def _coarse(thumbnail: UInt8[np.ndarray, "s s"]) -> Float32[np.ndarray, " d"]:
    """Return a tiny, normalised version of a thumbnail: the product of two is their correlation."""
    small = cv2.resize(thumbnail, (COARSE_PX, COARSE_PX), interpolation=cv2.INTER_AREA).astype(np.float32).reshape(-1)
    small -= small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-6)


def find_pairs(signatures: Sequence[Signature]) -> list[tuple[int, int, float]]:
    """Return (position, position, similarity) of near duplicates, sorted; flat pictures have none.

    In a group of more than MAX_COMPARED certain copies, no further pairs are compared: their group stays the same, and
    the time doesn't grow with the square of its size.
    """
    shown = np.array([i for i, signature in enumerate(signatures) if not signature.flat], np.int64)
    hashes = np.array([signatures[i].hash for i in shown], np.uint64)
    coarse = np.array([_coarse(signatures[i].thumbnail) for i in shown], np.float32).reshape(-1, COARSE_PX**2)
    pairs, certain = [], _Certain(len(signatures))
    for first, second in _shown(find_candidates(hashes, coarse)):
        for i, j in certain.left_to_compare(shown[first], shown[second]):
            alike = similarity(signatures[i].thumbnail, signatures[j].thumbnail)
            if alike >= MIN_CORRELATION:
                pairs.append((i, j, alike))
            if alike >= MIN_CONFLICT_CORRELATION:
                certain.join(i, j)
    return sorted(pairs)


class _Certain:
    """Groups of pictures that are certainly copies, whatever their labels."""

    def __init__(self, count: int):
        self._group = np.arange(count)
        self._members: dict[int, list[int]] = {}  # only groups of more than one
        self._large = np.zeros(count, bool)

    def join(self, i: int, j: int) -> None:
        groups = (int(self._group[i]), int(self._group[j]))
        if groups[0] != groups[1]:
            small, large = sorted(groups, key=lambda group: len(self._members.get(group, [group])))
            moved = self._members.pop(small, [small])
            members = self._members.setdefault(large, [large])
            members += moved
            self._group[moved] = large
            if len(members) > MAX_COMPARED:
                self._large[members] = True

    def left_to_compare(
        self, first: Int64[np.ndarray, " p"], second: Int64[np.ndarray, " p"]
    ) -> Iterator[tuple[int, int]]:
        """Yield the pairs, except those within a group that is large already."""
        for start in range(0, len(first), PAIRS_TO_FILTER):
            i, j = first[start : start + PAIRS_TO_FILTER], second[start : start + PAIRS_TO_FILTER]
            left = ~self._is_settled(i, j)
            for a, b in zip(i[left].tolist(), j[left].tolist(), strict=True):
                if not self._is_settled(a, b):
                    yield a, b

    def _is_settled(self, i: Any, j: Any) -> Any:
        return (self._group[i] == self._group[j]) & self._large[i]


def _shown(
    found: Iterator[tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"], float]],
) -> Iterator[tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]]:
    """Yield the candidates, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("comparing", total=1.0)
        for first, second, share in found:
            yield first, second
            progress.update(bar, completed=share)


def find_clip_pairs(clips: Sequence[Sequence[Signature]]) -> list[tuple[int, int, float]]:
    """Return (position, position, similarity) of clips most of whose frames are near duplicates, sorted.

    A frame is compared with the other clip's frames at its place and beside it, since a copy can begin later. Flat
    frames match nothing, but count among all frames. The matching share of either clip may suffice: all frames of a
    copy that fades out occur in the whole clip, but not the reverse.

    Args:
      clips: FRAMES signatures for each.
    """
    hashes = np.array([[frame.hash for frame in clip] for clip in clips], np.uint64).reshape(-1, FRAMES)
    shown = np.array([[not frame.flat for frame in clip] for clip in clips], bool).reshape(-1, FRAMES)
    needed = np.maximum(FRAMES / 2, MIN_SHARE * shown.sum(axis=1))
    pairs: dict[tuple[int, int], float] = {}
    for rows in _blocks(len(clips)):
        found = np.zeros((len(hashes[rows]), len(hashes)), np.int8)
        for k in range(FRAMES):
            near = np.zeros_like(found, bool)
            for other in _beside(k):
                differing = np.bitwise_count(hashes[rows, k, None] ^ hashes[None, :, other])
                near |= (differing <= MAX_BITS) & shown[rows, k, None] & shown[None, :, other]
            found += near
        first, second = np.nonzero(found >= needed[rows, None])
        for i, j in zip((first + rows.start).tolist(), second.tolist(), strict=True):
            if i != j and (alike := _clip_similarity(clips[i], clips[j], needed[i])) is not None:
                pair = (min(i, j), max(i, j))
                pairs[pair] = max(alike, pairs.get(pair, -1.0))
    return sorted((i, j, alike) for (i, j), alike in pairs.items())


def _beside(k: int) -> range:
    return range(max(k - 1, 0), min(k + 2, FRAMES))


def _clip_similarity(a: Sequence[Signature], b: Sequence[Signature], needed: float) -> float | None:
    """Return the mean similarity of the frames of `a` that match in `b`; None: too few match."""
    best = [
        max((similarity(one.thumbnail, b[other].thumbnail) for other in _beside(k) if not b[other].flat), default=-1.0)
        for k, one in enumerate(a)
        if not one.flat
    ]
    alike = [value for value in best if value >= MIN_CLIP_CORRELATION]
    return float(np.mean(alike)) if len(alike) >= needed else None


def group(count: int, pairs: Sequence[tuple[int, int]]) -> Int32[np.ndarray, " n"]:
    """Return the group of each example: pairs connect examples; a group has the number of its first example."""
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    _, groups = connected_components(coo_matrix((np.ones(len(first)), (first, second)), (count, count)), directed=False)
    _, start, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(start), np.int64)
    rank[np.argsort(start)] = np.arange(len(start))
    return rank[inverse].astype(np.int32)
