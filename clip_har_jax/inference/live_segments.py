"""Segments of a stream as they happen: the hysteresis of `video.segments`, window by window, with bounded revisions.

Later windows can change an earlier result: two segments of one class with a short gap become one. So an event is
reported when it starts and when it ends, reported again if it turns out to continue, and is final at most `max_delay_s`
after its end. With a delay that covers every gap, the final events are the segments that `find_segments` returns for
the whole video.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from clip_har_jax.errors import UserError
from clip_har_jax.inference.sliding_windows import Windows
from clip_har_jax.video.segments import BACKGROUND, SegmentRules


class Change(NamedTuple):
    """A change of an event.

    Attributes:
      what: start; end; revise: the event continues after an end; final: it doesn't change any more.
      id: number of the event, from 1.
      end_s: None: the event continues.
      score: mean probability over the event so far.
    """

    what: str
    id: int
    label: str
    start_s: float
    end_s: float | None
    score: float


@dataclass
class _Event:
    """A run of scores of one class: the event so far, and the scores since its end, in case it continues."""

    start_s: float
    end_s: float | None = None
    total: float = 0.0
    count: int = 0
    gap_total: float = 0.0
    gap_count: int = 0
    id: int = 0  # 0: not reported

    def change(self, what: str, label: str) -> Change:
        return Change(what, self.id, label, self.start_s, self.end_s, round(self.total / self.count, 6))


class LiveSegments:
    """Finds the segments in the scores of one stream.

    Args:
      labels: the classes, in the order of the scores; `BACKGROUND` among them never is an event.
      rules: when a run of scores is a segment.
      windows: the windows that are scored.
      max_delay_s: the longest time from the end of an event until it is final.

    Raises:
      UserError: the delay is over before an end can be seen.
    """

    def __init__(self, labels: Sequence[str], rules: SegmentRules, windows: Windows, max_delay_s: float):
        self._half_s, self._hop_s = windows.window_s / 2, windows.hop_s
        if not self._half_s + self._hop_s <= max_delay_s < float("inf"):
            raise UserError(
                f"max_delay_s is {max_delay_s:g}; an end is seen half a window and a hop later, so "
                f"{self._half_s + self._hop_s:g} or more is needed"
            )
        self.labels, self.rules, self._max_delay_s = tuple(labels), rules, max_delay_s
        self._events: dict[int, _Event] = {}  # by class; each class has at most one that isn't final
        self._last_s: float | None = None
        self._reach_s = self._seen_next_s = 0.0
        self._told = 0

    def update(self, time_s: float, scores: Float[np.ndarray, " c"]) -> list[Change]:
        """Take the scores of the next window, whose middle is `time_s`; return the changes."""
        first = self._last_s is None
        edge_s = max(0.0, time_s - self._half_s) if self._last_s is None else (self._last_s + time_s) / 2
        self._last_s = time_s
        self._reach_s = time_s + (self._hop_s / 2 if first else time_s - edge_s)
        self._seen_next_s = time_s + self._half_s + self._hop_s
        changes: list[Change] = []
        values = np.asarray(scores, np.float64)
        starting = {int(i) for i in np.flatnonzero(values >= self.rules.start_score)}
        for index in sorted(starting | self._events.keys()):
            if self.labels[index] != BACKGROUND:
                changes += self._follow(index, float(values[index]), edge_s)
        return changes

    def finish(self, end_s: float | None = None) -> list[Change]:
        """End all events, at `end_s` or at the end of the last scores, and return the final changes."""
        changes: list[Change] = []
        if end_s is not None and self._last_s is not None:
            self._reach_s = max(end_s, self._last_s)
        for index, event in sorted(self._events.items()):
            changes += self._grow(index, event)
            if event.id and event.end_s is None:
                event.end_s = self._reach_s
                changes.append(event.change("end", self.labels[index]))
            if event.id:
                changes.append(event.change("final", self.labels[index]))
        self._events.clear()
        self._last_s = None
        return changes

    def _follow(self, index: int, score: float, edge_s: float) -> list[Change]:
        label, rules = self.labels[index], self.rules
        changes: list[Change] = []
        event = self._events.get(index)
        if event is not None and event.end_s is not None:
            late = edge_s - event.end_s >= rules.max_gap_s
            if score >= rules.start_score and not late:  # it continues after all
                event.total, event.count = event.total + event.gap_total, event.count + event.gap_count
                event.end_s, event.gap_total, event.gap_count = None, 0.0, 0
                if event.id:
                    changes.append(event.change("revise", label))
            elif late or self._is_late_next(event.end_s):
                changes += self._close(index, event)
                event = None
            else:
                event.gap_total, event.gap_count = event.gap_total + score, event.gap_count + 1
                return changes
        elif event is not None and score < rules.end_score:
            event.end_s, event.gap_total, event.gap_count = edge_s, score, 1
            if event.id:
                changes.append(event.change("end", label))
            if not rules.max_gap_s or self._is_late_next(edge_s):
                changes += self._close(index, event)
            return changes
        if event is None:
            if score < rules.start_score:
                return changes
            event = self._events[index] = _Event(edge_s)
        event.total, event.count = event.total + score, event.count + 1
        return changes + self._grow(index, event)

    def _grow(self, index: int, event: _Event) -> list[Change]:
        """Report an event that has become long enough."""
        end_s = self._reach_s if event.end_s is None else event.end_s
        if event.id or end_s - event.start_s < max(self.rules.min_duration_s, 1e-9):
            return []
        self._told += 1
        event.id = self._told
        return [event.change("start", self.labels[index])]

    def _close(self, index: int, event: _Event) -> list[Change]:
        del self._events[index]
        return [event.change("final", self.labels[index])] if event.id else []

    def _is_late_next(self, end_s: float) -> bool:
        """Return whether the next window comes too late to change an event that ended at `end_s`."""
        return self._seen_next_s > end_s + self._max_delay_s
