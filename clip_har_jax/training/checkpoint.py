"""Checkpoints: the training state and the data position, saved by Orbax in the background, each sealed by a manifest.

Orbax writes aside and renames, so a kill leaves whole checkpoints only, but it doesn't check the bytes of arrays when
it reads them back. Beside each checkpoint stands `<step>.manifest.json` with the SHA-256 of its files; one that
differs is moved aside and the one before it is used.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from clip_har_jax.config import CheckpointConfig
from clip_har_jax.errors import UserError
from clip_har_jax.parallel import distributed
from clip_har_jax.training.state import TrainState, abstract_state

BEST_BY = "val/top1"
NOTE = "_CHECKPOINT_METADATA"  # when the checkpoint was made; Orbax writes it last
COMMIT_MARK = "commit_success.txt"  # what Orbax adds on object stores, which can't rename
SAVE_TIMEOUT_S = 600
_READ_BYTES = 1 << 22


class Checkpointer:
    """The checkpoints of one work folder; a context manager that waits for the last save.

    Args:
      folder: where they are, on a disk or an object store; made if missing.
      config: how many are kept: the latest, and the best by validation accuracy.

    Raises:
      UserError: the folder can't be written.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig):
        self._folder, self._config = epath.Path(folder), config
        self._saving: int | None = None
        try:
            self._manager = self._open()
        except OSError as error:
            raise UserError(f"{folder}: checkpoints can't be written there ({error.strerror or error})") from error

    def _open(self) -> ocp.CheckpointManager:
        policies: list[Any] = [checkpoint_managers.LatestN(self._config.keep_latest)]
        if self._config.keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=_best_by, n=self._config.keep_best))
        return ocp.CheckpointManager(
            self._folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=_best_by,
                cleanup_tmp_directories=True,  # what a killed save left behind
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=SAVE_TIMEOUT_S,
                    post_finalization_callback=self._seal,
                ),
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_metric(self) -> float | None:
        """The highest validation accuracy of a kept checkpoint."""
        step = self._manager.best_step()
        value = _best_by(self._manager.metrics(step)) if step is not None else -1.0
        return value if value >= 0 else None

    def save(self, state: TrainState, position: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts saving; returns once the state may be changed again.

        If this save or the one before it fails, as on a full disk, older checkpoints but the newest and the best are
        deleted and the state is saved once more.

        Raises:
          UserError: that fails too. The checkpoints that were whole still are.
        """
        step = position["step"]
        if step == self.latest_step():
            return
        try:
            self._save(step, state, position, metrics)
        except Exception as error:  # tensorstore's, Orbax's and the file system's have no common class
            self._save_again(step, state, position, metrics, error)

    def finish(self, state: TrainState, position: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Returns when the last save, of this very state, is whole on disk; saves it again if that failed.

        Raises:
          UserError: as `save`.
        """
        try:
            self._manager.wait_until_finished()
            self._seal_note()
        except Exception as error:
            self._save_again(position["step"], state, position, metrics, error)

    def _save(self, step: int, state: TrainState, position: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._manager.wait_until_finished()
        self._seal_note()
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
        if jax.process_count() > 1:  # the others don't know of it, and can't be asked while they compute
            raise UserError(f"{self._folder}: checkpoint {step} can't be saved ({reason}); start again") from error
        try:
            self._reopen()
            self.free_space()
            self._save(step, state, position, metrics)
            self._manager.wait_until_finished()
            self._seal_note()
        except Exception as again:
            self._reopen()
            kept = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise UserError(
                f"{self._folder}: checkpoint {step} can't be saved ({_reason(again)}); whole are: {kept}. Free some "
                "space or mend the folder, then start again"
            ) from again
        print(f"warning: a save failed ({reason}); older checkpoints were deleted and step {step} is saved", flush=True)

    def _reopen(self) -> None:
        """Forgets a failed save, whose partial folder is removed."""
        self._saving = None
        with contextlib.suppress(Exception):  # the failure that is being handled, once more
            self._manager.close()
        self._manager = self._open()

    def free_space(self) -> None:
        """Deletes all checkpoints but the newest and the best."""
        kept = {self._manager.latest_step(), self._manager.best_step()}
        for step in self._manager.all_steps():
            if step not in kept:
                self._manager.delete(step)

    def newest_whole(self) -> int | None:
        """The newest step whose files are as they were saved; None: there are no checkpoints.

        Raises:
          UserError: there are checkpoints and none of them is whole.
        """
        return self._first_whole(sorted(self._manager.all_steps(), reverse=True))

    def best_whole(self) -> int:
        """As `newest_whole`, of the highest validation accuracy; the newest where none was evaluated.

        Raises:
          UserError: none is whole.
        """
        steps = self._manager.all_steps()
        rank = {step: (_best_by(self._manager.metrics(step)), step) for step in steps}
        step = self._first_whole(sorted(steps, key=lambda step: rank[step], reverse=True))
        assert step is not None, "the last step is always saved"
        return step

    def _first_whole(self, steps: Sequence[int]) -> int | None:
        """The first whole one of `steps`; those before it are moved aside and reported."""
        damaged = distributed.broadcast(self._find_damaged(steps) if distributed.is_main() else None)
        if damaged:
            if distributed.is_main():
                self._move_aside(damaged)
            distributed.barrier("damaged checkpoints are moved")
            self._manager.reload()
        whole = [step for step in steps if str(step) not in damaged]
        if steps and not whole:
            raise UserError(
                f"{self._folder}: no checkpoint is whole ({_listed(damaged)}); they lie in {self._aside()}. Put a copy "
                "of one back, or start anew with another --workdir"
            )
        return whole[0] if whole else None

    def position(self, step: int) -> dict[str, Any]:
        """The data position that was saved with a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore())).position

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state of a checkpoint, placed on the mesh as `like` is.

        Raises:
          UserError: the checkpoint is of a model with other parameters.
        """
        try:
            return self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state(like)))
            ).state
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._folder}: checkpoint {step} doesn't fit this config's model ({_reason(error)}); use the "
                "config that the run began with, or another --workdir"
            ) from error

    def _find_damaged(self, steps: Iterable[int]) -> dict[str, str]:
        """What is wrong with the steps before the first whole one, by step (JSON has no integer keys)."""
        damaged: dict[str, str] = {}
        for step in steps:
            problem = self._problem(step)
            if problem is None:
                break
            damaged[str(step)] = problem
        return damaged

    def _problem(self, step: int) -> str | None:
        """How the files of a checkpoint differ from its manifest; None: not at all."""
        try:
            files = json.loads(self._manifest(step).read_text())["files"]
        except FileNotFoundError:
            return "its manifest is missing"
        except (OSError, ValueError, KeyError, TypeError):
            return "its manifest is damaged"
        try:
            found = _hashes(self._folder / str(step))
            if NOTE not in files and NOTE in found:  # killed before it was sealed: all that is read of it is JSON
                json.loads((self._folder / str(step) / NOTE).read_text())
                del found[NOTE]
        except (OSError, ValueError) as error:
            return f"can't be read: {error}"
        if differing := sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name)):
            name = differing[0]
            what = "is missing" if name not in found else "was added" if name not in files else "was changed"
            return f"{name} {what}"
        return None

    def _move_aside(self, damaged: Mapping[str, str]) -> None:
        aside = self._aside()
        aside.mkdir(parents=True, exist_ok=True)
        for step, problem in damaged.items():
            print(f"warning: checkpoint {step} is damaged ({problem}); moved to {aside}", flush=True)
            if (aside / step).exists():
                (aside / step).rmtree()
            (self._folder / step).rename(aside / step)
            self._manifest(int(step)).unlink(missing_ok=True)

    def _aside(self) -> epath.Path:
        return self._folder.parent / f"{self._folder.name}_damaged"

    def _manifest(self, step: int) -> epath.Path:
        return self._folder / f"{step}.manifest.json"

    def _seal(self) -> None:
        """Writes the manifest of the checkpoint being saved; called in Orbax's thread before the folder is renamed.

        So there is no whole checkpoint without one. Orbax's own note is written after that: `_seal_note` adds it.
        """
        if not distributed.is_main():
            return
        assert self._saving is not None, "called by a save"
        folder = [*self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"), self._folder / str(self._saving)][0]
        files = _hashes(folder)
        files.pop(NOTE, None)
        self._write_manifest(self._saving, files)
        for other in self._folder.glob("*.manifest.json"):
            step = other.name.partition(".")[0]
            if step != str(self._saving) and not (self._folder / step).exists():
                other.unlink(missing_ok=True)

    def _seal_note(self) -> None:
        """Adds Orbax's note of the checkpoint that was saved last to its manifest."""
        step, self._saving = self._saving, None
        if step is not None and distributed.is_main():
            files = json.loads(self._manifest(step).read_text())["files"]
            self._write_manifest(step, {**files, NOTE: _sha256(self._folder / str(step) / NOTE)})

    def _write_manifest(self, step: int, files: Mapping[str, str]) -> None:
        path = self._manifest(step)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps({"step": step, "files": files}))
        partial.replace(path)


def _hashes(folder: epath.Path) -> dict[str, str]:
    """SHA-256 by relative name, several files at once: reading is what takes the time."""
    assert folder.exists(), folder
    files = {str((root / name).relative_to(folder)): root / name for root, _, names in folder.walk() for name in names}
    files.pop(COMMIT_MARK, None)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(_sha256, files.values()), strict=True))


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _listed(damaged: Mapping[str, str]) -> str:
    return "; ".join(f"{step}: {problem}" for step, problem in damaged.items())


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _best_by(metrics: Any) -> float:
    return (metrics or {}).get(BEST_BY, -1.0)
