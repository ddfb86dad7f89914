"""Endless streams of image-text pairs that can be continued exactly.

The shards of all epochs form one sequence, shuffled anew in each epoch. Stream s of S takes its places s, s + S,
s + 2 S ...; sources are mixed by weight, and the pairs are shuffled in a buffer. The rows of a global batch are divided
among the streams. So a batch depends on the seed and the number of streams alone, not on how many processes or workers
read them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from clip_har_jax.data.pair_sources import PairSources
from clip_har_jax.data.pairs import Found, PairReader
from clip_har_jax.errors import UserError

DRAWS = 1024  # choices of a source that are made at once
Position = dict[str, Any]  # JSON


@dataclass(frozen=True)
class StreamPlan:
    """The settings that make the streams of a run.

    Attributes:
      sources: the pairs.
      seed: of the order.
      num_streams: of the whole run, over all processes.
      buffer_size: pairs that a stream shuffles together.
    """

    sources: PairSources
    seed: int
    num_streams: int
    buffer_size: int


class ShardStream:
    """The pairs of one source in one stream, in the order of its shards.

    Raises:
      UserError: a position in other shards.
    """

    def __init__(self, plan: StreamPlan, source: int, stream: int, position: Position | None = None):
        self._reader: PairReader = plan.sources.readers[source]
        self._plan, self._source, self._stream = plan, source, stream
        found = position or {"turn": 0, "at": 0}
        self._turn, self._at = found["turn"], found["at"]  # shards that are over; position in the one that isn't
        self._pairs = self._open()
        self._num_empty = 0  # shards in a row that gave nothing

    @property
    def position(self) -> Position:
        return {"turn": self._turn, "at": self._at}

    def _open(self) -> Iterator[tuple[Found, int]]:
        epoch, place = divmod(self._stream + self._turn * self._plan.num_streams, len(self._reader.names))
        order = _order(self._plan.seed, self._source, epoch, len(self._reader.names))
        return self._reader.read(int(order[place]), self._at)

    def __next__(self) -> Found:
        while True:
            if (following := next(self._pairs, None)) is not None:
                found, self._at = following
                self._num_empty = 0
                return found
            self._num_empty += 1
            if self._num_empty > len(self._reader.names):
                raise UserError(f"{self._reader.names[0]}: the shards hold no pairs; check the pattern")
            self._turn, self._at = self._turn + 1, 0
            self._pairs = self._open()


@lru_cache(maxsize=16)  # concurrent streams are in at most two epochs of each source
def _order(seed: int, source: int, epoch: int, size: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng((seed, 0, source, epoch)).permutation(size)


class MixedStream:
    """The pairs of all sources in one stream, each drawn by its weight."""

    def __init__(self, plan: StreamPlan, stream: int, position: Position | None = None):
        found = position or {"drawn": 0, "sources": [None] * len(plan.sources.readers)}
        self._plan, self._stream, self._drawn = plan, stream, found["drawn"]
        self._sources = [ShardStream(plan, i, stream, at) for i, at in enumerate(found["sources"])]
        self._bounds = np.cumsum(plan.sources.weights)

    @property
    def position(self) -> Position:
        return {"drawn": self._drawn, "sources": [source.position for source in self._sources]}

    def __next__(self) -> Found:
        source = 0
        if len(self._sources) > 1:
            block, place = divmod(self._drawn, DRAWS)
            draw = _draws(self._plan.seed, self._stream, block)[place]
            source = min(int(np.searchsorted(self._bounds, draw, side="right")), len(self._sources) - 1)
        self._drawn += 1
        return next(self._sources[source])


@lru_cache(maxsize=64)
def _draws(seed: int, stream: int, block: int) -> Float64[np.ndarray, " n"]:
    return np.random.default_rng((seed, 1, stream, block)).random(DRAWS)


class Drawn(NamedTuple):
    """A pair of a stream, and the seed of its augmentation."""

    found: Found
    key: tuple[int, ...]


class PairStream:
    """The shuffled pairs of one stream.

    The buffer holds consecutive pairs, which are given in random order; each one that is given makes room for one of
    the next pairs, so that shards are read evenly. Its position is small: where the buffer's pairs began, and how many
    of them were given. To continue, the buffer is read again.

    Args:
      plan: of the run.
      stream: its number.
      position: of an earlier stream, to continue after; None: from the start.
    """

    def __init__(self, plan: StreamPlan, stream: int, position: Position | None = None):
        self._plan, self._stream = plan, stream
        found = position or {"buffer": 0, "given": 0, "start": None}
        self._number, self._given, self._start = found["buffer"], found["given"], found["start"]
        self._mixed = MixedStream(plan, stream, self._start)
        self._start = self._mixed.position
        self._pairs: list[Any] = []
        self._next: list[Any] = []
        self._next_start: Position = {}
        self._places = self._make_places()

    @property
    def position(self) -> Position:
        return {"buffer": self._number, "given": self._given, "start": self._start}

    def _fill(self) -> None:
        """Read the pairs of the buffer, and those that took the place of the given ones."""
        self._pairs = [next(self._mixed) for _ in range(self._plan.buffer_size)]
        for place in self._places[: self._given]:
            self._pairs[place] = None
        self._next_start = self._mixed.position
        self._next = [next(self._mixed) for _ in range(self._given)]

    def __next__(self) -> Drawn:
        size = self._plan.buffer_size
        if not self._pairs:
            self._fill()
        if self._given == size:
            self._pairs, self._next, self._start = self._next, [], self._next_start
            self._next_start, self._given, self._number = self._mixed.position, 0, self._number + 1
            self._places = self._make_places()
        place = int(self._places[self._given])
        found, self._pairs[place] = self._pairs[place], None
        self._next.append(next(self._mixed))
        self._given += 1
        return Drawn(found, (self._plan.seed, 3, self._stream, self._number * size + self._given))

    def _make_places(self) -> Int[np.ndarray, " n"]:
        """Return the order in which the pairs of the buffer are given."""
        rng = np.random.default_rng((self._plan.seed, 2, self._stream, self._number))
        return rng.permutation(self._plan.buffer_size)


def choose_num_streams(sources: PairSources, num_processes: int, batch_size: int, wanted: int | None) -> int:
    """Return the number of streams of a new run: a multiple of the processes that divides the batch.

    Args:
      sources: the pairs; each stream needs a shard of each source.
      num_processes: that read different rows.
      batch_size: global.
      wanted: by the config; None: at most 8 for each process.

    Raises:
      UserError: the wanted number doesn't fit, or a source has fewer shards than there are processes.
    """
    fewest = min(sources.readers, key=lambda reader: len(reader.names))
    most = len(fewest.names)
    if most < num_processes:
        raise UserError(
            f"{fewest.names[0]}: {most} shards for {num_processes} processes, each of which reads its own; write more, "
            "smaller shards"
        )
    fits = [count for count in range(num_processes, most + 1, num_processes) if batch_size % count == 0]
    if not fits:
        raise UserError(
            f"config.train.global_batch_size is {batch_size}, which {num_processes} processes don't divide; make it a "
            "multiple"
        )
    if wanted is None:
        return max(count for count in fits if count <= 8 * num_processes)
    if wanted not in fits:
        raise UserError(
            f"config.data.num_streams is {wanted}; it must divide the batch of {batch_size}, be a multiple of the "
            f"{num_processes} processes, and be at most {most}, the number of shards"
        )
    return wanted
