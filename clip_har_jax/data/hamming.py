"""All pairs of 64-bit hashes that differ in few bits: an exact search that compares only a small part of all pairs.

Multi-index hashing (Norouzi, Punjani and Fleet 2012) with the thresholds of the general pigeonhole principle (Qin et
al. 2018): the bits are divided into m bands. Two hashes that differ in at most r bits differ in at most t_k bits of
some band k, where the t_k sum to r - m + 1. So only hashes that are this similar in some band are compared.
docs/adr/0008-own-search-of-near-hashes.md says why faiss isn't used.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt64
from threadpoolctl import threadpool_limits

from clip_har_jax.cores import usable_cores

BITS = 64
NUM_BANDS = (1, 8, 7, 6, 5, 4, 3)  # to try; 1 compares all pairs
# Nanoseconds per comparison, per value of a band, and per value near it, measured on one core. They only choose the
# number of bands.
PAIR_NS, VALUE_NS, NEAR_NS = 1.0, 25_000.0, 12.0
SPARSE = 4  # most values of a band per hash
AT_ONCE, BLOCK_WIDTH = 2**18, 2**13  # comparisons of one block, which stays in a core's cache; its columns
MIN_DENSE = 0.05  # share of near hashes in a block above which all its vectors are multiplied at once
TASK = 2**23  # approximate comparisons in one task of a thread; its result has at most as many pairs

Positions = Int64[np.ndarray, "_"]
Hashes = UInt64[np.ndarray, "_"]


@dataclass(frozen=True)
class Band:
    """A group of neighbouring bits of all hashes.

    Attributes:
      shift: number of lower bits.
      width: number of bits.
      threshold: number of bits that may differ.
      order: positions of the hashes, sorted by the value of these bits.
      hashes: the hashes in this order.
      starts: the position of each value in `order`; last, the number of hashes.
      within: the values with at most `threshold` bits set.
      compared: for each value, the number of hashes that differ from it by one of `within`.
    """

    shift: int
    width: int
    threshold: int
    order: Int64[np.ndarray, " n"]
    hashes: UInt64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " starts"]
    within: Int64[np.ndarray, " w"]
    compared: Float64[np.ndarray, " v"]

    def work(self) -> float:
        """Return the estimated time of the band in ns."""
        sizes = np.diff(self.starts)
        a_value = VALUE_NS + NEAR_NS * len(self.within)
        return PAIR_NS / 2 * float(sizes @ self.compared) + np.count_nonzero(sizes) * a_value

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
    """The hashes in bands; shared by the threads."""

    vectors: Float32[np.ndarray, "n d"]
    bands: Sequence[Band]
    max_bits: int
    min_product: float

    def run(self, k: int, start: int, stop: int) -> tuple[Positions, Positions]:
        """Return the pairs of hashes start to stop of band k's order with those that come later in it."""
        band = self.bands[k]
        value = int(np.searchsorted(band.starts, start, "right")) - 1
        found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))]
        while start < stop:
            end = int(band.starts[value + 1])
            if end > start:
                near = band.within ^ value
                near = near[near > value]
                columns = _ranges(np.append(start, band.starts[near]), np.append(end, band.starts[near + 1]))
                found += self._compare(band, start, min(end, stop), columns)
            start, value = end, value + 1
        rows, columns, multiplied = (np.concatenate(parts) for parts in zip(*found, strict=True))
        chosen = (columns > rows) & self._is_first(k, band.hashes[rows] ^ band.hashes[columns])
        first, second, multiplied = band.order[rows[chosen]], band.order[columns[chosen]], multiplied[chosen]
        products = np.ones(len(first), np.float32)
        left = ~multiplied
        products[left] = np.einsum("ij,ij->i", self.vectors[first[left]], self.vectors[second[left]])
        chosen = multiplied | (products >= self.min_product)
        first, second = first[chosen], second[chosen]
        return np.minimum(first, second), np.maximum(first, second)

    def _compare(
        self, band: Band, start: int, stop: int, columns: Positions
    ) -> Iterator[tuple[Positions, Positions, Bool[np.ndarray, "_"]]]:
        """Yield the near pairs of rows start to stop of a band's order with columns, and which were multiplied."""
        width = min(len(columns), BLOCK_WIDTH)
        height, others = AT_ONCE // width, band.hashes[columns]
        for top in range(start, stop, height):
            rows = slice(top, min(top + height, stop))
            for left in range(top - start, len(columns), width):
                near = np.bitwise_count(band.hashes[rows, None] ^ others[left : left + width]) <= self.max_bits
                if dense := np.count_nonzero(near) > MIN_DENSE * near.size:
                    across = self.vectors[band.order[columns[left : left + width]]]
                    near &= self.vectors[band.order[rows]] @ across.T >= self.min_product
                # np.nonzero of two axes takes twice as long as all the rest.
                i, j = np.divmod(np.flatnonzero(near), near.shape[1])
                yield i + top, columns[j + left], np.full(len(i), dense)

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
    search = Search(vectors, _choose_bands(hashes, max_bits), max_bits, min_product)
    tasks = [(k, *task) for k, band in enumerate(search.bands) for task in band.tasks()]
    total, done = sum(compared for *_, compared in tasks), 0.0
    threads = usable_cores()
    running: deque[tuple[Future[tuple[Positions, Positions]], float]] = deque()
    # Each thread multiplies on its own: BLAS's threads would wait for each other in busy loops.
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
    within = np.flatnonzero(np.bitwise_count(np.arange(2**width)) <= threshold)
    near = np.zeros(2**width)
    near[within] = 1
    # A convolution over XOR, by the Walsh-Hadamard transform.
    compared = np.rint(_hadamard(_hadamard(sizes.astype(np.float64)) * _hadamard(near)) / 2**width)
    starts, order = np.concatenate([[0], np.cumsum(sizes)]), np.argsort(values, kind="stable")
    return Band(shift, width, threshold, order, hashes[order], starts, within, compared)


def _hadamard(values: Float64[np.ndarray, " v"]) -> Float64[np.ndarray, " v"]:
    half = 1
    while half < len(values):
        low, high = values.reshape(-1, 2, half).transpose(1, 0, 2)
        values = np.stack([low + high, low - high], axis=1).reshape(-1)
        half *= 2
    return values


def _ranges(starts: Int64[np.ndarray, " b"], ends: Int64[np.ndarray, " b"]) -> Positions:
    """Return the numbers of all ranges, one range after the other."""
    if len(starts) == 1:
        return np.arange(starts[0], ends[0])
    lengths = ends - starts
    offsets = starts - np.cumsum(lengths) + lengths
    return np.arange(int(lengths.sum())) + np.repeat(offsets, lengths)
