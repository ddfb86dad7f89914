"""Charts as inline SVG in the page's colours, so that one drawing fits light and dark pages."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from clip_har_jax.evaluation.report_sums import ReliabilityBins

# Colour in matplotlib -> variable of the page that replaces it.
COLORS = {
    "ink": "#010203",
    "soft": "#010204",
    "line": "#010205",
    "bar": "#010206",
    "second": "#010207",
    "third": "#010208",
}
SERIES = ("bar", "second", "third", "soft")
SIZE_IN = (4.6, 3.0)
MOST_POINTS = 1000  # of a curve over the examples
MIN_LOG_RATIO = 10  # least ratio of the largest to the smallest value for a logarithmic axis

Points = tuple[Sequence[int | float], Sequence[float]]  # x and y


def chart(size_in: tuple[float, float] = SIZE_IN) -> tuple[Figure, Axes]:
    """Return an empty chart in the page's colours."""
    figure = Figure(figsize=size_in)
    axes = figure.add_axes((0.18, 0.17, 0.79, 0.8))  # room on the left for 1.25e-05
    axes.grid(True, color=COLORS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", colors=COLORS["soft"], length=0, labelsize=9)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=COLORS["soft"], fontsize=9)
    return figure, axes


def to_svg(figure: Figure, description: str) -> Markup:
    """Return the figure as SVG for an HTML page: no addresses, unique ids, the page's colours."""
    for axes in figure.axes:
        legend = axes.get_legend()
        for entry in legend.get_texts() if legend else ():
            entry.set_color(COLORS["ink"])
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\sid="[a-z0-9]+_\d+"', "", text)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    text = re.sub(r' ?font-family: [^;"]*;?', "", text)  # the page's
    label = Markup('<div class="chart" role="img" aria-label="{}">').format(description)
    return label + Markup(text) + Markup("</div>")


def _legend(axes: Axes, **options: Any) -> Legend:
    return axes.legend(frameon=False, fontsize=9, **options)


def draw_lines(
    series: Mapping[str, Points], x: str, y: str, description: str, log_y: bool = False, markers: bool = False
) -> Markup:
    """Draw lines over a common x axis; with `log_y`, a logarithmic y axis if the values differ tenfold."""
    figure, axes = chart()
    for (name, (xs, ys)), color in zip(series.items(), SERIES * len(series), strict=False):
        marker = "o" if markers or len(xs) < 12 else None
        axes.plot(xs, ys, color=COLORS[color], linewidth=1.8, marker=marker, markersize=4, label=name)
    values = np.concatenate([ys for _, ys in series.values()])
    if log_y and values.min() > 0 and values.max() / values.min() >= MIN_LOG_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    if all(float(value).is_integer() for xs, _ in series.values() for value in xs):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel=x, ylabel=y)
    axes.margins(x=0.02)
    if len(series) > 1:
        _legend(axes)
    return to_svg(figure, description)


def draw_reliability(before: ReliabilityBins | None, after: ReliabilityBins) -> Markup:
    """Draw accuracy by confidence (reliability diagram), with temperature and, if given, without it."""
    figure, axes = chart((4.8, 4.2))
    axes.set_position((0.13, 0.12, 0.84, 0.74))
    axes.plot([0, 1], [0, 1], color=COLORS["soft"], linewidth=1, linestyle=(0, (4, 4)))
    told = []
    for name, bins, color in (("without temperature", before, "second"), ("as the model answers", after, "bar")):
        if bins is None:
            continue
        seen = bins.count > 0
        xs, ys = (values[seen] / bins.count[seen] for values in (bins.confidence, bins.correct))
        told.append(f"{name} ECE {bins.ece:.3f}")
        sizes = 12 + 240 * bins.count[seen] / bins.count.sum()
        axes.scatter(xs, ys, s=sizes, color=COLORS[color], label=f"{name}: ECE {bins.ece:.3f}", alpha=0.8, zorder=3)
    axes.set(xlabel="how sure the model is", ylabel="how often it is right", xlim=(0, 1.03), ylim=(0, 1.03))
    legend = _legend(axes, loc="lower left", bbox_to_anchor=(0, 1.0), handletextpad=0.2)
    for handle in legend.legend_handles:
        handle.set_sizes([40])  # type: ignore[union-attr]
    return to_svg(figure, "Reliability diagram: " + ", ".join(told))


def draw_coverage(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], abstain: float | None) -> Markup:
    """Draw the accuracy of the answers when only the most confident ones are given."""
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(order) + 1)
    accuracy = np.cumsum(right[order]) / answered
    start = min(len(order) - 1, max(0, len(order) // 50 - 1))  # for the first few answers the line is noise
    figure, axes = chart()
    points = np.unique(np.linspace(start, len(order) - 1, MOST_POINTS).astype(int))
    axes.plot(answered[points] / len(order), accuracy[points], color=COLORS["bar"], linewidth=1.8)
    description = f"Accuracy against the share of images answered: {accuracy[-1]:.3f} when all are"
    if abstain is not None and (given := int((confidence >= abstain).sum())):
        axes.plot([given / len(order)], [accuracy[given - 1]], "o", color=COLORS["second"], markersize=8)
        axes.annotate(
            "as the model answers",
            (given / len(order), accuracy[given - 1]),
            xytext=(-10, -16),
            textcoords="offset points",
            ha="right",
            color=COLORS["ink"],
            fontsize=9,
        )
        description += f", {accuracy[given - 1]:.3f} when the surest {given / len(order):.0%} are"
    axes.set(xlabel="share of images answered", ylabel="accuracy of the answers")
    return to_svg(figure, description)


def draw_bars(values: Mapping[str, float], x: str, description: str, unit: str = "") -> Markup:
    """Draw horizontal bars with their values."""
    figure = Figure(figsize=(4.6, 0.4 + 0.36 * len(values)))
    axes = figure.add_axes((0.28, 0.3 / (0.4 + 0.36 * len(values)), 0.58, 0.97 - 0.3 / (0.4 + 0.36 * len(values))))
    axes.spines[:].set_visible(False)
    names, widths = list(values), list(values.values())
    axes.barh(names, widths, color=COLORS["bar"], height=0.62)
    axes.invert_yaxis()
    for i, width in enumerate(widths):
        axes.annotate(
            f"{width:,.0f}{unit}" if width >= 10 else f"{width:.2g}{unit}",
            (width, i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=COLORS["ink"],
        )
    axes.tick_params(colors=COLORS["ink"], length=0, labelsize=9)
    axes.set_xticks([])
    axes.set_xlabel(x, color=COLORS["soft"], fontsize=9)
    return to_svg(figure, description)
