"""Data sets of other providers: TFDS (without TensorFlow), Hugging Face, and labelled images in Parquet files."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax import remote
from clip_har_jax.csv_files import MULTI_LABEL
from clip_har_jax.data.examples import Example, Source, fingerprint_of, make_targets
from clip_har_jax.data.shards import list_shards
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.names import clean_name, label_ids, sort_labels, split_labels
from clip_har_jax.specs import Spec, find_split


class TableSource(Source):
    """Rows of a table (TFDS, Hugging Face, Parquet) with encoded images.

    Args:
      read: row number -> encoded image; opens its files at first use, so that it can be sent to a worker.
      sets: the labels of each row: one, or any number in multi-label data.
      labels: the classes and their order.
      where: the data set's name in messages.
      identity: distinguishes this version of the data set from others.
      multi_label: whether a row has any number of labels.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        sets: Sequence[tuple[str, ...]],
        labels: Sequence[str],
        where: str,
        identity: str,
        multi_label: bool = False,
    ):
        self.labels, self._size = tuple(labels), len(sets)
        if multi_label:
            self.targets = make_targets(sets, self.labels, where)
        else:
            self.label_ids = np.asarray(label_ids([name for (name,) in sets], self.labels, where), np.int32)
        held = self.label_ids if self.targets is None else self.targets
        self.fingerprint = fingerprint_of(where, identity, self.labels, held.tobytes())
        self.read, self.where = read, where

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> Example:
        name = f"{self.where}#{i}"
        try:
            return Example(self.read(i), self.label_of(i), name)
        except Exception as error:  # the library chooses the exceptions for damaged records
            raise OSError(None, str(error) or type(error).__name__, name) from error


def _require(package: str, spec: Spec) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{spec}: needs {package} ({error}); pip install 'clip-har-jax[data]'") from error


def _split_of(spec: Spec, split: str, available: Sequence[str]) -> str:
    """Return the data set's name of the split; its library parses slices such as `train[:10%]`."""
    found = find_split(split.partition("[")[0], available, "split" in spec.options)
    if found is None:
        raise UserError(f"{spec}: no split {split!r}; it has {', '.join(available)}; say ?split=NAME")
    return split if "[" in split else found


def _columns(spec: Spec, features: Mapping[str, Any], image: type, label: type) -> tuple[str, str]:
    """Return the first column of images and the first column of class labels."""
    images = [name for name, feature in features.items() if isinstance(feature, image)]
    classes = [name for name, feature in features.items() if isinstance(feature, label)]
    if not images or not classes:
        missing = "image" if not images else "class label"
        raise UserError(f"{spec}: has no {missing} column, only {', '.join(features)}; use another data set")
    return images[0], classes[0]


def _reason(error: Exception) -> str:
    """Return the first line of an error message of a library."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _TfdsReader:
    """Read encoded images of a prepared TFDS data set, without TensorFlow."""

    def __init__(self, folder: str, split: str, key: str):
        self.folder, self.split, self.key = folder, split, key
        self._rows: Any = None

    def __call__(self, i: int) -> bytes:
        if self._rows is None:
            self._rows = _encoded_rows(self.folder, self.split)
        return self._rows[i][self.key]


def _encoded_rows(folder: str, split: str) -> Any:
    """Return rows with random access and encoded images."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    images = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    return builder.as_data_source(split, decoders={name: tfds.decode.SkipDecoding() for name in images})


def tfds_source(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    tfds = _require("tensorflow_datasets", spec)
    builder = _tfds_builder(spec, tfds)
    split = _split_of(spec, split, list(builder.info.splits))
    features = builder.info.features
    image, label = _columns(spec, features, tfds.features.Image, tfds.features.ClassLabel)
    folder = str(builder.data_path)
    # ArrayRecord has no columns: each record is read once for its label, but no image is decoded.
    ids = [int(row[label]) for row in _encoded_rows(folder, split)]
    names = features[label].names
    sets, classes = [(names[i],) for i in ids], tuple(labels) or tuple(names)
    return TableSource(_TfdsReader(folder, split, image), sets, classes, str(spec), builder.info.full_name)


def _tfds_builder(spec: Spec, tfds: Any) -> Any:
    """Return the builder of a data set that was prepared with random access.

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
    except Exception as error:  # TFDS raises its own exceptions for unknown names, import errors and unreadable folders
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
    """Read encoded images of a Hugging Face data set, or of Parquet files; relative paths are below `folder`."""

    def __init__(self, rows: Any, key: str, folder: str = ""):
        self.rows, self.key, self.folder = rows, key, folder

    def __call__(self, i: int) -> bytes:
        image = self.rows[i][self.key]
        return image["bytes"] if image["bytes"] is not None else Path(self.folder, image["path"]).read_bytes()


def _hub(spec: Spec, datasets: Any) -> remote.RemoteService:
    """Return the service for the Hub; if it can't be reached, `datasets` uses only its local cache."""
    if Path(spec.path).expanduser().exists():
        return remote.RemoteService(str(spec), "check that the folder holds a data set")
    advice = "check the name and the network, or download it and give the folder as hf:PATH"
    service = remote.hub(str(spec), datasets.config.HF_ENDPOINT, advice)
    if not datasets.config.HF_HUB_OFFLINE:
        try:
            service.check_reachable(datasets.config.HF_ENDPOINT)
        except UserError:
            datasets.config.HF_HUB_OFFLINE = True  # else each of its requests waits for a timeout
    return service


def hf_source(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    datasets = _require("datasets", spec)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    service = _hub(spec, datasets)

    def load() -> tuple[str, Any]:
        builder = datasets.load_dataset_builder(spec.path)
        builder.download_and_prepare()
        found = _split_of(spec, split, list(builder.info.splits))
        return found, builder.as_dataset(found)

    split, rows = service.call(load)
    image, label = _columns(spec, rows.features, datasets.Image, datasets.ClassLabel)
    names, ids = rows.features[label].names, list(rows[label])
    _check_labelled(spec, split, names, ids)
    identity = rows._fingerprint
    rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    sets, classes = [(names[i],) for i in ids], tuple(labels) or tuple(names)
    return TableSource(_HubReader(rows, image), sets, classes, str(spec), identity)


def _check_labelled(spec: Spec, split: str, names: Sequence[str], ids: Sequence[int | None]) -> None:
    """Refuse a split with withheld labels, as in test splits of competitions: none, -1, or all the first class."""
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


def parquet_source(spec: Spec, labels: Sequence[str], multi_label: bool = False) -> Source:
    """Return the labelled images of `parquet:PATTERN?label=COLUMN`.

    Images are bytes, a struct with `bytes` as Hugging Face writes it, or paths, relative to `?images=DIR` or else to
    the first file. Labels are texts or Hugging Face's class labels; in multi-label data lists of these, or texts joined
    by `|`. The rows are copied once into the cache of Hugging Face's `datasets`, which gives random access.

    Raises:
      UserError: no such files or columns, a damaged file, or labels that are missing or of another type.
    """
    column, image = spec.options.get("label"), spec.options.get("image", "image")
    if column is None:
        raise UserError(f"{spec}: image-text pairs; name the column of the labels by ?label=COLUMN")
    if wrong := [name for name in ("caption", "weight") if name in spec.options]:
        raise UserError(f"{spec}: {wrong[0]} is for image-text pairs, and ?label means classes; leave one out")
    datasets = _require("datasets", spec)
    files = list_shards(spec.path, (".parquet",), str(spec))
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_parquet([file.path for file in files])
    except Exception as error:  # the library chooses the exceptions for damaged files
        raise UserError(f"{spec}: can't be read ({_reason(error)}); copy the files again") from error
    for option, name in (("image", image), ("label", column)):
        if name not in rows.features:
            raise UserError(
                f"{spec}: no column {name!r}, which ?{option}=COLUMN names; {nearest(name, list(rows.features))}"
            )
    sets, names = _label_sets(spec, rows, column, multi_label)
    classes = tuple(labels) or names or sort_labels(name for own in sets for name in own)
    identity = fingerprint_of(column, image, [(file.path.rpartition("/")[2], file.size) for file in files])
    images = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    folder = os.path.expanduser(spec.options.get("images") or files[0].path.rpartition("/")[0])
    return TableSource(_HubReader(images, image, folder), sets, classes, str(spec), identity, multi_label)


def _label_sets(spec: Spec, rows: Any, column: str, multi_label: bool) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return the labels of each row, and the class names that the file itself lists, if it does."""
    feature = rows.features[column]
    inner = getattr(feature, "feature", None)  # of a list
    kind = feature if inner is None else inner
    names = tuple(clean_name(name, str(spec)) for name in getattr(kind, "names", None) or ())
    if inner is not None and not multi_label:
        raise UserError(f"{spec}: the column {column!r} holds lists of labels; set {MULTI_LABEL}")
    if not names and getattr(kind, "dtype", "") not in ("string", "large_string"):
        raise UserError(f"{spec}: the column {column!r} holds {feature}; texts or class labels, or lists, are needed")
    sets: list[tuple[str, ...]] = []
    for row, value in enumerate(rows[column]):
        given = (value if inner is not None else [value]) if value is not None else []
        where = f"{spec}, row {row}"
        own = [names[one] if names else one for one in given if one is not None and one != -1]
        if multi_label and not names and inner is None:
            own = [name for text in own for name in split_labels(text, where)]
        if not multi_label and (not own or not own[0].strip()):
            raise UserError(f"{where}: no label; give it one, or set {MULTI_LABEL}")
        sets.append(tuple(clean_name(name, where) for name in own))
    return sets, names
