"""Class embeddings of many texts, kept on disk by content: weights, token ids, program."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from clip_har_jax.caches import cache_folder
from clip_har_jax.files import atomic, sha256, sha256_file

CACHED_FROM = 512  # texts; fewer take less time than their weights take to digest
MOST_FILES = 20  # the files that were used last are kept
WEIGHTS = ("*.safetensors", "*.msgpack", "*.bin", "config.json")


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 over a model folder's weights and sizes."""
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return sha256(part for path in files for part in (path.name, sha256_file(path)))


def cached(key: str, compute: Callable[[], Float32[np.ndarray, "c d"]]) -> Float32[np.ndarray, "c d"]:
    """Return the array that was computed under this key before, else compute and keep it.

    A damaged file is computed anew; a folder that can't be written keeps nothing.
    """
    path = cache_folder("texts") / f"{key}.npy"
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
        os.utime(path)
        return found
    except (OSError, ValueError, EOFError):
        pass
    made = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial, partial.open("wb") as file:
            np.save(file, made)
        for old in sorted(path.parent.glob("*.npy"), key=lambda each: each.stat().st_mtime)[:-MOST_FILES]:
            old.unlink(missing_ok=True)
    except OSError:
        pass
    return made
