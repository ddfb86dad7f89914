"""The division of examples into training, validation and test."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from clip_har_jax.errors import UserError


def hold_out(
    label_ids: Int32[np.ndarray, " n"], fraction: float, seed: int
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " val"]]:
    """Split positions by class: hold out the same share of each class, at least one image if it has two.

    Args:
      label_ids: the class of each example.
      fraction: share to hold out, 0 to 1.
      seed: the split depends only on it and on the labels.

    Returns:
      Sorted positions for training and for validation; every class with images has one for training.
    """
    held: list[np.ndarray] = []
    for label in np.unique(label_ids) if fraction > 0 else []:
        positions = np.flatnonzero(label_ids == label)
        count = min(max(1, round(fraction * len(positions))), len(positions) - 1)
        held.append(np.random.default_rng((seed, int(label))).permutation(positions)[:count])
    val = np.sort(np.concatenate(held)) if held else np.empty(0, np.int64)
    return np.setdiff1d(np.arange(len(label_ids)), val), val


@dataclass(frozen=True)
class Shares:
    """Shares of the examples for validation and test; the rest is for training."""

    val: float = 0.1
    test: float = 0.2


def assign_splits(
    label_ids: Int32[np.ndarray, " n"], groups: Int32[np.ndarray, " n"], shares: Shares, seed: int
) -> list[str]:
    """Return the split of each example: near duplicates stay together, and the shares are equal in all classes.

    The largest groups of a class are placed first, each in the split that lacks most; single examples then fill up, so
    that a class without large groups is split exactly. A pure function of its arguments.

    Args:
      label_ids: the class of each example; a group with several classes is excluded.
      groups: the group of each example.
      shares: of the examples of each class.
      seed: of the random choice.
    """
    wanted = {"train": 1 - shares.val - shares.test, "val": shares.val, "test": shares.test}
    splits = ["excluded"] * len(label_ids)
    members: dict[int, list[int]] = {}
    for i, number in enumerate(groups.tolist()):
        members.setdefault(number, []).append(i)
    by_class: dict[int, list[list[int]]] = {}
    for positions in members.values():
        labels = set(label_ids[positions].tolist())
        if len(labels) == 1:
            by_class.setdefault(labels.pop(), []).append(positions)
    for label, found in sorted(by_class.items()):
        order = np.random.default_rng((seed, label)).permutation(len(found))
        shuffled = sorted((found[k] for k in order), key=len, reverse=True)  # stable sort: equal sizes stay shuffled
        total, have = sum(map(len, found)), dict.fromkeys(wanted, 0)
        for positions in shuffled:
            split = max(wanted, key=lambda name: (wanted[name] * total - have[name], wanted[name]))
            have[split] += len(positions)
            for i in positions:
                splits[i] = split
    return splits


def take_shots(
    label_ids: Int32[np.ndarray, " n"], labels: Sequence[str], shots: int, seed: int
) -> Int[np.ndarray, " chosen"]:
    """Return sorted positions of `shots` random examples of each class.

    Raises:
      UserError: a class has too few.
    """
    chosen = []
    for i, label in enumerate(labels):
        positions = np.flatnonzero(label_ids == i)
        if len(positions) < shots:
            raise UserError(
                f"config.data.shots is {shots}, but class {label!r} has only {len(positions)} training images; use "
                f"{len(positions)} or fewer, or leave the class out by config.data.labels"
            )
        chosen.append(np.random.default_rng((seed, i)).permutation(positions)[:shots])
    return np.sort(np.concatenate(chosen))
