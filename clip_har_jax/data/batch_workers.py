"""Batches decoded in worker processes, directly into memory that they share with the trainer.

Threads of one process wait for each other between decoders: with photographs of 12 KB, two threads are 1.2 to 1.4 times
as fast as one, two processes 1.9 times (`python -m benchmarks.input_pipeline`). docs/adr/0003-own-batch-workers.md says
why grain's processes aren't used. The shared memory has no name, so it is freed with its processes.
"""

import atexit
import math
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from clip_har_jax.data.batches import BatchSource, HostBatch
from clip_har_jax.errors import UserError
from clip_har_jax.processes import Lifeline, SharedMemory, follow_parent, make_pipe, make_process, serialize

JOIN_LIMIT_S = 5.0  # time for a killed process, or one whose pipe is closed, to end


@runtime_checkable
class Readable(Protocol):
    """Batches that a worker reads; it is pickled."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the images of a batch."""

    def read(self, step: int, images: UInt8[np.ndarray, "..."], each: Callable[..., Iterator[Any]] = map) -> HostBatch:
        """Read batch `step` and write its images into `images`; `each` is `map` or a parallel version of it."""


class Workers:
    """Processes that each read their own batches; the caller takes them in order.

    Args:
      parts: the batches of each worker, and the numbers of those that it reads.
      num_threads: threads of each worker that read the rows of a batch, to hide the latency of storage; 1: none.
      ahead: batches in shared memory that wait for the trainer, over all workers; at least two per worker.
    """

    def __init__(self, parts: Sequence[tuple[Readable, range]], num_threads: int, ahead: int):
        slots = max(2, -(-ahead // len(parts)))
        self._lifeline = Lifeline()
        self._workers = [_Worker(batches.shape, mine, slots, num_threads, self._lifeline) for batches, mine in parts]
        atexit.register(self.close)  # runs before multiprocessing waits for its processes
        pickled: dict[int, bytes] = {}
        try:
            for worker, (batches, _) in zip(self._workers, parts, strict=True):
                if id(batches) not in pickled:  # several workers may share one object
                    pickled[id(batches)] = serialize(batches)
                worker.begin(pickled[id(batches)])  # after all were started, so that they start in parallel
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the processes."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.end()
        self._workers = []
        self._lifeline.close()


class WorkerBatches(Workers):
    """The batches from `start_step` on, in order. Worker w of W reads every W-th batch and stays a few ahead."""

    def __init__(self, batches: BatchSource, start_step: int, num_workers: int, num_threads: int, ahead: int):
        steps = [range(start_step + worker, len(batches), num_workers) for worker in range(num_workers)]
        super().__init__([(batches, mine) for mine in steps], num_threads, ahead)
        self._turn = 0

    def __next__(self) -> HostBatch:
        worker = self._workers[self._turn % len(self._workers)]
        self._turn += 1
        return worker.take()


class _Worker:
    """A process, and the shared memory whose slots it fills in turn and the trainer empties."""

    def __init__(self, shape: tuple[int, ...], steps: range, slots: int, num_threads: int, lifeline: Lifeline):
        memory = SharedMemory(slots * math.prod(shape))
        self._slots = _as_slots(memory, shape)
        self._taken = 0
        self._pipe, other_end = make_pipe()
        self._process = make_process(_work, other_end, memory, shape, steps, num_threads, lifeline, name="batch-worker")
        self._process.start()
        other_end.close()  # so that the pipe ends when the process ends

    def begin(self, batches: bytes) -> None:
        try:
            self._pipe.send_bytes(batches)
        except OSError:
            raise self._died() from None

    def take(self) -> HostBatch:
        try:
            found = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if found is None:
            raise StopIteration
        if isinstance(found, Exception):
            raise found
        images = self._slots[self._taken % len(self._slots)].copy()
        self._taken += 1
        with suppress(OSError):  # it has read its last batch and has ended
            self._pipe.send_bytes(b"")  # the slot is free
        return found._replace(batch=found.batch._replace(image=images))

    def _died(self) -> UserError:
        self._process.join(JOIN_LIMIT_S)
        code = self._process.exitcode
        if code is None or code >= 0:
            return UserError(f"a decoding process ended early (exit code {code}); what it printed says why")
        return UserError(
            f"a decoding process was killed (signal {-code}), as it is when memory runs out; lower "
            "config.data.num_workers or config.data.prefetch_batches, and start again"
        )

    def end(self) -> None:
        self._pipe.close()
        if self._process.exitcode is None and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)  # it ignores other signals
        self._process.join(JOIN_LIMIT_S)


def _as_slots(memory: SharedMemory, shape: tuple[int, ...]) -> UInt8[np.ndarray, "slots ..."]:
    return np.frombuffer(memory.buffer, np.uint8).reshape(-1, *shape)


def _work(
    pipe: Connection,
    memory: SharedMemory,
    shape: tuple[int, ...],
    steps: range,
    num_threads: int,
    lifeline: Lifeline,
) -> None:
    """Read this worker's batches in its own process, until the last one or until the trainer closes the pipe."""
    follow_parent(lifeline)
    try:
        batches: Readable = pickle.loads(pipe.recv_bytes())
        slots = _as_slots(memory, shape)
        if num_threads == 1:
            _read(pipe, batches, slots, steps, map)
        else:
            with ThreadPoolExecutor(num_threads) as pool:
                _read(pipe, batches, slots, steps, pool.map)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the trainer closed its end


def _read(
    pipe: Connection, batches: Readable, slots: np.ndarray, steps: range, each: Callable[..., Iterator[Any]]
) -> None:
    for turn, step in enumerate(steps):
        if turn >= len(slots):
            pipe.recv_bytes()  # wait for a free slot
        try:
            found = batches.read(step, slots[turn % len(slots)], each)
        except Exception as error:
            pipe.send(error)
            return
        pipe.send(found._replace(batch=found.batch._replace(image=None)))
    pipe.send(None)
