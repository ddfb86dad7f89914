"""Checkpoints: the training state and the data position, saved by Orbax in the background.

Kept are the latest and the best by validation accuracy. The data position is the number of examples seen, since each
batch is a pure function of it.
"""

from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from clip_har_jax.config import CheckpointConfig
from clip_har_jax.errors import UserError
from clip_har_jax.training.state import TrainState, abstract_state

BEST_BY = "val/top1"


class Checkpointer:
    """The checkpoints of one work folder; a context manager that waits for the last save.

    Args:
      folder: where they are; made if missing.
      config: how many are kept.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig):
        policies = [checkpoint_managers.LatestN(config.keep_latest)]
        if config.keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=_best_by, n=config.keep_best))
        self._manager = ocp.CheckpointManager(
            epath.Path(folder).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=_best_by,
                cleanup_tmp_directories=True,  # what a killed save left behind
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the highest validation accuracy; the latest where none was evaluated."""
        return self._manager.best_step() or self.latest_step()

    def best_metric(self) -> float | None:
        """The highest validation accuracy of a kept checkpoint."""
        step = self._manager.best_step()
        value = _best_by(self._manager.metrics(step)) if step is not None else -1.0
        return value if value >= 0 else None

    def save(self, state: TrainState, position: Mapping[str, int], metrics: Mapping[str, float]) -> None:
        """Starts saving; returns once the state may be changed again."""
        step = position["step"]
        if step == self.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position))),
            metrics=dict(metrics),
            force=True,
        )

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, int]]:
        """The state and data position of a checkpoint, placed on the mesh as `like` is.

        Raises:
          UserError: the checkpoint is of a model with other parameters.
        """
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state(like)), position=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self._manager.directory}: checkpoint {step} doesn't fit this config's model ({reason}); use the "
                "config that the run began with, or another --workdir"
            ) from error
        return restored.state, restored.position

    def wait(self) -> None:
        """Returns when the last save is whole on disk."""
        self._manager.wait_until_finished()


def _best_by(metrics: Any) -> float:
    return (metrics or {}).get(BEST_BY, -1.0)
