"""The facts in run.json that identify a run, so that a model can be traced to code, config, data and environment."""

import datetime
import functools
import os
import re
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
CODE_SUFFIXES = (".py", ".pyi", ".sh", ".toml", ".c", ".cc", ".cpp", ".cu", ".h")
GIT_SHA = "CLIP_HAR_JAX_GIT_SHA"  # set where the code has no git history, as in an image


def _git(*arguments: str) -> str | None:
    """Return git's output for this code's own repository; None if it isn't in one."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def has_code_changes() -> bool | None:
    """Return whether the code differs from its commit: a changed tracked file, or untracked code.

    Other untracked files, such as images, don't count. None: the code isn't in a repository.
    """
    changed = _git("status", "--porcelain", "--untracked-files=no")
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", *(f"*{suffix}" for suffix in CODE_SUFFIXES))
    return None if changed is None or untracked is None else bool(changed or untracked)


@functools.cache
def environment_hash() -> str:
    """Return the SHA-256 of the names and versions of all installed distributions."""
    return sha256("\n".join(sorted({_requirement(item) for item in metadata.distributions()})))


def _requirement(item: metadata.Distribution) -> str:
    """Return NAME==VERSION; `item.metadata` would parse the whole description, for hundreds of distributions."""
    head = (item.read_text("METADATA") or item.read_text("PKG-INFO") or "").partition("\n\n")[0]
    fields = dict(re.findall(r"^(Name|Version):[ \t]*(.*?)[ \t]*$", head, re.MULTILINE))
    return f"{fields.get('Name')}=={fields.get('Version')}"


def make_record(config: RunConfig, facts: dict[str, Any], previous: dict[str, Any] | None) -> dict[str, Any]:
    """Return the contents of run.json: `facts` of this start, and facts on the code and the machine.

    Args:
      previous: the contents so far, whose run id and first start a resumed run keeps; None: a new run.
    """
    old = previous or {}
    now = datetime.datetime.now(datetime.UTC)
    return {
        "run_id": old.get("run_id") or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        "started": old.get("started") or now.isoformat(timespec="seconds"),
        "git_sha": _git("rev-parse", "HEAD") or os.environ.get(GIT_SHA) or None,
        "git_dirty": has_code_changes(),
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
