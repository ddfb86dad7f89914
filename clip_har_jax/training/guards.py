"""What ends a run before its last step without losing work."""

import signal
from types import FrameType


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
        return 0 if self.received is None else 128 + self.received
