"""Steps of an automated training: each runs once for given inputs, as a process that receives the signals."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from etils import epath

from clip_har_jax.errors import UserError
from clip_har_jax.files import read_json, sha256, write_json
from clip_har_jax.trainer.provenance import ROOT


class StepFailedError(UserError):
    """A step ended with an exit code other than 0."""

    def __init__(self, name: str, code: int):
        super().__init__(
            f"the {name} step ended with exit code {code}; its own lines say why. The same command continues"
        )
        self.code = code


@dataclass
class Step:
    """The result of one step.

    Attributes:
      name: of the step.
      skipped: it had run on the same inputs before.
      seconds: how long it took.
      result: values by name; JSON.
    """

    name: str
    skipped: bool
    seconds: float
    result: dict[str, Any]


class Steps:
    """Run steps, and store the inputs of each in a JSON file.

    Args:
      state: the file.
    """

    def __init__(self, state: Path):
        self.done: list[Step] = []
        self.stopped = 0  # the number of the signal that was received
        self._state = state
        self._child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Pass SIGTERM and SIGINT on to the running step."""
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, name: str, inputs: Sequence[Any], outputs: Sequence[Path], do: Callable[[], dict[str, Any]]) -> Any:
        """Run a step, unless it ran on these inputs before and its outputs exist; return its result.

        Args:
          name: of the step.
          inputs: everything that the result depends on; JSON.
          outputs: files or folders that must exist for the step to be skipped.
          do: makes the outputs and returns the result.

        Raises:
          StepFailedError: a signal was received during the step.
        """
        digest = sha256(json.dumps(inputs, sort_keys=True))
        state = read_json(epath.Path(self._state)) or {}
        known = state.get(name, {})
        skipped = known.get("inputs") == digest and all(path.exists() for path in outputs)
        begin = time.monotonic()
        print(f"{name}: {'nothing changed' if skipped else 'running'}", file=sys.stderr, flush=True)
        result = known["result"] if skipped else do()
        if self.stopped:
            raise StepFailedError(name, 128 + self.stopped)
        if not skipped:
            write_json(self._state, state | {name: {"inputs": digest, "result": result}})
        self.add(name, result, time.monotonic() - begin, skipped)
        return result

    def add(self, name: str, result: dict[str, Any], seconds: float = 0.0, skipped: bool = False) -> None:
        """Record a step that always runs, such as a gate."""
        self.done.append(Step(name, skipped, seconds, result))

    def call(self, name: str, *command: str | Path) -> None:
        """Run a script of the project in its own process, as part of a step.

        Raises:
          StepFailedError: it ended with an exit code other than 0.
        """
        paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # for `-m export`, from any working directory
        self._child = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_die_with_parent,
        )
        if self.stopped:  # between two steps
            self._child.send_signal(self.stopped)
        code = self._child.wait()
        self._child = None
        if code:
            raise StepFailedError(name, code)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stopped = number
        if self._child is not None:
            self._child.send_signal(number)


def _die_with_parent() -> None:
    """Ask the system to kill this process when its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
