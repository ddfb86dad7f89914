"""Checkpoints: the training state and the data position, saved by Orbax in the background, each sealed by a manifest.

Orbax writes to a temporary folder and renames it, so a kill leaves only complete checkpoints, but it doesn't verify the
bytes of arrays when it reads them. Beside each checkpoint stands `<step>.manifest.json` with the SHA-256 of its files.
A checkpoint that differs is moved aside when the folder is opened, and an earlier one is used.
Saving, sealing and restoring share the state of one manager, so they stand in one file, over 300 lines.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from clip_har_jax import remote
from clip_har_jax.config import CheckpointConfig
from clip_har_jax.errors import UserError
from clip_har_jax.files import is_local
from clip_har_jax.parallel import distributed
from clip_har_jax.training import checkpoint_seals
from clip_har_jax.training.state import TrainState, abstract_state

BEST_BY = ("val/top1", "val/map")  # the metric that chooses the best step: of one label, of several
# A replicated array is written by all of its replicas together, a slice each. For less than this, cutting it up costs
# more than it saves: a ViT has hundreds of small arrays.
MIN_SLICE_BYTES = 2**20
SAVE_TIMEOUT_S = 600


@cache
def _write_small_arrays_whole() -> None:
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES)
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True  # Orbax warns that its handler is replaced, which is meant here
    try:
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    finally:
        logger.disabled = before


class Checkpointer:
    """The checkpoints of one work folder; a context manager that waits for the last save.

    Args:
      folder: on a disk or an object store; made if missing.
      config: how many of the latest and of the best checkpoints (by validation accuracy) to keep.

    Raises:
      UserError: the folder can't be written.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig):
        path = epath.Path(folder)
        self._folder, self._config = path.absolute() if is_local(path) else path, config
        self._saving: int | None = None
        try:
            checkpoint_seals.probe(self._folder)
            self._damaged = self._sweep(checkpoint_seals.steps_on_disk(self._folder))
            self._manager = self._open()
        except OSError as error:
            raise UserError(f"{folder}: checkpoints can't be written there ({error.strerror or error})") from error

    def _open(self) -> ocp.CheckpointManager:
        _write_small_arrays_whole()
        policies: list[Any] = [checkpoint_managers.LatestN(self._config.keep_latest)]
        if self._config.keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=best_by, n=self._config.keep_best))
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=best_by,
                cleanup_tmp_directories=True,  # leftovers of a killed save
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=SAVE_TIMEOUT_S,
                    post_finalization_callback=self._seal,
                ),
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # Report the error that ends the run, not a background save that failed for the same reason.
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            remote.leave(self._folder, error, self._manager.close)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_metric(self) -> float | None:
        """Return the highest validation accuracy of a kept checkpoint."""
        step = self._manager.best_step()
        value = best_by(self._manager.metrics(step)) if step is not None else -1.0
        return value if value >= 0 else None

    def save(self, state: TrainState, position: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Start to save a state; return when it may be changed again.

        If this save or the previous one fails, as on a full disk, all checkpoints except the newest and the best are
        deleted, and the state is saved once more.

        Args:
          position: the step, and the position in the data, for `position`.
          metrics: of the validation; empty if the state wasn't evaluated.

        Raises:
          UserError: the second attempt fails too. Earlier complete checkpoints are kept.
        """
        step = position["step"]
        if step == self.latest_step():
            return
        try:
            self._save(step, state, position, metrics)
        except UserError:
            raise
        except Exception as error:  # tensorstore, Orbax and the file system have no common exception class
            self._save_again(step, state, position, metrics, error)

    def _wait_until_finished(self) -> None:
        """Wait for the save in the background; give up an object store that doesn't answer.

        Raises:
          UserError: the store doesn't answer.
        """
        if is_local(self._folder):
            self._manager.wait_until_finished()
        else:
            remote.while_reachable(os.fspath(self._folder), self._manager.wait_until_finished)

    def finish(self, state: TrainState, position: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Wait until the last save, of this state, is complete on disk; save it again if that failed.

        Raises:
          UserError: as `save`.
        """
        try:
            self._wait_until_finished()
            self._seal_late()
        except UserError:
            raise
        except Exception as error:
            self._save_again(position["step"], state, position, metrics, error)

    def _save(self, step: int, state: TrainState, position: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._wait_until_finished()
        self._seal_late()
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position))),
            metrics=dict(metrics),
            force=True,
        )

    def _save_again(
        self,
        step: int,
        state: TrainState,
        position: Mapping[str, Any],
        metrics: Mapping[str, float],
        error: Exception,
    ) -> None:
        reason = _reason(error)
        if not is_local(self._folder):  # else opening the folder again would take minutes
            remote.check_answers(os.fspath(self._folder), remote.store(os.fspath(self._folder)))
        if jax.process_count() > 1:  # the other processes don't know of it, and can't be asked while they compute
            raise UserError(f"{self._folder}: checkpoint {step} can't be saved ({reason}); start again") from error
        try:
            self._reopen()
            self.free_space()
            self._save(step, state, position, metrics)
            self._wait_until_finished()
            self._seal_late()
        except Exception as again:
            self._reopen()
            # Deleting the older ones may have stopped halfway, so each is verified again.
            whole = [step for step in self._manager.all_steps() if checkpoint_seals.problem(self._folder, step) is None]
            kept = ", ".join(map(str, whole)) or "none"
            raise UserError(
                f"{self._folder}: checkpoint {step} can't be saved ({_reason(again)}); whole are: {kept}. Free some "
                "space or mend the folder, then start again"
            ) from again
        print(f"warning: a save failed ({reason}); older checkpoints were deleted and step {step} is saved", flush=True)

    def _reopen(self) -> None:
        """Forget a failed save and remove its partial folder."""
        self._saving = None
        with contextlib.suppress(Exception):  # the failure that is being handled, again
            self._manager.close()
        self._manager = self._open()

    def free_space(self) -> None:
        """Delete all checkpoints except the newest and the best."""
        kept = {self._manager.latest_step(), self._manager.best_step()}
        for step in self._manager.all_steps():
            if step not in kept:
                self._manager.delete(step)

    def newest_whole(self) -> int | None:
        """Return the newest step whose files are unchanged since they were saved; None: no checkpoint was ever saved.

        Raises:
          UserError: there were checkpoints, but none is intact, at this start or an earlier one. A supervisor that
            restarts a run must not start it from scratch unnoticed.
        """
        step = self._manager.latest_step()
        if step is None and self._steps_aside():
            raise self._none_whole()
        return step

    def best_whole(self) -> int:
        """Return the intact checkpoint with the highest validation accuracy; the newest if none was evaluated.

        Raises:
          UserError: none is intact.
        """
        rank = {step: (best_by(self._manager.metrics(step)), step) for step in self._manager.all_steps()}
        for step in sorted(rank, key=lambda step: rank[step], reverse=True):
            damaged = self._sweep([step])
            if not damaged:
                return step
            self._damaged |= damaged
            self._manager.reload()
        raise self._none_whole()

    def _none_whole(self) -> UserError:
        reasons = "; ".join(f"{step}: {self._damaged.get(step, 'damaged')}" for step in self._steps_aside())
        aside = checkpoint_seals.aside(self._folder)
        return UserError(
            f"{self._folder}: no checkpoint is whole ({reasons}); they lie in {aside}. Put a "
            "copy of one back, or start anew with another --workdir"
        )

    def _steps_aside(self) -> list[str]:
        """Return the damaged checkpoints that were moved aside at any start; process 0 looks them up for all."""
        aside = checkpoint_seals.aside(self._folder)
        found = sorted(path.name for path in aside.iterdir()) if distributed.is_main() and aside.exists() else []
        return distributed.broadcast(found)

    def _sweep(self, steps: Iterable[int]) -> dict[str, str]:
        """Move damaged checkpoints of `steps` aside; return the damage by step, as text. Process 0 does it for all."""
        damaged = {}
        if distributed.is_main():
            problems = {str(step): checkpoint_seals.problem(self._folder, step) for step in steps}
            damaged = {step: problem for step, problem in problems.items() if problem is not None}
            self._move_aside(damaged)
        return distributed.broadcast(damaged)

    def position(self, step: int) -> dict[str, Any]:
        """Return the data position that was saved with a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore())).position

    def restore(self, target: TrainState, step: int) -> TrainState:
        """Return the state of a checkpoint, placed on the mesh.

        Args:
          target: a state, or its shapes, types and shardings, for the restored one.

        Raises:
          UserError: the checkpoint is from a model with other parameters.
        """
        try:
            return self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state(target)))
            ).state
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._folder}: checkpoint {step} doesn't fit this config's model ({_reason(error)}); use the "
                "config that the run began with, or another --workdir"
            ) from error

    def _move_aside(self, damaged: Mapping[str, str]) -> None:
        aside = checkpoint_seals.aside(self._folder)
        for step, problem in damaged.items():
            print(f"warning: checkpoint {step} is damaged ({problem}); moved to {aside}", flush=True)
            aside.mkdir(parents=True, exist_ok=True)
            if (aside / step).exists():
                (aside / step).rmtree()
            checkpoint_seals.move_folder(self._folder / step, aside / step)
            checkpoint_seals.manifest_path(self._folder, int(step)).unlink(missing_ok=True)

    def _seal(self) -> None:
        """Write the manifest of the checkpoint being saved; Orbax calls this in its thread before the rename.

        So every complete checkpoint has one. `_seal_late` adds the files that Orbax writes afterwards.
        """
        if not distributed.is_main():
            return
        assert self._saving is not None, "called by a save"
        folder = [*self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"), self._folder / str(self._saving)][0]
        files = checkpoint_seals.hashes(folder, leave_out=checkpoint_seals.LATE)
        checkpoint_seals.write_manifest(self._folder, self._saving, files)

    def _seal_late(self) -> None:
        """Complete the manifest of the last saved checkpoint, and remove those of deleted checkpoints."""
        step, self._saving = self._saving, None
        if step is None or not distributed.is_main():
            return
        checkpoint_seals.seal_late(self._folder, step)


def report_failed_saves_once() -> None:
    """Report a failed save in one line instead of the many lines of Orbax and tensorstore; for programs.

    Their messages can come as late as the interpreter's exit, so the hooks stay in place.
    """
    hook = sys.unraisablehook

    def unless_of_a_save(unraisable: Any) -> None:
        # A write that ends after the save failed, or at the interpreter's exit.
        of_a_save = "async_serialize" in getattr(unraisable.object, "__qualname__", "")
        if not of_a_save and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = unless_of_a_save
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def best_by(metrics: Mapping[str, float] | None) -> float:
    """Return the validation metric that chooses the best step, higher is better; -1 without one."""
    return next((metrics[name] for name in BEST_BY if name in metrics), -1.0) if metrics else -1.0
