"""Example, and the interface of sources of examples."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from clip_har_jax.data.motion import DrawnClip
from clip_har_jax.errors import UserError
from clip_har_jax.files import sha256
from clip_har_jax.listing import Tally
from clip_har_jax.names import SEPARATOR, label_ids
from clip_har_jax.video.clips import Clip, read_views
from clip_har_jax.video.sampling import FrameSampling, sample_times


class ClipViews(NamedTuple):
    """The frames to read from a clip; the arguments of `video.clips.read_views`, in its order."""

    sampling: FrameSampling
    indices: Sequence[int]  # of the views, from 0 to `sampling.num_views` - 1
    rng: np.random.Generator | None  # draws the times in training; None: fixed times
    each: Callable[[np.ndarray], np.ndarray]  # applied to each frame
    max_megapixels: float


@runtime_checkable
class ClipData(Protocol):
    """A clip whose frames are read on demand."""

    def read(self, views: ClipViews) -> list[Clip]:
        """Read the frames of each view.

        Raises:
          BadVideo: as `video.clips.read_clip`.
        """


class ClipFile(NamedTuple):
    """A clip in a video file."""

    path: str

    def read(self, views: ClipViews) -> list[Clip]:
        """Read the frames of each view; see `video.clips.read_views`."""
        return read_views(self.path, *views)


class MotionClip(NamedTuple):
    """A drawn clip of the embedded motion set."""

    split: str
    number: int
    is_reversed: bool = False

    def read(self, views: ClipViews) -> list[Clip]:
        """Draw the frames of each view at the times at which `video.clips.read_views` would read them."""
        drawn, clips = DrawnClip(self.split, self.number), []
        for view in views.indices:
            times = np.minimum(sample_times(drawn.duration_s, views.sampling, view, views.rng), drawn.duration_s)
            shown = drawn.duration_s - times if self.is_reversed else times
            frames = tuple(views.each(drawn.frame_at(float(time_s))) for time_s in shown)
            clips.append(Clip(frames, tuple(times.tolist()), drawn.duration_s))
        return clips


class Example(NamedTuple):
    """One example of a source."""

    data: bytes | np.ndarray | ClipData  # an encoded image, uint8 [h, w, 3], or a clip
    label: int | np.ndarray  # the class; in multi-label data bool [c], true for each label of the example
    name: str  # the name by which a person finds it


class Source(ABC):
    """Labelled examples with random access. Listed at once, read one by one, and sent to worker processes.

    Attributes:
      labels: the classes.
      label_ids: the class of each example, known without reading it; multi-label data has `targets` instead.
      targets: the labels of each example, [n, c]; None: each example has one, in `label_ids`.
      fingerprint: SHA-256 over the labels and the identity of the examples.
      clips: the examples are videos.
      weights: of the examples in weighted sampling; None: there are none.
      manifest_sha256: checksum of the split manifest that lists the examples; None: no manifest.
    """

    labels: tuple[str, ...]
    label_ids: Int32[np.ndarray, " n"]
    targets: Bool[np.ndarray, "n c"] | None = None
    fingerprint: str
    clips: bool = False
    weights: Float32[np.ndarray, " n"] | None = None
    manifest_sha256: str | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def __getitem__(self, i: int) -> Example:
        """Read one example.

        Raises:
          OSError: the file can't be read.
          BadImage: the file changed since it was listed.
        """

    @property
    def num_examples(self) -> int | None:
        """The number of examples; None if it isn't known, as of shards of image-text pairs."""
        return len(self)

    @cached_property
    def tally(self) -> Tally:
        """The kept and left out files of the listing; all are kept if nothing was listed from a disk."""
        return Tally(len(self))

    def label_of(self, i: int) -> int | Bool[np.ndarray, " c"]:
        """Return the class of an example; in multi-label data its row of `targets`."""
        return int(self.label_ids[i]) if self.targets is None else self.targets[i]

    def names_of(self, i: int) -> tuple[str, ...]:
        """Return the labels of an example: one, or any number in multi-label data."""
        if self.targets is None:
            return (self.labels[self.label_ids[i]],)
        return tuple(self.labels[k] for k in np.flatnonzero(self.targets[i]))

    @property
    def class_counts(self) -> Int64[np.ndarray, " c"]:
        """The number of examples of each class."""
        if self.targets is None:
            return np.bincount(self.label_ids, minlength=len(self.labels))
        return self.targets.sum(axis=0, dtype=np.int64)

    if not TYPE_CHECKING:  # a type checker would accept any name

        def __getattr__(self, name: str) -> Any:
            """Refuse `label_ids` of multi-label data: a use of one label for each example can't be right there."""
            if name == "label_ids" and self.targets is not None:
                raise UserError("the images have several labels each, and one is needed here")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def path(self, i: int) -> str | None:
        """Return an example's file; None if it has none."""
        return None

    def name(self, i: int) -> str:
        """Return the name of an example for messages: its file, or else its number."""
        return self.path(i) or f"example {i}"


def fingerprint_of(*parts: object) -> str:
    """Return a SHA-256 over the `repr` of the parts."""
    return sha256(repr(part) + "\0" for part in parts)


def make_targets(sets: Sequence[Collection[str]], labels: Sequence[str], where: str) -> Bool[np.ndarray, "n c"]:
    """Return which of the classes each example has.

    Args:
      sets: the labels of each of the n examples.
      labels: the c classes.
      where: the data's name in messages.

    Raises:
      UserError: a label that is none of the classes, two classes that a reader can't tell apart, or a class with a `|`,
        which a manifest would read as several.
    """
    if joined := [label for label in labels if SEPARATOR in label]:
        raise UserError(f"{where}: the label {joined[0]!r} holds {SEPARATOR!r}, which divides labels; rename it")
    ids = label_ids([name for own in sets for name in own], labels, where)
    targets = np.zeros((len(sets), len(labels)), bool)
    targets[np.repeat(np.arange(len(sets)), [len(own) for own in sets]), ids] = True
    return targets
