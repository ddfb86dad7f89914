"""Recall of retrieval, against a plain count over all pairs."""

import numpy as np
import pytest

from clip_har_jax.data.pairs import BadPair, Pair
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation import retrieval
from clip_har_jax.evaluation.retrieval import RANKS, Embedded, chance, check_texts, describe, measure_retrieval, recall


def embeddings(rng: np.random.Generator, count: int) -> np.ndarray:
    rows = rng.normal(size=(count, 6)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def counted(queries: np.ndarray, answers: np.ndarray, matches: set[tuple[int, int]]) -> dict[str, float]:
    """Return the recall by sorting all answers of each query."""
    hits = dict.fromkeys(RANKS, 0)
    for q, query in enumerate(queries):
        best = np.argsort(-(answers @ query))
        for k in RANKS:
            hits[k] += any((q, int(a)) in matches for a in best[:k])
    return {f"recall@{k}": hits[k] / len(queries) for k in RANKS}


def test_recall_is_that_of_sorting_all_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", 7)  # several chunks, the last one smaller
    rng = np.random.default_rng(0)
    queries, answers = embeddings(rng, 40), embeddings(rng, 30)
    matches = {(q, int(a)) for q in range(40) for a in rng.choice(30, rng.integers(1, 4), replace=False)}
    found = recall(queries, answers, np.asarray(sorted(matches)))
    assert found == pytest.approx(counted(queries, answers, matches))
    assert 0 < found["recall@1"] < found["recall@5"] < found["recall@10"] < 1


def test_a_model_that_gives_the_same_for_everything_has_no_recall() -> None:
    same = np.ones((20, 4), np.float32) / 2
    matches = np.stack([np.arange(20)] * 2, axis=1)
    assert set(recall(same, same, matches).values()) == {0.0}


def test_chance_is_the_mean_recall_of_random_answers() -> None:
    rng = np.random.default_rng(1)
    queries = np.asarray([0, 0, 0, 1, 2, 2])  # three, one and two right answers of 12
    drawn = [[rng.permutation(12)[:k].min() < right for k in (1, 5)] for right in [3, 1, 2] * 4000]
    found = chance(queries, 12)
    assert [found["recall@1"], found["recall@5"]] == pytest.approx(np.mean(drawn, axis=0), abs=0.015)
    assert chance(np.asarray([0, 1]), 4)["recall@10"] == 1.0  # fewer answers than 10


def test_equal_images_and_equal_captions_count_once() -> None:
    """Two captions of one image are both right, and so are two images of one caption."""
    pairs = [Pair("1", b"x", "a"), Pair("2", b"x", "b"), Pair("3", b"y", "c"), Pair("4", b"z", "c")]
    eye = np.eye(6, dtype=np.float32)
    image, text = eye[[0, 0, 1, 2]], eye[[0, 3, 1, 1]]
    padded = Embedded(
        np.concatenate([image, eye[:2]]),
        np.concatenate([text, eye[:2]]),
        np.asarray([True] * 4 + [False] * 2),
        [*pairs, BadPair("5", "damaged"), None],
    )
    found = measure_retrieval([padded])
    counts = [found[key] for key in ("num_pairs", "num_images", "num_captions", "num_unreadable")]
    assert counts == [4, 3, 3, 1]
    assert found["image_to_text"]["recall@1"] == pytest.approx(2 / 3)  # z is like no caption
    assert found["text_to_image"]["recall@1"] == pytest.approx(2 / 3)  # b is like no image
    assert found["chance"]["image_to_text"]["recall@1"] == pytest.approx((2 + 1 + 1) / 3 / 3)
    assert describe(found)[0][0] == "image to text" and "recall@1 0.667 (chance 0.444)" in describe(found)[0][1]


def test_an_image_tower_alone_is_refused() -> None:
    check_texts("both", True)
    with pytest.raises(UserError, match="mine: an image tower alone, which can't embed captions"):
        check_texts("mine", False)


def test_no_pairs_and_infinite_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match="no image-text pair could be read"):
        measure_retrieval([Embedded(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), np.zeros(1), [None])])
    nan = np.full((1, 2), np.nan, np.float32)
    with pytest.raises(UserError, match="aren't finite"):
        measure_retrieval([Embedded(nan, nan, np.ones(1) > 0, [Pair("1", b"x", "a")])])
