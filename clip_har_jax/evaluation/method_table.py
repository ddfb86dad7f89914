"""The table of a method comparison: one row per method, over the cells of its seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLUMNS = (
    "method",
    "top-1, %",
    "zero-shot retained, %",
    "ECE, %",
    "trainable",
    "optimiser, KiB",
    "step memory, MiB",
    "time, s",
    "chosen on validation",
)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean with the half-width of its 95% interval (Student's t); None: of one value."""
    from scipy.stats import t

    if len(values) == 1:
        return float(values[0]), None
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def summarize(method: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row of the table; means over seeds with the half-widths of their 95% intervals, as `interval` does."""

    def over_seeds(key: str) -> tuple[float, float | None] | None:
        values = [cell[key] for cell in cells]
        return None if any(value is None for value in values) else interval(values)

    return {
        "method": method,
        "settings": dict(cells[0]["settings"]),
        "fits": [dict(cell["fit"]) for cell in cells],
        "target": over_seeds("top1"),
        "retained": over_seeds("retained"),
        "ece": over_seeds("ece"),
        "trainable_parameters": cells[0]["trainable_parameters"],
        "optimizer_bytes": cells[0]["optimizer_bytes"],
        "step_bytes": cells[0]["step_bytes"],
        "seconds": float(np.mean([cell["seconds"] for cell in cells])),
    }


def make_table(rows: Sequence[Mapping[str, Any]], note: str) -> str:
    """Return the table in Markdown, followed by a note on how it was made."""
    body = [
        (
            f"`{row['method']}`",
            *(percent(row[key]) for key in ("target", "retained", "ece")),
            f"{row['trainable_parameters']:,}",
            f"{row['optimizer_bytes'] / 1024:.0f}",
            "-" if row["step_bytes"] is None else f"{row['step_bytes'] / 2**20:.1f}",
            f"{row['seconds']:.0f}",
            _chosen(row),
        )
        for row in rows
    ]
    return markdown_table(COLUMNS, body, note)


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], note: str) -> str:
    """Return a table in Markdown, followed by a note."""
    lines = [f"| {' | '.join(line)} |" for line in (header, *body)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:], "", note, ""])


def percent(pair: tuple[float | None, float | None] | None) -> str:
    """Return a share in %, with the half-width of its interval if it has one; "-" without a share."""
    if pair is None or pair[0] is None:
        return "-"
    return f"{100 * pair[0]:.1f}" + ("" if pair[1] is None else f" ± {100 * pair[1]:.1f}")


def _chosen(row: Mapping[str, Any]) -> str:
    """Return the settings shared by all seeds, then the choice of each seed."""
    parts = [f"{name.replace('_', ' ')} {value:.2g}" for name, value in row["settings"].items()]
    for name in row["fits"][0]:
        values = [f"{fit[name]:g}" for fit in row["fits"]]
        parts.append(f"{name} {values[0] if len(set(values)) == 1 else ' / '.join(values)}")
    return ", ".join(parts) or "-"
