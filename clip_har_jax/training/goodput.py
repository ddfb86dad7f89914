"""Goodput: where the time of a run went, over all its starts, and what share of it moved the model forward."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax

# start: imports, data listing and restoring; lost: after the last checkpoint before a kill, done again since.
CATEGORIES = ("productive", "start", "compile", "data_wait", "checkpoint", "evaluation", "lost")
# Tracing isn't counted here: traces nest, and their times with them.
_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class Goodput:
    """Seconds by category; what no other category claims is productive.

    Args:
      before: the seconds at the checkpoint from which the run continues.
      lost_s: what an earlier start spent after that checkpoint.
      begin: `time.monotonic()` when this start began.
    """

    def __init__(self, before: Mapping[str, float] | None = None, lost_s: float = 0.0, begin: float | None = None):
        self._seconds = {name: float((before or {}).get(name, 0.0)) for name in CATEGORIES}
        self._seconds["lost"] += lost_s
        self._begin = time.monotonic() if begin is None else begin
        self._claimed = 0.0

    def __enter__(self) -> "Goodput":
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILE_EVENTS:
            self._add("compile", duration_secs)

    def _add(self, category: str, seconds: float) -> None:
        self._seconds[category] += seconds
        self._claimed += seconds

    def claim(self, category: str) -> None:
        """Count all time until now that nothing has claimed."""
        self._add(category, max(0.0, time.monotonic() - self._begin - self._claimed))

    @contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Count the time of a block, less what was compiled in it."""
        begin, claimed = time.monotonic(), self._claimed
        try:
            yield
        finally:
            inner = self._claimed - claimed
            self._add(category, max(0.0, time.monotonic() - begin - inner))

    def seconds(self) -> dict[str, float]:
        """Seconds by category until now; their sum is the time of all starts."""
        now = dict(self._seconds)
        now["productive"] += max(0.0, time.monotonic() - self._begin - self._claimed)
        return {name: round(value, 3) for name, value in now.items()}


def productive_share(seconds: Mapping[str, float]) -> float:
    """Return the share of the time that moved the model forward."""
    return seconds["productive"] / max(sum(seconds.values()), 1e-9)
