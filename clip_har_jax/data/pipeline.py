"""Iterators over batches. A batch is a pure function of (seed, step).

So the order doesn't depend on the number of threads, workers or processes, and a run resumes from its step number
alone.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grain

from clip_har_jax.batch import Batch
from clip_har_jax.config import DataConfig
from clip_har_jax.cores import usable_cores
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.batch_workers import WorkerBatches
from clip_har_jax.data.batches import BatchSource, HostBatch
from clip_har_jax.data.sources import Source
from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import Preprocess

T = TypeVar("T")
Opened = TypeVar("Opened", bound="ReadAhead[Any]")
MIN_FOR_WORKERS = 10_000  # examples; below it, starting decoding processes costs more than they save


class ReadAhead(Iterator[T]):
    """Batches of this process, read ahead in threads or worker processes; a context manager that stops them."""

    _reader: Any  # gives what was read, and has `close`; None: closed

    def __next__(self) -> T:
        if self._reader is None:
            raise StopIteration
        try:
            return self._take(next(self._reader))
        except BaseException:  # the end of the data or of the run: stop reading
            self.close()
            raise

    @abstractmethod
    def _take(self, found: Any) -> T:
        """Return the batch of what the reader gave, and record its errors."""

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and workers."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None  # collected only at interpreter exit, it would print errors


class BatchIterator(ReadAhead[Batch]):
    """The batches of a `BatchSource`, from `start_step` on."""

    def __init__(self, batches: BatchSource, bad_inputs: BadInputs, start_step: int = 0):
        config = batches.config
        ahead, workers = config.prefetch_batches, config.num_workers
        if workers is None:
            workers = default_workers(usable_cores(), len(batches.source))
        self._bad_inputs = bad_inputs
        if workers:
            self._reader = WorkerBatches(batches, start_step, workers, config.num_threads or 1, ahead)
        else:
            threads = min(count_threads(config), ahead)  # each thread reads a whole batch
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
            self._reader = iter(grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options))

    def _take(self, found: HostBatch) -> Batch:
        self._bad_inputs.record(found.errors)
        return found.batch


def count_threads(config: DataConfig) -> int:
    """Return the number of decoding threads without worker processes: by default one per core, at most 8."""
    return config.num_threads or min(usable_cores(), 8)


def default_workers(cores: int, num_examples: int) -> int:
    """Return the number of decoding processes for a number of cores: one per core, half for many cores, at most 8.

    Each takes time to start and about 60 MB, so small data gets none. Nor does a single core, where a thread is as
    fast.
    """
    if cores == 1 or num_examples < MIN_FOR_WORKERS:
        return 0
    return min(cores, max(4, cores // 2), 8)


@dataclass(frozen=True)
class ResumePoint:
    """The start of training: its step, and the position at which batch 0 begins (not 0 if the batch size changed)."""

    step: int = 0
    first_example: int = 0


@dataclass(frozen=True)
class ProcessShare:
    """This process's share of each global batch: process `index` of `count` reads rows [index * B / count, ...)."""

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> tuple[int, int]:
        """Return the first row of the share and the row after its last.

        Raises:
          UserError: the batch doesn't divide over the processes.
        """
        if batch_size % self.count:
            raise UserError(
                f"a batch of {batch_size} images doesn't divide over {self.count} processes; make it a multiple"
            )
        size = batch_size // self.count
        return self.index * size, (self.index + 1) * size


def train_batches(
    source: Source,
    config: DataConfig,
    preprocess: Preprocess,
    *,
    seed: int,
    global_batch_size: int,
    bad_inputs: BadInputs,
    resume: ResumePoint = ResumePoint(),
    share: ProcessShare = ProcessShare(),
) -> BatchIterator:
    """Return endless batches, shuffled again in each epoch, from `resume.step` on.

    The global batches are the same for every number of processes.

    Raises:
      UserError: a batch that doesn't divide over the processes; more bad images than the config allows.
    """
    rows = share.rows(global_batch_size)
    batches = BatchSource(source, config, preprocess, seed, global_batch_size, rows, resume.first_example)
    return BatchIterator(batches, bad_inputs, resume.step)


def eval_batches(
    source: Source,
    config: DataConfig,
    preprocess: Preprocess,
    *,
    batch_size: int,
    bad_inputs: BadInputs,
    share: ProcessShare = ProcessShare(),
) -> BatchIterator:
    """Return each example once, in the source's order; the last batch is padded with rows of mask 0.

    Raises:
      UserError: as `train_batches`.
    """
    batches = BatchSource(source, config, preprocess, None, batch_size, share.rows(batch_size))
    return BatchIterator(batches, bad_inputs)


def prefetch_to_mesh(batches: Iterator[Batch], place: Callable[[Batch], Any], size: int = 2) -> Iterator[Any]:
    """Keep `size` batches in transfer to the devices while the previous one is computed."""
    placed: deque[Any] = deque()
    for batch in batches:
        placed.append(place(batch))
        if len(placed) > size:
            yield placed.popleft()
    yield from placed
