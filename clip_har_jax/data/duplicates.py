"""Near duplicates: the same photograph re-encoded, resized, slightly cropped or framed; groups of them.

A 64-bit perceptual hash finds candidates among all pairs, a comparison of small pictures at several scales decides.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import imagehash
import numpy as np
from jaxtyping import Int32, UInt8, UInt64
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

# Of copies of 840 photographs, re-encoded, resized, cropped or bordered, 99.6 to 100% pass both bounds (docs/
# performance.md). Of the 352,380 pairs of those photographs two do: one of a copy, and one of two shots of a scene.
MAX_BITS = 16  # that may differ of 64
MIN_CORRELATION = 0.85
SCALES = (0.92, 0.95, 0.98, 1.0, 1.02, 1.05, 1.08)  # of a crop against what it was cropped from
COMPARED = 0.84  # share of a side that is compared, so that it lies in both
WORKING_PX, THUMBNAIL_PX = 256, 48
FLAT = 4.0  # grey levels (standard deviation) below which a line is a part of a border, or a picture shows nothing
MIN_SIDE_PX = 16  # of what borders leave
BLOCK = 2048  # rows compared at once with all others


class Signature(NamedTuple):
    """What pictures are compared by."""

    hash: int  # of 64 bits
    thumbnail: UInt8[np.ndarray, "s s"]  # grey, without borders
    flat: bool  # shows nothing, so that it looks like any other such


def make_signature(image: UInt8[np.ndarray, "h w 3"]) -> Signature:
    """The signature of a picture: pHash (Zauner 2010, as imagehash computes it) of what its borders frame."""
    grey = Image.fromarray(image).convert("L").resize((WORKING_PX, WORKING_PX), Image.Resampling.BILINEAR)
    inner = _without_borders(np.asarray(grey))
    bits = imagehash.phash(Image.fromarray(inner)).hash
    thumbnail = cv2.resize(inner, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    packed = int.from_bytes(np.packbits(bits.reshape(-1)).tobytes(), "big")
    return Signature(packed, thumbnail, bool(thumbnail.std() < FLAT))


def _without_borders(grey: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:
    """The picture less even lines at its edges, again and again, since a framed picture may have a margin too."""
    while True:
        top, bottom = _border(grey), _border(grey[::-1])
        left, right = _border(grey.T), _border(grey.T[::-1])
        inner = grey[top : len(grey) - bottom, left : grey.shape[1] - right]
        if inner.shape == grey.shape or min(inner.shape) < MIN_SIDE_PX:
            return np.ascontiguousarray(grey)
        grey = inner


def _border(lines: np.ndarray) -> int:
    """How many of the first lines, at most a half, are even and alike, or mix such a line with the picture."""
    lines = lines[: len(lines) // 2].astype(np.float32)
    even = (lines.std(axis=1) < FLAT) & (np.abs(lines.mean(axis=1) - lines[0].mean()) < FLAT)
    count = len(lines) if even.all() else int(even.argmin())
    return count + 1 if count else 0


def similarity(a: UInt8[np.ndarray, "s s"], b: UInt8[np.ndarray, "s s"]) -> float:
    """The correlation of two thumbnails, the middle of one laid over the other where it fits best; 1: the same."""
    best = -1.0
    for scale in SCALES:
        side = round(THUMBNAIL_PX * scale)
        resized = cv2.resize(b, (side, side), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        part = round(THUMBNAIL_PX * COMPARED)
        edge = (side - part) // 2
        middle = resized[edge : edge + part, edge : edge + part]
        best = max(best, float(cv2.matchTemplate(a, middle, cv2.TM_CCOEFF_NORMED).max()))
    return best


def _candidates(hashes: UInt64[np.ndarray, " n"]) -> Iterator[tuple[int, int]]:
    """Pairs of positions whose hashes differ in few bits; all pairs are compared, 10^9 in about 7 s on one core."""
    for start in range(0, len(hashes), BLOCK):
        rows = hashes[start : start + BLOCK]
        differing = np.bitwise_count(rows[:, None] ^ hashes[None, start:])
        first, second = np.nonzero(differing <= MAX_BITS)
        later = second > first
        yield from zip((first[later] + start).tolist(), (second[later] + start).tolist(), strict=True)


def find_pairs(signatures: Sequence[Signature]) -> list[tuple[int, int, float]]:
    """(position, position, similarity) of near duplicates, sorted; flat pictures are nobody's."""
    shown = np.array([i for i, signature in enumerate(signatures) if not signature.flat], np.int64)
    hashes = np.array([signatures[i].hash for i in shown], np.uint64)
    pairs = []
    for a, b in _candidates(hashes):
        i, j = int(shown[a]), int(shown[b])
        alike = similarity(signatures[i].thumbnail, signatures[j].thumbnail)
        if alike >= MIN_CORRELATION:
            pairs.append((i, j, alike))
    return sorted(pairs)


def group(count: int, pairs: Sequence[tuple[int, int]]) -> Int32[np.ndarray, " n"]:
    """Each example's group: pairs, and what hangs together by pairs, share one; numbered by their first example."""
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    _, groups = connected_components(coo_matrix((np.ones(len(first)), (first, second)), (count, count)), directed=False)
    _, start, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(start), np.int64)
    rank[np.argsort(start)] = np.arange(len(start))
    return rank[inverse].astype(np.int32)
