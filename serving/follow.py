"""From the frames of one stream to events, with a model: frame by frame, or window by window.

A model of images classifies each frame, and events follow from the smoothed scores. A model of clips classifies
windows: the features of a frame are computed once, and each hop runs only the clip head, so the cost per second doesn't
grow with the length of the window.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import Depends, Query
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from clip_har_jax.errors import UserError
from clip_har_jax.inference.backends import softmax
from clip_har_jax.inference.live_segments import Change, LiveSegments
from clip_har_jax.inference.sliding_windows import LONGEST_S, FrameRing, Windows, choose_windows
from clip_har_jax.inference.stream import EventDetector, EventRules
from clip_har_jax.video.segments import BACKGROUND, SegmentRules
from serving.batcher import Batcher
from serving.classes import Prompts, TextClasses
from serving.models import ServedModel
from serving.problems import Problem
from serving.requests import ModelQuery, Threshold, async_dependency
from serving.service import Service

SHORTEST_S = 0.05  # of a window or a hop: more would be analysed than any camera sends
Seconds = Annotated[float, Field(ge=SHORTEST_S, le=LONGEST_S, allow_inf_nan=False)] | SkipJsonSchema[None]


@dataclasses.dataclass(frozen=True)
class EventOptions:
    """The rules of events; the defaults are those of `EventRules`."""

    smoothing: Annotated[str, Query(pattern="^(exponential|attention|none)$")] = EventRules.smoothing
    memory_s: Annotated[float, Query(gt=0, le=60, allow_inf_nan=False)] = EventRules.memory_s
    start_score: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False)] = EventRules.start_score
    end_score: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False)] = EventRules.end_score
    min_duration_s: Annotated[float, Query(ge=0, le=600, allow_inf_nan=False)] = EventRules.min_duration_s
    max_gap_s: Annotated[
        float, Query(ge=0, le=600, allow_inf_nan=False, description="longest gap within one action, with windows")
    ] = 0.0
    window_s: Annotated[Seconds, Query(description="length of a window; left out: as in training")] = None
    hop_s: Annotated[Seconds, Query(description="time between windows; left out: a quarter of window_s")] = None
    max_delay_s: Annotated[Seconds, Query(description="longest time from the end of an event until it is final")] = None
    threshold: Annotated[Threshold | SkipJsonSchema[None], Query()] = None
    top: Annotated[int, Query(ge=1, le=100)] = 5
    classes: Annotated[list[str], Query(description="as /v1/predict takes them")] = ()  # type: ignore[assignment]

    def rules(self, model: ServedModel, free: bool) -> EventRules:
        """Return the detector's rules for a model.

        Raises:
          Problem: they contradict each other.
        """
        below = self.threshold if self.threshold is not None or free else model.abstain_below
        try:
            return EventRules(
                self.smoothing, self.memory_s, self.start_score, self.end_score, self.min_duration_s, below
            )
        except UserError as error:
            raise Problem("invalid_request", str(error)) from error

    def segment_rules(self, model: ServedModel, free: bool) -> SegmentRules:
        """Return the rules of segments for a model of clips.

        Raises:
          Problem: they contradict one another.
        """
        below = self.threshold if self.threshold is not None or free else model.abstain_below
        try:
            rules = SegmentRules(self.start_score, self.end_score, self.max_gap_s, self.min_duration_s)
            return dataclasses.replace(rules, start_score=max(self.start_score, below or 0.0))
        except UserError as error:
            raise Problem("invalid_request", str(error)) from error

    def asks_for_windows(self, model: ServedModel) -> bool:
        """Return whether a stream is predicted by windows: always for a model of clips, on request for others."""
        return model.is_of_clips or self.window_s is not None or self.hop_s is not None

    def windows(self, model: ServedModel) -> Windows:
        """Return the windows of a request, or the model's own.

        Raises:
          Problem: invalid lengths, or a model that takes only images.
        """
        model.need_clips()
        try:
            return choose_windows(model.backend, self.window_s, self.hop_s)
        except UserError as error:
            raise Problem("invalid_request", str(error)) from error


EventQuery = Annotated[EventOptions, Depends(async_dependency(EventOptions))]


class Seen(NamedTuple):
    """The prediction at a frame of a stream.

    Attributes:
      time_s: time of the frame, or of the middle of its window.
      probs: probabilities of the classes `labels`.
      label: the most probable action; None: abstained, or background.
    """

    time_s: float
    labels: tuple[str, ...]
    probs: np.ndarray
    label: str | None
    score: float


class FramePath:
    """Predictions by a model of images, one for each frame.

    Args:
      model: the model.
      classes: None: the model's own.
      rules: the rules of events.
      batcher: runs the model.

    Raises:
      Problem: the model gives several labels.
    """

    rate_hz = None  # analyses as many frames as come

    def __init__(self, model: ServedModel, classes: TextClasses | None, rules: EventRules, batcher: Batcher):
        model.need_one_label()
        self._model, self._classes, self._batcher = model, classes, batcher
        self.detector = EventDetector(classes.labels if classes else model.labels, rules)
        self.lane = model.embed if classes is not None else model.classify

    async def measure(self, pixels: np.ndarray, deadline: float) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a frame's logits [c], and its embedding [d] if it is needed; `pixels`: uint8 [h, w, 3]."""
        model, batcher, classes = self._model, self._batcher, self._classes
        attends = self.detector.rules.smoothing == "attention"
        embedding = await batcher.run(model.embed, pixels, deadline) if classes or attends else None
        if classes is not None and embedding is not None:
            return classes.logits(embedding), embedding
        return await batcher.run(model.classify, pixels, deadline), embedding

    async def look(self, pixels: np.ndarray, time_s: float, deadline: float) -> tuple[Seen, list[dict[str, Any]]]:
        """Return the prediction for the next frame, uint8 [h, w, 3], and the messages of events."""
        moment = self.detector.update(time_s, *await self.measure(pixels, deadline))
        events = [{"event": "end", **vars(event)} for event in moment.ended]
        events += [{"event": "start", **vars(event)} for event in moment.started]
        return Seen(moment.time_s, self.detector.labels, moment.probs, moment.label, moment.score), events

    def finish(self) -> list[dict[str, Any]]:
        """End all events; return their messages."""
        return [{"event": "end", **vars(event)} for event in self.detector.finish()]


class WindowPath:
    """Predictions by a model of clips, one per hop, for the window that ends there.

    Args:
      model, classes, batcher: see `FramePath`.
      options: the rules of windows and events.
      free: the classes are free text.

    Raises:
      Problem: options that contradict each other, or a model that takes only images or gives several labels.
    """

    def __init__(
        self, model: ServedModel, classes: TextClasses | None, options: EventOptions, free: bool, batcher: Batcher
    ):
        model.need_one_label()
        self._model, self._classes, self._batcher, clips = model, classes, batcher, model.need_clips()
        self.windows, self.rules = options.windows(model), options.segment_rules(model, free)
        self._frame = clips.frame
        self.lane, self.window_lane = clips.frame or clips.whole, clips.head or clips.whole
        self.labels = classes.labels if classes else model.labels
        self.rate_hz = self.windows.rate_hz
        self._ring: FrameRing[np.ndarray] = FrameRing(self.windows)
        self._last_s: float | None = None
        delay_s = options.max_delay_s
        if delay_s is None:  # as long as something can change
            delay_s = self.windows.window_s / 2 + self.windows.hop_s + self.rules.max_gap_s
        try:
            self._segments = LiveSegments(self.labels, self.rules, self.windows, delay_s)
        except UserError as error:
            raise Problem("invalid_request", str(error)) from error

    async def features(self, pixels: np.ndarray, deadline: float) -> np.ndarray:
        """Return a frame's embedding [d], or the frame, uint8 [h, w, 3], if the model needs all frames together."""
        return pixels if self._frame is None else await self._batcher.run(self._frame, pixels, deadline)

    async def window_probs(self, features: list[np.ndarray], deadline: float) -> np.ndarray:
        """Return the class probabilities of a window, [c], from the features of its frames."""
        logits = await self._model.window_logits(self._classes, np.stack(features), self._batcher, deadline)
        return softmax(logits)

    async def look(
        self, pixels: np.ndarray, time_s: float, deadline: float
    ) -> tuple[Seen | None, list[dict[str, Any]]]:
        """Take the next frame, uint8 [h, w, 3]; return the prediction if a window is complete, and events' messages.

        A gap as long as a window ends all events, before the next window is complete.
        """
        events: list[dict[str, Any]] = []
        if self._last_s is not None and time_s - self._last_s > self.windows.window_s:  # a gap
            events, self._ring = self.finish(), FrameRing(self.windows)
        self._last_s = time_s
        window = self._ring.push(time_s, await self.features(pixels, deadline))
        if window is None:
            return None, events
        probs = await self.window_probs(window.features, deadline)
        events += map(to_message, self._segments.update(window.time_s, probs))
        best = int(np.argmax(probs))
        score, label = float(probs[best]), self.labels[best]
        silent = label == BACKGROUND or score < self.rules.end_score
        return Seen(window.time_s, self.labels, probs, None if silent else label, score), events

    def finish(self) -> list[dict[str, Any]]:
        """End all events; return their final messages."""
        return [to_message(change) for change in self._segments.finish()]


def to_message(change: Change) -> dict[str, Any]:
    """Return the message of an event's change."""
    fields = change._asdict()
    return {"event": fields.pop("what"), **fields, "final": change.what == "final"}


class Follower:
    """Turn the frames of one stream into events; a switch of the model ends the current events."""

    def __init__(self, service: Service, choice: ModelQuery, options: EventOptions, prompts: dict[str, Prompts] | None):
        self._service, self._choice, self._options, self._prompts = service, choice, options, prompts
        self.model: ServedModel | None = None
        self.path: FramePath | WindowPath | None = None

    async def choose(self, deadline: float) -> list[dict[str, Any]]:
        """Use the model that is active now; return the messages of events that ended with the previous one."""
        options, batcher = self._options, self._service.batcher
        model = self._service.models.get(self._choice.model, self._choice.version)
        if model is self.model:
            return []
        classes, free = model.classes, self._prompts is not None
        if self._prompts is not None:
            if not model.accepts_classes:
                raise model.refusal()
            classes = await model.open_vocabulary(self._prompts, batcher, deadline)
        path: FramePath | WindowPath
        if options.asks_for_windows(model):
            path = WindowPath(model, classes, options, free, batcher)
        else:
            path = FramePath(model, classes, options.rules(model, free), batcher)
        ended = self.path.finish() if self.path is not None else []
        self.model, self.path = model, path
        return ended
