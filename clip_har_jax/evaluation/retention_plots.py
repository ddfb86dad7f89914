"""Plots of accuracy on the target against retained zero-shot accuracy."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#0b4f9c", "#d1495b", "#2e933c", "#edae49", "#7b4b94", "#00798c", "#8d6346", "#5c677d", "#e36397", "#3d348b")
MARKERS = "osD^vP*X<>"
INK = "#1c2430"


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.6), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color="#e3e8ef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def draw_wise_ft(points: Sequence[Mapping[str, float]], chosen: float) -> bytes:
    """Return the WiSE-FT curve between a base model and its fine-tuning, one point per alpha, as a PNG.

    Args:
      points: each with alpha, target_top1 and retained_top1, by increasing alpha.
      chosen: the chosen alpha.
    """
    figure, axes = _figure("zero-shot top-1 retained", "top-1 on the target (validation)")
    x, y = ([point[key] for point in points] for key in ("retained_top1", "target_top1"))
    axes.plot(x, y, color=COLORS[0], marker="o", linewidth=1.5, markersize=5)
    for point, a, b in zip(points, x, y, strict=True):
        is_chosen = point["alpha"] == chosen
        text = f"{point['alpha']:g}" + (" (chosen)" if is_chosen else "")
        weight = "bold" if is_chosen else "normal"
        axes.annotate(text, (a, b), (6, 5), textcoords="offset points", fontsize=9, color=INK, fontweight=weight)
    axes.margins(0.12)
    axes.set_title("WiSE-FT by alpha", color=INK, fontsize=11)
    return _png(figure)


def draw_comparison(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return accuracy against retention, one point with 95% intervals per method, as a PNG.

    Args:
      rows: each with method, and (mean, half-width or None) under target and retained.
    """
    figure, axes = _figure("zero-shot top-1 retained on other actions", "top-1 on the target (test)")
    for i, row in enumerate(rows):
        (y, y_half), (x, x_half) = row["target"], row["retained"]
        axes.errorbar(
            x,
            y,
            xerr=x_half,
            yerr=y_half,
            fmt=MARKERS[i % len(MARKERS)],
            color=COLORS[i % len(COLORS)],
            capsize=2,
            elinewidth=1,
            markersize=7,
            label=str(row["method"]),
        )
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.margins(0.1)
    return _png(figure)
