"""run.json: what identifies a run, so that a model can be traced to its code, config, data and environment."""

import datetime
import os
import secrets
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from clip_har_jax.config import RunConfig
from clip_har_jax.files import sha256

ROOT = Path(__file__).resolve().parents[2]
GIT_SHA = "CLIP_HAR_JAX_GIT_SHA"  # set where the code came without its history, as in an image


def _git(*arguments: str) -> str | None:
    """What git says of this code's own repository; None where it isn't in one."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment_hash() -> str:
    """SHA-256 over the names and versions of all installed distributions."""
    names = sorted({f"{item.metadata['Name']}=={item.version}" for item in metadata.distributions()})
    return sha256("\n".join(names))


def make_record(config: RunConfig, facts: dict[str, Any], previous: dict[str, Any] | None) -> dict[str, Any]:
    """Return the contents of run.json: `facts` of this start, and what can be read off the code and the machine.

    A run that continues keeps the id and the start of `previous`, the earlier contents, if there are any.
    """
    old = previous or {}
    now = datetime.datetime.now(datetime.UTC)
    status = _git("status", "--porcelain")
    return {
        "run_id": old.get("run_id") or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        "started": old.get("started") or now.isoformat(timespec="seconds"),
        "git_sha": _git("rev-parse", "HEAD") or os.environ.get(GIT_SHA) or None,
        "git_dirty": None if status is None else bool(status),
        "config_hash": config.digest,
        "lock_hash": environment_hash(),
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
        "python": sys.version.split()[0],
        "command": sys.argv,
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        **facts,
    }
