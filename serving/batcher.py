"""Dynamic batching: one queue; each batch takes the items that have arrived while the last one ran.

No item waits for a batch to fill: a single image runs at once, and under load batches grow to the size that was
measured to be the fastest. A request that would wait too long is refused before any work on it.

A batch in all threads has the lowest latency. But threads that share a batch wait for each other, especially while
decoding takes a core from one of them. If enough items wait to give each thread a batch, each computes its own.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clip_har_jax.errors import UserError
from serving.problems import Problem
from serving.telemetry import Metrics

SIZES = (1, 2, 4, 8, 16, 32)
MEASURED_S = 0.7  # a slower batch ends the measurement
NEAR_BEST = 0.97  # share of the best throughput: the smallest batch above it is chosen, for its latency
ENOUGH = 0.85  # the same for a batch in one thread, which gains less from its size
EMA_WEIGHT = 0.1


class Costs:
    """Seconds per batch by its size: measured once, then scaled by a factor that follows the machine's load.

    Args:
      measured: size -> seconds.

    Attributes:
      best: the best size of a batch in all threads.
      enough: the smallest size that is worth its own thread.
    """

    def __init__(self, measured: dict[int, float]):
        self.measured = measured
        rates = {size: size / seconds for size, seconds in measured.items()}
        self.best = min(size for size in rates if rates[size] >= NEAR_BEST * max(rates.values()))
        self.enough = min(size for size in rates if rates[size] >= ENOUGH * max(rates.values()))
        self.factor = 1.0
        # By size; computed now because each request asks for it several times.
        self._seconds = np.interp(range(self.best + 1), list(measured), list(measured.values())).tolist()

    @classmethod
    def measure(cls, run: Callable[[np.ndarray], Any], example: np.ndarray) -> "Costs":
        """Time batches of `example`, one row of input, of growing size: until a larger one has no higher throughput."""
        measured: dict[int, float] = {}
        for size in SIZES:
            batch = np.repeat(example[None], size, axis=0)
            run(batch)
            rounds = []
            for _ in range(3):
                start = time.perf_counter()
                run(batch)
                rounds.append(time.perf_counter() - start)
                if sum(rounds) > MEASURED_S / 2:
                    break
            measured[size] = min(rounds)
            past = [other / measured[other] for other in measured if other <= size // 4]
            if measured[size] > MEASURED_S or (past and size / measured[size] < 1.02 * max(past)):
                break
        return cls(measured)

    @classmethod
    def of_two(cls, run: Callable[[int], Any], most: int) -> "Costs":
        """Time one item and `most` items, assuming that each further item costs the same."""
        measured: dict[int, float] = {}
        for size in (1, most):
            run(size)
            start = time.perf_counter()
            run(size)
            measured[size] = time.perf_counter() - start
        return cls(measured)

    def of_batch(self, size: int) -> float:
        """Return the expected seconds of one batch, up to the best size."""
        return self.factor * self._seconds[size]

    def of_queue(self, count: int) -> float:
        """Return the expected seconds for `count` images, in batches of the best size."""
        whole, rest = divmod(count, self.best)
        return whole * self.of_batch(self.best) + (self.of_batch(rest) if rest else 0.0)

    def observe(self, size: int, seconds: float) -> None:
        """Update the factor with the time of a batch."""
        ratio = seconds / max(self.of_batch(size) / self.factor, 1e-9)
        self.factor += EMA_WEIGHT * (min(max(ratio, 0.1), 50.0) - self.factor)


@dataclass(eq=False)
class Lane:
    """One graph of one model; its items can share a batch.

    Attributes:
      name: of the graph, in metrics.
      run: a batch -> one result for each item; called in a compute thread.
      costs: of its batches.
      run_in_one_thread: like `run` in one thread, so that several batches can run in parallel; None: impossible.
      load: number of admitted, unfinished items.
    """

    name: str
    run: Callable[[list[Any]], Iterable[Any]]
    costs: Costs
    run_in_one_thread: Callable[[list[Any]], Iterable[Any]] | None = None
    load: int = 0


@dataclass(eq=False)
class _Item:
    lane: Lane
    value: Any
    deadline: float  # of the loop's clock
    queued: float
    result: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Run the lanes of all models: one batch in all threads, or one in each thread.

    Args:
      max_wait_s: requests with a longer estimated wait are refused.
      threads: compute threads.
      metrics: counts waits and batch sizes.
      decoding_s: estimated wait in the decoder; the longer of both waits counts, since they overlap.
    """

    def __init__(
        self, max_wait_s: float, threads: int, metrics: Metrics, decoding_s: Callable[[], float] = lambda: 0.0
    ):
        self._max_wait_s, self._num_threads, self._metrics = max_wait_s, threads, metrics
        self._decoding_s = decoding_s
        self._queue: deque[_Item] = deque()
        self._wake = asyncio.Event()
        self._lanes: dict[Lane, int] = {}  # lanes with a load -> number of requests that use them
        self._running: dict[asyncio.Task[None], float] = {}  # batches -> start time
        self._in_one_thread = False  # whether the running batches leave threads to others
        self._last_end = 0.0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="compute")
        self._task = asyncio.get_running_loop().create_task(self._work())

    @property
    def estimated_wait_s(self) -> float:
        """Return the estimated time until all admitted items are finished."""
        total = sum(lane.costs.of_queue(lane.load) for lane in self._lanes)
        now = time.perf_counter()
        elapsed = sum(now - start for start in self._running.values()) / max(1, len(self._running))
        return max(0.0, total - elapsed, self._decoding_s())

    def check(self) -> None:
        """Refuse a request with a too long estimated wait.

        Raises:
          Problem: overloaded; the estimated wait is above the limit.
        """
        wait = self.estimated_wait_s
        self._metrics.estimated_wait.set(wait)
        if wait > self._max_wait_s:
            self._metrics.refused.labels("overloaded").inc()
            raise Problem("overloaded", f"an answer would take about {wait:.1f} s; try again", retry_after_s=wait)

    @asynccontextmanager
    async def admit(self, lane: Lane, count: int = 1) -> AsyncIterator[None]:
        """Reserve capacity for `count` items of a request.

        Raises:
          Problem: as `check`.
        """
        self.check()
        self._lanes[lane] = self._lanes.get(lane, 0) + 1
        lane.load += count
        self._metrics.queued.inc(count)
        try:
            yield
        finally:
            self._metrics.queued.dec(count)
            lane.load -= count
            self._lanes[lane] -= 1
            if not self._lanes[lane]:
                del self._lanes[lane]

    async def quiet(self, deadline: float) -> None:
        """Wait until background work, such as a video's frames, may continue.

        Raises:
          Problem: not within the deadline.
        """
        while self.estimated_wait_s > self._max_wait_s / 4:
            if asyncio.get_running_loop().time() > deadline:
                raise Problem("overloaded", "too busy with others; try again", retry_after_s=self.estimated_wait_s)
            await asyncio.sleep(0.02)

    async def run(self, lane: Lane, value: Any, deadline: float) -> Any:
        """Return the lane's result for one item, computed in a batch with others.

        Raises:
          Problem: the deadline passed, or the model's output isn't finite.
        """
        loop = asyncio.get_running_loop()
        item = _Item(lane, value, deadline, loop.time())
        self._queue.append(item)
        self._wake.set()
        try:
            async with asyncio.timeout_at(deadline):
                return await item.result
        except TimeoutError as error:
            raise Problem("deadline", "no answer in the time allowed; send fewer at once, or allow more") from error

    async def close(self) -> None:
        """Stop the compute threads; queued items get no answer."""
        for task in (self._task, *self._running):
            task.cancel()
        await asyncio.gather(self._task, *self._running, return_exceptions=True)
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            while self._queue and (batch := self._take()):
                task = asyncio.get_running_loop().create_task(self._run(batch, self._in_one_thread))
                self._running[task] = time.perf_counter()
                task.add_done_callback(self._done)
            await self._wake.wait()

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._wake.set()
        if not task.cancelled():
            task.result()  # raises unexpected errors, for the loop to log

    def _take(self) -> list[_Item]:
        """Return the next batch: the oldest item and those of its lane that fit; empty if none can start.

        Items whose requests have ended are dropped.
        """
        free = self._num_threads - len(self._running)
        if self._running and not (self._in_one_thread and free):
            return []
        now = asyncio.get_running_loop().time()
        self._queue = alive = deque(item for item in self._queue if not item.result.done() and item.deadline > now)
        if not alive:
            return []
        lane = alive[0].lane
        fitting = [item for item in alive if item.lane is lane]
        share = len(fitting) // (1 if self._running else free)  # for each thread that starts now
        single = lane.run_in_one_thread is not None and share >= lane.costs.enough
        if self._running and not single:
            return []
        self._in_one_thread = single
        batch = fitting[: min(share, lane.costs.best) if single else lane.costs.best]
        taken = set(map(id, batch))
        self._queue = deque(item for item in alive if id(item) not in taken)
        return batch

    async def _run(self, batch: list[_Item], single: bool) -> None:
        loop, lane = asyncio.get_running_loop(), batch[0].lane
        start, now = time.perf_counter(), loop.time()
        for item in batch:
            self._metrics.queue_wait.observe(now - item.queued)
        run = lane.run_in_one_thread if single and lane.run_in_one_thread is not None else lane.run
        try:
            results = await loop.run_in_executor(self._threads, run, [item.value for item in batch])
        except Exception as error:
            if len(batch) > 1:  # an error in one item must not fail the others: run each alone
                for item in batch:
                    if not item.result.done():
                        await self._run([item], single)
                return
            if not batch[0].result.done():
                problem = isinstance(error, UserError)  # raised by `check_finite`
                batch[0].result.set_exception(
                    Problem("bad_model_output", "the model gives NaN or infinity for this input") if problem else error
                )
            return
        end = time.perf_counter()
        # Parallel batches are slower each, but finish more often.
        lane.costs.observe(len(batch), end - max(start, self._last_end))
        self._last_end = end
        self._metrics.batch_images.observe(len(batch))
        self._metrics.model_seconds.labels(lane.name).observe(end - start)
        for item, result in zip(batch, results, strict=True):
            if not item.result.done():
                item.result.set_result(result)
