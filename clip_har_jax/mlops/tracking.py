"""A run's metrics for TensorBoard, MLflow and Weights & Biases; no tracker can delay or end the run.

metrics.jsonl is the reference: it contains the records that a tracker missed, and `mlops.sync` uploads them later.
Trackers and the queues before them share how a run ends, so they stand in one file, over 300 lines.
"""

import contextlib
import importlib
import json
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from etils import epath
from pybreaker import CircuitBreaker, CircuitBreakerError

from clip_har_jax import remote
from clip_har_jax.bundle import MANIFEST
from clip_har_jax.config import TRACKERS
from clip_har_jax.errors import UserError
from clip_har_jax.files import is_local, write_json

STATE = "trackers.json"  # in the work folder: the trackers' ids of the run, and the number of missed records
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
Metrics = Mapping[str, float | None]
Handle = dict[str, Any]  # the data with which a tracker continues its run; JSON


@dataclass(frozen=True)
class RunInfo:
    """The facts of a run that trackers record.

    Attributes:
      workdir: its work folder.
      run_id: as in run.json.
      params: the config, by dotted key.
      tags: the origin of code, data and environment.
      resume_step: the step from which this start continues; later lines are written again.
    """

    workdir: epath.Path
    run_id: str
    params: dict[str, Any]
    tags: dict[str, str]
    resume_step: int = 0

    @property
    def name(self) -> str:
        """The displayed name: the folder's name and the run's id."""
        return f"{self.workdir.name}-{self.run_id}"


def read_run_info(workdir: epath.PathLike) -> RunInfo:
    """Return the facts of the run in a work folder, from its config.json and run.json.

    Raises:
      UserError: no run is there.
    """
    workdir = epath.Path(workdir)
    try:
        config, record = (json.loads((workdir / name).read_text()) for name in ("config.json", "run.json"))
    except FileNotFoundError as error:
        raise UserError(f"--workdir={workdir}: holds no run; name the folder that scripts/train.py wrote") from error
    tags = {key: str(record.get(key)) for key in ("run_id", "git_sha", "git_dirty", "config_hash", "lock_hash")}
    tags |= {f"data.{split}": f"{part['spec']} {part['fingerprint']}" for split, part in record["data"].items()}
    return RunInfo(workdir, record["run_id"], dict(_leaves(config)), tags, record.get("last_step", 0))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@runtime_checkable
class Tracker(Protocol):
    """The record of one run in one service. Any method may raise an exception or take long."""

    handle: Handle

    def write(self, records: Sequence[tuple[int, Metrics]]) -> None:
        """Record the metrics of steps."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Add tags."""

    def log_folder(self, name: str, folder: Path) -> None:
        """Record the files of a folder under a name."""

    def close(self, status: str) -> None:
        """End this start of the run with a status: FINISHED, STOPPED or FAILED."""


Call = Callable[[Tracker], None]


class Record(NamedTuple):
    """The metrics of one step, to be written."""

    step: int
    metrics: Metrics


def open_tracker(name: str, info: RunInfo, handle: Handle | None) -> Tracker:
    """Open a tracker and import its library; `handle`: of the run to continue, if there is one."""
    return importlib.import_module(f"clip_har_jax.mlops.{name}").open_tracker(info, handle)


def check_trackers(names: Sequence[str], workdir: epath.PathLike) -> None:
    """Refuse trackers that can't work here, before any computation.

    Raises:
      UserError: the package of one is missing, or it can't write to the work folder's kind of store.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"config.trackers: {name} isn't installed; pip install -e '.[tracking]'")
        if name == "tensorboard" and not is_local(workdir):
            raise UserError(f"config.trackers: tensorboard appends to files, which {workdir} can't; leave it out")


class State:
    """trackers.json, written by the trackers' threads."""

    def __init__(self, workdir: epath.PathLike):
        self._path, self._lock = epath.Path(workdir) / STATE, threading.Lock()
        try:
            self._values: dict[str, dict[str, Any]] = json.loads(self._path.read_text())
        except (OSError, ValueError):  # missing or damaged: trackers start a new run
            self._values = {}

    def get(self, name: str) -> dict[str, Any]:
        return self._values.get(name, {})

    def update(self, name: str, **values: Any) -> None:
        with self._lock:
            self._values[name] = self.get(name) | values
            write_json(self._path, self._values)


class BackgroundTracker:
    """A tracker behind a bounded queue and a circuit breaker, on its own thread.

    Records that wait are passed on together, so that a slow tracker falls behind less. After `FAILURES` consecutive
    failures, or the first one if the tracker can't be opened, calls are suspended for `PAUSE_S`; then one call decides.
    Records that arrive meanwhile, or don't fit the queue, are counted and dropped: metrics.jsonl contains them.
    """

    QUEUE = 2000
    FAILURES = 3
    PAUSE_S = 60.0
    END_S = 120.0  # at the end of the run, a tracker isn't waited for longer
    FAILED_S = 5.0  # nor for longer than this after a call that failed
    STOPPED_S = 15.0  # nor for longer in total, if a signal ended the run

    def __init__(self, name: str, make: Callable[[Handle | None], Tracker], state: State):
        self.name, self.missed, self.error = name, 0, ""
        self._make, self._state = make, state
        self._changed = threading.Condition()  # guards the next three
        self._waiting: deque[Record | Call] = deque()
        self._in_call = 0  # of the items, those in the current call
        self._status = ""  # at the end: FINISHED, STOPPED or FAILED
        self._tracker: Tracker | None = None
        self._breaker = CircuitBreaker(self.FAILURES, self.PAUSE_S, throw_new_error_on_trip=False)
        self._failed_at: float | None = None  # when the last call failed; None: it succeeded
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, item: Record | Call) -> None:
        """Queue a record or a call without waiting for the tracker; count it as missed if the queue is full."""
        with self._changed:
            if len(self._waiting) >= self.QUEUE:
                self.missed += 1
            else:
                self._waiting.append(item)
                self._changed.notify()

    def _take(self) -> Call | None:
        """Wait for an item; return its call, one for all records up to the next call. None: the run has ended."""
        with self._changed:
            self._in_call = 0
            self._changed.wait_for(lambda: self._waiting or self._status)
            if not self._waiting:
                return None
            self._in_call = 1
            first = self._waiting.popleft()
            if not isinstance(first, Record):
                return first
            records = [first]
            while self._waiting and isinstance(item := self._waiting[0], Record):
                records.append(item)
                self._waiting.popleft()
            self._in_call = len(records)
            return lambda tracker: tracker.write(records)

    def _work(self) -> None:
        while call := self._take():
            self._try(call, self._in_call)
        if self._tracker is not None:  # even if the breaker is open: it has files and connections to close
            self._breaker.close()
            self._try(lambda tracker: tracker.close(self._status), 1)

    def _try(self, call: Call, items: int) -> None:
        try:
            self._breaker.call(self._call, call)
            self._failed_at = None
        except CircuitBreakerError:  # open: calls are suspended
            self.missed += items
        except (Exception, SystemExit) as error:  # no error of a tracker may end the run
            self.missed += items
            self._failed_at = time.monotonic()
            if self._tracker is None:
                self._breaker.open()
            if not self.error:
                self.error = remote.one_line(error)
                print(f"warning: {self.name}: {self.error}; the run goes on", file=sys.stderr, flush=True)

    def _call(self, call: Call) -> None:
        if self._tracker is None:
            self._tracker = self._make(self._state.get(self.name).get("handle"))
            self._state.update(self.name, handle=self._tracker.handle)
        call(self._tracker)

    def end(self, status: str) -> None:
        """Let the thread close the tracker after everything that waits."""
        with self._changed:
            self._status = status
            self._changed.notify()

    def wait(self, begin: float) -> None:
        """Wait for the thread, within the bounds after `begin` (`time.monotonic`), and report the missed records."""
        while self._thread.is_alive() and time.monotonic() < self._end_of_wait(begin):
            self._thread.join(timeout=0.1)
        with self._changed:
            # An abandoned call may still succeed; `sync` finds out what is there.
            missed = self.missed + (len(self._waiting) + self._in_call if self._thread.is_alive() else 0)
            self._waiting.clear()
        missed += self._state.get(self.name).get("missed", 0)
        with contextlib.suppress(OSError):  # a full disk, which the run has reported
            self._state.update(self.name, missed=missed)
        if missed:
            print(
                f"warning: {self.name} missed {missed} records; `python scripts/sync.py --workdir=...` hands them in",
                file=sys.stderr,
            )

    def _end_of_wait(self, begin: float) -> float:
        end = begin + (self.STOPPED_S if self._status == STOPPED else self.END_S)
        failed_at = self._failed_at
        return end if failed_at is None else min(end, max(failed_at, begin) + self.FAILED_S)


class Trackers:
    """A sink that passes everything to each of the trackers.

    Args:
      names: of `TRACKERS`.
      info: facts of the run.
      make: opens a tracker; tests pass their own.
    """

    def __init__(
        self,
        names: Sequence[str],
        info: RunInfo,
        make: Callable[[str, RunInfo, Handle | None], Tracker] = open_tracker,
    ):
        assert set(names) <= set(TRACKERS), "config.py has checked the names"
        self.status = FAILED  # until the run sets another status
        state = State(info.workdir)
        self._trackers = [
            BackgroundTracker(name, lambda handle, name=name: make(name, info, handle), state)  # type: ignore[misc]
            for name in names
        ]

    def write(self, step: int, metrics: Metrics) -> None:
        self._put(Record(step, dict(metrics)))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Add tags that weren't known at the start, such as the model's digest."""
        self._put(lambda tracker: tracker.tag(tags))

    def log_folder(self, name: str, folder: Path) -> None:
        """Record the files of a folder, which must not change, in all trackers."""
        self._put(lambda tracker: tracker.log_folder(name, folder))

    def close(self) -> None:
        """End all trackers, and wait for them together."""
        begin = time.monotonic()
        for tracker in self._trackers:
            tracker.end(self.status)
        for tracker in self._trackers:
            tracker.wait(begin)

    def _put(self, item: Record | Call) -> None:
        for tracker in self._trackers:
            tracker.put(item)


def hand_over(trackers: Trackers, model: epath.Path, report: epath.Path) -> None:
    """Record the results of a finished run: the model folder with its digest, and the folder of its report."""
    trackers.tag({"model_digest": json.loads((model / MANIFEST).read_text())["digest"]})
    for name, folder in (("evaluation", report), ("model", model)):
        trackers.log_folder(name, local_copy(folder))
    trackers.status = FINISHED


def local_copy(folder: epath.Path) -> Path:
    """Return the folder itself, or a copy if it is on an object store, which the trackers' libraries can't read."""
    if is_local(folder):
        return Path(folder)
    copy = Path(tempfile.mkdtemp())
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy
