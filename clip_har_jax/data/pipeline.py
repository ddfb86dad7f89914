"""Iterators over batches. A batch is a pure function of (seed, step).

So the order doesn't depend on the number of threads, workers or processes, and a run resumes from its step number
alone.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
from etils import epath

from clip_har_jax.batch import Batch
from clip_har_jax.config import DataConfig
from clip_har_jax.cores import usable_cores
from clip_har_jax.data.batch_workers import WorkerBatches
from clip_har_jax.data.batches import BadInput, BatchSource, HostBatch
from clip_har_jax.data.sources import Source
from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import Preprocess

MAX_BAD_FRACTION = "config.data.max_bad_fraction"
MIN_FOR_WORKERS = 10_000  # examples; below it, starting decoding processes costs more than they save


class BadInputs:
    """The unreadable images of a source: counted once each, logged, and an error if there are too many.

    Args:
      source: the source of the examples.
      max_fraction: accepted share of the source; one image more ends the run.
      log: bad_inputs.jsonl, appended to; None: only count. All sources of a run share one file, also after a resume; an
        input that it contains isn't logged again.
      setting: the name of `max_fraction` to a person.
    """

    def __init__(
        self, source: Source, max_fraction: float, log: epath.PathLike | None = None, setting: str = MAX_BAD_FRACTION
    ):
        self._setting = setting
        self._limit, self._size = max_fraction * len(source), len(source)
        self._log = None if log is None else epath.Path(log)
        self._seen: dict[int, str] = {}
        self._noun = "clips" if source.clips else "images"

    def __len__(self) -> int:
        return len(self._seen)

    def record(self, errors: Iterable[BadInput]) -> None:
        """Count and log the errors of a batch.

        Raises:
          UserError: more bad images than the config allows.
        """
        new = {index: (name, reason) for index, name, reason in errors if index not in self._seen}
        if new and self._log is not None:
            append_log(self._log, new)
        self._seen |= {index: f"{name}: {reason}" for index, (name, reason) in new.items()}
        if len(self._seen) > self._limit:
            listed = f", all so far in {self._log}" if self._log is not None else ""
            raise UserError(
                f"{len(self._seen)} of {self._size} {self._noun} can't be read, the first is "
                f"{next(iter(self._seen.values()))}{listed}; mend or remove them, or raise {self._setting}"
            )


def append_log(log: epath.Path, entries: dict[int, tuple[str, str]]) -> None:
    """Append index -> (name, reason) to a log, without names that it contains."""
    text = log.read_text() if log.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a killed run may have left a partial line
    logged = {json.loads(line)["input"] for line in whole.splitlines()}
    new = [
        json.dumps({"input": name, "index": index, "error": reason}) + "\n"
        for index, (name, reason) in entries.items()
        if name not in logged
    ]
    log.write_text(whole + "".join(new))  # rewritten as a whole, since object stores can't append


class BatchIterator:
    """Batches of this process, read ahead in threads or worker processes; a context manager that stops them."""

    def __init__(self, batches: BatchSource, bad_inputs: BadInputs, start_step: int = 0):
        config, cores = batches.config, usable_cores()
        ahead = config.prefetch_batches
        workers = default_workers(cores, len(batches.source)) if config.num_workers is None else config.num_workers
        self._bad_inputs = bad_inputs
        self._iterator: Any
        if workers:
            self._iterator = WorkerBatches(batches, start_step, workers, config.num_threads or 1, ahead)
        else:
            threads = min(config.num_threads or min(cores, 8), ahead)  # each thread reads a whole batch
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
            self._iterator = iter(grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options))

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        try:
            found: HostBatch = next(self._iterator)
            self._bad_inputs.record(found.errors)
        except BaseException:  # the end of the data or of the run: stop reading
            self.close()
            raise
        return found.batch

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None  # collected only at interpreter exit, it would print errors


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
