"""A function over the examples of a source, in worker processes, in order, with progress."""

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import Any

from clip_har_jax.cores import usable_cores
from clip_har_jax.errors import UserError

CHUNK = 32  # examples that a worker takes at once
MIN_FOR_WORKERS = 1000  # fewer are done before workers have started

_shared: Any = None  # in a worker: what it was started with


def map_in_workers(
    function: Callable[[Any, int], Any], shared: Any, count: int, num_workers: int | None, title: str
) -> Iterator[Any]:
    """`function(shared, i)` for i in 0 ... count - 1.

    Args:
      function: of a module, so that workers can import it.
      shared: sent to each worker once.
      num_workers: None: one a core; 0: this process alone does it.
      title: of the bar on the terminal.

    Raises:
      UserError: a worker was killed, as it is when memory runs out.
    """
    num_workers = usable_cores() if num_workers is None else num_workers
    if num_workers == 0 or count < MIN_FOR_WORKERS:
        yield from _shown((function(shared, i) for i in range(count)), count, title)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(num_workers, context, _start, (shared,)) as pool:
        try:
            yield from _shown(pool.map(_call, repeat(function), range(count), chunksize=CHUNK), count, title)
        except BrokenProcessPool as error:
            raise UserError(
                f"{title}: a worker process was killed, as it is when memory runs out; try --num_workers="
                f"{max(1, num_workers // 2)}"
            ) from error


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    import cv2

    cv2.setNumThreads(1)  # the workers are the parallelism


def _call(function: Callable[[Any, int], Any], i: int) -> Any:
    return function(_shared, i)


def _shown(items: Iterator[Any], count: int, title: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(file=sys.stderr)
    yield from track(items, title, count, console=console, transient=True, disable=not console.is_terminal)
