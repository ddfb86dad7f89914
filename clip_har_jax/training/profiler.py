"""Traces of chosen training steps."""

from types import TracebackType

import jax

from clip_har_jax.training.state import TrainState


class Profiler:
    """Write a trace of some steps; a context manager that closes the trace if the loop ends earlier.

    Args:
      steps: the first and the last one; None: no trace.
      folder: for TensorBoard and ui.perfetto.dev.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: str):
        self._first, self._last = steps or (0, 0)
        self._folder, self._is_tracing = folder, False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Start the trace if `step` is its first one."""
        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each Python call as an event slows the steps that are looked at
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._is_tracing = True

    def after(self, step: int, state: TrainState) -> None:
        """End the trace if `step` is its last one, after the device has finished it."""
        if self._is_tracing and step == self._last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
