"""Windows of untrimmed videos as labelled clips, from which a model learns when an action happens.

The label of a window is the action at its middle, or `background` if there is none. So a model that slides over a video
changes its prediction at the boundaries. The windows of an interval are evenly spaced; training draws the middle of
each at random within its part of the interval.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from clip_har_jax.data import untrimmed
from clip_har_jax.data.examples import ClipViews, Example, Source, fingerprint_of
from clip_har_jax.errors import UserError
from clip_har_jax.listing import Tally
from clip_har_jax.names import label_ids, sort_labels
from clip_har_jax.specs import Spec
from clip_har_jax.video.annotations import read_annotations
from clip_har_jax.video.clips import Clip, TimedFrame, iter_frames, read_views
from clip_har_jax.video.sampling import FrameSampling, sample_times
from clip_har_jax.video.segments import BACKGROUND, Segment

WINDOW_S = 2.0  # 8 frames at 4 a second, the defaults of config.data.video


@runtime_checkable
class UntrimmedVideo(Protocol):
    """A video with the times of its actions."""

    @property
    def name(self) -> str:
        """The name by which a person finds it."""

    @property
    def duration_s(self) -> float:
        """Its length."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Its annotated actions."""

    def frames(self, rate_hz: float) -> Iterator[TimedFrame]:
        """Yield its frames at a rate."""

    def read(self, span_s: tuple[float, float], view: ClipViews) -> Clip:
        """Read frames of an interval; times outside the video give its first or last frame."""


class VideoFile(NamedTuple):
    """An annotated video file."""

    name: str
    duration_s: float
    segments: tuple[Segment, ...]

    def frames(self, rate_hz: float) -> Iterator[TimedFrame]:
        """Yield the frames of the file; see `video.clips.iter_frames`."""
        return iter_frames(self.name, rate_hz)

    def read(self, span_s: tuple[float, float], view: ClipViews) -> Clip:
        """Read frames of an interval of the file."""
        return read_views(self.name, *view, span_s=span_s)[0]


class DrawnFile(NamedTuple):
    """A drawn video of `motion?untrimmed`."""

    split: str
    number: int

    @property
    def drawn(self) -> untrimmed.DrawnVideo:
        """The video itself."""
        return untrimmed.DrawnVideo(self.split, self.number)

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"motion/untrimmed/{self.split}/{self.number}"

    @property
    def duration_s(self) -> float:
        """Length of the video."""
        return self.drawn.duration_s

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The actions with their times."""
        return self.drawn.segments

    def frames(self, rate_hz: float) -> Iterator[TimedFrame]:
        """Draw the frames at a rate."""
        drawn = self.drawn
        times_s = np.arange(int(drawn.duration_s * rate_hz)) / rate_hz
        return (TimedFrame(float(time_s), drawn.frame_at(float(time_s))) for time_s in times_s)

    def read(self, span_s: tuple[float, float], view: ClipViews) -> Clip:
        """Draw frames of an interval."""
        drawn = self.drawn
        times_s = span_s[0] + sample_times(span_s[1] - span_s[0], view.sampling, 0, view.rng)
        times_s = np.clip(times_s, 0, drawn.duration_s)
        frames = tuple(view.each(drawn.frame_at(float(time_s))) for time_s in times_s)
        return Clip(frames, tuple(times_s.tolist()), span_s[1] - span_s[0])


class Window(NamedTuple):
    """An interval of a video whose middle lies between `first_s` and `last_s`."""

    video: UntrimmedVideo
    first_s: float
    last_s: float
    window_s: float

    @property
    def path(self) -> str | None:
        """The video's file; None: it is drawn."""
        return self.video.name if isinstance(self.video, VideoFile) else None

    def read(self, views: ClipViews) -> list[Clip]:
        """Read its frames; the middle is random in training, otherwise the centre of its part, or spread over views."""
        sampling, rng = views.sampling, views.rng
        within = FrameSampling(sampling.num_frames, "tsn" if sampling.method == "tsn" else "uniform")
        one, clips = views._replace(sampling=within, indices=(0,)), []
        for index in views.indices:
            share = rng.random() if rng is not None else (index + 0.5) / sampling.num_views
            middle_s = self.first_s + share * (self.last_s - self.first_s)
            clips.append(self.video.read((middle_s - self.window_s / 2, middle_s + self.window_s / 2), one))
        return clips


class WindowSource(Source):
    """The windows of untrimmed videos, with the label `background` outside their actions.

    Args:
      videos: the videos with their annotations.
      labels: the classes; empty: those of the annotations, and `background`.
      window_s: length of a window; there is one per half of it.
      where: the SPEC, for messages.
      tally: of the listing.
    """

    clips = True

    def __init__(
        self, videos: Sequence[UntrimmedVideo], labels: Sequence[str], window_s: float, where: str, tally: Tally
    ):
        rows = [(window, label) for video in videos for window, label in list_windows(video, window_s)]
        names = [label for _, label in rows]
        actions = {segment.label for video in videos for segment in video.segments}
        self.labels = tuple(labels) or sort_labels([*actions, BACKGROUND])
        self.label_ids = np.asarray(label_ids(names, self.labels, where), np.int32)
        self.videos, self.windows, self.tally = tuple(videos), [window for window, _ in rows], tally
        content = [(_content(video), video.duration_s, video.segments) for video in videos]
        self.fingerprint = fingerprint_of("windows", untrimmed.VERSION, window_s, self.labels, content)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> Example:
        return Example(self.windows[i], int(self.label_ids[i]), self.name(i))

    def name(self, i: int) -> str:
        window = self.windows[i]
        return f"{window.video.name}, {(window.first_s + window.last_s) / 2:.1f} s"


def _content(video: UntrimmedVideo) -> tuple[str, int]:
    """Return the identity of a video: its name without its folder, and its size in bytes."""
    size = os.stat(video.name).st_size if isinstance(video, VideoFile) else 0
    return os.path.basename(video.name), size


def list_windows(video: UntrimmedVideo, window_s: float) -> list[tuple[Window, str]]:
    """Return the windows of a video with their labels: first those of the segments, then those of the gaps."""
    stretches = [(segment.start_s, segment.end_s, segment.label) for segment in video.segments]
    begin_s = 0.0
    for segment in sorted(video.segments):
        if segment.start_s > begin_s:
            stretches.append((begin_s, segment.start_s, BACKGROUND))
        begin_s = max(begin_s, segment.end_s)
    if video.duration_s > begin_s:
        stretches.append((begin_s, video.duration_s, BACKGROUND))
    windows = []
    for start_s, end_s, label in stretches:
        edges = np.linspace(start_s, end_s, max(1, round((end_s - start_s) / (window_s / 2))) + 1).tolist()
        windows += [(Window(video, a, b, window_s), label) for a, b in pairwise(edges)]
    return windows


def list_untrimmed(spec: Spec, split: str, tally: Tally | None = None) -> list[UntrimmedVideo]:
    """Return the untrimmed videos of a SPEC: `motion?untrimmed`, or annotations with times.

    Raises:
      UserError: as `video.annotations.read_annotations`.
    """
    if spec.kind == "motion":
        name = spec.options.get("split", split)
        return [DrawnFile(name, i) for i in range(untrimmed.SPLITS[name])]
    found = read_annotations(spec, split, tally)
    return [VideoFile(str(video.path), video.duration_s, video.segments) for video in found]


def window_source(spec: Spec, split: str, labels: Sequence[str]) -> WindowSource:
    """Return the windows of a SPEC's untrimmed videos; `?window_s=2` sets their length.

    Raises:
      UserError: as `list_untrimmed`, or a length that isn't a number above 0.
    """
    text = spec.options.get("window_s", f"{WINDOW_S:g}")
    try:
        window_s = float(text)
    except ValueError:
        window_s = 0.0
    if not 0 < window_s < 3600:
        raise UserError(f"{spec}: window_s={text}; it is the length of a window in seconds, above 0 and under an hour")
    tally = Tally()
    videos = list_untrimmed(spec, split, tally)
    return WindowSource(videos, labels, window_s, str(spec), tally)
