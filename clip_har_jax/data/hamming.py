"""All pairs of 64-bit hashes that differ in few bits: an exact search that compares a small part of all pairs.

Multi-index hashing (Norouzi, Punjani and Fleet 2012) with the thresholds of the general pigeonhole principle (Qin et
al. 2018): the bits are dealt into m bands. Two hashes that differ in at most r bits differ in at most t_k bits of some
band k, where the t_k sum to r - m + 1. So only hashes that are that near in a band are compared.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt64
from threadpoolctl import threadpool_limits

from clip_har_jax.cores import usable_cores

BITS = 64
NUM_BANDS = (1, 8, 7, 6, 5, 4, 3)  # that are tried; 1 compares all hashes with all
# Nanoseconds of a comparison, of a value of a band, and of each value near it, measured on one core. They choose the
# number of bands and nothing else.
PAIR_NS, VALUE_NS, NEAR_NS = 1.0, 25_000.0, 12.0
SPARSE = 4  # values of a band for each hash, at most
AT_ONCE, BLOCK_WIDTH = 2**18, 2**13  # comparisons of one block, which stays in a core's cache; its columns
MIN_DENSE = 0.05  # share of a block's hashes that are near, from which on all its vectors are multiplied at once
TASK = 2**23  # comparisons of one task of a thread, about; its result has no more pairs

Positions = Int64[np.ndarray, "_"]
Hashes = UInt64[np.ndarray, "_"]


@dataclass(frozen=True)
class Band:
    """Some neighbouring bits of all hashes.

    Attributes:
      shift: bits below them.
      width: how many they are.
      threshold: how many of them may differ.
      order: positions of the hashes, sorted by the value of these bits.
      starts: where each value begins in `order`; last, the number of hashes.
      compared: how many hashes are within the threshold of each value.
    """

    shift: int
    width: int
    threshold: int
    order: Int64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " starts"]
    compared: Float64[np.ndarray, " v"]

    def work(self) -> float:
        """Return the estimated time of the band in ns."""
        sizes = np.diff(self.starts)
        near = sum(math.comb(self.width, flips) for flips in range(self.threshold + 1))
        return PAIR_NS / 2 * float(sizes @ self.compared) + np.count_nonzero(sizes) * (VALUE_NS + NEAR_NS * near)

    def tasks(self) -> Iterator[tuple[int, int, float]]:
        """Yield ranges of `order`, and the comparisons of each."""
        ends = np.cumsum(np.repeat(self.compared, np.diff(self.starts)))
        start, done = 0, 0.0
        while start < len(ends):
            stop = max(start + 1, int(np.searchsorted(ends, done + TASK)))
            yield start, stop, float(ends[stop - 1]) - done
            start, done = stop, float(ends[stop - 1])


@dataclass(frozen=True)
class Search:
    """Hashes in bands: what the threads share."""

    hashes: Hashes
    vectors: Float32[np.ndarray, "n d"]
    bands: Sequence[Band]
    max_bits: int
    min_product: float

    def run(self, k: int, start: int, stop: int) -> tuple[Positions, Positions]:
        """Return the pairs of hashes start to stop of band k's order with those that come later in it."""
        band = self.bands[k]
        flips = _values_within(band.width, band.threshold)
        value = int(np.searchsorted(band.starts, start, "right")) - 1
        found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        while start < stop:
            end = int(band.starts[value + 1])
            if end > start:
                near = flips ^ value
                near = near[near > value]
                later = np.concatenate([np.arange(start, end), _ranges(band.starts[near], band.starts[near + 1])])
                found += self._compare(k, band.order[start : min(end, stop)], band.order[later])
            start, value = end, value + 1
        first, second = (np.concatenate(ends) for ends in zip(*found, strict=True))
        return np.minimum(first, second), np.maximum(first, second)

    def _compare(self, k: int, rows: Positions, columns: Positions) -> Iterator[tuple[Positions, Positions]]:
        """Yield the pairs of each block; the columns begin with the rows, so that pairs lie above the diagonal."""
        width = min(len(columns), BLOCK_WIDTH)
        height = AT_ONCE // width
        for top in range(0, len(rows), height):
            for left in range(top, len(columns), width):
                block = rows[top : top + height], columns[left : left + width]
                differing = self.hashes[block[0], None] ^ self.hashes[block[1]]
                near = np.bitwise_count(differing) <= self.max_bits
                if dense := np.count_nonzero(near) > MIN_DENSE * near.size:
                    near &= self.vectors[block[0]] @ self.vectors[block[1]].T >= self.min_product
                # np.nonzero of two axes takes twice as long as all the rest.
                i, j = np.divmod(np.flatnonzero(near), near.shape[1])
                chosen = (j + left > i + top) & self._is_first(k, differing[i, j])
                first, second = block[0][i[chosen]], block[1][j[chosen]]
                if not dense:
                    products = np.einsum("ij,ij->i", self.vectors[first], self.vectors[second])
                    first, second = first[products >= self.min_product], second[products >= self.min_product]
                yield first, second

    def _is_first(self, k: int, differing: UInt64[np.ndarray, " p"]) -> Bool[np.ndarray, " p"]:
        """Tell which pairs are found in no band before band k, so that each is yielded once."""
        first = np.ones(len(differing), bool)
        for band in self.bands[:k]:
            first &= np.bitwise_count(_cut(differing, band.shift, band.width)) > band.threshold
        return first


def near_pairs(
    hashes: UInt64[np.ndarray, " n"], max_bits: int, vectors: Float32[np.ndarray, "n d"], min_product: float
) -> Iterator[tuple[Positions, Positions, float]]:
    """Yield each pair of positions, first below second, that is near in two ways, once.

    Of a million hashes as even as random ones 7% of the pairs are compared. Where hashes are much alike more are, and
    all pairs at most, as the comparisons are counted before the number of bands is chosen. Memory: some 20 bytes a
    hash and band, and the results of a few tasks.

    Args:
      hashes: in any order.
      max_bits: of the two hashes may differ: 16, or about as many, a quarter of them.
      vectors: one of each hash.
      min_product: that the two vectors must have.

    Yields:
      Positions of pairs, and the share of the comparisons that are done.
    """
    # Neighbouring bits of a perceptual hash depend on one another, so each band takes bits from everywhere.
    dealt = np.random.default_rng(0).permutation(BITS)
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, BITS // 8), axis=1)[:, dealt]
    hashes = np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint64).reshape(-1)
    search = Search(hashes, vectors, _choose_bands(hashes, max_bits), max_bits, min_product)
    tasks = [(k, *task) for k, band in enumerate(search.bands) for task in band.tasks()]
    total, done = sum(compared for *_, compared in tasks), 0.0
    threads = usable_cores()
    running: deque[tuple[Future[tuple[Positions, Positions]], float]] = deque()
    # Each thread multiplies by itself: BLAS's own threads would wait for one another, spinning.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        for number, (k, start, stop, compared) in enumerate(tasks, 1):
            running.append((pool.submit(search.run, k, start, stop), compared))
            while len(running) > (2 * threads if number < len(tasks) else 0):
                oldest, compared = running.popleft()
                done += compared
                yield *oldest.result(), done / total


def _cut(hashes: UInt64[np.ndarray, " p"], shift: int, width: int) -> UInt64[np.ndarray, " p"]:
    return (hashes >> np.uint64(shift)) & np.uint64(2**width - 1)


def _choose_bands(hashes: Hashes, max_bits: int) -> list[Band]:
    """Return the bands with the least work for these hashes."""
    choices = []
    for count in NUM_BANDS:
        widths = [BITS // count + (k < BITS % count) for k in range(count)] if count > 1 else [0]
        if max(2**width for width in widths) > SPARSE * max(len(hashes), 1):
            continue  # tables of values that no hash has
        least, rest = divmod(max_bits - count + 1, count)
        thresholds = [min(least + (k < rest), width) for k, width in enumerate(widths)]  # more to the widest, the first
        choices.append([_make_band(hashes, sum(widths[:k]), widths[k], thresholds[k]) for k in range(count)])
    return min(choices, key=lambda bands: sum(band.work() for band in bands))


def _make_band(hashes: Hashes, shift: int, width: int, threshold: int) -> Band:
    values = _cut(hashes, shift, width).astype(np.int64)
    sizes = np.bincount(values, minlength=2**width)
    near = np.zeros(2**width)
    near[_values_within(width, threshold)] = 1
    # A convolution over XOR, by the Walsh-Hadamard transform.
    compared = np.rint(_hadamard(_hadamard(sizes.astype(np.float64)) * _hadamard(near)) / 2**width)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Band(shift, width, threshold, np.argsort(values, kind="stable"), starts, compared)


def _values_within(width: int, flips: int) -> Int64[np.ndarray, " b"]:
    """Return the values of `width` bits of which at most `flips` are 1."""
    return np.flatnonzero(np.bitwise_count(np.arange(2**width)) <= flips)


def _hadamard(values: Float64[np.ndarray, " v"]) -> Float64[np.ndarray, " v"]:
    half = 1
    while half < len(values):
        low, high = values.reshape(-1, 2, half).transpose(1, 0, 2)
        values = np.stack([low + high, low - high], axis=1).reshape(-1)
        half *= 2
    return values


def _ranges(starts: Int64[np.ndarray, " b"], ends: Int64[np.ndarray, " b"]) -> Positions:
    """Return the numbers of all ranges, one range after the other."""
    lengths = ends - starts
    offsets = starts - np.cumsum(lengths) + lengths
    return np.arange(int(lengths.sum())) + np.repeat(offsets, lengths)
