"""Weights & Biases: online with a key (WANDB_API_KEY or `wandb login`), else offline in the work folder.

WANDB_MODE and WANDB_PROJECT have their usual effect.
"""

import netrc
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("WANDB_SILENT", "true")

import wandb

from clip_har_jax import remote
from clip_har_jax.errors import UserError
from clip_har_jax.files import is_local
from clip_har_jax.mlops.tracking import FINISHED, Handle, Metrics, RunInfo

PROJECT = "clip_har_jax"
INIT_TIMEOUT_S = 30.0  # afterwards the run is written offline
SYNC_TIMEOUT_S = 600.0  # for uploading one offline folder


class Wandb:
    """One W&B run, new or continued under the same id."""

    def __init__(self, info: RunInfo, handle: Handle | None):
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        try:
            self._run = self._init(info, mode)
        except Exception as error:  # nothing is lost: the run is written to the disk instead
            if mode == "offline":
                raise
            print(f"warning: wandb: {remote.one_line(error)}; going on offline", file=sys.stderr)
            wandb.teardown()
            mode = "offline"
            self._run = self._init(info, mode)
        self._run.define_metric("*", step_metric="step")
        folders = list((handle or {}).get("folders", []))
        if mode == "offline":
            folders.append(os.path.dirname(self._run.settings.sync_file))
        self.handle: Handle = {"id": self._run.id, "folders": folders}

    @staticmethod
    def _init(info: RunInfo, mode: str) -> Any:
        local = is_local(info.workdir)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=info.run_id,
            name=info.name,
            resume="allow" if mode == "online" else None,
            config=info.params | {"run": info.tags},
            dir=os.fspath(info.workdir) if local else None,
            mode=mode,  # type: ignore[arg-type]  # WANDB_MODE is checked by W&B itself
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=INIT_TIMEOUT_S,
                x_disable_stats=True,  # the run's own system metrics are sent to all trackers
                x_disable_meta=True,
            ),
        )

    def write(self, records: Sequence[tuple[int, Metrics]]) -> None:
        for step, metrics in records:
            # A resumed run may go back some steps, which W&B's own counter would refuse.
            self._run.log({"step": step} | {name: value for name, value in metrics.items() if value is not None})

    def tag(self, tags: Mapping[str, str]) -> None:
        self._run.summary.update(dict(tags))

    def log_folder(self, name: str, folder: Path) -> None:
        artifact = wandb.Artifact(f"{name.replace('/', '-')}-{self._run.id}", type=name.split("/")[0])
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)
        for path in sorted(folder.rglob("*.png")):
            self._run.log({f"{name}/{path.stem}": wandb.Image(str(path))})

    def close(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == FINISHED else 1)


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(_base_url()).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # the file of `wandb login`
        return False


def open_tracker(info: RunInfo, handle: Handle | None) -> Wandb:
    """Return a run with the run's own id, so that a resumed run is the same one."""
    return Wandb(info, handle)


def sync(
    info: RunInfo, handle: Handle | None, lines: Iterable[dict[str, Any]], folders: Mapping[str, Path]
) -> tuple[str, Handle]:
    """Upload offline data with W&B's own `wandb sync`; each folder once.

    Raises:
      UserError: W&B refuses it or can't be reached.
    """
    local = [Path(folder) for folder in (handle or {}).get("folders", [])]
    left = [path for path in local if path.is_dir() and not list(path.glob("*.synced"))]
    if not left:
        return "nothing is left offline", handle or {}
    if not _has_key():
        raise UserError("wandb: no key; set WANDB_API_KEY, or run `wandb login`")
    remote.RemoteService("wandb", "try again later").check_reachable(_base_url())
    for path in left:
        command = [sys.executable, "-m", "wandb", "sync", "--id", info.run_id, str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SYNC_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"wandb: {path.name} wasn't uploaded within {SYNC_TIMEOUT_S:g} s; try again") from error
        if done.returncode or not list(path.glob("*.synced")):
            said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"wandb: {path.name} wasn't uploaded: {remote.without_secrets(said[-1])}")
    return f"{len(left)} offline folders uploaded to run {info.run_id}", handle or {}
