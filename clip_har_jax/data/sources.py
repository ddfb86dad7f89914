"""SPEC -> Source: a list of labelled examples with random access.

A source holds names and labels, and reads an image only when it is asked for; it can be sent to worker processes.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from clip_har_jax.data import synthetic
from clip_har_jax.data.cache import CachedRecords
from clip_har_jax.data.manifest import read_split
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.preprocess import BadImage
from clip_har_jax.specs import Spec, find_split, label_ids, list_files, parse_spec
from clip_har_jax.video_sets import list_videos


class ClipFile(NamedTuple):
    """A video, of which frames are read when it is known which."""

    path: str


class Example(NamedTuple):
    """One example as its source gives it."""

    data: bytes | np.ndarray | ClipFile  # an encoded image, uint8 [h, w, 3], or a video
    label: int
    name: str  # by which a person finds it


@runtime_checkable
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


class VideoSource(FileSource):
    """Video files with labels; their examples are clips."""

    def __getitem__(self, i: int) -> Example:
        return Example(ClipFile(self.paths[i]), int(self.label_ids[i]), self.paths[i])


class ManifestSource(FileSource):
    """A split of a manifest: its files, each checked when it is read, or its cached images."""

    def __init__(self, spec: Spec, split: str, labels: Sequence[str]):
        rows = read_split(spec, split)
        self.labels = tuple(labels) or rows.labels
        self.label_ids = np.asarray(label_ids(rows.names, self.labels, str(spec)), np.int32)
        self.paths, self.sha256, self.weights = rows.paths, rows.sha256, rows.weights
        self.manifest_sha256 = rows.digest
        cache = spec.options.get("cache")
        folder = Path(spec.path).expanduser().parent / f"cache_{cache}px"
        self.records = CachedRecords(folder, rows.split, rows.digest) if cache else None
        self.fingerprint = _fingerprint("manifest", rows.digest, rows.split, cache, self.labels)

    def __getitem__(self, i: int) -> Example:
        if self.records is not None:
            return Example(self.records[i], int(self.label_ids[i]), self.paths[i])
        example = super().__getitem__(i)
        assert isinstance(example.data, bytes)
        if hashlib.sha256(example.data).hexdigest() != self.sha256[i]:
            raise BadImage("changed since its manifest was written")
        return example


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
      labels: the classes and their order; empty: `names`.
      where: by which a person finds the data set.
      identity: what tells this version of the data set from others.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        names: Sequence[str],
        ids: Sequence[int],
        labels: Sequence[str],
        where: str,
        identity: str,
    ):
        self.labels = tuple(labels) or tuple(names)
        self.label_ids = np.asarray(label_ids([names[i] for i in ids], self.labels, where), np.int32)
        self.fingerprint = _fingerprint(where, identity, self.labels, self.label_ids.tobytes())
        self.read, self.where = read, where

    def __len__(self) -> int:
        return len(self.label_ids)

    def __getitem__(self, i: int) -> Example:
        name = f"{self.where}#{i}"
        try:
            return Example(self.read(i), int(self.label_ids[i]), name)
        except Exception as error:  # what a damaged record raises is the library's choice
            raise OSError(None, str(error) or type(error).__name__, name) from error


class SubsetSource:
    """Some examples of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.labels, self.label_ids = source.labels, source.label_ids[indices]
        self.fingerprint = _fingerprint(source.fingerprint, indices.tobytes())
        weights = getattr(source, "weights", None)
        self.weights = None if weights is None else weights[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Example:
        return self.source[int(self.indices[i])]


def manifest_of(source: Source) -> str | None:
    """The checksum of the manifest that a source, or what it is a part of, comes from; None where there is none."""
    while not hasattr(source, "manifest_sha256"):
        if not hasattr(source, "source"):
            return None
        source = source.source
    return source.manifest_sha256


def are_clips(source: Source) -> bool:
    """Whether a source's examples are videos."""
    while hasattr(source, "source"):
        source = source.source
    return isinstance(source, VideoSource)


def make_source(text: str, default_split: str, labels: Sequence[str] = (), *, several_classes: bool = False) -> Source:
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
    makers: dict[str, Callable[[Spec, str, Sequence[str]], Source]] = {
        "synthetic": _synthetic,
        "folder": _files,
        "csv": _files,
        "manifest": ManifestSource,
        "video": lambda spec, split, labels: VideoSource(list_videos(spec, split), labels, str(spec)),
        "tfds": _tfds,
        "hf": _hf,
    }
    source = makers[spec.kind](spec, spec.options.get("split", default_split), labels)
    if not len(source):
        raise UserError(f"{spec}: no examples in it; choose another split")
    found = np.unique(source.label_ids)
    if several_classes and len(found) < 2:
        raise UserError(
            f"{spec}: all {len(source)} images are of one class, {source.labels[found[0]]!r}; training needs two"
        )
    return source


def _synthetic(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    if split not in synthetic.SPLITS:
        raise UserError(f"{spec}: no split {split!r}; {nearest(split, list(synthetic.SPLITS))}")
    return SyntheticSource(split, labels)


def _files(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    return FileSource(list_files(spec, split), labels, str(spec))


def _require(package: str, spec: Spec) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{spec}: needs {package} ({error}); pip install 'clip-har-jax[data]'") from error


def _split_of(spec: Spec, split: str, available: Sequence[str]) -> str:
    """What the data set calls the split; a part of one, as in `train[:10%]`, is for its library to read."""
    found = find_split(split.partition("[")[0], available, "split" in spec.options)
    if found is None:
        raise UserError(f"{spec}: no split {split!r}; it has {', '.join(available)}; say ?split=NAME")
    return split if "[" in split else found


def _columns(spec: Spec, features: Mapping[str, Any], image: type, label: type) -> tuple[str, str]:
    """The first column of images and the first of class labels."""
    images = [name for name, feature in features.items() if isinstance(feature, image)]
    classes = [name for name, feature in features.items() if isinstance(feature, label)]
    if not images or not classes:
        missing = "image" if not images else "class label"
        raise UserError(f"{spec}: has no {missing} column, only {', '.join(features)}; use another data set")
    return images[0], classes[0]


def _reason(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _TfdsReader:
    """Reads encoded images of a prepared TFDS data set, without TensorFlow."""

    def __init__(self, folder: str, split: str, key: str):
        self.folder, self.split, self.key = folder, split, key
        self._rows: Any = None

    def __call__(self, i: int) -> bytes:
        if self._rows is None:
            self._rows = _encoded_rows(self.folder, self.split)
        return self._rows[i][self.key]


def _encoded_rows(folder: str, split: str) -> Any:
    """Rows with random access, whose images stay encoded."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    images = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    return builder.as_data_source(split, decoders={name: tfds.decode.SkipDecoding() for name in images})


def _tfds(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    tfds = _require("tensorflow_datasets", spec)
    builder = _tfds_builder(spec, tfds)
    split = _split_of(spec, split, list(builder.info.splits))
    features = builder.info.features
    image, label = _columns(spec, features, tfds.features.Image, tfds.features.ClassLabel)
    folder = str(builder.data_path)
    # ArrayRecord has no columns: every record is read once for its label, but no image is decoded.
    ids = [int(row[label]) for row in _encoded_rows(folder, split)]
    return TableSource(
        _TfdsReader(folder, split, image), features[label].names, ids, labels, str(spec), builder.info.full_name
    )


def _tfds_builder(spec: Spec, tfds: Any) -> Any:
    """The builder of a data set that was prepared with random access.

    Raises:
      UserError: unknown, not prepared, or prepared as TFRecord.
    """
    if spec.path.split(":")[0] == "har15":
        importlib.import_module("clip_har_jax.data.har15")  # registers it
    data_dir = spec.options.get("data_dir")
    where = f", data_dir={data_dir!r}" if data_dir else ""
    prepare = f"prepare it with tfds.builder({spec.path!r}{where}, file_format='array_record').download_and_prepare()"
    try:
        builder = tfds.builder(spec.path, data_dir=data_dir)
    except Exception as error:  # TFDS raises its own kinds for unknown names, import errors and unreadable folders
        raise UserError(f"{spec}: TFDS can't open it ({_reason(error)}); check the name, or {prepare}") from error
    if not builder.info.splits:
        raise UserError(f"{spec}: not prepared in {builder.data_path}; {prepare}")
    file_format = builder.info.file_format
    if file_format is not None and file_format.value != "array_record":
        raise UserError(
            f"{spec}: {builder.data_path} holds {file_format.value} files, which have no random access; {prepare}"
        )
    return builder


class _HubReader:
    """Reads encoded images of a Hugging Face data set."""

    def __init__(self, rows: Any, key: str):
        self.rows, self.key = rows, key

    def __call__(self, i: int) -> bytes:
        image = self.rows[i][self.key]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _hf(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    datasets = _require("datasets", spec)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(spec.path)
        builder.download_and_prepare()
        split = _split_of(spec, split, list(builder.info.splits))
        rows = builder.as_dataset(split)
    except UserError:
        raise
    except Exception as error:  # the Hub's client, the network and the file formats raise many kinds
        raise UserError(
            f"{spec}: can't be loaded ({_reason(error)}); check the name and the network, or download it and give the "
            "folder as hf:PATH"
        ) from error
    image, label = _columns(spec, rows.features, datasets.Image, datasets.ClassLabel)
    names, ids = rows.features[label].names, list(rows[label])
    _check_labelled(spec, split, names, ids)
    identity = rows._fingerprint
    rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return TableSource(_HubReader(rows, image), names, ids, labels, str(spec), identity)


def _check_labelled(spec: Spec, split: str, names: Sequence[str], ids: Sequence[int | None]) -> None:
    """Refuses a split whose labels were withheld, as test splits of competitions are: none, -1, or all the first."""
    unlabelled = sum(i is None or i < 0 for i in ids)
    same = len(ids) > 1 and len(names) > 1 and len(set(ids)) == 1
    if not unlabelled and not same:
        return
    say = "no class" if unlabelled else repr(names[ids[0] or 0])
    share = f"all {len(ids)} rows" if same or unlabelled == len(ids) else f"{unlabelled} of {len(ids)} rows"
    raise UserError(
        f"{spec}: the {split} split of {spec.path} carries no labels ({share} say {say}); use ?split=train, and hold a "
        "part of it out for validation (config.data.val_fraction)"
    )
