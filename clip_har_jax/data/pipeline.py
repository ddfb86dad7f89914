"""grain iterators: a batch is a pure function of (seed, step).

So the order doesn't depend on the number of threads, workers or processes, and a run continues from the number of its
step alone.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from etils import epath

from clip_har_jax.batch import Batch
from clip_har_jax.config import DataConfig
from clip_har_jax.cores import usable_cores
from clip_har_jax.data.augment import augment
from clip_har_jax.data.sampling import Order
from clip_har_jax.data.sources import ClipFile, Example, Source, are_clips
from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import BadImage, Preprocess, decode, evaluation_transform
from clip_har_jax.video import FrameSampling, read_clip

MIN_FOR_WORKERS = 10_000  # examples from which on decoding processes are worth their start
Row = tuple[np.ndarray, int, float, int]  # image, label, mask, index
BadInput = tuple[int, str, str]  # index, name, reason


class HostBatch(NamedTuple):
    """A batch in host memory, and what could not be read of it."""

    batch: Batch
    errors: tuple[BadInput, ...]


class BatchSource:
    """Batch number -> this process's rows of that batch; the random-access source that grain reads.

    Args:
      seed: of the order and the augmentation; None: evaluation, in the source's order, each example once.
      rows: (first, last) row of each global batch that this process reads.
      first_example: position where batch 0 begins, or would begin: not 0 after the batch size was changed.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        preprocess: Preprocess,
        seed: int | None,
        global_batch_size: int,
        rows: tuple[int, int],
        first_example: int = 0,
    ):
        self.source, self.config, self.preprocess, self.seed = source, config, preprocess, seed
        self.global_batch_size, self.rows, self.first_example = global_batch_size, rows, first_example
        self._clips = are_clips(source)
        self._order = None if seed is None else Order(source, config.sampling, seed)

    def __len__(self) -> int:
        if self.seed is not None:
            return 2**40 // self.global_batch_size  # endless, as far as positions go
        return -(-len(self.source) // self.global_batch_size)

    def __getitem__(self, step: int) -> HostBatch:
        start = self.first_example + step * self.global_batch_size
        loaded = [self._load(start + row) for row in range(*self.rows)]
        images, labels, mask, index = zip(*(row for row, _ in loaded), strict=True)
        batch = Batch(
            np.stack(images), np.asarray(labels, np.int32), np.asarray(mask, np.float32), np.asarray(index, np.int32)
        )
        return HostBatch(batch, tuple(error for _, error in loaded if error is not None))

    def _load(self, position: int) -> tuple[Row, BadInput | None]:
        blank = np.zeros(self._shape(), np.uint8)
        if self._order is None and position >= len(self.source):
            return (blank, 0, 0.0, -1), None
        index, key = (position, ()) if self._order is None else self._order[position]
        label, name = int(self.source.label_ids[index]), f"example {index}"
        try:
            example = self.source[index]
            name = example.name
            return (self._transform(example, key), label, 1.0, index), None
        except BadImage as error:
            return (blank, label, 0.0, index), (index, name, str(error))
        except OSError as error:
            name = name if error.filename is None else str(error.filename)
            return (blank, label, 0.0, index), (index, name, f"can't be read ({error.strerror or error})")
        except Exception as error:  # a bug; of its kind nothing is sure, not even that a worker can send it
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error

    def _shape(self) -> tuple[int, ...]:
        """Of one example: an image, or the frames of a clip's view, or of several views."""
        size, video = self.preprocess.image_size_px, self.config.video
        views = (video.num_views,) if video.num_views > 1 and self.seed is None else ()
        return (*views, video.num_frames, size, size, 3) if self._clips else (size, size, 3)

    def _read_frames(self, path: str, label: str, key: tuple[int, ...]) -> np.ndarray:
        """The frames of a clip, transformed alike."""
        config, video = self.config, self.config.video
        sampling = FrameSampling(video.num_frames, video.sampling, video.rate_hz, video.num_views)

        def each(image: np.ndarray) -> np.ndarray:
            if not key:
                return evaluation_transform(image, self.preprocess)
            return augment(image, self.preprocess.image_size_px, config.augment, np.random.default_rng(key), label)

        rng = np.random.default_rng((*key, 1)) if key else None
        views = range(1 if key else video.num_views)
        clips = [read_clip(path, sampling, view, rng, each, config.max_megapixels) for view in views]
        frames = np.stack([np.stack(clip.frames) for clip in clips])
        return frames.reshape(self._shape())

    def _transform(self, example: Example, key: tuple[int, ...]) -> np.ndarray:
        image, config = example.data, self.config
        if isinstance(image, ClipFile):
            return self._read_frames(image.path, self.source.labels[example.label], key)
        if key:
            rng = np.random.default_rng(key)
            label = self.source.labels[example.label]
            return augment(image, self.preprocess.image_size_px, config.augment, rng, label, config.max_megapixels)
        if isinstance(image, bytes):
            image = decode(image, config.max_megapixels)
        return evaluation_transform(image, self.preprocess)


class BadInputs:
    """The images of a source that can't be read: counted once each, logged, and the end of the run when too many.

    Args:
      source: whose examples are meant.
      max_fraction: share of the source; one image more ends the run.
      log: bad_inputs.jsonl, appended to; None: counted only. The sources of a run, and the run continued, share one:
        an input that is in it already isn't logged again.
    """

    def __init__(self, source: Source, max_fraction: float, log: epath.PathLike | None = None):
        self._limit, self._size = max_fraction * len(source), len(source)
        self._log = None if log is None else epath.Path(log)
        self._seen: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def record(self, errors: Iterable[BadInput]) -> None:
        """Takes the errors of a batch.

        Raises:
          UserError: more bad images than the config allows.
        """
        new = {index: (name, reason) for index, name, reason in errors if index not in self._seen}
        if new and self._log is not None:
            _append(self._log, new)
        self._seen |= {index: f"{name}: {reason}" for index, (name, reason) in new.items()}
        if len(self._seen) > self._limit:
            listed = f", all so far in {self._log}" if self._log is not None else ""
            raise UserError(
                f"{len(self._seen)} of {self._size} images can't be read, the first is "
                f"{next(iter(self._seen.values()))}{listed}; mend or remove them, or raise config.data.max_bad_fraction"
            )


def _append(log: epath.Path, entries: dict[int, tuple[str, str]]) -> None:
    """Adds index -> (name, reason) to a log, less the names that are in it."""
    text = log.read_text() if log.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a killed run may have left half a line
    logged = {json.loads(line)["input"] for line in whole.splitlines()}
    new = [
        json.dumps({"input": name, "index": index, "error": reason}) + "\n"
        for index, (name, reason) in entries.items()
        if name not in logged
    ]
    log.write_text(whole + "".join(new))  # as a whole, since object stores can't append


class BatchIterator:
    """Batches of this process, read ahead in threads or worker processes; a context manager that ends them."""

    def __init__(self, batches: BatchSource, bad_inputs: BadInputs, start_step: int = 0):
        config = batches.config
        cores = usable_cores()
        threads = min(config.num_threads or min(cores, 8), config.prefetch_batches)  # a thread reads a whole batch
        workers = default_workers(cores, len(batches.source)) if config.num_workers is None else config.num_workers
        dataset = grain.MapDataset.source(batches)[start_step:].to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch_batches)
        )
        if workers:
            _let_workers_start()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers), _guard_worker)
        self._bad_inputs = bad_inputs
        self._iterator: Any = iter(dataset)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        try:
            batch, errors = next(self._iterator)
            self._bad_inputs.record(errors)
        except BaseException as error:  # the end of the data, or of the run: nothing is read any more
            self.close()
            if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
                raise UserError(
                    "a decoding process was killed, as it is when memory runs out; lower config.data.num_workers or "
                    "config.data.prefetch_batches, and start again"
                ) from error
            raise
        return batch

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None  # collected as late as the interpreter's end, it would fail noisily


def default_workers(cores: int, num_examples: int) -> int:
    """Decoding processes for so many cores: none where threads use them up, as decoders leave Python's lock alone.

    Each costs 3 s at the start and about 300 MB, so there are never more than 8, and none for small data.
    """
    return 0 if cores <= 4 or num_examples < MIN_FOR_WORKERS else min(cores // 2, 8)


def _let_workers_start() -> None:
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads absl's flags when it starts workers
        flags.FLAGS.mark_as_parsed()


def _guard_worker(worker_index: int, worker_count: int) -> None:
    """Ties a worker's life to the trainer's: it outlives neither a kill of it nor dies before it at a Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group; the trainer ends its workers
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "workers are started by a trainer"

    def end_with_trainer() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=end_with_trainer, daemon=True).start()


def _rows(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    if batch_size % process_count:
        raise UserError(
            f"a batch of {batch_size} images doesn't divide over {process_count} processes; make it a multiple"
        )
    size = batch_size // process_count
    return process_index * size, (process_index + 1) * size


def train_batches(
    source: Source,
    config: DataConfig,
    preprocess: Preprocess,
    *,
    seed: int,
    global_batch_size: int,
    start_step: int = 0,
    first_example: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    bad_inputs: BadInputs,
) -> BatchIterator:
    """Endless batches in an order that is shuffled anew each epoch, from `start_step` on.

    Process p of P gets rows [p * B / P, (p + 1) * B / P) of each global batch, so that the global batch is the same
    for every number of processes.

    Raises:
      UserError: a batch that doesn't divide over the processes; more bad images than the config allows.
    """
    rows = _rows(global_batch_size, process_index, process_count)
    batches = BatchSource(source, config, preprocess, seed, global_batch_size, rows, first_example)
    return BatchIterator(batches, bad_inputs, start_step)


def eval_batches(
    source: Source,
    config: DataConfig,
    preprocess: Preprocess,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    bad_inputs: BadInputs,
) -> BatchIterator:
    """Each example once, in the source's order; the last batch is padded with rows of mask 0.

    Raises:
      UserError: as `train_batches`.
    """
    rows = _rows(batch_size, process_index, process_count)
    return BatchIterator(BatchSource(source, config, preprocess, None, batch_size, rows), bad_inputs)


def prefetch_to_mesh(batches: Iterator[Batch], place: Callable[[Batch], Any], size: int = 2) -> Iterator[Any]:
    """Keeps `size` batches on their way to the devices while another is computed with."""
    placed: deque[Any] = deque()
    for batch in batches:
        placed.append(place(batch))
        if len(placed) > size:
            yield placed.popleft()
    yield from placed
