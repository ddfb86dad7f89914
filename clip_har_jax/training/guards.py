"""Reasons to end a run before its last step: a signal, and updates that aren't finite. No work is lost."""

import signal
from collections import deque
from types import FrameType
from typing import Any

import jax
import numpy as np

from clip_har_jax.errors import UserError


class StopSignal:
    """A flag set by SIGTERM and SIGINT, which the loop reads between steps; a second SIGINT ends the process at once.

    A context manager that restores the earlier handlers at its end.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as in shells; that of SIGTERM if only another process got the signal."""
        return 128 + (self.received or signal.SIGTERM)


class TooManySkippedError(UserError):
    """Too many consecutive updates weren't finite; `examples` are those of their batches, by step."""

    def __init__(self, message: str, examples: dict[int, list[int]]):
        super().__init__(message)
        self.examples = examples


class SkipGuard:
    """End a run whose updates are no longer finite.

    Args:
      max_in_row: accepted number of consecutive skipped updates.
    """

    LAG = 2  # steps between dispatching a step and reading its result, so that the device always has work

    def __init__(self, max_in_row: int):
        self._max, self._pending = max_in_row, deque[tuple[int, jax.Array, Any]]()
        self._skipped: dict[int, Any] = {}

    def watch(self, step: int, skipped: jax.Array, index: jax.Array) -> None:
        """Record a step's count of consecutive skipped updates and its batch's index; read those of `LAG` steps
        earlier.

        Args:
          step: its number.
          skipped, index: scalars on the device.

        Raises:
          TooManySkippedError: more than `max_in_row`.
        """
        self._pending.append((step, skipped, index))
        while len(self._pending) > self.LAG:
            self._read()

    def finish(self) -> None:
        """Read the counts of the last steps.

        Raises:
          TooManySkippedError: more than `max_in_row`.
        """
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, skipped, index = self._pending.popleft()
        in_row = int(jax.device_get(skipped))
        if not in_row:
            self._skipped.clear()
            return
        self._skipped[step] = index
        if in_row > self._max:
            examples = {step: _rows_here(index) for step, index in self._skipped.items()}
            raise TooManySkippedError(
                f"step {step}: the loss or the gradient wasn't finite {in_row} times in a row", examples
            )


def _rows_here(index: jax.Array) -> list[int]:
    """Return the indices of the examples of a batch that this process holds."""
    rows = {shard.index[0].start or 0: np.asarray(jax.device_get(shard.data)) for shard in index.addressable_shards}
    return [int(value) for start in sorted(rows) for value in rows[start] if value >= 0]
