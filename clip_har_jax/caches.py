"""The folders for results that later runs reuse: compiled programs, features, class embeddings."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return a folder of this user's cache: $XDG_CACHE_HOME/clip_har_jax/KIND, or ~/.cache/clip_har_jax/KIND."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_har_jax" / kind
