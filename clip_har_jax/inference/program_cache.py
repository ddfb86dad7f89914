"""The cache of a model folder's traced programs and class embeddings, which makes the next start faster.

An entry holds traced programs (StableHLO in `jax.export`'s versioned format, without weights) and class embeddings.
With them, neither flax nor the text tower's weights are needed. JAX's compilation cache, in another folder, holds the
compiled programs.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.bundle import Actions
from clip_har_jax.caches import cache_folder
from clip_har_jax.files import sha256, sha256_file, write_bytes

MAX_ENTRIES = 100
_DIGEST_BYTES = 64  # of hex digits before a program
_CODE = (  # files that set what a program computes, or the tokens of a text
    *("inference/jax_*.py", "inference/program_cache.py", "models/*.py"),
    *("patches.py", "preprocess.py", "text.py", "tokenization.py"),
)
_CONTENTS = ("safetensors", "msgpack", "bin", "json", "txt", "model")  # endings of weights, settings and tokenizers


class KeptEntry:
    """The cache entry of a model folder with its classes; damaged files count as missing.

    Args:
      content: the digest of the model folder, see `model_folder_digest`.
      actions: the classes to recognise.
      machine: further dependencies of programs: platform and versions.
    """

    def __init__(self, content: str, actions: Actions, machine: Sequence[str]):
        package = Path(__file__).parents[1]
        code = [path.read_bytes() for pattern in _CODE for path in sorted(package.glob(pattern))]
        key = sha256(repr(part) for part in (content, actions, tuple(machine), sha256(code)))
        self.folder = cache_folder("programs") / key

    def tensors(self) -> dict[str, np.ndarray] | None:
        """Return the arrays that `write_tensors` stored, in their shapes; None: missing or damaged."""
        from safetensors.numpy import load

        data = self._read("classes.safetensors")
        return None if data is None else load(data)

    def write_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Store small arrays: class embeddings [c, d], their scale [], the parameters of a head."""
        from safetensors.numpy import save

        self._write("classes.safetensors", save({name: np.array(value, order="C") for name, value in tensors.items()}))

    def program(self, name: str) -> Any | None:
        """Return a `jax.export.Exported` that `write_program` stored; None: missing or damaged."""
        from jax import export

        data = self._read(f"{name}.jax_export")
        return None if data is None else export.deserialize(bytearray(data))

    def write_program(self, name: str, exported: Any) -> None:
        """Store a `jax.export.Exported`."""
        self._write(f"{name}.jax_export", bytes(exported.serialize()))

    def _read(self, name: str) -> bytes | None:
        """Return a file's contents without the leading digest; None: missing, or the digest differs."""
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            return None
        contents = data[_DIGEST_BYTES:]
        return contents if data[:_DIGEST_BYTES] == sha256(contents).encode() else None

    def _write(self, name: str, contents: bytes) -> None:
        with suppress(OSError):  # a cache that can't be written only costs time
            _make_room(self.folder)
            write_bytes(self.folder / name, sha256(contents).encode() + contents)


def _make_room(folder: Path) -> None:
    """Make an entry's folder, and remove the oldest entries."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    entries = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in entries[:-MAX_ENTRIES]:
        shutil.rmtree(old, ignore_errors=True)


def model_folder_digest(folder: Path, sealed: str | None) -> str:
    """Return the digest of a model folder: that of its seal, else one over its files of weights and settings."""
    if sealed is not None:
        return sealed
    files = [path for ending in _CONTENTS for path in folder.glob(f"*.{ending}")]
    return sha256(f"{path.name} {sha256_file(path)}\n" for path in sorted(files))


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Return only these tensors, in the shapes of the file; None if numpy lacks their type (bfloat16).

    Raises:
      OSError: the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in names}
    except (TypeError, SafetensorError):
        return None
