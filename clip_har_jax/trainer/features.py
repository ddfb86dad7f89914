"""Image embeddings, computed once and kept on disk by what the images, the model and the way between them are."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.data.sources import ClipFile, Source
from clip_har_jax.parallel import distributed
from clip_har_jax.preprocess import PREPROCESS_VERSION, BadImage
from clip_har_jax.training.probe import Embedded


def cache_folder() -> Path:
    """Where features are kept: beside the compiled programs, in $XDG_CACHE_HOME/clip_har_jax (default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_har_jax" / "features"


def content_digest(source: Source) -> str:
    """SHA-256 over the examples' bytes and labels; of drawn ones over what they are drawn from."""

    def read(i: int) -> Any:
        try:
            data = source[i].data
            if not isinstance(data, ClipFile):
                return data
            with open(data.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except (OSError, BadImage) as error:  # it will be reported when it is to be read for good
            return str(error).encode()

    def one(i: int) -> bytes:
        return hashlib.sha256(read(i)).digest()

    if not len(source) or isinstance(read(0), np.ndarray):
        return source.fingerprint
    digest = hashlib.sha256(np.ascontiguousarray(source.label_ids).tobytes())
    with ThreadPoolExecutor(8) as pool:
        for part in pool.map(one, range(len(source))):
            digest.update(part)
    return digest.hexdigest()


def image_tower_digest(params: Mapping[str, Any]) -> str:
    """SHA-256 over the weights that image embeddings depend on."""
    digest = hashlib.sha256()
    for name in sorted(name for name in params if name.startswith("vis")):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(params[name]).tobytes())
    return digest.hexdigest()


def cached_features(
    source: Source, tower_digest: str, way: Mapping[str, Any], compute: Callable[[], Embedded]
) -> Embedded:
    """Return the features of a source, read if they are kept, else computed and kept.

    Of several processes each has its own file or shares one; unless all find theirs, all compute.

    Args:
      tower_digest: from `image_tower_digest`.
      way: what else the features depend on, as JSON: preprocessing, a clip's frames, the tower's sizes, the precision.
      compute: reads and embeds each image once; all processes together.
    """
    key = json.dumps([content_digest(source), tower_digest, PREPROCESS_VERSION, dict(way)])
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    kept = _read(path, len(source))
    if distributed.agree(kept is not None):
        assert kept is not None
        return kept
    embedded = compute()
    _write(path, embedded)
    return embedded


def _read(path: Path, count: int) -> Embedded | None:
    """None: not there, damaged, or without the examples that couldn't be read, which each run is to say."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(str(path))
        return Embedded(tensors["embeddings"], tensors["label"]) if len(tensors["label"]) == count else None
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, embedded: Embedded) -> None:
    """Under a name of its own first, since others may write the same at the same time."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in embedded._asdict().items()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
