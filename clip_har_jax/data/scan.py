"""One pass over a data set: checksums, measurements, signatures and groups of copies; the files of its manifest."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_har_jax.config import DataConfig
from clip_har_jax.data.duplicates import (
    FRAMES,
    MIN_CONFLICT_CORRELATION,
    Signature,
    find_clip_pairs,
    find_pairs,
    group,
    make_signature,
)
from clip_har_jax.data.examples import ClipFile, Source, make_targets
from clip_har_jax.data.quality import Facts, measure
from clip_har_jax.errors import UserError
from clip_har_jax.files import sha256, sha256_file
from clip_har_jax.image_files import BadImage, decode
from clip_har_jax.image_formats import sniff
from clip_har_jax.names import join_labels, label_ids, sort_labels
from clip_har_jax.video.clips import read_clip
from clip_har_jax.video.sampling import FrameSampling

# Clips of one recording: UCF101's v_CLASS_gGROUP_cCLIP, HMDB51's RECORDING_CLASS_<five properties>_CLIP
RECORDINGS = (
    re.compile(r"(v_.+_g\d+)_c\d+"),
    re.compile(r"(.+)_[fhlu]_[cn]m_np\d_(?:fr|le|ri|ba)_(?:goo|med|bad)_\d+"),
)


class Scanned(NamedTuple):
    """The results of reading an image or a clip."""

    sha256: str
    bytes: int
    facts: Facts  # for a clip, means over its sampled frames
    signatures: tuple[Signature, ...]  # one for an image, FRAMES for a clip


class Pooled:
    """Several sources, one after the other, with the union of their labels.

    Attributes:
      labels: the classes; in multi-label data the sets of labels that occur, each as one text.
      label_ids: [n], the position in `labels` of each example, so that it says whether two examples are labelled alike.
      targets: [n, c], the labels of each example in multi-label data; None: one label each.

    Raises:
      UserError: images mixed with clips, or drawn clips.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        kinds = {source.clips for source in sources}
        if len(kinds) > 1:
            raise UserError("--data: images and clips together; prepare each by itself")
        self.clips = kinds.pop()
        for source in sources:
            refuse_drawn_clips(source)
        sets = [source.names_of(i) for source in sources for i in range(len(source))]
        self.targets = None
        if sources[0].targets is not None:
            self.targets = make_targets(sets, sort_labels(name for own in sets for name in own), "--data")
        names = list(map(join_labels, sets))
        self.labels = sort_labels(names)
        self.label_ids = np.asarray(label_ids(names, self.labels, "--data"), np.int32)
        self.given = np.repeat(np.arange(len(sources)), [len(source) for source in sources])
        self.tallies = [source.tally for source in sources]
        self._start = np.cumsum([0, *(len(source) for source in sources)])

    def __len__(self) -> int:
        return len(self.label_ids)

    def read(self, i: int) -> tuple[bytes | ClipFile, str]:
        """Return an encoded image or a clip, and its name; raise OSError if it can't be read."""
        source = self.sources[self.given[i]]
        example = source[int(i - self._start[self.given[i]])]
        if not isinstance(example.data, np.ndarray):
            return example.data, example.name
        Image.fromarray(example.data).save(buffer := io.BytesIO(), "PNG")
        return buffer.getvalue(), example.name

    def path(self, i: int) -> str | None:
        """Return an example's file, if its source has files."""
        source = self.sources[self.given[i]]
        return source.path(int(i - self._start[self.given[i]]))


def refuse_drawn_clips(source: Source) -> None:
    """Refuse drawn clips: they have no files that a manifest could name.

    Raises:
      UserError: the source's clips are drawn.
    """
    if source.clips and source.path(0) is None:
        raise UserError(
            "motion: drawn clips need no preparation; name its splits, data.train=motion and data.val=motion, instead"
        )


def scan(source: Pooled, i: int) -> Scanned | tuple[str, str]:
    """Return the results of reading an example, or its name and the reason of failure."""
    name = source.path(i) or f"example {i}"
    try:
        data, name = source.read(i)
        if isinstance(data, ClipFile):
            return _scan_clip(data.path)
        image = decode(data, DataConfig.max_megapixels)
        return Scanned(sha256(data), len(data), measure(image), (make_signature(image),))
    except BadImage as error:
        return name, str(error)
    except OSError as error:
        return str(error.filename or name), f"can't be read ({error.strerror or error})"


def _scan_clip(path: str) -> Scanned:
    frames = read_clip(path, FrameSampling(FRAMES), max_megapixels=DataConfig.max_megapixels).frames
    facts = [measure(frame) for frame in frames]
    signatures = tuple(make_signature(frame) for frame in frames)
    means = (float(np.mean([getattr(one, name) for one in facts])) for name in ("brightness", "contrast"))
    return Scanned(
        sha256_file(path), Path(path).stat().st_size, Facts(facts[0].width, facts[0].height, *means), signatures
    )


def find_duplicates(scanned: Sequence[Scanned], clips: bool) -> list[tuple[int, int, float]]:
    """Return pairs of near duplicates; similarity 1 for identical files."""
    first: dict[str, int] = {}
    pairs: list[tuple[int, int, float]] = []
    for i, one in enumerate(scanned):
        if one.sha256 in first:
            pairs.append((first[one.sha256], i, 1.0))
        else:
            first[one.sha256] = i
    unique = list(first.values())
    signatures = [scanned[i].signatures for i in unique]
    near = find_clip_pairs(signatures) if clips else find_pairs([one for (one,) in signatures])
    return sorted([*pairs, *((unique[a], unique[b], alike) for a, b, alike in near)])


def part_conflicts(
    pairs: Sequence[tuple[int, int, float]], label_ids: np.ndarray
) -> tuple[list[tuple[int, int, float]], list[tuple[int, int, float]]]:
    """Split pairs into those that join two examples, and those for a person to decide.

    A near duplicate with another label is a wrong label or another picture. It joins the examples only if the
    similarity is so high that it must be the same picture.

    Args:
      pairs: two examples and their similarity, 0 to 1.
      label_ids: [n], of the examples.
    """
    joined: list[tuple[int, int, float]] = []
    undecided: list[tuple[int, int, float]] = []
    for i, j, alike in pairs:
        certain = label_ids[i] == label_ids[j] or alike >= MIN_CONFLICT_CORRELATION
        (joined if certain else undecided).append((i, j, alike))
    return joined, undecided


def recording_of(path: str, label: str) -> str | None:
    """Return the recording of a clip by the file names of UCF101 and HMDB51; None: unknown."""
    for pattern in RECORDINGS:
        if found := pattern.fullmatch(Path(path).stem):
            return f"{label}/{found[1]}"
    return None


def find_groups(
    pairs: Sequence[tuple[int, int, float]], label_ids: np.ndarray, recordings: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups of copies, and the groups that must share a split: copies, and clips of one recording.

    Copies with different labels join nothing else, so that only they are left without a split.

    Args:
      pairs: two examples and their similarity, 0 to 1.
      label_ids: [n], of the examples.
      recordings: the recording of each example, if it is a clip of one.

    Returns:
      The number of each example's group, [n], of either kind.
    """
    copies = group(len(label_ids), [(a, b) for a, b, _ in pairs])
    order = np.lexsort((label_ids, copies))
    differing = (copies[order][1:] == copies[order][:-1]) & (label_ids[order][1:] != label_ids[order][:-1])
    conflicting = np.isin(copies, copies[order][1:][differing])
    first: dict[str, int] = {}
    links: list[tuple[int, int]] = [
        (first.setdefault(name, i), i) for i, name in enumerate(recordings) if name is not None and not conflicting[i]
    ]
    return copies, group(len(label_ids), [*((a, b) for a, b, _ in pairs), *links])


def place_files(
    source: Pooled, kept: Sequence[int], scanned: Sequence[Scanned], output: Path
) -> tuple[list[str], Path]:
    """Return the files' paths below a common folder, and that folder; write images without files to images/."""
    files = [source.path(i) for i in kept]
    if any(file is None for file in files):
        folder = output / "images"
        folder.mkdir(exist_ok=True)
        names = []
        for i, one in zip(kept, scanned, strict=True):
            data, _ = source.read(i)
            assert isinstance(data, bytes), "clips have files"
            found = sniff(data)
            name = f"images/{one.sha256[:16]}-{i:07d}{'.img' if found is None else found.suffixes[0]}"
            (output / name).write_bytes(data)
            names.append(name)
        return names, output.resolve()
    absolute = [Path(file).absolute() for file in files if file is not None]
    root = Path(os.path.commonpath([path.parent for path in absolute]))
    return [path.relative_to(root).as_posix() for path in absolute], root
