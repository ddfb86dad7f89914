"""The engines of bulk prediction: their protocol, their two stages, and the engine that runs in this process."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from clip_har_jax.inference.backends import Backend
from clip_har_jax.inference.predictor import Predictor

Loaded = np.ndarray | str  # the model's input, or the reason why there is none
Outcome = np.ndarray | str  # class probabilities [c], or the reason why there are none
DECODE, MODEL = "decode", "model"  # the stages
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The inputs of one file of predictions."""

    number: int
    inputs: list[str]


@dataclass(frozen=True)
class Piece:
    """The outcomes of consecutive inputs of a part, from position `start` of the part on."""

    part: int
    start: int
    outcomes: Sequence[Outcome]
    seconds: Mapping[str, float]  # spent in each stage


@runtime_checkable
class Engine(Protocol):
    """A way to compute parts: it gives the outcome of each input of each part once, in any order."""

    name: str

    @property
    def lanes(self) -> Mapping[str, int]:
        """Return how many threads, tasks or models work on each stage at the same time."""

    def run(self, parts: Iterator[Part]) -> Iterator[Piece]:
        """Yield the pieces of all parts; `parts` are read on demand."""


def timed(function: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """Return a call's result and its seconds."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def predict_loaded(backend: Backend, loaded: Sequence[Loaded]) -> list[Outcome]:
    """Return the outcomes of one batch; the readable images pass the model together."""
    images = [image for image in loaded if not isinstance(image, str)]
    probs = iter(backend.predict(np.stack(images)) if images else ())
    return [image if isinstance(image, str) else next(probs) for image in loaded]


class LocalEngine:
    """Decode in threads of this process, and run the model in its main thread.

    Args:
      predictor: the model.
      workers: decoding threads.
    """

    name = "local"

    def __init__(self, predictor: Predictor, workers: int):
        self._predictor, self._workers = predictor, workers

    @property
    def lanes(self) -> Mapping[str, int]:
        """Return the number of decoding threads, and of the one that runs the model."""
        return {DECODE: self._workers, MODEL: 1}

    def run(self, parts: Iterator[Part]) -> Iterator[Piece]:
        """Yield the pieces of the parts, one batch each, in order."""
        with ThreadPoolExecutor(self._workers) as pool:
            for part in parts:
                yield from self._run_part(part, pool)

    def _run_part(self, part: Part, pool: ThreadPoolExecutor) -> Iterator[Piece]:
        """Yield the batches of a part; the next batch is decoded while the model runs."""
        size = self._predictor.batch_size
        starts = range(0, len(part.inputs), size)

        def load(start: int) -> list[Future[tuple[Loaded, float]]]:
            return [pool.submit(timed, self._predictor.try_load, path) for path in part.inputs[start : start + size]]

        loading = load(0)
        for start in starts:
            ahead = load(start + size)
            loaded, decode_s = zip(*(future.result() for future in loading), strict=True)
            outcomes, model_s = timed(predict_loaded, self._predictor.backend, loaded)
            yield Piece(part.number, start, outcomes, {DECODE: sum(decode_s), MODEL: model_s})
            loading = ahead
