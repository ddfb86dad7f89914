"""Split manifests: a table of files, labels and splits with checksums, so that no change goes undetected."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring_ascii as json_string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_har_jax.errors import UserError
from clip_har_jax.files import atomic, sha256
from clip_har_jax.names import sort_labels, split_labels
from clip_har_jax.specs import Spec, find_split

FORMAT = 1
ROWS_AT_ONCE = 65536
SCHEMA = pa.schema(
    {
        "path": pa.string(),  # relative to the root, with forward slashes
        "sha256": pa.string(),
        "label": pa.string(),  # of multi-label data, the labels joined by |; "" for none
        "group": pa.int32(),  # near duplicates have the same number
        "split": pa.string(),  # train, val, test, or excluded
        "weight": pa.float32(),  # weight in weighted sampling; may be edited
        "bytes": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "brightness": pa.float32(),  # mean grey level, 0 to 1
        "contrast": pa.float32(),  # its standard deviation
    }
)
PROMISED = ("path", "sha256", "label", "group", "split")  # columns of the checksum


@dataclass(frozen=True)
class Manifest:
    """A split manifest.

    Attributes:
      table: rows of SCHEMA, sorted by path.
      root: the folder to which the paths are relative.
      about: how it was made: the data's SPECs, the seed, the shares.
    """

    table: pa.Table
    root: Path
    about: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the promised columns: each file, its content, label, group and split."""
        return sha256(_promises(self.table))

    @property
    def clips(self) -> bool:
        """Return whether the files are videos."""
        return bool(self.about.get("clips", False))

    @property
    def multi_label(self) -> bool:
        """Return whether an image has any number of labels."""
        return bool(self.about.get("multi_label", False))

    def column(self, name: str) -> list[Any]:
        return self.table.column(name).to_pylist()

    def label_sets(self) -> list[tuple[str, ...]]:
        """Return the labels of each row: one, or any number in multi-label data."""
        return label_sets(_shared(self.table.column("label")), self.multi_label)


def _promises(table: pa.Table) -> Iterator[str]:
    """Yield the promised columns of each row as a JSON list and a newline, many rows at once."""
    for batch in table.select(PROMISED).to_batches(max_chunksize=ROWS_AT_ONCE):
        paths, digests, labels, groups, splits = (column.to_pylist() for column in batch.columns)
        text = {value: json.dumps(value) for value in {*labels, *splits}}
        yield "".join(
            f"[{json_string(path)}, {json_string(digest)}, {text[label]}, {json.dumps(group)}, {text[split]}]\n"
            for path, digest, label, group, split in zip(paths, digests, labels, groups, splits, strict=True)
        )


def make_manifest(rows: Sequence[Mapping[str, Any]], root: Path, about: Mapping[str, Any]) -> Manifest:
    return Manifest(pa.Table.from_pylist(sorted(rows, key=lambda row: row["path"]), SCHEMA), root, about)


def write_split_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest atomically."""
    about = {"format": FORMAT, "digest": manifest.digest, "root": str(manifest.root), "about": dict(manifest.about)}
    with atomic(path) as partial:
        pq.write_table(manifest.table.replace_schema_metadata({"manifest": json.dumps(about)}), partial)


def read_manifest(path: Path, root: Path | None = None) -> Manifest:
    """Read a manifest and check its checksum.

    Args:
      path: the manifest.
      root: the folder to which its paths are relative; None: the one that it names, or else its own folder.

    Raises:
      UserError: not a manifest, or changed since it was written.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: {'not a file' if path.exists() else 'no such file'}; prepare_data.py writes manifests"
        )
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[b"manifest"])
        table = table.replace_schema_metadata(None).select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a manifest ({_line(error)}); prepare_data.py writes them") from error
    if about["format"] != FORMAT:
        raise UserError(f"{path}: a manifest of format {about['format']}, not {FORMAT}; run prepare_data.py again")
    if root is None:
        root = Path(about["root"])
        root = root if root.is_dir() else path.parent
    manifest = Manifest(table, root, about["about"])
    if manifest.digest != about["digest"]:
        raise UserError(f"{path}: was changed after prepare_data.py wrote it (its checksum differs); run it again")
    return manifest


def lists_clips(path: Path) -> bool:
    """Return whether a manifest lists videos, by its metadata alone; False if it can't be read."""
    try:
        about = json.loads((pq.read_schema(path).metadata or {})[b"manifest"])
        return bool(about["about"].get("clips", False))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split; parallel lists."""

    split: str
    labels: tuple[str, ...]  # over the whole manifest
    paths: list[str]
    sets: list[tuple[str, ...]]  # labels of each: one, or any number in multi-label data
    sha256: list[str]
    weights: np.ndarray  # float32
    digest: str  # of the manifest
    clips: bool  # whether the files are videos
    multi_label: bool


def read_split(spec: Spec, split: str) -> SplitRows:
    """Return the rows of a split of `manifest:FILE`, after checking that the files exist.

    Raises:
      UserError: no such split, or files are missing or have another size; names the first one and their number.
    """
    path = Path(spec.path).expanduser()
    manifest = read_manifest(path, Path(spec.options["images"]).expanduser() if "images" in spec.options else None)
    available = sorted(set(pc.unique(manifest.table.column("split")).to_pylist()) - {"excluded"})
    found = find_split(split, available, "split" in spec.options)
    if found is None:
        raise UserError(f"{spec}: no split {split!r}; it has {', '.join(available)}; say ?split=NAME")
    rows = manifest.table.filter(pc.equal(manifest.table.column("split"), found))
    paths = [os.path.join(manifest.root, name) for name in rows.column("path").to_pylist()]
    if "cache" not in spec.options:  # the records were made when the files existed
        _check_files(path, paths, rows.column("bytes").to_pylist(), manifest.root)
    texts = pc.unique(manifest.table.column("label")).to_pylist()
    return SplitRows(
        found,
        sort_labels(name for own in label_sets(texts, manifest.multi_label) for name in own),
        paths,
        label_sets(_shared(rows.column("label")), manifest.multi_label),
        rows.column("sha256").to_pylist(),
        rows.column("weight").to_numpy(),
        manifest.digest,
        manifest.clips,
        manifest.multi_label,
    )


def label_sets(texts: Sequence[str], multi_label: bool) -> list[tuple[str, ...]]:
    """Return the labels that each text of a manifest's column `label` means; equal texts share one tuple."""
    meant = {text: split_labels(text, "manifest") if multi_label else (text,) for text in set(texts)}
    return [meant[text] for text in texts]


def _shared(column: pa.ChunkedArray) -> list[str]:
    """Return a column's values, with equal values as one object, to save memory."""
    encoded = column.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    return [values[i] for i in encoded.indices.to_pylist()]


def _check_files(manifest: Path, paths: Sequence[str], sizes: Sequence[int], root: Path) -> None:
    changed = [path for path, size in zip(paths, sizes, strict=True) if _size(path) != size]
    if changed:
        what = "is missing" if _size(changed[0]) is None else "has another size"
        raise UserError(
            f"{manifest}: {len(changed)} of {len(paths)} files changed since it was written, the first is "
            f"{changed[0]}, which {what}; run prepare_data.py again, or say "
            f"?images=DIR if the files are elsewhere than in {root}"
        )


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
