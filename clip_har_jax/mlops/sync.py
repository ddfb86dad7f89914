"""Late uploads to trackers, from metrics.jsonl and the work folder, which hold everything."""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_har_jax import remote
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.mlops.tracking import STATE, State, check_trackers, read_run_info

SYNCED = ("mlflow", "wandb")  # TensorBoard's files lie in the work folder and lack only what a full disk refused


def sync(workdir: str | os.PathLike[str], names: Sequence[str] = ()) -> dict[str, str]:
    """Bring trackers up to date with a work folder on a local disk.

    Args:
      workdir: of a run that isn't running.
      names: of `SYNCED`; empty: those of the run.

    Returns:
      A summary of the uploads, by tracker.

    Raises:
      UserError: no run, no such tracker, or it still can't be reached.
    """
    workdir = Path(os.fspath(workdir))
    info, state = read_run_info(workdir), State(workdir)
    for name in names:
        if name not in SYNCED:
            raise UserError(
                f"--trackers: {name!r} isn't one that can be brought up to date; {nearest(name, [*SYNCED])}"
            )
    names = names or [name for name in SYNCED if state.get(name)]
    if not names:
        raise UserError(f"{workdir / STATE}: names no tracker; say which by --trackers=mlflow or wandb")
    check_trackers(names, workdir)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    folders = {"model": workdir / "model"} if (workdir / "model").is_dir() else {}
    if reports := sorted(workdir.glob("eval/*/report.html")):
        folders["evaluation"] = reports[-1].parent
    done = {}
    for name in names:
        module = importlib.import_module(f"clip_har_jax.mlops.{name}")
        service = remote.RemoteService(name, "metrics.jsonl keeps everything; run the same command again later")
        handle = state.get(name).get("handle")
        done[name], handle = service.call(module.sync, info, handle, lines, folders)
        state.update(name, handle=handle, missed=0)
    return done
