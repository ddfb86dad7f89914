"""Near duplicates: the same photograph re-encoded, resized, slightly cropped or framed; groups of them.

A 64-bit perceptual hash finds candidates among all pairs, a comparison of small pictures at several scales decides.
Clips are compared by some of their frames.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import imagehash
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8, UInt64
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from clip_har_jax.cores import usable_cores

# Of copies of 840 photographs, re-encoded, resized, cropped or bordered, 99.6 to 100% pass both bounds (docs/
# performance.md). Of the 352,380 pairs of those photographs two do: one of a copy, and one of two shots of a scene.
MAX_BITS = 16  # that may differ of 64
MIN_CORRELATION = 0.85
SCALES = (0.92, 0.95, 0.98, 1.0, 1.02, 1.05, 1.08)  # of a crop against what it was cropped from
COMPARED = 0.84  # share of a side that is compared, so that it lies in both
WORKING_PX, THUMBNAIL_PX = 256, 48
FLAT = 4.0  # grey levels (standard deviation) below which a line is a part of a border, or a picture shows nothing
MIN_SIDE_PX = 16  # of what borders leave
FRAMES = 6  # of a clip, spread evenly over it
# Frames of copies of drawn clips, re-encoded, rescaled or trimmed, have 0.95 or more; of two that differ 0.90 at most.
MIN_CLIP_CORRELATION = 0.92
MIN_SHARE = 2 / 3  # of a clip's frames that must be near duplicates of frames of the other
PAIRS_AT_ONCE = 2**24  # of hashes, which bounds memory even where all are alike
MAX_ROWS = 4096  # of hashes that are searched at once
SECTIONS = 16  # of the hashes; an index is made for each
# Two images whose labels differ count as one picture only from here on: of copies of 60 photographs 87% (8% cut off
# one side) to 100% (half the size) have it, of pairs that are two shots of a scene or two people none (0.874 at most).
MIN_CONFLICT_CORRELATION = 0.93
# The thumbnails of 523 copies as above correlate by 0.93 and more when they are made 8 x 8. Of blurred pictures, whose
# hashes say little, that spares 149 of 150 comparisons.
COARSE_PX = 8
MIN_COARSE = 0.8


class Signature(NamedTuple):
    """What pictures are compared by."""

    hash: int  # of 64 bits
    thumbnail: UInt8[np.ndarray, "s s"]  # grey, without borders
    flat: bool  # shows nothing, so that it looks like any other such


def make_signature(image: UInt8[np.ndarray, "h w 3"]) -> Signature:
    """Return the signature of a picture: pHash (Zauner 2010, as imagehash computes it) of what its borders frame."""
    grey = Image.fromarray(image).convert("L").resize((WORKING_PX, WORKING_PX), Image.Resampling.BILINEAR)
    inner = _without_borders(np.asarray(grey))
    bits = imagehash.phash(Image.fromarray(inner)).hash
    thumbnail = cv2.resize(inner, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    packed = int.from_bytes(np.packbits(bits.reshape(-1)).tobytes(), "big")
    return Signature(packed, thumbnail, bool(thumbnail.std() < FLAT))


def _without_borders(grey: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:
    """Return the picture less even lines at its edges, again and again, since a framed picture may have a
    margin too.
    """
    while True:
        top, bottom = _border(grey), _border(grey[::-1])
        left, right = _border(grey.T), _border(grey.T[::-1])
        inner = grey[top : len(grey) - bottom, left : grey.shape[1] - right]
        if inner.shape == grey.shape or min(inner.shape) < MIN_SIDE_PX:
            return np.ascontiguousarray(grey)
        grey = inner


def _border(lines: np.ndarray) -> int:
    """Count the first lines that are a border: even and alike, at most half of the picture.

    The line behind them counts too, since scaling mixes it with the border.
    """
    lines = lines[: len(lines) // 2].astype(np.float32)
    even = (lines.std(axis=1) < FLAT) & (np.abs(lines.mean(axis=1) - lines[0].mean()) < FLAT)
    count = len(lines) if even.all() else int(even.argmin())
    return count + 1 if count else 0


def similarity(a: UInt8[np.ndarray, "s s"], b: UInt8[np.ndarray, "s s"]) -> float:
    """Return the correlation of two thumbnails, the middle of one laid over the other where it fits best; 1: the
    same.
    """
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
) -> Iterator[tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]]:
    """Yield pairs of positions (first below second) whose hashes differ in few bits, and which look alike from afar.

    The search is exact: faiss's flat binary index compares 10^9 pairs of hashes in about 0.5 s on one core. It takes
    the hashes in random order, so that the pairs found so far tell how many rows can be searched at once, and from a
    section's first on, since earlier ones were compared already.
    """
    import faiss

    faiss.omp_set_num_threads(usable_cores())
    order = np.random.default_rng(0).permutation(len(hashes))
    codes = hashes[order].view(np.uint8).reshape(-1, hashes.itemsize)
    rows = max(1, PAIRS_AT_ONCE // max(len(hashes), 1))
    section = max(1, -(-len(hashes) // SECTIONS))
    for begin in range(0, len(hashes), section):
        index = faiss.IndexBinaryFlat(8 * hashes.itemsize)
        index.add(codes[begin:])
        start, stop = begin, min(begin + section, len(hashes))
        while start < stop:
            end = min(start + rows, stop)
            limits, _, found = index.range_search(codes[start:end], MAX_BITS + 1)
            counts = np.diff(limits.astype(np.int64))
            first, second = np.repeat(np.arange(start, end), counts), found + begin
            later = second > first
            ends = np.sort(np.stack([order[first[later]], order[second[later]]]), axis=0)
            alike = np.einsum("ij,ij->i", coarse[ends[0]], coarse[ends[1]]) >= MIN_COARSE
            yield ends[0, alike], ends[1, alike]
            rows = int(np.clip(PAIRS_AT_ONCE // max(counts.mean(), 1), 1, min(4 * rows, MAX_ROWS)))
            start = end


def _blocks(count: int) -> Iterator[slice]:
    """Yield the rows that are compared at once with all that follow."""
    size = max(1, PAIRS_AT_ONCE // max(count, 1))
    return (slice(start, start + size) for start in range(0, count, size))


def _coarse(thumbnail: UInt8[np.ndarray, "s s"]) -> Float32[np.ndarray, " d"]:
    """Return a thumbnail made very small, so that products of two are their correlation."""
    small = cv2.resize(thumbnail, (COARSE_PX, COARSE_PX), interpolation=cv2.INTER_AREA).astype(np.float32).reshape(-1)
    small -= small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-6)


def find_pairs(signatures: Sequence[Signature]) -> list[tuple[int, int, float]]:
    """(position, position, similarity) of near duplicates, sorted; flat pictures are nobody's."""
    shown = np.array([i for i, signature in enumerate(signatures) if not signature.flat], np.int64)
    hashes = np.array([signatures[i].hash for i in shown], np.uint64)
    coarse = np.array([_coarse(signatures[i].thumbnail) for i in shown], np.float32).reshape(-1, COARSE_PX**2)
    pairs = []
    for first, second in find_candidates(hashes, coarse):
        for i, j in zip(shown[first].tolist(), shown[second].tolist(), strict=True):
            alike = similarity(signatures[i].thumbnail, signatures[j].thumbnail)
            if alike >= MIN_CORRELATION:
                pairs.append((i, j, alike))
    return sorted(pairs)


def find_clip_pairs(clips: Sequence[Sequence[Signature]]) -> list[tuple[int, int, float]]:
    """(position, position, similarity) of clips most of whose frames are near duplicates, sorted.

    A frame is compared with the other clip's frame at its place and those beside it, as a copy may begin later. Flat
    frames are like none, and a pair needs half of all frames nevertheless. The frames of either of the two may do:
    those of a copy that fades out are all in the whole clip, not the other way round.

    Args:
      clips: FRAMES signatures of each.
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
    """Return the mean similarity of the frames of `a` that are in `b`; None where those are too few."""
    best = [
        max((similarity(one.thumbnail, b[other].thumbnail) for other in _beside(k) if not b[other].flat), default=-1.0)
        for k, one in enumerate(a)
        if not one.flat
    ]
    alike = [value for value in best if value >= MIN_CLIP_CORRELATION]
    return float(np.mean(alike)) if len(alike) >= needed else None


def group(count: int, pairs: Sequence[tuple[int, int]]) -> Int32[np.ndarray, " n"]:
    """Each example's group: pairs, and what hangs together by pairs, share one; numbered by their first example."""
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    _, groups = connected_components(coo_matrix((np.ones(len(first)), (first, second)), (count, count)), directed=False)
    _, start, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(start), np.int64)
    rank[np.argsort(start)] = np.arange(len(start))
    return rank[inverse].astype(np.int32)
