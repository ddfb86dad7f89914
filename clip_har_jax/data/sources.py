"""SPEC -> Source: a list of labelled examples with random access.

A source holds names and labels, and reads an image only when it is asked for; it can be sent to worker processes.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from clip_har_jax.data import synthetic
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.specs import Spec, label_ids, list_files, parse_spec


class Example(NamedTuple):
    """One example as its source gives it."""

    data: bytes | np.ndarray  # an encoded image, or uint8 [h, w, 3]
    label: int
    name: str  # by which a person finds it


class Source(Protocol):
    """Labelled examples with random access."""

    labels: tuple[str, ...]
    label_ids: np.ndarray  # int32 [n], known without reading an image
    fingerprint: str  # SHA-256 over what is listed

    def __len__(self) -> int:
        """How many examples there are."""

    def __getitem__(self, i: int) -> Example:
        """Reads one example; OSError where its file can't be read."""


def _fingerprint(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()


class FileSource:
    """Image files with labels: a folder or a CSV."""

    def __init__(self, files: Sequence[tuple[Path, str]], labels: Sequence[str], where: str):
        names = [label for _, label in files]
        self.labels = tuple(labels) or tuple(sorted(set(names)))
        self.label_ids = np.asarray(label_ids(names, self.labels, where), np.int32)
        self.paths = [str(path) for path, _ in files]
        sizes = [path.stat().st_size if path.exists() else -1 for path, _ in files]
        listing = [(path.name, size, name) for (path, name), size in zip(files, sizes, strict=True)]
        self.fingerprint = _fingerprint(self.labels, *listing)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Example:
        return Example(Path(self.paths[i]).read_bytes(), int(self.label_ids[i]), self.paths[i])


class SyntheticSource:
    """The embedded action set, drawn when asked for."""

    def __init__(self, split: str, labels: Sequence[str]):
        self.labels = tuple(labels) or synthetic.LABELS
        names = [synthetic.LABELS[synthetic.label_of(split, i)] for i in range(synthetic.SPLITS[split])]
        self.label_ids = np.asarray(label_ids(names, self.labels, "synthetic"), np.int32)
        self.fingerprint = _fingerprint("synthetic", synthetic.VERSION, split, len(names), self.labels)
        self.split = split

    def __len__(self) -> int:
        return len(self.label_ids)

    def __getitem__(self, i: int) -> Example:
        return Example(synthetic.draw(self.split, i), int(self.label_ids[i]), f"synthetic/{self.split}/{i}")


class TableSource:
    """Rows of a prepared data set (TFDS, Hugging Face) that give encoded images.

    Args:
      read: row number -> encoded image; opens what it needs on first use, so that it can be sent to a worker.
      names: how the data set calls its classes.
      ids: each row's class in `names`.
    """

    def __init__(
        self,
        read: Callable[[int], bytes | np.ndarray],
        names: Sequence[str],
        ids: Sequence[int],
        labels: Sequence[str],
        where: str,
        identity: object,
    ):
        self.labels = tuple(labels) or tuple(names)
        self.label_ids = np.asarray(label_ids([names[i] for i in ids], self.labels, where), np.int32)
        self.fingerprint = _fingerprint(where, identity, self.labels, self.label_ids.tobytes())
        self.read, self.where = read, where

    def __len__(self) -> int:
        return len(self.label_ids)

    def __getitem__(self, i: int) -> Example:
        return Example(self.read(i), int(self.label_ids[i]), f"{self.where}#{i}")


class SubsetSource:
    """Some examples of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.labels, self.label_ids = source.labels, source.label_ids[indices]
        self.fingerprint = _fingerprint(source.fingerprint, indices.tobytes())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Example:
        return self.source[int(self.indices[i])]


def make_source(
    text: str, default_split: str, labels: Sequence[str] = (), *, several_classes: bool = False
) -> Source:
    """The examples that a SPEC names.

    Args:
      text: the SPEC.
      default_split: train, val or test; where the SPEC leaves it open.
      labels: the classes and their order; empty: the data's own.
      several_classes: whether one class alone is a mistake, as it is in training.

    Raises:
      UserError: the SPEC, or what it names, isn't usable; says what to do.
    """
    spec = parse_spec(text)
    makers = {"synthetic": _synthetic, "folder": _files, "csv": _files, "tfds": _tfds, "hf": _hf}
    source = makers[spec.kind](spec, spec.options.get("split", default_split), labels)
    found = np.unique(source.label_ids)
    if several_classes and len(found) < 2:
        raise UserError(f"{spec}: all {len(source)} images are of one class, {source.labels[found[0]]!r}; two are needed")
    return source


def _synthetic(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    if split not in synthetic.SPLITS:
        raise UserError(f"{spec}: split {nearest(split, list(synthetic.SPLITS))}")
    return SyntheticSource(split, labels)


def _files(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    return FileSource(list_files(spec, split), labels, str(spec))


class _TfdsReader:
    """Reads encoded images of a prepared TFDS data set, without TensorFlow."""

    def __init__(self, name: str, split: str, data_dir: str | None, key: str):
        self.arguments, self.key = (name, split, data_dir), key
        self._source: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}  # file handles don't travel

    def __call__(self, i: int) -> bytes:
        if self._source is None:
            self._source = _tfds_source(*self.arguments, self.key)
        return self._source[i][self.key]


def _tfds_source(name: str, split: str, data_dir: str | None, key: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.data_source(name, split=split, data_dir=data_dir, decoders={key: tfds.decode.SkipDecoding()})


def _tfds(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    import tensorflow_datasets as tfds

    data_dir = spec.options.get("data_dir")
    try:
        builder = tfds.builder(spec.path, data_dir=data_dir)
    except Exception as error:  # TFDS raises its own kinds for unknown names, import errors and unreadable folders
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{spec}: TFDS doesn't know it or it isn't prepared ({reason})") from error
    features = builder.info.features
    images = [name for name, item in features.items() if isinstance(item, tfds.features.Image)]
    classes = [name for name, item in features.items() if isinstance(item, tfds.features.ClassLabel)]
    if not images or not classes:
        raise UserError(f"{spec}: an image and a class label are needed; it has {', '.join(features)}")
    splits = list(builder.info.splits or {})
    if not splits:
        raise UserError(
            f"{spec}: not prepared in {builder.data_path}; prepare it with tfds.builder({spec.path!r}, "
            "file_format='array_record').download_and_prepare()"
        )
    split = _known_split(spec, split, splits)
    if builder.info.file_format is not None and builder.info.file_format.value != "array_record":
        raise UserError(
            f"{spec}: {builder.data_path} holds {builder.info.file_format.value} files, which have no random access; "
            "prepare it again with file_format='array_record'"
        )
    reader = _TfdsReader(spec.path, split, data_dir, images[0])
    rows = tfds.data_source(spec.path, split=split, data_dir=data_dir, decoders={images[0]: tfds.decode.SkipDecoding()})
    ids = [int(row[classes[0]]) for row in rows]
    return TableSource(reader, features[classes[0]].names, ids, labels, str(spec), builder.info.full_name)


def _known_split(spec: Spec, split: str, splits: Sequence[str]) -> str:
    """The split asked for; where the SPEC leaves it open, validation data may be called validation, val or test."""
    same = {"val": ("validation", "val", "valid", "test")}.get(split, (split,))
    found = [name for name in same if name in splits]
    if not found:
        raise UserError(f"{spec}: no split {split!r}; it has {', '.join(splits)}; say ?split=NAME")
    return found[0]


class _HubReader:
    """Reads encoded images of a Hugging Face data set."""

    def __init__(self, rows: Any, key: str):
        self.rows, self.key = rows, key

    def __call__(self, i: int) -> bytes:
        image = self.rows[i][self.key]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _hf(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    import datasets

    try:
        splits = list(datasets.get_dataset_split_names(spec.path))
        rows = datasets.load_dataset(spec.path, split=_known_split(spec, split, splits))
    except UserError:
        raise
    except Exception as error:  # the Hub's client, the network and the file formats raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{spec}: can't be loaded ({reason}); check the name and the network") from error
    images = [name for name, item in rows.features.items() if isinstance(item, datasets.Image)]
    classes = [name for name, item in rows.features.items() if isinstance(item, datasets.ClassLabel)]
    if not images or not classes:
        raise UserError(f"{spec}: an image and a class label are needed; it has {', '.join(rows.features)}")
    names, ids = rows.features[classes[0]].names, list(rows[classes[0]])
    unlabelled = [i for i in ids if not 0 <= i < len(names)]
    if unlabelled or (len(ids) > 1 and len(names) > 1 and len(set(ids)) == 1):
        value = repr(names[ids[0]]) if not unlabelled else "no class"
        raise UserError(
            f"{spec}: the {split} split carries no labels (all {len(unlabelled) or len(ids)} rows say {value}); use "
            f"hf:{spec.path}?split=train and hold out a part of it (data.val_fraction)"
        )
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    return TableSource(_HubReader(rows, images[0]), names, ids, labels, str(spec), rows._fingerprint)
