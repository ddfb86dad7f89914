"""Predictions of long videos and streams, window by window; each frame is encoded only once if the model allows it.

A model of clips predicts a window of a few seconds. A window slides over the video by `hop_s`. Consecutive windows
share most of their frames, so the embeddings of frames are kept, and only the clip head runs at each hop. In a model
whose tower mixes the frames, a single frame has no embedding; then the frames are kept, and each hop runs the whole
clip.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32

from clip_har_jax.errors import UserError
from clip_har_jax.inference.backends import Backend, clip_sampling, need_one_label, softmax
from clip_har_jax.preprocess import evaluation_transform
from clip_har_jax.video.clips import TimedFrame
from clip_har_jax.video.decoding import BadVideo
from clip_har_jax.video.segments import Segment, SegmentRules, find_segments

F = TypeVar("F")
HOPS = 4  # hops per window by default
LONGEST_S = 600.0


@dataclass(frozen=True)
class Windows:
    """The windows that slide over a video.

    Attributes:
      num_frames: frames of a window, evenly spaced.
      window_s: length of a window.
      hop_s: time from one window to the next.
    """

    num_frames: int
    window_s: float
    hop_s: float

    def __post_init__(self) -> None:
        if not 0 < self.window_s <= LONGEST_S:
            raise UserError(f"window_s is {self.window_s:g}; more than 0 and at most {LONGEST_S:g} s are needed")
        if not 0 < self.hop_s <= self.window_s:
            raise UserError(f"hop_s is {self.hop_s:g}; more than 0 and at most window_s ({self.window_s:g}) are needed")

    @property
    def rate_hz(self) -> float:
        """The number of analysed frames per second."""
        return self.num_frames / self.window_s


def choose_windows(backend: Backend, window_s: float | None = None, hop_s: float | None = None) -> Windows:
    """Return the windows for a model: its number of frames in training, at the frame rate in its folder.

    Args:
      backend: the model.
      window_s: None: the number of frames divided by the rate in actions.json (2 s by default).
      hop_s: None: a quarter of the window.

    Raises:
      UserError: invalid lengths.
    """
    sampling = clip_sampling(backend.actions)
    num_frames = backend.num_frames or sampling.num_frames
    if window_s is None:
        window_s = num_frames / sampling.rate_hz
    return Windows(num_frames, window_s, window_s / HOPS if hop_s is None else hop_s)


@dataclass(frozen=True)
class Window(Generic[F]):
    """A complete window: the features of its frames, and the time of its middle."""

    time_s: float
    end_s: float
    features: list[F]


class FrameRing(Generic[F]):
    """Keeps the newest frames of one video, and returns the windows that they fill.

    Args:
      windows: the lengths of the windows.
    """

    def __init__(self, windows: Windows):
        self.windows = windows
        self._frames: deque[tuple[float, F]] = deque()
        self._due_s: float | None = None
        self._given = False

    def push(self, time_s: float, feature: F) -> Window[F] | None:
        """Take the next frame; return a window if one is complete.

        Args:
          time_s: time of the frame; must increase.
          feature: the value to keep for the frame.
        """
        windows, period_s = self.windows, 1 / self.windows.rate_hz
        self._frames.append((time_s, feature))
        if self._due_s is None:
            self._due_s = time_s + windows.window_s - period_s
        while self._frames[0][0] < time_s - windows.window_s - period_s:
            self._frames.popleft()
        if time_s < self._due_s - period_s / 4:  # a frame of any rate may be this early
            return None
        self._due_s += windows.hop_s * max(1, 1 + (time_s - self._due_s) // windows.hop_s)
        targets = time_s - period_s * np.arange(windows.num_frames - 1, -1, -1)
        end_s = time_s + period_s
        return Window(end_s - windows.window_s / 2, end_s, self._nearest(targets))

    def rest(self) -> Window[F] | None:
        """Return the only window of a video that is shorter than a window; None: there were complete windows."""
        if self._given or not self._frames:
            return None
        first_s, last_s = self._frames[0][0], self._frames[-1][0]
        length_s, count = last_s - first_s + 1 / self.windows.rate_hz, self.windows.num_frames
        targets = first_s + (np.arange(count) + 0.5) / count * length_s - 0.5 / self.windows.rate_hz
        return Window(first_s + length_s / 2, first_s + length_s, self._nearest(targets))

    def _nearest(self, targets: np.ndarray) -> list[F]:
        self._given = True
        times = np.asarray([time_s for time_s, _ in self._frames])
        chosen = np.abs(times[None] - targets[:, None]).argmin(axis=1)
        return [self._frames[i][1] for i in chosen]


class Scored(NamedTuple):
    """The prediction of a window."""

    time_s: float  # the middle of the window
    end_s: float
    logits: Float32[np.ndarray, " c"]


def score_windows(
    frames: Iterable[TimedFrame], backend: Backend, windows: Windows, batch_size: int = 32
) -> Iterator[Scored]:
    """Yield the logits of each window of a video, whose frames come at about `windows.rate_hz`.

    Raises:
      BadVideo: as `video.iter_frames`, after the windows before the damage.
    """
    ring: FrameRing[np.ndarray] = FrameRing(windows)
    source = iter(frames)
    failure: BadVideo | None = None
    ended = False
    while not ended and failure is None:
        chunk: list[TimedFrame] = []
        try:
            for frame in islice(source, batch_size):
                chunk.append(frame)
        except BadVideo as error:  # the frames before the damage still count
            failure = error
        ended = len(chunk) < batch_size
        due: list[Window[np.ndarray]] = []
        if chunk:
            images = np.stack([evaluation_transform(frame.image, backend.preprocess) for frame in chunk])
            features = backend.embed_frames(images) if backend.takes_frames else images
            pushed = (ring.push(frame.time_s, row) for frame, row in zip(chunk, features, strict=True))
            due = [window for window in pushed if window is not None]
        if (ended or failure is not None) and (rest := ring.rest()) is not None:
            due.append(rest)
        if due:
            rows = np.stack([np.stack(window.features) for window in due])
            logits = backend.frame_logits(rows) if backend.takes_frames else backend.logits(rows)
            yield from (Scored(one.time_s, one.end_s, row) for one, row in zip(due, logits, strict=True))
    if failure is not None:
        raise failure


@dataclass
class FoundSegments:
    """The actions in a video, with their times."""

    segments: list[Segment] = field(default_factory=list)
    frames: int = 0
    duration_s: float = 0.0
    damage: str | None = None  # a description of the unreadable part of the video


def find_video_segments(
    frames: Iterable[TimedFrame],
    backend: Backend,
    windows: Windows,
    rules: SegmentRules,
    batch_size: int = 32,
) -> FoundSegments:
    """Return the segments of a whole video. Memory grows by one row of scores per hop, not with the frames.

    Raises:
      BadVideo: no frame of it can be read.
      UserError: a multi-label model.
    """
    need_one_label(backend.actions, "segments")
    found = FoundSegments()
    times: list[float] = []
    scores: list[np.ndarray] = []

    def counted() -> Iterator[TimedFrame]:
        for frame in frames:
            found.frames, found.duration_s = found.frames + 1, frame.time_s + 1 / windows.rate_hz
            yield frame

    try:
        for window in score_windows(counted(), backend, windows, batch_size):
            times.append(window.time_s)
            scores.append(softmax(window.logits))
    except BadVideo as error:
        if not scores:
            raise
        found.damage = str(error)
    found.segments = find_segments(np.asarray(times), np.asarray(scores), backend.labels, rules, found.duration_s)
    return found
