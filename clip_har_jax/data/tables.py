"""Data sets of other providers: TFDS (without TensorFlow) and Hugging Face."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax import remote
from clip_har_jax.data.examples import Example, Source, fingerprint_of
from clip_har_jax.errors import UserError
from clip_har_jax.names import label_ids
from clip_har_jax.specs import Spec, find_split


class TableSource(Source):
    """Rows of a prepared data set (TFDS, Hugging Face) with encoded images.

    Args:
      read: row number -> encoded image; opens its files at first use, so that it can be sent to a worker.
      names: the data set's class names.
      ids: the class of each row, an index into `names`.
      labels: the classes and their order; empty: `names`.
      where: the data set's name in messages.
      identity: distinguishes this version of the data set from others.
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
        self.fingerprint = fingerprint_of(where, identity, self.labels, self.label_ids.tobytes())
        self.read, self.where = read, where

    def __len__(self) -> int:
        return len(self.label_ids)

    def __getitem__(self, i: int) -> Example:
        name = f"{self.where}#{i}"
        try:
            return Example(self.read(i), int(self.label_ids[i]), name)
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
    return TableSource(
        _TfdsReader(folder, split, image), features[label].names, ids, labels, str(spec), builder.info.full_name
    )


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
    """Read encoded images of a Hugging Face data set."""

    def __init__(self, rows: Any, key: str):
        self.rows, self.key = rows, key

    def __call__(self, i: int) -> bytes:
        image = self.rows[i][self.key]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


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
    return TableSource(_HubReader(rows, image), names, ids, labels, str(spec), identity)


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
