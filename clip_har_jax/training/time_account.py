"""The time of a run by category over all its starts, and the share spent in training steps.

The usual name of that share is goodput; run.json uses it.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax

# category in run.json -> words for people
CATEGORIES = {
    "productive": "training steps",
    "start": "starting",  # imports, listing the data, restoring
    "compile": "compiling",
    "data_wait": "waiting for data",
    "checkpoint": "saving",
    "evaluation": "evaluating",
    "lost": "steps repeated after a kill",  # steps after the last checkpoint before the kill
}
# Tracing doesn't count as compiling: traces are nested, and their times overlap.
_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class TimeAccount:
    """Seconds by category; a context manager that measures compilation. Time without a category is productive.

    Args:
      before: seconds by category at the checkpoint from which the run resumes.
      lost_s: seconds of an earlier start after that checkpoint.
      begin: `time.monotonic()` when this start began.
    """

    def __init__(self, before: Mapping[str, float] | None = None, lost_s: float = 0.0, begin: float | None = None):
        self._seconds = {name: float((before or {}).get(name, 0.0)) for name in CATEGORIES}
        self._seconds["lost"] += lost_s
        self._begin = time.monotonic() if begin is None else begin
        self._counted = 0.0

    def __enter__(self) -> "TimeAccount":
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILE_EVENTS:
            self._add("compile", duration_secs)

    def _add(self, category: str, seconds: float) -> None:
        self._seconds[category] += seconds
        self._counted += seconds

    def count_rest(self, category: str) -> None:
        """Count all time of this start that has no category yet."""
        self._add(category, max(0.0, time.monotonic() - self._begin - self._counted))

    @contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Measure the time of a block, without compilation in it."""
        begin, counted = time.monotonic(), self._counted
        try:
            yield
        finally:
            inner = self._counted - counted
            self._add(category, max(0.0, time.monotonic() - begin - inner))

    def seconds(self) -> dict[str, float]:
        """Return the seconds by category until now; their sum is the time of all starts."""
        now = dict(self._seconds)
        now["productive"] += max(0.0, time.monotonic() - self._begin - self._counted)
        return {name: round(value, 3) for name, value in now.items()}


def describe_seconds(seconds: Mapping[str, float]) -> str:
    """Return the time by category in words, the longest first; less than half a second is left out."""
    total = max(sum(seconds.values()), 1e-9)
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{CATEGORIES[name]} {value:.0f} s ({value / total:.0%})" for name, value in longest if value >= 0.5
    )
