"""The search for near duplicates finds what a comparison of all pairs finds; of two labels a person decides."""

import numpy as np
import pytest

from clip_har_jax.data import duplicates
from clip_har_jax.data.duplicates import MAX_BITS, MIN_COARSE, find_candidates
from clip_har_jax.data.scan import part_conflicts


def vectors(count: int, seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.mark.parametrize("at_once", [2000, 2**24])
def test_candidates_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", at_once)
    rng, count = np.random.default_rng(0), 700
    hashes = rng.integers(0, 2**64, count, np.uint64)
    coarse = vectors(count, 1)
    for copy in range(300, 600):  # of an image before it, with 0 to 20 other bits
        bits = rng.choice(64, rng.integers(0, 21), replace=False).astype(np.uint64)
        hashes[copy] = hashes[copy - 300] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
        coarse[copy] = coarse[copy - 300]
    bits_differing = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu((bits_differing <= MAX_BITS) & (coarse @ coarse.T >= MIN_COARSE), 1))
    found = [np.stack(pair, axis=1) for pair in find_candidates(hashes, coarse)]
    assert len(expected) > 200
    assert sorted(map(tuple, np.concatenate(found).tolist())) == list(map(tuple, expected.tolist()))


def test_no_images_have_no_candidates() -> None:
    assert list(find_candidates(np.empty(0, np.uint64), np.empty((0, 64), np.float32))) == []


def test_near_images_of_two_labels_are_kept_and_shown() -> None:
    """Two men before a white ground (0.851) aren't one picture; a copy under two labels (0.97) is."""
    pairs = [(0, 1, 0.97), (0, 2, 0.851), (1, 3, 0.97), (4, 5, 0.86), (6, 7, 1.0)]
    label_ids = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    joined, undecided = part_conflicts(pairs, label_ids)
    assert joined == [(0, 1, 0.97), (1, 3, 0.97), (4, 5, 0.86), (6, 7, 1.0)]
    assert undecided == [(0, 2, 0.851)]
