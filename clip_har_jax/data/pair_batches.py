"""Batches of image-text pairs: endless ones for training that can be continued exactly, and one pass to evaluate."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np

from clip_har_jax.batch import PairBatch
from clip_har_jax.cores import usable_cores
from clip_har_jax.data.bad_inputs import BadPairs
from clip_har_jax.data.batch_workers import Workers
from clip_har_jax.data.batches import HostBatch
from clip_har_jax.data.pair_rows import PairTransform, StreamRows
from clip_har_jax.data.pair_sources import PairSources
from clip_har_jax.data.pair_streams import PairStream, Position, StreamPlan
from clip_har_jax.data.pairs import Found
from clip_har_jax.data.pipeline import MIN_FOR_WORKERS, ProcessShare, ReadAhead, count_threads, default_workers
from clip_har_jax.errors import UserError

KEPT_POSITIONS = 64  # batches; more than are on their way to the devices, or named after failed updates
ENDLESS = 2**40
WHOLE = ProcessShare()


class _Threads:
    """Batches read ahead in one thread, whose rows others decode."""

    def __init__(self, rows: StreamRows, start_step: int, num_threads: int, ahead: int):
        self._rows, self._step, self._ahead = rows, start_step, ahead
        self._reader, self._decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(num_threads)
        self._waiting: deque[Future[HostBatch]] = deque()

    def __next__(self) -> list[HostBatch]:
        while len(self._waiting) < self._ahead:
            self._waiting.append(self._reader.submit(self._read, self._step))
            self._step += 1
        return [self._waiting.popleft().result()]

    def _read(self, step: int) -> HostBatch:
        return self._rows.read(step, np.empty(self._rows.shape, np.uint8), self._decoders.map)

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)


class _Processes(Workers):
    """Batches whose rows are read in worker processes, each of which has its own streams."""

    def __next__(self) -> list[HostBatch]:
        return [worker.take() for worker in self._workers]


class PairBatches(ReadAhead[PairBatch]):
    """Endless batches of this process's streams.

    Args:
      plan: of the run's streams.
      transform: of its pairs.
      batch_size: global.
      bad_pairs: receives the errors.
      positions: of all streams, after step `start_step`; empty: from the start.
      start_step: number of batches read before.
      share: this process's share of the streams.

    Attributes:
      step: number of the last batch that was given.
    """

    def __init__(
        self,
        plan: StreamPlan,
        transform: PairTransform,
        batch_size: int,
        bad_pairs: BadPairs,
        positions: Sequence[Position | None] = (),
        start_step: int = 0,
        share: ProcessShare = WHOLE,
    ):
        first, last = share.rows(plan.num_streams)
        self._plan, self._rows = plan, batch_size // plan.num_streams
        self._streams, self._bad_pairs, self.step = range(first, last), bad_pairs, start_step
        starts: list[Position | None] = list(positions[first:last]) or [None] * len(self._streams)
        self._positions: dict[int, list[Position | None]] = {start_step: starts}
        self._reader = _open(plan, transform, batch_size, self._streams, starts, start_step)

    def _take(self, found: list[HostBatch]) -> PairBatch:
        batch: PairBatch = found[0].batch
        if len(found) > 1:
            batch = PairBatch(*(np.concatenate(rows) for rows in zip(*(part.batch for part in found), strict=True)))
        self._bad_pairs.record([error for part in found for error in part.errors], len(batch.mask))
        self.step += 1
        self._positions[self.step] = [position for part in found for position in part.positions]
        self._positions.pop(self.step - KEPT_POSITIONS, None)
        return batch

    def positions(self, step: int) -> dict[str, Position | None]:
        """Return the position of each of this process's streams after a step, one of the last few, by its number."""
        return {str(stream): at for stream, at in zip(self._streams, self._positions[step], strict=True)}

    def names(self, step: int) -> dict[int, str]:
        """Return the names of this process's pairs in a batch, one of the last few, by row; they are read again."""
        found: dict[int, str] = {}
        for stream, position in zip(self._streams, self._positions.get(step - 1, ()), strict=False):
            pairs, first = PairStream(self._plan, stream, position), stream * self._rows
            found |= {first + row: next(pairs).found.name for row in range(self._rows)}
        return found


def _open(
    plan: StreamPlan,
    transform: PairTransform,
    batch_size: int,
    streams: range,
    positions: Sequence[Position | None],
    start_step: int,
) -> _Threads | _Processes:
    config, count, workers = transform.config, plan.sources.num_examples, transform.config.num_workers
    if workers is None:
        workers = default_workers(usable_cores(), MIN_FOR_WORKERS if count is None else count)
    workers = min(workers, len(streams))
    if not workers:
        rows = StreamRows(plan, transform, batch_size, streams, positions)
        return _Threads(rows, start_step, count_threads(config), config.prefetch_batches)
    parts = [
        (
            StreamRows(plan, transform, batch_size, mine.tolist(), [positions[i - streams[0]] for i in mine]),
            range(start_step, ENDLESS),
        )
        for mine in np.array_split(np.asarray(streams), workers)
    ]
    return _Processes(parts, config.num_threads or 1, config.prefetch_batches * workers)


def eval_pair_batches(
    sources: PairSources,
    transform: PairTransform,
    batch_size: int,
    bad_pairs: BadPairs,
    share: ProcessShare = WHOLE,
) -> Iterator[tuple[PairBatch, list[Found | None]]]:
    """Yield each pair once, in order, with the pairs themselves; the last batch is padded with rows of mask 0.

    Every process reads all shards and decodes its share of each batch's rows; the pairs are those of all rows.

    Raises:
      UserError: no pair at all, too many bad ones, or a batch that doesn't divide over the processes.
    """
    first, last = share.rows(batch_size)
    pairs, number = sources.each_once(), 0
    with ThreadPoolExecutor(count_threads(transform.config)) as pool:
        while rows := list(islice(pairs, batch_size)):
            padded: list[Found | None] = [*rows, *[None] * (batch_size - len(rows))]
            images = np.empty((last - first, *transform.preprocess.shape), np.uint8)
            loaded = list(pool.map(transform.load, padded[first:last], [()] * len(images), images))
            batch, errors = transform.batch(images, loaded, number + first)
            is_padding = np.array([found is None for found in padded[first:last]])
            batch.index[is_padding] = -1
            bad_pairs.record(errors, int((~is_padding).sum()))
            yield batch, padded
            number += len(rows)
    if not number:
        raise UserError("no pairs in the shards; check the pattern")
