"""Recall of image-text retrieval: how often the right caption of an image, or image of a caption, is among the best K.

Equal images are one image and equal captions one caption, so that an image with several captions (as in Flickr30k and
COCO) has several right answers, and so has a caption of several images. A tie counts against the right answer.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from clip_har_jax.data.pairs import Found, Pair
from clip_har_jax.errors import UserError
from clip_har_jax.files import sha256

RANKS = (1, 5, 10)
CHUNK = 1024  # queries that are compared with all answers at once


class Embedded(NamedTuple):
    """A batch of pairs, embedded."""

    image: Float32[np.ndarray, "b d"]  # L2-normalised
    text: Float32[np.ndarray, "b d"]
    counts: np.ndarray  # bool [b]: read and decoded
    pairs: Sequence[Found | None]


def check_texts(model: str, has_texts: bool) -> None:
    """Check that captions can be embedded.

    Raises:
      UserError: the model is an image tower alone.
    """
    if not has_texts:
        raise UserError(f"{model}: an image tower alone, which can't embed captions; name a model with both towers")


def measure_retrieval(batches: Iterable[Embedded]) -> dict[str, Any]:
    """Return the recall over all pairs, in both directions, beside that of random answers.

    Raises:
      UserError: no pair could be read, or embeddings aren't finite.
    """
    images, texts = dict[str, int](), dict[str, int]()
    image_rows: list[np.ndarray] = []
    text_rows: list[np.ndarray] = []
    pairs: list[tuple[int, int]] = []
    num_unreadable = 0
    for batch in batches:
        for row, pair in enumerate(batch.pairs):
            if pair is None:
                continue
            if not isinstance(pair, Pair) or not batch.counts[row]:
                num_unreadable += 1
                continue
            image, text = sha256(pair.image), pair.caption
            if image not in images:
                images[image] = len(images)
                image_rows.append(np.asarray(batch.image[row], np.float32))
            if text not in texts:
                texts[text] = len(texts)
                text_rows.append(np.asarray(batch.text[row], np.float32))
            pairs.append((images[image], texts[text]))
    if not pairs:
        raise UserError("no image-text pair could be read; bad_inputs.jsonl says why")
    by_image, by_text = np.stack(image_rows), np.stack(text_rows)
    if not (np.isfinite(by_image).all() and np.isfinite(by_text).all()):
        raise UserError("the model's embeddings aren't finite; its weights are damaged")
    matches = np.unique(np.asarray(pairs), axis=0)
    return {
        "num_pairs": len(pairs),
        "num_images": len(images),
        "num_captions": len(texts),
        "num_unreadable": num_unreadable,
        "image_to_text": recall(by_image, by_text, matches),
        "text_to_image": recall(by_text, by_image, matches[:, ::-1]),
        "chance": {
            "image_to_text": chance(matches[:, 0], len(texts)),
            "text_to_image": chance(matches[:, 1], len(images)),
        },
    }


def recall(
    queries: Float32[np.ndarray, "q d"], answers: Float32[np.ndarray, "a d"], matches: Int[np.ndarray, "n 2"]
) -> dict[str, float]:
    """Return the share of queries for which a right answer is among the K most similar, for each K of `RANKS`.

    Args:
      queries: L2-normalised embeddings.
      answers: as the queries.
      matches: each right (query, answer), once; every query has one.
    """
    ranks = np.empty(len(queries), np.int64)
    order = matches[np.argsort(matches[:, 0], kind="stable")]
    for first in range(0, len(queries), CHUNK):
        similarity = queries[first : first + CHUNK] @ answers.T
        begin, end = np.searchsorted(order[:, 0], (first, first + len(similarity)))
        row, column = order[begin:end, 0] - first, order[begin:end, 1]
        best = np.full(len(similarity), -np.inf, np.float32)
        np.maximum.at(best, row, similarity[row, column])
        similarity[row, column] = -np.inf  # right answers don't compete with each other
        ranks[first : first + len(similarity)] = (similarity >= best[:, None]).sum(axis=1)
    return {f"recall@{k}": float((ranks < k).mean()) for k in RANKS}


def chance(queries: Int[np.ndarray, " n"], num_answers: int) -> dict[str, float]:
    """Return the expected recall of random answers.

    Args:
      queries: the query of each right pair.
      num_answers: to choose from.
    """
    right, counts = np.unique(np.bincount(queries), return_counts=True)

    def misses(num_right: int, k: int) -> float:
        k = min(k, num_answers)
        return math.comb(num_answers - num_right, k) / math.comb(num_answers, k)

    found = [(int(number), int(count)) for number, count in zip(right, counts, strict=True)]
    total = sum(count for _, count in found)
    return {f"recall@{k}": sum(count * (1 - misses(number, k)) for number, count in found) / total for k in RANKS}


def describe(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the recalls as rows of a title and a text."""
    titles = {"image_to_text": "image to text", "text_to_image": "text to image"}
    return [
        (
            title,
            ", ".join(
                f"recall@{k} {metrics[name][f'recall@{k}']:.3f} (chance {metrics['chance'][name][f'recall@{k}']:.3f})"
                for k in RANKS
            ),
        )
        for name, title in titles.items()
    ]
