"""SPEC -> Source: a list of labelled examples with random access.

A source holds names and labels, and reads an image only on demand. It can be sent to worker processes.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from clip_har_jax.csv_files import MULTI_LABEL, has_times, list_csv
from clip_har_jax.data import motion, synthetic
from clip_har_jax.data.cache import CachedRecords
from clip_har_jax.data.examples import ClipFile, Example, MotionClip, Source, fingerprint_of, make_targets
from clip_har_jax.data.manifest import lists_clips, read_split
from clip_har_jax.data.tables import hf_source, parquet_source, tfds_source
from clip_har_jax.data.windows import window_source
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.files import sha256
from clip_har_jax.image_files import BadImage
from clip_har_jax.listing import Tally, list_folder
from clip_har_jax.names import label_ids, sort_labels
from clip_har_jax.specs import CLIPS, PAIRS, Spec, parse_spec
from clip_har_jax.video.datasets import list_videos

SAMPLED_FILES = 20_000
SAMPLED_BYTES = 4096


class FileSource(Source):
    """Image files with labels: a folder or a CSV.

    The fingerprint covers the files' names, sizes, labels and samples of their contents, but not their location and
    time, so that a copy on another machine is the same data set.
    """

    def __init__(
        self, files: Sequence[tuple[Path, str]], labels: Sequence[str], where: str, tally: Tally | None = None
    ):
        names = [label for _, label in files]
        self.labels = tuple(labels) or sort_labels(names)
        self.label_ids = np.asarray(label_ids(names, self.labels, where), np.int32)
        self.paths = [str(path) for path, _ in files]
        self.tally = Tally(len(files)) if tally is None else tally
        self.fingerprint = fingerprint_of(self.labels, *fingerprint_files(files))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Example:
        with open(self.paths[i], "rb", buffering=0) as file:
            return Example(file.read(), self.label_of(i), self.paths[i])

    def path(self, i: int) -> str:
        return self.paths[i]


def fingerprint_files(files: Sequence[tuple[Path, str]]) -> Iterator[tuple[str, int, str, str]]:
    """Yield the name, size, label and sampled digest of each file.

    The digest covers the first, middle and last `SAMPLED_BYTES` of at most `SAMPLED_FILES` evenly spaced files; an
    image that is saved again differs in one of them. It is "" for other files; the size is -1 for missing files.
    """
    every = -(-len(files) // SAMPLED_FILES) or 1
    for i, (path, label) in enumerate(files):
        size, digest = -1, ""
        with suppress(OSError):  # reported as a bad image when it is read
            found = os.stat(path)
            size = found.st_size
            digest = _sample(path, size, found.st_mtime_ns) if i % every == 0 else ""
        yield path.name, size, label, digest


@functools.lru_cache(2 * SAMPLED_FILES)  # a start opens the same data several times
def _sample(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb", buffering=0) as file:
        parts = []
        for start in sorted({0, max(0, (size - SAMPLED_BYTES) // 2), max(0, size - SAMPLED_BYTES)}):
            file.seek(start)
            parts.append(file.read(SAMPLED_BYTES))
    return sha256(parts)


class VideoSource(FileSource):
    """Labelled video files; their examples are clips."""

    clips = True

    def __getitem__(self, i: int) -> Example:
        return Example(ClipFile(self.paths[i]), int(self.label_ids[i]), self.paths[i])


class ManifestSource(FileSource):
    """A split of a manifest: its files, checked when they are read, or its cached images."""

    def __init__(self, spec: Spec, split: str, labels: Sequence[str], multi_label: bool = False):
        rows = read_split(spec, split)
        self.labels = tuple(labels) or rows.labels
        if multi_label:
            self.targets = make_targets(rows.sets, self.labels, str(spec))
        elif rows.multi_label:
            raise UserError(f"{spec}: its images have several labels each; set {MULTI_LABEL}")
        else:
            self.label_ids = np.asarray(label_ids([name for (name,) in rows.sets], self.labels, str(spec)), np.int32)
        self.paths, self.sha256, self.weights, self.clips = rows.paths, rows.sha256, rows.weights, rows.clips
        self.manifest_sha256, self.tally = rows.digest, Tally(len(rows.paths))
        cache = spec.options.get("cache")
        folder = Path(spec.path).expanduser().parent / f"cache_{cache}px"
        self.records = CachedRecords(folder, rows.split, rows.digest) if cache else None
        self.fingerprint = fingerprint_of("manifest", rows.digest, rows.split, cache, self.labels)

    def __getitem__(self, i: int) -> Example:
        if self.records is not None:
            return Example(self.records[i], self.label_of(i), self.paths[i])
        example = super().__getitem__(i)
        assert isinstance(example.data, bytes)
        if sha256(example.data) != self.sha256[i]:
            raise BadImage("changed since its manifest was written")
        return example._replace(data=ClipFile(self.paths[i])) if self.clips else example


class SyntheticSource(Source):
    """The embedded action set, drawn on demand."""

    def __init__(self, split: str, labels: Sequence[str]):
        self.labels = tuple(labels) or synthetic.LABELS
        names = [synthetic.LABELS[synthetic.label_of(split, i)] for i in range(synthetic.SPLITS[split])]
        self.label_ids = np.asarray(label_ids(names, self.labels, "synthetic"), np.int32)
        self.fingerprint = fingerprint_of("synthetic", synthetic.VERSION, split, len(names), self.labels)
        self.split = split

    def __len__(self) -> int:
        return len(self.label_ids)

    def __getitem__(self, i: int) -> Example:
        return Example(synthetic.draw(self.split, i), int(self.label_ids[i]), f"synthetic/{self.split}/{i}")


class MotionSource(Source):
    """The embedded motion set: clips whose frames are drawn on demand.

    Args:
      split: train, val or test.
      labels: the classes; empty: the set's own.
      is_reversed: play the clips of the pairs that are one another's reverse backwards, under the partner's label.
    """

    clips = True

    def __init__(self, split: str, labels: Sequence[str], is_reversed: bool = False):
        self.labels = tuple(labels) or motion.LABELS
        kept = [i for i in range(motion.SPLITS[split]) if not is_reversed or self._label(split, i) in motion.REVERSES]
        names = [self._label(split, i) for i in kept]
        if is_reversed:  # its frames in the other order are a clip of the partner
            names = [motion.PARTNER[name] for name in names]
        self.label_ids = np.asarray(label_ids(names, self.labels, "motion"), np.int32)
        self.fingerprint = fingerprint_of("motion", motion.VERSION, split, len(names), self.labels, is_reversed)
        self.split, self.numbers, self.is_reversed = split, kept, is_reversed

    @staticmethod
    def _label(split: str, i: int) -> str:
        return motion.LABELS[motion.label_of(split, i)]

    def __len__(self) -> int:
        return len(self.label_ids)

    def __getitem__(self, i: int) -> Example:
        number = self.numbers[i]
        name = f"motion/{self.split}/{number}{' reversed' if self.is_reversed else ''}"
        return Example(MotionClip(self.split, number, self.is_reversed), int(self.label_ids[i]), name)


class SubsetSource(Source):
    """A selection of examples from another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.labels = source.labels
        if source.targets is None:
            self.label_ids = source.label_ids[indices]
        else:
            self.targets = source.targets[indices]
        self.fingerprint = fingerprint_of(source.fingerprint, indices.tobytes())
        self.weights = None if source.weights is None else source.weights[indices]
        self.clips, self.manifest_sha256, self.tally = source.clips, source.manifest_sha256, source.tally

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Example:
        return self.source[int(self.indices[i])]

    def path(self, i: int) -> str | None:
        return self.source.path(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))


def make_source(text: str, default_split: str, labels: Sequence[str] = (), *, several_classes: bool = False) -> Source:
    """Return the examples of a SPEC.

    >>> source = make_source("folder:images", "train")
    >>> len(source), source.labels
    (6, ('dancing', 'running'))

    Args:
      text: the SPEC.
      default_split: train, val or test, if the SPEC names no split.
      labels: the classes and their order; empty: the data's own.
      several_classes: refuse data of a single class, for training.

    Raises:
      UserError: the SPEC or its data can't be used; says what to do.
    """
    spec = parse_spec(text)
    makers: dict[str, Callable[[Spec, str, Sequence[str]], Source]] = {
        "synthetic": lambda spec, split, labels: SyntheticSource(_drawn_split(spec, split), labels),
        "motion": _motion,
        "folder": _files,
        "csv": _files,
        "manifest": ManifestSource,
        "video": _videos,
        "tfds": tfds_source,
        "hf": hf_source,
        "parquet": lambda spec, split, labels: parquet_source(spec, labels),
    }
    if spec.kind in PAIRS and "label" not in spec.options:
        raise UserError(
            f"{spec}: image-text pairs have no classes, which are needed here; name labelled images, e.g. folder:PATH"
        )
    source = makers[spec.kind](spec, spec.options.get("split", default_split), labels)
    if not len(source):
        raise UserError(f"{spec}: no examples in it; choose another split")
    found = np.unique(source.label_ids)
    if several_classes and len(found) < 2:
        raise UserError(
            f"{spec}: all {len(source)} images are of one class, {source.labels[found[0]]!r}; training needs two"
        )
    return source


def _drawn_split(spec: Spec, split: str) -> str:
    """Return the split of an embedded set."""
    if split not in synthetic.SPLITS:
        raise UserError(f"{spec}: no split {split!r}; {nearest(split, list(synthetic.SPLITS))}")
    return split


def has_clips(text: str) -> bool:
    """Return whether the examples of a SPEC are clips; reads at most the metadata of a manifest or the first line of a
    table.
    """
    spec = parse_spec(text)
    path = Path(spec.path).expanduser()
    if spec.kind == "csv":
        return has_times(path)
    return lists_clips(path) if spec.kind == "manifest" else spec.kind in CLIPS


def _motion(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    split = _drawn_split(spec, split)
    if "untrimmed" in spec.options:
        if "reversed" in spec.options:
            raise UserError(f"{spec}: untrimmed videos aren't reversed; leave one of the options out")
        return window_source(spec, split, labels)
    if "window_s" in spec.options:
        raise UserError(f"{spec}: only untrimmed videos have windows; say motion?untrimmed&window_s=2")
    return MotionSource(split, labels, "reversed" in spec.options)


def _files(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    if spec.kind == "csv" and has_times(Path(spec.path).expanduser()):
        return window_source(spec, split, labels)
    if of_pairs := [name for name in ("caption", "weight") if name in spec.options]:
        raise UserError(f"{spec}: {of_pairs[0]} is for image-text pairs, and classes are needed here; leave it out")
    timed = [name for name in ("videos", "split", "missing", "window_s") if name in spec.options]
    if spec.kind == "csv" and timed:
        raise UserError(f"{spec}: {timed[0]} is for tables with the columns start_s and end_s; leave it out")
    tally = Tally()
    files = list_csv(spec, tally) if spec.kind == "csv" else list_folder(spec, split, tally=tally)
    return FileSource(files, labels, str(spec), tally)


def _videos(spec: Spec, split: str, labels: Sequence[str]) -> Source:
    tally, path = Tally(), Path(spec.path).expanduser()
    if path.is_file() and (path.suffix.lower() == ".json" or has_times(path)):
        return window_source(spec, split, labels)
    if timed := [name for name in ("missing", "window_s") if name in spec.options]:
        raise UserError(f"{spec}: {timed[0]} is for annotations with times; leave it out")
    if path.is_file():
        options = {"images": spec.options["videos"]} if "videos" in spec.options else {}
        return VideoSource(list_csv(Spec("csv", spec.path, options), tally), labels, str(spec), tally)
    return VideoSource(list_videos(spec, split, tally), labels, str(spec), tally)
