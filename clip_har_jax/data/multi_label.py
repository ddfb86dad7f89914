"""Multi-label data: images with any number of labels, from folders, tables, manifests and Parquet files."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clip_har_jax.csv_files import list_csv_sets
from clip_har_jax.data.examples import Source, fingerprint_of, make_targets
from clip_har_jax.data.sources import FileSource, ManifestSource, fingerprint_files
from clip_har_jax.data.tables import parquet_source
from clip_har_jax.errors import UserError
from clip_har_jax.files import sha256_file
from clip_har_jax.listing import Tally, list_folder
from clip_har_jax.names import join_labels, sort_labels
from clip_har_jax.specs import Spec, parse_spec

LabelledFiles = Sequence[tuple[Path, tuple[str, ...]]]  # each file with its labels


class MultiLabelFiles(FileSource):
    """Image files with any number of labels each: a folder or a CSV."""

    def __init__(self, files: LabelledFiles, labels: Sequence[str], where: str, tally: Tally):
        sets = [own for _, own in files]
        self.labels = tuple(labels) or sort_labels(name for own in sets for name in own)
        self.targets = make_targets(sets, self.labels, where)
        self.paths, self.tally = [str(path) for path, _ in files], tally
        texts = [(path, join_labels(own)) for path, own in files]
        self.fingerprint = fingerprint_of("multi-label", self.labels, *fingerprint_files(texts))

    def __len__(self) -> int:
        return len(self.paths)


def _csv(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    if wrong := [name for name in spec.options if name != "images"]:
        raise UserError(f"{spec}: {wrong[0]} isn't for multi-label data; leave it out")
    tally = Tally()
    return MultiLabelFiles(list_csv_sets(spec, tally), labels, str(spec), tally)


def _folder(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    tally = Tally()
    files = list_folder(spec, split, tally=tally)
    return MultiLabelFiles(join_copies(files, tally), labels, str(spec), tally)


def join_copies(files: Sequence[tuple[Path, str]], tally: Tally) -> list[tuple[Path, tuple[str, ...]]]:
    """Return each content once, under its first path, with the labels of all files that hold it.

    Args:
      files: with the label of each.
      tally: its number of kept files is lowered, and a note added.
    """
    sizes = [_size(path) for path, _ in files]
    shared = {size for size, count in zip(*np.unique(sizes, return_counts=True), strict=True) if count > 1}
    found: dict[str, tuple[Path, list[str]]] = {}
    for (path, label), size in zip(files, sizes, strict=True):
        # Only files of one size can be equal; one that can't be read is reported when the image is needed.
        key = sha256_file(path) if size >= 0 and size in shared else str(path)
        found.setdefault(key, (path, []))[1].append(label)
    if repeated := len(files) - len(found):
        tally.kept -= repeated
        tally.notes.append(
            f"{repeated} files repeat the contents of another; each content is one image with the labels of all its "
            "folders"
        )
    return [(path, sort_labels(own)) for path, own in found.values()]


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size if os.access(path, os.R_OK) else -1
    except OSError:
        return -1


MULTI_LABEL_KINDS: dict[str, Callable[[Spec, str, Sequence[str]], Source]] = {
    "csv": _csv,
    "folder": _folder,
    "manifest": lambda spec, split, labels: ManifestSource(spec, split, labels, multi_label=True),
    "parquet": lambda spec, split, labels: parquet_source(spec, labels, multi_label=True),
}


def make_multi_label_source(
    text: str, default_split: str, labels: Sequence[str] = (), *, for_training: bool = False
) -> Source:
    """Return the examples of a SPEC with all their labels; see `sources.make_source`.

    In a folder, files of equal contents are one image with the labels of all their class folders. Labels of a CSV are
    joined by `|`, and rows of one file add up; an empty cell means no label.

    Args:
      text: the SPEC.
      default_split: train, val or test, if the SPEC names no split.
      labels: the classes and their order; empty: the data's own.
      for_training: refuse data in which no image has a label.

    Raises:
      UserError: the SPEC or its data can't be used, or a label is none of `labels`; says what to do.
    """
    spec = parse_spec(text)
    if spec.kind not in MULTI_LABEL_KINDS:
        raise UserError(
            f"{spec}: gives each image one label; multi-label data is read from {', '.join(MULTI_LABEL_KINDS)}"
        )
    source = MULTI_LABEL_KINDS[spec.kind](spec, spec.options.get("split", default_split), labels)
    if not len(source):
        raise UserError(f"{spec}: no examples in it; choose another split")
    if for_training and not source.class_counts.any():
        raise UserError(f"{spec}: none of its {len(source)} images has a label; training needs some")
    return source
