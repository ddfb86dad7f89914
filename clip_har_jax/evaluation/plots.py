"""Pictures of an evaluation, drawn without the global state of pyplot."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from scipy.sparse import csr_array

LIGHT = {"page": "#ffffff", "ink": "#1c2430", "low": "#f2f5f9", "high": "#0b4f9c", "on_high": "#ffffff"}
DARK = {"page": "#161b22", "ink": "#e2e8f0", "low": "#1f2630", "high": "#7cc0ff", "on_high": "#0b1117"}
MAX_COUNTED_CLASSES = 40  # with more, the cells are too small for numbers
MAX_NAMED_CLASSES = 150  # with more, names would be unreadable
MAX_DRAWN_CLASSES = 2000  # with more, each point stands for several classes
MAX_SIDE_IN = 24.0
PAGE_IN = 10.0  # larger pictures are scaled down to a page
MAX_LABEL_LENGTH = 28
FALLBACK_FONTS = (  # for scripts that matplotlib's own font lacks
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Noto Sans Devanagari",
)


def draw_confusion(confusion: csr_array, labels: Sequence[str], dark: bool = False, normalized: bool = False) -> bytes:
    """Return a confusion matrix as a PNG: colours are shares of the true class, numbers are examples or percent of it.

    Args:
      confusion: number of examples by true (row) and predicted (column) class, [c, c].
      labels: of the classes.
      dark: for a dark page.
      normalized: numbers are percent of the row.
    """
    installed = {font.name for font in fontManager.ttflist}
    with rc_context({"font.family": ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]}):
        return _draw_confusion(_summed(confusion), labels, DARK if dark else LIGHT, normalized)


def _summed(confusion: csr_array) -> Int[np.ndarray, "s s"]:
    """Return the matrix; with too many classes, sums over blocks of neighbouring ones."""
    cells, width = confusion.tocoo(), -(-confusion.shape[0] // MAX_DRAWN_CLASSES)
    side = -(-confusion.shape[0] // width)
    summed = np.zeros((side, side), np.int64)
    np.add.at(summed, tuple(axis // width for axis in cells.coords), cells.data)
    return summed


def _draw_confusion(
    confusion: Int[np.ndarray, "s s"], labels: Sequence[str], colors: dict[str, str], normalized: bool
) -> bytes:
    count = len(labels)
    side = min(count * (0.44 if count <= MAX_COUNTED_CLASSES else 0.17), MAX_SIDE_IN)
    figure = Figure(figsize=(max(side, 2.5), max(side, 2.5)), facecolor=colors["page"])
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap=LinearSegmentedColormap.from_list("share", (colors["low"], colors["high"])), vmin=0, vmax=1)
    label_pt = 9.0 if count <= MAX_COUNTED_CLASSES else 72 * side / count * 0.6
    _name_axes(axes, labels, colors, label_pt, title_pt=11 * max(1.0, side / PAGE_IN))
    if count <= MAX_COUNTED_CLASSES:
        for row, column in np.argwhere(confusion > 0):
            color = colors["on_high"] if share[row, column] > 0.5 else colors["ink"]
            text = f"{100 * share[row, column]:.0f}" if normalized else str(confusion[row, column])
            size = 9 if len(text) < 4 else 6
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # labels can be in any script
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def _name_axes(axes: Axes, labels: Sequence[str], colors: dict[str, str], font_pt: float, title_pt: float) -> None:
    if len(labels) > MAX_NAMED_CLASSES:
        labels = ()
    names = [label if len(label) <= MAX_LABEL_LENGTH else label[: MAX_LABEL_LENGTH - 1] + "…" for label in labels]
    style: dict[str, Any] = {"color": colors["ink"], "fontsize": font_pt, "parse_math": False}
    axes.set_xticks(range(len(names)), names, rotation=90, **style)
    axes.set_yticks(range(len(names)), names, **style)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted", color=colors["ink"], fontsize=title_pt)
    axes.set_ylabel("true", color=colors["ink"], fontsize=title_pt)
    axes.spines[:].set_visible(False)
