"""The data of a run: training and validation examples, classes, prompts, and the images of the retention gate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from clip_har_jax.config import RunConfig
from clip_har_jax.data.multi_label import make_multi_label_source
from clip_har_jax.data.pair_sources import PairSources, has_pairs, make_pair_sources
from clip_har_jax.data.sources import Example, Source, SubsetSource, make_source
from clip_har_jax.data.splits import hold_out, hold_out_multi_label, take_shots
from clip_har_jax.data.windows import WindowSource
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.files import sha256
from clip_har_jax.specs import parse_spec
from clip_har_jax.text import make_prompts


@dataclass(frozen=True)
class Data:
    """The training and validation examples of a run, with the classes and prompts of the validation.

    `retrieval`: the pairs of `config.data.retrieval`, for the recall at the end; None: there are none.
    """

    train: Source | PairSources
    val: Source
    labels: tuple[str, ...]
    prompts: dict[str, tuple[str, ...]]
    retrieval: PairSources | None = None

    @property
    def classified(self) -> Source:
        """The training examples, where their classes are needed.

        Raises:
          UserError: they are image-text pairs.
        """
        if isinstance(self.train, PairSources):
            raise UserError(
                "config.data.train: image-text pairs have no classes, which are needed here; use labelled images"
            )
        return self.train

    @property
    def texts(self) -> list[str]:
        """All prompts, class after class."""
        return [text for label in self.labels for text in self.prompts[label]]

    @property
    def class_of_prompt(self) -> list[int]:
        return [i for i, label in enumerate(self.labels) for _ in self.prompts[label]]


def load_data(config: RunConfig) -> Data:
    """Return the data of a config.

    Raises:
      UserError: it can't be found, or leaves no training or validation images, or too few images of a class.
    """
    retrieval = _load_retrieval(config)
    if has_pairs(config.data.train):
        if config.data.multi_label:
            raise UserError(
                f"config.data.train={config.data.train}: image-text pairs have no labels; for data.multi_label name "
                "labelled images, e.g. parquet:FILE?label=COLUMN"
            )
        return replace(_load_pairs(config), retrieval=retrieval)
    classes = config.data.classes
    if config.data.multi_label:
        _refuse_one_label(config)
    with _named("data.train"):
        train_source = _open(config, config.data.train, "train", config.data.labels, for_training=True)
    if config.data.val:
        with _named("data.val"):
            val_source = _open(config, config.data.val, "val", train_source.labels)
    elif isinstance(train_source, WindowSource):
        raise UserError(
            "config.data.val: windows of untrimmed videos need validation videos of their own, as windows of one video "
            "are alike; name some"
        )
    else:
        fraction, seed = config.data.val_fraction, config.data.split_seed
        if train_source.targets is None:
            train_ids, val_ids = hold_out(train_source.label_ids, fraction, seed)
        else:
            train_ids, val_ids = hold_out_multi_label(train_source.targets, fraction, seed)
        train_source, val_source = SubsetSource(train_source, train_ids), SubsetSource(train_source, val_ids)
    if classes:
        train_source = select_classes(train_source, classes, "data.classes")
        val_source = select_classes(val_source, classes, "data.classes")
    labels = tuple(train_source.labels)
    if unknown := [label for label in config.data.augment.no_flip_labels if label not in labels]:
        raise UserError(
            f"config.data.augment.no_flip_labels: {unknown[0]!r} is none of the {len(labels)} classes; "
            f"{nearest(unknown[0], list(labels))}"
        )
    if not len(val_source):
        raise UserError("config.data.val_fraction leaves no validation images; raise it, or set config.data.val")
    if val_source.targets is not None and not val_source.targets.any():
        raise UserError("config.data.val: none of the validation images has a label; name others")
    if config.data.shots is not None:
        positions = take_shots(train_source.label_ids, labels, config.data.shots, config.seed)
        train_source = SubsetSource(train_source, positions)
    # A learned context replaces the template's words.
    templates = ("{}.",) if config.method.name == "prompt" else config.text.templates
    prompts = _fill(config, templates, labels)
    return Data(train_source, val_source, labels, prompts, retrieval)


def _open(
    config: RunConfig, spec: str, split: str, labels: Sequence[str] = (), *, for_training: bool = False
) -> Source:
    """Return the examples of a SPEC, each with one label or, by `data.multi_label`, with any number."""
    if config.data.multi_label:
        return make_multi_label_source(spec, split, labels, for_training=for_training)
    return make_source(spec, split, labels, several_classes=for_training)


def _refuse_one_label(config: RunConfig) -> None:
    """Refuse settings that treat images by their one label.

    Raises:
      UserError: such a setting beside `data.multi_label`.
    """
    if config.data.classes:
        raise UserError("config.data.classes chooses images by their one label; with data.multi_label leave it out")
    if config.data.shots is not None:
        raise UserError("config.data.shots counts images by their one label; with data.multi_label leave it out")
    if config.data.sampling not in ("shuffle", "weights"):
        raise UserError(
            f"config.data.sampling={config.data.sampling} draws images by their one label; with data.multi_label use "
            "shuffle or weights, and method.class_balance for rare labels"
        )


# Keys that treat training examples by their classes, with the value that doesn't.
NEEDS_CLASSES = (
    ("data.shots", None),
    ("data.sampling", "shuffle"),
    ("data.augment.no_flip_labels", ()),
    ("method.class_balance", 0.0),
)


def _load_pairs(config: RunConfig) -> Data:
    """Return image-text pairs to train on, and labelled images for zero-shot evaluation."""
    for key, unset in NEEDS_CLASSES:
        if attrgetter(key)(config) != unset:
            raise UserError(f"config.{key} needs classes, and config.data.train holds image-text pairs; leave it out")
    if not config.data.val:
        raise UserError(
            "config.data.val: image-text pairs have no classes; name labelled images for the zero-shot evaluation, "
            "which also chooses the checkpoint to keep"
        )
    with _named("data.train"):
        pairs = make_pair_sources(config.data.train)
    with _named("data.val"):
        val = make_source(config.data.val, "val", config.data.labels)
    if config.data.classes:
        val = select_classes(val, config.data.classes, "data.classes")
    labels = tuple(val.labels)
    return Data(pairs, val, labels, _fill(config, config.text.templates, labels))


def _load_retrieval(config: RunConfig) -> PairSources | None:
    if not config.data.retrieval:
        return None
    with _named("data.retrieval"):
        return make_pair_sources(config.data.retrieval)


def zero_shot_prompts(config: RunConfig, labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the prompts of the zero-shot baseline: the config's templates, even if a run learns a context."""
    return _fill(config, config.text.templates, labels)


def _fill(config: RunConfig, templates: Sequence[str], labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return make_prompts(labels, templates, config.text.descriptions, config.text.phrases)


def validates_on_test(config: RunConfig) -> bool:
    """Return whether `config.data.val` has no validation images, so that its test images choose the weights."""
    text = config.data.val
    if not text or parse_spec(text).kind not in ("folder", "video", "manifest") or "split" in parse_spec(text).options:
        return False
    try:
        train, val, test = (_open(config, text, split).fingerprint for split in ("train", "val", "test"))
    except UserError:  # it has no such split
        return False
    return val == test != train  # all equal: a folder without splits, whose images are all for validation


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Add the config key of the data to an error: the person may not know the config's default."""
    try:
        yield
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error


class ClassSource(SubsetSource):
    """The examples of some classes of another source; the classes are renumbered."""

    def __init__(self, source: Source, ids: Sequence[int]):
        super().__init__(source, np.flatnonzero(np.isin(source.label_ids, ids)))
        places = np.full(len(source.labels), -1, np.int32)
        places[ids] = np.arange(len(ids))
        self.labels, self.label_ids = tuple(source.labels[i] for i in ids), places[self.label_ids]
        self.fingerprint = sha256(f"{self.fingerprint} {self.labels}")

    def __getitem__(self, i: int) -> Example:
        return super().__getitem__(i)._replace(label=int(self.label_ids[i]))


def select_classes(source: Source, classes: Sequence[str], key: str) -> Source:
    """Return the examples of some of a source's classes, with only these classes, in this order.

    Raises:
      UserError: fewer than two classes, an unknown one, or no examples; names the config key.
    """
    if unknown := [label for label in classes if label not in source.labels]:
        raise UserError(
            f"config.{key}: {unknown[0]!r} is no class of the data; {nearest(unknown[0], list(source.labels))}"
        )
    ids = [source.labels.index(label) for label in classes]
    chosen = ClassSource(source, ids)
    if len(set(classes)) < 2 or not len(chosen):
        raise UserError(f"config.{key}: two or more classes with images are needed, not {', '.join(classes)}")
    return chosen


@dataclass(frozen=True)
class RetentionData:
    """Images on which zero-shot accuracy is measured before and after training."""

    source: Source
    labels: tuple[str, ...]
    prompts: dict[str, tuple[str, ...]]


def load_retention(config: RunConfig) -> RetentionData | None:
    """Return the data of the retention gate; None if the config names none.

    Raises:
      UserError: it can't be found, or lacks some of the classes.
    """
    if not config.retention.data:
        if config.retention.classes or config.retention.fail:
            raise UserError("config.retention.data is empty; name the images by which retention is measured")
        return None
    with _named("retention.data"):
        whole = make_source(config.retention.data, "test")
    chosen = config.retention.classes or tuple(whole.labels)
    source = select_classes(whole, chosen, "retention.classes")
    return RetentionData(source, chosen, make_prompts(chosen))


def unseen_spec(config: RunConfig) -> str | None:
    """Return the SPEC of test images that belong to a config's training data; None if the run used all of them."""
    if has_pairs(config.data.train):
        return None
    spec = parse_spec(config.data.train)
    if spec.kind not in ("synthetic", "folder", "video", "manifest"):
        return None
    text = str(replace(spec, options={name: value for name, value in spec.options.items() if name != "split"}))
    try:
        test, *seen = (
            _open(config, given, split).fingerprint
            for given, split in ((text, "test"), (text, "train"), (config.data.val, "val"))
            if given
        )
    except UserError:  # no such split
        return None
    return None if test in seen else text
