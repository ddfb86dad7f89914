"""Image embeddings, computed once and kept on disk under a digest of the images, the model and the preprocessing."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.caches import cache_folder
from clip_har_jax.data.examples import ClipFile, Source
from clip_har_jax.data.windows import Window
from clip_har_jax.files import sha256, sha256_file, write_bytes
from clip_har_jax.image_files import BadImage
from clip_har_jax.models.temporal import HEAD
from clip_har_jax.parallel import distributed
from clip_har_jax.preprocess import PREPROCESS_VERSION
from clip_har_jax.training.probe import LabeledFeatures


def examples_digest(source: Source) -> str:
    """Return the SHA-256 of the examples' bytes, times and labels; for drawn examples, of their seeds."""
    file_digest = cache(sha256_file)  # many windows have one file

    def one(i: int) -> str | None:
        try:
            data = source[i].data
            if isinstance(data, Window) and data.path:
                return sha256(f"{file_digest(data.path)} {data.first_s} {data.last_s} {data.window_s}")
            if isinstance(data, ClipFile):
                return file_digest(data.path)
            return sha256(data) if isinstance(data, bytes) else None
        except (OSError, BadImage) as error:  # reported when the example is really read
            return sha256(str(error))

    if not len(source) or one(0) is None:
        return source.fingerprint
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(one, range(len(source)))
        return sha256((np.ascontiguousarray(source.label_ids).tobytes(), *map(str, parts)))


def image_tower_digest(params: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the weights on which image embeddings depend."""
    names = sorted(name for name in params if name.startswith(("vis", HEAD)))
    arrays = ((name, np.ascontiguousarray(distributed.fetch_to_all(params[name]))) for name in names)
    return sha256(part for name, value in arrays for part in (name, value.tobytes()))


def cached_features(
    source: Source, tower_digest: str, depends_on: Mapping[str, Any], compute: Callable[[], LabeledFeatures]
) -> LabeledFeatures:
    """Return the features of a source, from disk if they are there; otherwise compute and store them.

    Processes may share the file or have one each; unless all find it, all compute.

    Args:
      tower_digest: from `image_tower_digest`.
      depends_on: further settings as JSON: preprocessing, frame sampling, the tower's sizes, the precision.
      compute: reads and embeds each image once; all processes call it together.
    """
    key = json.dumps([examples_digest(source), tower_digest, PREPROCESS_VERSION, dict(depends_on)])
    path = cache_folder("features") / f"{sha256(key)}.safetensors"
    kept = _read(path, len(source))
    if distributed.agree(kept is not None):
        assert kept is not None
        return kept
    embedded = compute()
    _write(path, embedded)
    return embedded


def _read(path: Path, count: int) -> LabeledFeatures | None:
    """Return stored features; None if they are missing, damaged or incomplete (each run must report bad images)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(str(path))
        return LabeledFeatures(tensors["embeddings"], tensors["label"]) if len(tensors["label"]) == count else None
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, embedded: LabeledFeatures) -> None:
    """Write the file atomically, since another run may write the same one."""
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({name: np.ascontiguousarray(value) for name, value in embedded._asdict().items()}))
