"""The search for near duplicates finds what a comparison of all pairs finds; of two labels a person decides."""

from collections.abc import Callable

import numpy as np
import pytest

from clip_har_jax.data import duplicates, hamming
from clip_har_jax.data.duplicates import MAX_BITS, MIN_COARSE, Signature, find_candidates, find_pairs, group
from clip_har_jax.data.hamming import near_pairs
from clip_har_jax.data.scan import part_conflicts


def vectors(count: int, seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.mark.parametrize(("bands", "at_once"), [(1, 2000), (8, 2**18), (7, 500), (5, 2**18)])
def test_candidates_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch, bands: int, at_once: int) -> None:
    monkeypatch.setattr(hamming, "NUM_BANDS", (bands,))
    monkeypatch.setattr(hamming, "AT_ONCE", at_once)
    monkeypatch.setattr(hamming, "BLOCK_WIDTH", 300)
    monkeypatch.setattr(hamming, "TASK", 20 * at_once)
    monkeypatch.setattr(hamming, "SPARSE", 10**6)
    rng, count = np.random.default_rng(0), 700
    hashes = rng.integers(0, 2**64, count, np.uint64)
    coarse = vectors(count, 1)
    for copy in range(300, 600):  # of an image before it, with 0 to 20 other bits
        bits = rng.choice(64, rng.integers(0, 21), replace=False).astype(np.uint64)
        hashes[copy] = hashes[copy - 300] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
        coarse[copy] = coarse[copy - 300]
    bits_differing = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu((bits_differing <= MAX_BITS) & (coarse @ coarse.T >= MIN_COARSE), 1))
    found = [np.stack(pair[:2], axis=1) for pair in find_candidates(hashes, coarse)]
    assert len(expected) > 200
    assert sorted(map(tuple, np.concatenate(found).tolist())) == list(map(tuple, expected.tolist()))


def planted(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random hashes, of which each of the second half is one of the first with 0 to 20 other bits."""
    hashes = rng.integers(0, 2**64, count, np.uint64)
    for copy in range(count // 2, count):
        bits = rng.choice(64, rng.integers(0, 21), replace=False).astype(np.uint64)
        hashes[copy] = hashes[copy - count // 2] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    return hashes


def skewed(count: int, rng: np.random.Generator) -> np.ndarray:
    """Hashes of near-white pictures: a quarter has one value, a half differs from it in bits of one end."""
    hashes = rng.integers(0, 2**64, count, np.uint64)
    hashes[: count // 4] = hashes[0]
    hashes[count // 4 : 3 * count // 4] = hashes[0] ^ rng.integers(0, 2**12, count // 2, np.uint64)
    return hashes


@pytest.mark.parametrize(("drawn", "count"), [(planted, 12_000), (skewed, 2_500)])
def test_each_pair_of_near_hashes_is_found_once(drawn: Callable[..., np.ndarray], count: int) -> None:
    hashes = drawn(count, np.random.default_rng(0))
    expected = np.concatenate(
        [np.argwhere(np.triu(are_near(hashes[i : i + 500], hashes[i:]), 1)) + i for i in range(0, count, 500)]
    )
    found, shares = [], []
    for first, second, share in near_pairs(hashes, MAX_BITS, np.ones((count, 1), np.float32), 0.5):
        found.append(np.stack([first, second], axis=1))
        shares.append(share)
    together = np.concatenate(found)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert len(together) == len(expected) > count / 4
    assert np.array_equal(together[np.lexsort(together.T[::-1])], expected)


def are_near(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.bitwise_count(first[:, None] ^ second) <= MAX_BITS


@pytest.mark.parametrize(("drawn", "most"), [(planted, 0.4), (skewed, 1.01)])
def test_even_hashes_spare_comparisons_and_alike_ones_cost_no_more_than_all_pairs(
    drawn: Callable[..., np.ndarray], most: float
) -> None:
    count = 100_000
    bands = hamming._choose_bands(drawn(count, np.random.default_rng(0)), MAX_BITS)
    compared = sum(float(np.diff(band.starts) @ band.compared) for band in bands)
    assert compared <= most * count**2


def test_no_images_have_no_candidates() -> None:
    assert list(find_candidates(np.empty(0, np.uint64), np.empty((0, 64), np.float32))) == []


def test_near_images_of_two_labels_are_kept_and_shown() -> None:
    """Two men before a white ground (0.851) aren't one picture; a copy under two labels (0.97) is."""
    pairs = [(0, 1, 0.97), (0, 2, 0.851), (1, 3, 0.97), (4, 5, 0.86), (6, 7, 1.0)]
    label_ids = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    joined, undecided = part_conflicts(pairs, label_ids)
    assert joined == [(0, 1, 0.97), (1, 3, 0.97), (4, 5, 0.86), (6, 7, 1.0)]
    assert undecided == [(0, 2, 0.851)]


def test_a_large_group_of_one_picture_is_found_without_comparing_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_COMPARED", 10)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 48, 48)).astype(np.uint8)
    which = [int(i % 5 == 0) for i in range(100)]
    signatures = [Signature(one * (2**64 - 1), pictures[one], False) for one in which]
    compared: list[int] = []
    similarity = duplicates.similarity

    def counted(a: np.ndarray, b: np.ndarray) -> float:
        compared.append(1)
        return similarity(a, b)

    monkeypatch.setattr(duplicates, "similarity", counted)
    pairs = find_pairs(signatures)
    assert group(100, [pair[:2] for pair in pairs]).tolist() == [1 - one for one in which]
    all_pairs = 20 * 19 // 2 + 80 * 79 // 2
    assert len(compared) < all_pairs / 5
    monkeypatch.setattr(duplicates, "MAX_COMPARED", 100)
    assert len(find_pairs(signatures)) == all_pairs
