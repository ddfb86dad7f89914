"""A picture of actions in videos over time: annotated ones above, found ones below."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clip_har_jax.evaluation.pages import spoken
from clip_har_jax.video.segments import Segment

MOST_VIDEOS = 12
ROW_IN, WIDTH_IN = 0.55, 10.0


def draw_timelines(
    true: Mapping[str, Sequence[Segment]], found: Mapping[str, Sequence[Segment]], labels: Sequence[str]
) -> bytes:
    """Return a PNG with two bars for each of the first videos; a found segment is paler if its score is lower.

    Args:
      true: annotated segments by video.
      found: segments of a localiser by video.
      labels: of the classes, one colour each.
    """
    import matplotlib

    videos = list(true)[:MOST_VIDEOS]
    shades = matplotlib.colormaps["tab20"]
    colours = {label: to_hex(shades(i % 20)) for i, label in enumerate(labels)}
    figure = Figure(figsize=(WIDTH_IN, 1.6 + ROW_IN * len(videos)), layout="constrained")
    axes = figure.add_subplot()
    shown = set()
    for row, video in enumerate(videos):
        for offset, segments in ((-0.2, true[video]), (0.2, found.get(video, ()))):
            for segment in sorted(segments, key=lambda segment: segment.score):  # the likeliest on top
                shown.add(segment.label)
                axes.barh(
                    row + offset,
                    segment.end_s - segment.start_s,
                    0.34,
                    left=segment.start_s,
                    color=_pale(colours[segment.label], segment.score),
                    edgecolor="black" if offset < 0 else "none",
                    linewidth=0.6,
                )
    axes.set_yticks(range(len(videos)), [video.rsplit("/", 1)[-1] for video in videos])
    axes.set_xlim(left=0)
    axes.set_ylim(len(videos) - 0.5, -0.5)
    axes.set_xlabel("seconds (outlined bars: annotated; bars below them: found)")
    axes.set_ylabel("video")
    axes.spines[["top", "right"]].set_visible(False)
    said = zip(labels, spoken(labels), strict=True)
    handles = [Patch(color=colours[label], label=name) for label, name in said if label in shown]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _pale(colour: str, score: float) -> str:
    """Return a colour mixed with white, the more the lower the score; opaque, so that overlaps keep their colours."""
    share = 0.25 + 0.75 * min(1.0, max(0.0, score))
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))
