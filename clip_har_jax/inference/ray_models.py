"""The models of the Ray engine: one on each node, or on each GPU where there are any; lost ones are replaced."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_har_jax.errors import UserError
from clip_har_jax.inference.bulk_engine import Loaded, Outcome, predict_loaded, timed
from clip_har_jax.inference.predictor import Predictor
from clip_har_jax.inference.ray_cluster import import_ray, only_on

LOOK_S = 2.0  # between two looks at the nodes of the cluster
NO_NODE_S = 300.0
MAX_LOSSES = 20  # models lost in a row, without one finished piece
AHEAD = 2  # pieces that a model has at a time: one that it computes, and the next one


@dataclass(frozen=True)
class ModelFlags:
    """The arguments of `Predictor`."""

    path: str
    classes: tuple[str, ...]
    batch_size: int


class _Model:
    """A model in a process of its own, an actor."""

    def open(self, flags: ModelFlags, node: str) -> dict[str, Any]:
        """Open the model and return the facts that identify it."""
        try:
            self._predictor = Predictor(flags.path, flags.classes, flags.batch_size)
        except UserError as error:
            raise UserError(f"node {node}: {error}; each node needs the model's folder at the same path") from error
        return identify(self._predictor)

    def predict(self, *segments: Sequence[Loaded]) -> tuple[list[Outcome], float]:
        """Return the outcomes of a piece, batch by batch as the local engine does, and their seconds."""
        loaded, size = [image for segment in segments for image in segment], self._predictor.batch_size
        batches = [loaded[start : start + size] for start in range(0, len(loaded), size)]
        outcomes, seconds = timed(lambda: [predict_loaded(self._predictor.backend, batch) for batch in batches])
        return [outcome for batch in outcomes for outcome in batch], seconds


def identify(predictor: Predictor) -> dict[str, Any]:
    """Return the facts that must be equal for equal predictions."""
    graphs = getattr(predictor.backend, "graphs", None)
    return {
        "digest": predictor.backend.digest,
        "labels": predictor.labels,
        "format": graphs.format if graphs else None,
    }


def model_ended_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a model whose process or node has ended, or whose node ended before it was there."""
    errors = import_ray().exceptions
    return errors.RayActorError, errors.ActorUnschedulableError, errors.OutOfMemoryError


@dataclass(eq=False)
class PooledModel:
    """A model of the pool, as the driver sees it."""

    actor: Any
    node: Mapping[str, Any]  # as in ray.nodes()
    pieces: int = 0  # in its hands
    is_open: bool = False


class ModelPool:
    """The models on the nodes of the cluster, which come and go.

    Args:
      flags: how to open the model.
      identity: the expected result of `identify`.
    """

    def __init__(self, flags: ModelFlags, identity: Mapping[str, Any]):
        self._ray, self._flags, self._identity = import_ray(), flags, identity
        self._actor_class = self._ray.remote(max_restarts=0, max_task_retries=0)(_Model)
        self._models: list[PooledModel] = []
        self.opening: dict[Any, PooledModel] = {}
        self.num_cpus = 1
        self._looked, self._seen_node, self._losses = float("-inf"), time.monotonic(), 0

    def __len__(self) -> int:
        return len(self._models)

    def refresh(self) -> None:
        """Start models on new nodes and forget those of lost ones.

        Raises:
          UserError: the cluster has had no node for minutes.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if nodes:
            self._seen_node = now
        elif now - self._seen_node > NO_NODE_S:
            raise UserError(f"the cluster has had no node with a CPU for {NO_NODE_S:g} s; the same command continues")
        self.num_cpus = max(1, sum(int(node["Resources"]["CPU"]) for node in nodes))
        alive = {node["NodeID"] for node in nodes}
        self._models = [model for model in self._models if model.node["NodeID"] in alive]
        with_gpus = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1]
        for node in with_gpus or nodes:
            num_gpus = int(node["Resources"].get("GPU", 0))
            missing = max(1, num_gpus) - sum(model.node["NodeID"] == node["NodeID"] for model in self._models)
            for _ in range(missing):
                self._start(node, min(1, num_gpus))

    def _start(self, node: Mapping[str, Any], num_gpus: int) -> None:
        # No CPU is reserved: model and decoding share those of the node, and the one that falls behind gets more.
        where = only_on(node["NodeID"])
        actor = self._actor_class.options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=where).remote()
        model = PooledModel(actor, node)
        self._models.append(model)
        self.opening[actor.open.remote(self._flags, node["NodeManagerAddress"])] = model

    def take_opened(self, reference: Any) -> None:
        """Admit a model that has been opened.

        Raises:
          UserError: it can't be opened on its node, or is another one there.
        """
        model = self.opening.pop(reference)
        try:
            identity = self._ray.get(reference)
        except model_ended_errors() as error:
            self.lose(model, error)
            return
        for key, value in self._identity.items():
            if identity[key] != value:
                raise UserError(
                    f"node {model.node['NodeManagerAddress']}: {self._flags.path} has another {key} there "
                    f"({str(identity[key])[:80]!r}, here {str(value)[:80]!r}); copy the same folder to all nodes, and "
                    "name one format of it if their runtimes differ"
                )
        model.is_open = True

    def find_free(self) -> PooledModel | None:
        """Return the open model with the fewest pieces; None: all have enough."""
        free = [model for model in self._models if model.is_open and model.pieces < AHEAD]
        return min(free, key=lambda model: model.pieces, default=None)

    def lose(self, model: PooledModel, error: BaseException) -> None:
        """Forget a model whose process ended; `refresh` starts another one.

        Raises:
          UserError: too many were lost in a row.
        """
        if model not in self._models:
            return
        if getattr(error, "actor_init_failed", False):  # before its first line: the project isn't there
            node = model.node["NodeManagerAddress"]
            raise UserError(f"node {node}: a worker can't start; install the same version of this project on all nodes")
        self._models.remove(model)
        self._ray.kill(model.actor)  # unavailable ones too, so that none computes beside its successor
        self._losses += 1
        if self._losses > MAX_LOSSES:
            raise UserError(
                f"node {model.node['NodeManagerAddress']}: the model's process has ended {MAX_LOSSES} times in a row, "
                f"as it does when memory runs out; try a smaller --batch_size ({' '.join(str(error).split())[:200]})"
            )

    def count_success(self) -> None:
        """Note that a piece was finished."""
        self._losses = 0

    def close(self) -> None:
        """End the models."""
        for model in self._models:
            self._ray.kill(model.actor)
        self._models.clear()
        self.opening.clear()
