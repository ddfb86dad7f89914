"""The contents of duplicates.json: groups of copies, and pairs for a person to decide."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def list_duplicates(
    rows: Sequence[Mapping[str, Any]],
    copies: np.ndarray,
    pairs: Sequence[tuple[int, int, float]],
    given: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the contents of duplicates.json: each group of more than one copy.

    Args:
      rows: of the manifest, n of them.
      copies: [n], the number of each row's group.
      pairs: two rows and their similarity, 0 to 1.
      given: the split that each row had before; empty if none.
    """
    members: dict[int, list[int]] = {}
    for i, number in enumerate(copies.tolist()):
        members.setdefault(number, []).append(i)
    least: dict[int, float] = {}
    for a, _, alike in pairs:
        number = int(copies[a])
        least[number] = min(least.get(number, 1.0), alike)
    return [
        {
            "group": rows[positions[0]]["group"],
            "similarity": round(least[number], 4),
            "joined": True,
            "identical": len({rows[i]["sha256"] for i in positions}) == 1,
            "conflict": len({rows[i]["label"] for i in positions}) > 1,
            "crosses": len({given[i] for i in positions}) > 1,
            "members": [_member(rows[i], given[i]) for i in positions],
        }
        for number, positions in sorted(members.items())
        if len(positions) > 1
    ]


def list_undecided(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[int, int, float]], given: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the pairs that look alike but have different labels, for duplicates.json; both keep their splits."""
    return [
        {
            "group": None,
            "similarity": round(alike, 4),
            "joined": False,
            "identical": False,
            "conflict": True,
            "crosses": given[i] != given[j],
            "members": [_member(rows[i], given[i]), _member(rows[j], given[j])],
        }
        for i, j, alike in pairs
    ]


def _member(row: Mapping[str, Any], given: str) -> dict[str, str]:
    return {"path": row["path"], "label": row["label"], "split": row["split"], "data": given}
