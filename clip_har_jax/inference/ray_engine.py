"""The Ray engine of bulk prediction: files are decoded in tasks on all CPUs, models run in a pool of actors.

The driver cuts parts into pieces and hands them out; it keeps few of them in progress, so memory is bounded. Tasks and
actors don't retry by themselves: the driver repeats a piece whose worker, model or node was lost, so each outcome
arrives once. If a decoding process ends, the inputs of its task are halved until the file that ends it is alone.
"""

import errno
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from clip_har_jax.errors import UserError
from clip_har_jax.inference.bulk_engine import DECODE, MODEL, Loaded, Part, Piece, timed
from clip_har_jax.inference.predictor import Predictor, try_load
from clip_har_jax.inference.ray_cluster import import_ray
from clip_har_jax.inference.ray_models import ModelFlags, ModelPool, PooledModel, identify, model_ended_errors
from clip_har_jax.preprocess import Preprocess

PIECE_SIZE = 128  # inputs, rounded to whole batches: some 20 MB of pixels
TRIES = 3  # of a file that ends the process that decodes it
IMPORT_FAILED = "failed to import on the worker"  # Ray's words
NODE = re.compile(r"\bip=([\w.:]+)")
MISSING_MODULE = re.compile(r"No module named '[\w.]+'")
SKIPPED = f"its decoding ended the process {TRIES} times; convert or remove it"


def decode_all(inputs: Sequence[str], preprocess: Preprocess) -> tuple[list[Loaded], float]:
    """Return the model's inputs or the reasons why there are none, and the seconds; runs in a task."""
    return timed(lambda: [try_load(path, preprocess) for path in inputs])


@dataclass(eq=False)
class Segment:
    """Inputs of a piece that one task decodes."""

    inputs: Sequence[str]
    crashes: int = 0
    loaded: Any = None  # the result, or a reference to it; None: not there yet

    def after_crash(self) -> list["Segment"]:
        """Return the segments to try instead, after the process that decoded this one has ended."""
        if len(self.inputs) > 1:
            middle = len(self.inputs) // 2
            return [Segment(self.inputs[:middle]), Segment(self.inputs[middle:])]
        if self.crashes + 1 < TRIES:
            return [Segment(self.inputs, self.crashes + 1)]
        return [Segment(self.inputs, loaded=[SKIPPED])]


@dataclass(eq=False)
class Work:
    """A piece of a part in progress."""

    part: int
    start: int
    segments: list[Segment]
    decode_s: float = 0.0

    def replace(self, segment: Segment, others: list[Segment]) -> None:
        """Put other segments with the same inputs in the place of one."""
        position = self.segments.index(segment)
        self.segments[position : position + 1] = others

    @property
    def is_decoded(self) -> bool:
        """Return whether all segments have their results."""
        return all(segment.loaded is not None for segment in self.segments)


def cut(parts: Iterator[Part], size: int) -> Iterator[Work]:
    """Yield the parts in pieces of at most `size` inputs."""
    for part in parts:
        for start in range(0, len(part.inputs), size):
            yield Work(part.number, start, [Segment(part.inputs[start : start + size])])


class RayEngine:
    """The engine on the Ray to which this process is connected.

    Args:
      predictor: the model as opened here; its nodes must open the same.
      model: the path or Hub name by which the nodes open it.
      classes: as for `Predictor`.
    """

    name = "ray"

    def __init__(self, predictor: Predictor, model: str, classes: Sequence[str]):
        path = os.path.abspath(model) if os.path.exists(model) else model
        self._flags = ModelFlags(path, tuple(classes), predictor.batch_size)
        self._identity, self._preprocess = identify(predictor), predictor.backend.preprocess
        self._lanes: Mapping[str, int] = {DECODE: 1, MODEL: 1}

    @property
    def lanes(self) -> Mapping[str, int]:
        """Return the number of CPUs and of models at the last look at the cluster."""
        return self._lanes

    def run(self, parts: Iterator[Part]) -> Iterator[Piece]:
        """Yield the pieces of the parts as they are finished.

        Raises:
          UserError: a node can't open the model, or its disk is full.
        """
        first = next(parts, None)
        if first is None:
            return
        size = max(1, PIECE_SIZE // self._flags.batch_size) * self._flags.batch_size
        pool = ModelPool(self._flags, self._identity)
        job = _Job(cut(chain([first], parts), size), pool, self._preprocess)
        try:
            while job.hand_out():
                self._lanes = {DECODE: pool.num_cpus, MODEL: max(1, len(pool))}
                yield from job.collect()
        finally:
            pool.close()


class _Job:
    """The pieces in progress of one run."""

    def __init__(self, works: Iterator[Work], pool: ModelPool, preprocess: Preprocess):
        self._ray, self._works, self._pool = import_ray(), works, pool
        self._decode = self._ray.remote(num_cpus=1, num_returns=2, max_retries=0)(decode_all)
        self._preprocess = preprocess
        self._decoding: dict[Any, tuple[Work, Segment, Any]] = {}
        self._decoded: deque[Work] = deque()
        self._predicting: dict[Any, tuple[Work, PooledModel]] = {}
        self._in_progress = 0
        self._exhausted = False

    def hand_out(self) -> bool:
        """Start decoding and predictions as far as there is room; return whether there is anything to wait for."""
        self._pool.refresh()
        while not self._exhausted and self._in_progress < self._pool.num_cpus + 2 * len(self._pool) + 1:
            work = next(self._works, None)
            if work is None:
                self._exhausted = True
            else:
                self._in_progress += 1
                self._start_decoding(work)
        while self._decoded and (model := self._pool.find_free()):
            work = self._decoded.popleft()
            model.pieces += 1
            reference = model.actor.predict.remote(*(segment.loaded for segment in work.segments))
            self._predicting[reference] = work, model
        return self._in_progress > 0

    def _start_decoding(self, work: Work) -> None:
        started = {id(segment) for _, segment, _ in self._decoding.values()}
        for segment in work.segments:
            if segment.loaded is None and id(segment) not in started:
                paths = [os.path.abspath(path) for path in segment.inputs]  # workers have another current folder
                loaded, seconds = self._decode.remote(paths, self._preprocess)
                self._decoding[seconds] = work, segment, loaded
        if work.is_decoded:
            self._decoded.append(work)

    def collect(self) -> Iterator[Piece]:
        """Wait for results, for a second at most, and yield the finished pieces."""
        waiting = [*self._decoding, *self._predicting, *self._pool.opening]
        if not waiting:  # all models were lost; the pool soon starts others
            time.sleep(0.1)
            return
        done, _ = self._ray.wait(waiting, num_returns=1, timeout=1.0, fetch_local=False)
        for reference in done:
            if reference in self._decoding:
                self._take_decoded(reference)
            elif reference in self._predicting:
                yield from self._take_predicted(reference)
            elif reference in self._pool.opening:
                with explained():
                    self._pool.take_opened(reference)

    def _take_decoded(self, reference: Any) -> None:
        work, segment, loaded = self._decoding.pop(reference)
        errors = self._ray.exceptions
        try:
            with explained():
                seconds = self._ray.get(reference)
        except (errors.WorkerCrashedError, errors.OutOfMemoryError):
            work.replace(segment, segment.after_crash())
            self._start_decoding(work)
        except _lost_errors():
            self._start_decoding(work)
        else:
            segment.loaded, work.decode_s = loaded, work.decode_s + seconds
            if work.is_decoded:
                self._decoded.append(work)

    def _take_predicted(self, reference: Any) -> Iterator[Piece]:
        work, model = self._predicting.pop(reference)
        model.pieces -= 1
        try:
            with explained():
                outcomes, model_s = self._ray.get(reference)
        except model_ended_errors() as error:
            self._pool.lose(model, error)
            self._decoded.appendleft(work)
        except _lost_errors():  # pixels or results of a lost node
            for segment in work.segments:
                segment.loaded = segment.loaded if segment.loaded == [SKIPPED] else None
            self._start_decoding(work)
        else:
            self._in_progress -= 1
            self._pool.count_success()
            yield Piece(work.part, work.start, outcomes, {DECODE: work.decode_s, MODEL: model_s})


def _lost_errors() -> tuple[type[Exception], ...]:
    """Return the errors of tasks and objects whose node was lost; their work is repeated elsewhere."""
    errors = import_ray().exceptions
    return errors.NodeDiedError, errors.LocalRayletDiedError, errors.ObjectLostError


@contextmanager
def explained() -> Iterator[None]:
    """Turn errors of workers that a person can mend into `UserError`, and give those of lost nodes as they are."""
    errors = import_ray().exceptions
    try:
        yield
    except errors.RayTaskError as error:
        cause, found = error.cause, NODE.search(str(error))
        node = found[1] if found else "of a worker"
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        if isinstance(cause, ModuleNotFoundError) or IMPORT_FAILED in str(cause):
            missing = MISSING_MODULE.search(str(cause))
            said = missing[0] if missing else "a module is missing"
            raise UserError(f"node {node}: {said}; install the same version of this project on all nodes") from error
        if isinstance(cause, errors.OutOfDiskError) or getattr(cause, "errno", None) == errno.ENOSPC:
            raise UserError(f"node {node}: {' '.join(str(cause).split())[:200]}; free space there") from error
        if isinstance(cause, _lost_errors()):
            raise cause from error
        raise
    except errors.OutOfDiskError as error:
        raise UserError(
            f"a node's disk is full, so that Ray can't keep pictures there ({' '.join(str(error).split())[:200]}); "
            "free space in Ray's temporary folder"
        ) from error
