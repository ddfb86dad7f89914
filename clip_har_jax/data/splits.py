"""The division of examples into training, validation and test."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32

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


def stratify(
    targets: Bool[np.ndarray, "g c"], sizes: Int[np.ndarray, " g"], shares: Sequence[float], seed: int
) -> Int[np.ndarray, " g"]:
    """Return the part of each group of multi-label examples, so that each label has about the given shares.

    Iterative stratification (Sechidis et al. 2011): the rarest label is dealt out first, each of its groups to the part
    that lacks most of it. Unlabelled groups go where most examples are missing. A pure function of its arguments.

    Args:
      targets: the labels of each group.
      sizes: the examples of each group.
      shares: of the examples for each part; they sum to 1.
      seed: of the random order of equal groups.
    """
    weights = targets * sizes[:, None]
    share = np.asarray(shares, np.float64)
    lacking = share[:, None] * weights.sum(axis=0)[None]  # [parts, c], of each label
    room = share * sizes.sum()
    chosen, order = np.full(len(sizes), -1), np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]  # large groups first, while there is room for them

    def place(group: Any, wanted: np.ndarray) -> None:
        part = int(np.lexsort((-room, -wanted))[0])
        chosen[group] = part
        lacking[part] -= weights[group]
        room[part] -= sizes[group]

    left = weights.sum(axis=0)
    while (left > 0).any():
        label = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        found = order[(chosen[order] < 0) & targets[order, label]]
        for group in found:
            place(group, lacking[:, label])
        left = left - weights[found].sum(axis=0)
    for group in order[chosen[order] < 0]:
        place(group, room)
    return chosen


def hold_out_multi_label(
    targets: Bool[np.ndarray, "n c"], fraction: float, seed: int
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " val"]]:
    """Return sorted positions for training and for validation, as `hold_out` does for examples of one label each."""
    if fraction == 0:
        return np.arange(len(targets)), np.empty(0, np.int64)
    part = stratify(targets, np.ones(len(targets), np.int64), (1 - fraction, fraction), seed)
    return np.flatnonzero(part == 0), np.flatnonzero(part == 1)


def assign_multi_label_splits(
    targets: Bool[np.ndarray, "n c"], groups: Int32[np.ndarray, " n"], shares: Shares, seed: int
) -> list[str]:
    """Return the split of each example, as `assign_splits` does; a group with several sets of labels is excluded.

    Args:
      targets: the labels of each example.
      groups: the group of each example.
      shares: of the examples of each label.
      seed: of the random choice.
    """
    _, first, own, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    differs = np.zeros(len(first), bool)
    np.logical_or.at(differs, own, (targets != targets[first][own]).any(axis=1))
    splits = np.full(len(first), "excluded", object)
    parts = stratify(
        targets[first][~differs], sizes[~differs], (1 - shares.val - shares.test, shares.val, shares.test), seed
    )
    splits[~differs] = np.array(["train", "val", "test"], object)[parts]
    return splits[own].tolist()


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
