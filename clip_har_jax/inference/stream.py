"""Frames -> action events with start and end, smoothed over time.

A single frame is unreliable: it can be blurred, or fit several actions. So each frame's logits are averaged with those
just before it. An action starts above one score and ends below a lower one (hysteresis, as in a Schmitt trigger), so
that a score that varies around a threshold gives one event instead of many.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float32

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.inference.backends import Backend, need_one_label
from clip_har_jax.preprocess import evaluation_transform
from clip_har_jax.video.clips import TimedFrame
from clip_har_jax.video.decoding import BadVideo

T = TypeVar("T")
SMOOTHING = ("exponential", "attention", "none")
WINDOW = 3  # times memory_s: older frames weigh under 5%
ATTENTION_TEMPERATURE = 0.05  # of cosine similarities between frames
MAX_FRAMES = 256  # limit of stored frames


@dataclass(frozen=True)
class EventRules:
    """The rules that turn frames into actions.

    Attributes:
      smoothing: weights of earlier frames. exponential: by age. attention: by similarity of the frames' embeddings, so
        that a cut in the film takes effect at once.
      memory_s: age at which a frame's weight is 1/e.
      start_score: smoothed probability at which an action starts.
      end_score: smoothed probability below which it ends.
      min_duration_s: shorter actions aren't reported.
      abstain_below: smoothed probability below which a frame gets no label and starts no action.
      max_gap_s: a longer gap between frames ends the current action at the last frame; None: no limit.
    """

    smoothing: str = "exponential"
    memory_s: float = 1.0
    start_score: float = 0.6
    end_score: float = 0.4
    min_duration_s: float = 0.5
    abstain_below: float | None = None
    max_gap_s: float | None = None

    def __post_init__(self) -> None:
        if self.smoothing not in SMOOTHING:
            raise UserError(f"smoothing {self.smoothing!r}; {nearest(self.smoothing, list(SMOOTHING))}")
        if not 0 < self.memory_s < 3600 or not 0 <= self.min_duration_s < 3600:
            raise UserError("memory_s must be above 0 and min_duration_s 0 or more; both under an hour")
        if not 0 <= self.end_score <= self.start_score <= 1:
            raise UserError(f"0 <= end_score ({self.end_score}) <= start_score ({self.start_score}) <= 1 is needed")


@dataclass
class Event:
    """An action: the times of the first frame that shows it and the first that no longer does (None: it continues)."""

    label: str
    start_s: float
    end_s: float | None
    score: float  # mean smoothed probability


@dataclass(frozen=True)
class FrameResult:
    """The result for one frame.

    Attributes:
      probs: smoothed.
      label: the most probable action; None: abstained.
      started, ended: events that became certain with this frame.
    """

    time_s: float
    probs: Float32[np.ndarray, " c"]
    label: str | None
    score: float
    started: tuple[Event, ...]
    ended: tuple[Event, ...]


@dataclass
class _Running:
    """An action that has begun, reported or not."""

    index: int
    start_s: float
    total: float = 0.0
    frames: int = 0
    told: bool = False

    def event(self, label: str, end_s: float | None = None) -> Event:
        return Event(label, self.start_s, end_s, self.total / max(self.frames, 1))


@dataclass
class _Remembered:
    time_s: float
    logits: np.ndarray
    embedding: np.ndarray | None


class EventDetector:
    """The detector of events in one stream of frames.

    Args:
      labels: the classes, in the order of the logits.
      rules: see `EventRules`.
    """

    def __init__(self, labels: Sequence[str], rules: EventRules = EventRules()):
        self.labels, self.rules = tuple(labels), rules
        self._frames: deque[_Remembered] = deque(maxlen=MAX_FRAMES)
        self._running: _Running | None = None
        self._last_s = 0.0

    def update(
        self,
        time_s: float,
        logits: Float32[np.ndarray, " c"],
        embedding: Float32[np.ndarray, " d"] | None = None,
    ) -> FrameResult:
        """Process the next frame.

        Args:
          time_s: of the frame; never decreases.
          logits: of the classes.
          embedding: L2-normalised; needed only for attention.
        """
        gap = self.rules.max_gap_s is not None and time_s - self._last_s > self.rules.max_gap_s
        before = self.finish() if gap else ()
        self._last_s = time_s = max(time_s, self._last_s)
        self._frames.append(_Remembered(time_s, logits, embedding))
        while self._frames[0].time_s < time_s - WINDOW * self.rules.memory_s:
            self._frames.popleft()
        probs = self._smoothed()
        best = int(np.argmax(probs))
        score = float(probs[best])
        below = self.rules.abstain_below is not None and score < self.rules.abstain_below
        started, ended = self._follow(time_s, probs, best, below)
        return FrameResult(time_s, probs, None if below else self.labels[best], score, started, before + ended)

    def finish(self) -> tuple[Event, ...]:
        """End the current action at the last frame."""
        return self._end(self._last_s)

    def _smoothed(self) -> np.ndarray:
        newest = self._frames[-1]
        rows = np.stack([frame.logits for frame in self._frames])
        if self.rules.smoothing == "none" or len(rows) == 1:
            smoothed = rows[-1]
        else:
            if self.rules.smoothing == "attention":
                assert newest.embedding is not None, "attention compares embeddings"
                embeddings = np.stack([frame.embedding for frame in self._frames if frame.embedding is not None])
                weights = np.exp((embeddings @ newest.embedding - 1) / ATTENTION_TEMPERATURE)
            else:
                ages = newest.time_s - np.asarray([frame.time_s for frame in self._frames])
                weights = np.exp(-ages / self.rules.memory_s)
            smoothed = weights @ rows / weights.sum()
        powers = np.exp(smoothed - smoothed.max())
        return (powers / powers.sum()).astype(np.float32)

    def _follow(
        self, time_s: float, probs: np.ndarray, best: int, below: bool
    ) -> tuple[tuple[Event, ...], tuple[Event, ...]]:
        started: tuple[Event, ...] = ()
        ended: tuple[Event, ...] = ()
        starts = probs[best] >= self.rules.start_score and not below
        running = self._running
        if running is not None:
            replaced = starts and best != running.index
            if replaced or probs[running.index] < self.rules.end_score:
                ended = self._end(time_s)
                running = None
        if running is None and starts:
            running = self._running = _Running(best, time_s)
        if running is not None:
            running.total, running.frames = running.total + float(probs[running.index]), running.frames + 1
            if not running.told and time_s - running.start_s >= self.rules.min_duration_s:
                running.told = True
                started = (running.event(self.labels[running.index]),)
        return started, ended

    def _end(self, time_s: float) -> tuple[Event, ...]:
        running, self._running = self._running, None
        if running is None or not running.told:
            return ()
        return (running.event(self.labels[running.index], time_s),)


@dataclass
class Watched:
    """The result for a whole video."""

    events: list[Event] = field(default_factory=list)
    frames: int = 0
    duration_s: float = 0.0
    damage: str | None = None  # a description of the unreadable part


def watch(
    frames: Iterable[TimedFrame], backend: Backend, detector: EventDetector, batch_size: int = 1
) -> Iterator[FrameResult]:
    """Yield the results of frames, computed `batch_size` at a time; call `detector.finish` at the end.

    Raises:
      BadVideo: as `video.iter_frames`, after the results of the frames before.
    """
    source = iter(frames)
    failure: BadVideo | None = None
    while failure is None:
        chunk: list[TimedFrame] = []
        try:
            for frame in islice(source, batch_size):
                chunk.append(frame)
        except BadVideo as error:  # the frames before it still count
            failure = error
        if not chunk:
            break
        images = np.stack([evaluation_transform(frame.image, backend.preprocess) for frame in chunk])
        logits = backend.logits(images)
        attends = detector.rules.smoothing == "attention"
        embeddings = backend.embed(images) if attends else [None] * len(chunk)
        for frame, row, embedding in zip(chunk, logits, embeddings, strict=True):
            yield detector.update(frame.time_s, row, embedding)
    if failure is not None:
        raise failure


def find_events(frames: Iterable[TimedFrame], backend: Backend, rules: EventRules, batch_size: int = 32) -> Watched:
    """Return the events of a whole video.

    Raises:
      BadVideo: no frame can be read.
      UserError: a multi-label model.
    """
    need_one_label(backend.actions, "events")
    watched, detector = Watched(), EventDetector(backend.labels, rules)
    try:
        for moment in watch(frames, backend, detector, batch_size):
            watched.events += moment.ended
            watched.frames, watched.duration_s = watched.frames + 1, moment.time_s
    except BadVideo as error:
        if not watched.frames:
            raise
        watched.damage = str(error)
    watched.events += detector.finish()
    return watched


class Latest(Generic[T]):
    """Read a source in a thread and yield its newest item; items that aren't taken in time are skipped and counted.

    Args:
      source: read at its own speed.
    """

    def __init__(self, source: Iterable[T]):
        self.skipped = 0
        self._changed = threading.Condition()
        self._item: list[T] = []
        self._error: BaseException | None = None
        self._ended = False
        threading.Thread(target=self._read, args=(source,), daemon=True).start()

    def _read(self, source: Iterable[T]) -> None:
        try:
            for item in source:
                with self._changed:
                    self.skipped += len(self._item)
                    self._item = [item]
                    self._changed.notify()
        except Exception as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._item or self._ended)
                taken, self._item = self._item, []
            if taken:
                yield taken[0]
            elif self._error is not None:
                raise self._error
            else:
                return
