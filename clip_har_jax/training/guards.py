"""What ends a run before its last step without losing work."""

import signal
from collections import deque
from types import FrameType
from typing import Any

import jax
import numpy as np

from clip_har_jax.errors import UserError


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag, which the loop reads between steps; a second SIGINT ends at once.

    A context manager that puts the handlers back. `exit_code` is the shell's own convention, 128 + the signal's number.
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
        """For a run that was stopped; where another process got the signal, it was SIGTERM as far as this one knows."""
        return 128 + (self.received or signal.SIGTERM)


class TooManySkippedError(UserError):
    """Updates in a row weren't finite; `examples` are the steps and the examples of their batches."""

    def __init__(self, message: str, examples: dict[int, list[int]]):
        super().__init__(message)
        self.examples = examples


class SkipGuard:
    """Ends a run whose updates aren't finite any more.

    Args:
      max_in_row: updates in a row that may be left out.
    """

    LAG = 2  # steps between a step's dispatch and the reading of its result, so that the device always has work

    def __init__(self, max_in_row: int):
        self._max, self._pending = max_in_row, deque[tuple[int, jax.Array, Any]]()
        self._skipped: dict[int, Any] = {}

    def watch(self, step: int, skipped: jax.Array, index: jax.Array) -> None:
        """Take a step's count of skipped updates in a row and its batch's index; reads those of `LAG` steps before.

        Raises:
          TooManySkippedError: the limit is passed.
        """
        self._pending.append((step, skipped, index))
        while len(self._pending) > self.LAG:
            self._read()

    def finish(self) -> None:
        """Read what is left.

        Raises:
          TooManySkippedError: the limit is passed.
        """
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, skipped, index = self._pending.popleft()
        in_row = int(skipped)
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
    """Return the examples that this process holds of a batch."""
    rows = {shard.index[0].start or 0: np.asarray(shard.data) for shard in index.addressable_shards}
    return [int(value) for start in sorted(rows) for value in rows[start] if value >= 0]
