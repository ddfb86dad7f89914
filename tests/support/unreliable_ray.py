"""A stand-in for Ray in one process: it runs each call at once, and loses workers, models and nodes by chance."""

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

NAMES = (
    *("RayTaskError", "WorkerCrashedError", "OutOfMemoryError", "RayActorError", "ActorUnschedulableError"),
    *("NodeDiedError", "LocalRayletDiedError", "ObjectLostError", "OutOfDiskError"),
)
ERRORS = {name: type(name, (Exception,), {}) for name in NAMES}
ENDS = {  # by function or method
    "decode_all": ("WorkerCrashedError", "NodeDiedError"),
    "open": ("RayActorError", "ActorUnschedulableError", "OutOfMemoryError"),
    "predict": ("RayActorError", "ObjectLostError", "OutOfMemoryError"),
}


class UnreliableRay:
    """The calls of Ray that the engine uses.

    Args:
      seed: of all chances.
      loss: probability that a call ends in an error of Ray.
      lost: the functions and methods whose calls can be lost.
    """

    exceptions = SimpleNamespace(**ERRORS)

    def __init__(self, seed: int, loss: float, lost: Sequence[str] = tuple(ENDS)):
        self._chance, self._loss, self._lost = random.Random(seed), loss, lost
        self._results: dict[int, Any] = {}
        self.losses: list[str] = []
        self.most_waiting = 0

    def nodes(self) -> list[dict[str, Any]]:
        """Return two nodes."""
        node = {"Alive": True, "Resources": {"CPU": 1.0}, "NodeManagerAddress": "10.0.0.1"}
        return [{**node, "NodeID": f"{i}"} for i in range(2)]

    def remote(self, num_returns: int = 1, **_: Any) -> Callable[[Any], Any]:
        """Return a decorator for functions and for classes of actors."""

        def wrap(target: Any) -> Any:
            if not isinstance(target, type):
                return SimpleNamespace(remote=lambda *arguments: self._call(target, arguments, num_returns))
            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: self._actor(target())))

        return wrap

    def _actor(self, instance: Any) -> Any:
        def method(name: str) -> Any:
            return SimpleNamespace(remote=lambda *values: self._call(getattr(instance, name), values, 1))

        return SimpleNamespace(open=method("open"), predict=method("predict"))

    def _call(self, function: Any, arguments: Any, num_returns: int) -> Any:
        if self._chance.random() < self._loss and function.__name__ in self._lost:
            self.losses.append(self._chance.choice(ENDS[function.__name__]))
            results = [ERRORS[self.losses[-1]]()] * num_returns
        else:
            values = [self._results.get(value, value) if isinstance(value, int) else value for value in arguments]
            result = function(*values)
            results = list(result) if num_returns > 1 else [result]
        references = [len(self._results) + i for i in range(num_returns)]
        self._results.update(zip(references, results, strict=True))
        return references[0] if num_returns == 1 else references

    def wait(self, references: list[int], **_: Any) -> tuple[list[int], list[int]]:
        """Return one of the references, and the others."""
        assert references and len(set(references)) == len(references)
        self.most_waiting = max(self.most_waiting, len(references))
        one = self._chance.choice(references)
        return [one], [reference for reference in references if reference != one]

    def get(self, reference: int) -> Any:
        """Return a result or raise its error."""
        result = self._results[reference]
        if isinstance(result, Exception):
            raise result
        return result

    def kill(self, actor: Any) -> None:
        """End an actor."""
