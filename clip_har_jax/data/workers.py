"""A parallel map over the examples of a source, in worker processes, in order, with progress."""

import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

from loky import ProcessPoolExecutor

from clip_har_jax.cores import usable_cores
from clip_har_jax.errors import UserError
from clip_har_jax.processes import Lifeline, follow_parent, make_pool, serialize

CHUNK = 32  # most examples that a worker takes at once
MIN_FOR_WORKERS = 1000  # images

_shared: Any = None  # in a worker: the value that it was started with


def map_in_workers(
    function: Callable[[Any, int], Any],
    shared: Any,
    count: int,
    num_workers: int | None,
    title: str,
    min_for_workers: int = MIN_FOR_WORKERS,
) -> Iterator[Any]:
    """Yield `function(shared, i)` for i in 0 ... count - 1.

    Args:
      function: defined at the top of a module, so that workers can import it.
      shared: sent to each worker once.
      num_workers: None: one per core; 0: run in this process.
      title: of the progress bar.
      min_for_workers: with fewer examples, run in this process.

    Raises:
      UserError: a worker was killed, as happens when memory runs out.
    """
    num_workers = usable_cores() if num_workers is None else num_workers
    if num_workers == 0 or count < min_for_workers:
        yield from _shown((function(shared, i) for i in range(count)), count, title)
        return
    chunk = min(CHUNK, -(-count // (4 * num_workers)))
    try:
        with _pool(num_workers, shared) as pool:
            yield from _shown(pool.map(_call, repeat(function), range(count), chunksize=chunk), count, title)
    except BrokenProcessPool as error:
        raise UserError(
            f"{title}: a worker process was killed, as it is when memory runs out; try --num_workers="
            f"{max(1, num_workers // 2)}"
        ) from error


@contextmanager
def _pool(num_workers: int, shared: Any) -> Iterator[ProcessPoolExecutor]:
    """Yield processes that received `shared` through a file: a pipe to a killed reader would block for ever."""
    lifeline = Lifeline()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shared.pickle"
        path.write_bytes(serialize(shared))
        pool = make_pool(num_workers, _start, path, lifeline)
        try:
            yield pool
        finally:
            pool.shutdown(kill_workers=True)  # all results have arrived, or the caller stopped
            lifeline.close()


def _start(path: Path, lifeline: Lifeline) -> None:
    global _shared
    follow_parent(lifeline)
    _shared = pickle.loads(path.read_bytes())
    import cv2

    cv2.setNumThreads(1)  # the workers are the parallelism


def _call(function: Callable[[Any, int], Any], i: int) -> Any:
    return function(_shared, i)


def _shown(items: Iterator[Any], count: int, title: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(file=sys.stderr)
    yield from track(items, title, count, console=console, transient=True, disable=not console.is_terminal)
