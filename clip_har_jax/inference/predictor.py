"""Predictor: images and videos -> predictions."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from clip_har_jax.errors import UserError
from clip_har_jax.image_files import MAX_ASPECT, BadImage, decode, read_image
from clip_har_jax.image_formats import IMAGE_SUFFIXES
from clip_har_jax.inference.backends import above_thresholds, clip_sampling, score_views
from clip_har_jax.inference.exported import open_backend
from clip_har_jax.inference.sliding_windows import FoundSegments, Windows, choose_windows, find_video_segments
from clip_har_jax.listing import VIDEO_SUFFIXES, Tally, find_files, read_path_lines
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.video.clips import TimedFrame, iter_frames, read_clip
from clip_har_jax.video.segments import SegmentRules

# A path, an encoded image, a PIL image, or uint8 [h, w, 3] in RGB.
ImageLike = str | Path | bytes | Image.Image | np.ndarray

MAX_TOP = 5
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits per channel


@dataclass(frozen=True)
class Prediction:
    """The prediction for one input; with an `error` there is no label."""

    input: str
    label: str | None = None
    score: float | None = None  # probability of the label
    top: tuple[tuple[str, float], ...] = ()  # at most 5 (label, probability), the most probable first
    error: str | None = None
    abstained: bool = False  # less confident than the model's threshold; none of several labels reaches its own
    duration_s: float | None = None  # of a video
    damage: str | None = None  # a description of the unreadable part of a clip
    labels: tuple[tuple[str, float], ...] | None = None  # of a multi-label model, those that reach their thresholds
    sigmoid: tuple[float, ...] = ()  # of each class of `top`: its probability alone; empty: the model has no logit bias

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `predict.py --json` prints."""
        if self.error is not None:
            return {"input": self.input, "error": self.error}
        top = [{"label": label, "score": score} for label, score in self.top]
        if self.sigmoid:
            top = [entry | {"sigmoid": alone} for entry, alone in zip(top, self.sigmoid, strict=True)]
        answer: dict[str, Any] = {"input": self.input, "label": self.label, "score": self.score, "top": top}
        if self.labels is not None:
            answer["labels"] = [{"label": label, "score": score} for label, score in self.labels]
        return answer | {"abstained": self.abstained} | ({"damage": self.damage} if self.damage else {})


class Predictor:
    """A model with its classes, for recognising actions in images and videos.

    >>> predictor = Predictor("model")
    >>> predictor.labels
    ('dancing', 'running')

    Args:
      path: a model folder, any CLIP in the Hugging Face layout, or an exported folder (or one format in it).
      classes: the actions to recognise, in free words; None: those of the model folder.
      batch_size: images in one forward pass.

    Raises:
      UserError: no usable model there, or no classes.
    """

    def __init__(self, path: str | os.PathLike[str], classes: Sequence[str] | None = None, batch_size: int = 32):
        self.backend = open_backend(path, classes or (), batch_size, multi_label=True)
        self.batch_size = batch_size

    @property
    def labels(self) -> tuple[str, ...]:
        """The actions that the model recognises."""
        return self.backend.labels

    def predict(self, inputs: Iterable[ImageLike]) -> list[Prediction]:
        """Return one prediction per input, in order; the prediction of an unreadable input has an error.

        >>> predictor = Predictor("model")
        >>> good, bad = predictor.predict(["photo.jpg", "missing.jpg"])
        >>> good.label in predictor.labels, 0.5 <= good.score <= 1
        (True, True)
        >>> bad.error
        "can't be read (No such file or directory)"
        """
        return list(self.stream(inputs))

    def stream(self, inputs: Iterable[ImageLike]) -> Iterator[Prediction]:
        """Yield predictions like `predict`, batch by batch; `inputs` are read on demand."""
        numbered = enumerate(inputs)
        while chunk := list(islice(numbered, self.batch_size)):
            names = [_name(item, position) for position, item in chunk]
            loaded = [None if _is_clip(item) else self.try_load(item) for _, item in chunk]
            images = [image for image in loaded if isinstance(image, np.ndarray)]
            logits = iter(self.backend.logits(np.stack(images)) if images else ())
            for name, image in zip(names, loaded, strict=True):
                if image is None:
                    yield self.predict_clip(name)
                else:
                    bad = Prediction(name, error=image) if isinstance(image, str) else None
                    yield bad or self._prediction(name, next(logits)[None])

    def predict_clip(self, path: str | Path) -> Prediction:
        """Return one prediction for a whole video; its frames are sampled with the model folder's settings.

        An export of an earlier version, which takes single images, returns the mean over the frames.
        """
        sampling = clip_sampling(self.backend.actions)
        logits, damage = [], None
        try:
            for view in range(sampling.num_views):
                clip = read_clip(path, sampling, view, each=self._transform, num_threads=0)
                frames, damage = np.stack(clip.frames), clip.damage or damage
                whole = self.backend.takes_clips
                logits.append(self.backend.logits(frames[None] if whole else frames))
        except BadImage as error:
            return Prediction(str(path), error=str(error))
        prediction = self._prediction(str(path), np.concatenate(logits))
        return replace(prediction, damage=damage, duration_s=clip.duration_s)

    def segments(
        self,
        path: str | Path,
        windows: Windows | None = None,
        rules: SegmentRules | None = None,
        each: Callable[[Iterator[TimedFrame]], Iterator[TimedFrame]] = lambda frames: frames,
    ) -> FoundSegments:
        """Return the actions in a video with their times, from windows that slide over it.

        >>> predictor = Predictor("model")
        >>> found = predictor.segments("clip.mp4")
        >>> [(segment.label, segment.start_s) for segment in found.segments]
        [('dancing', 0.0)]

        Args:
          path: the video.
          windows: the length of windows and their distance; None: those of `choose_windows`.
          rules: the rules of segments; None: the defaults.
          each: wraps the frames while they are read, e.g. to report progress.

        Raises:
          BadVideo: no frame of it can be read.
          UserError: an export of an earlier version, which takes only images.
        """
        windows = choose_windows(self.backend) if windows is None else windows
        frames = each(iter_frames(path, windows.rate_hz))
        return find_video_segments(frames, self.backend, windows, rules or SegmentRules(), self.batch_size)

    def embed(self, inputs: Iterable[ImageLike]) -> Float32[np.ndarray, "n d"]:
        """Return L2-normalised image embeddings.

        Raises:
          BadImage: an input can't be read.
        """
        return self.backend.embed(np.stack([_load(item, self.backend.preprocess) for item in inputs]))

    def _prediction(self, name: str, logits: Float32[np.ndarray, "v c"]) -> Prediction:
        """Return the prediction from the logits of the views, or frames, of an input."""
        actions = self.backend.actions
        probs, sigmoid = score_views(logits, self.backend.sigmoid, actions.multi_label)
        order = np.argsort(-probs, kind="stable")[:MAX_TOP]
        top = tuple((self.labels[i], float(probs[i])) for i in order)
        labels = above_thresholds(probs, actions) if actions.multi_label else None
        abstained = labels == () or top[0][1] < actions.thresholds.get("abstain", 0.0)
        alone = () if sigmoid is None else tuple(float(sigmoid[i]) for i in order)
        label, score = (labels or top)[0]
        return Prediction(name, label, score, top, abstained=abstained, labels=labels, sigmoid=alone)

    def try_load(self, item: ImageLike) -> np.ndarray | str:
        """Return the model's input, uint8 [size, size, 3], or the reason why `item` can't be read."""
        return try_load(item, self.backend.preprocess)

    def _transform(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "a b 3"]:
        return evaluation_transform(image, self.backend.preprocess)


def try_load(item: ImageLike, preprocess: Preprocess) -> np.ndarray | str:
    """Return the input of a model with these image settings, or the reason why `item` can't be read."""
    try:
        return _load(item, preprocess)
    except BadImage as error:
        return str(error)


def _load(item: ImageLike, preprocess: Preprocess) -> UInt8[np.ndarray, "a b 3"]:
    image = _to_array(item)
    if max(image.shape[:2]) > MAX_ASPECT * min(image.shape[:2]):
        raise BadImage(f"{image.shape[1]}x{image.shape[0]} px, one side over {MAX_ASPECT} times the other; crop it")
    return evaluation_transform(image, preprocess)


def _is_clip(item: ImageLike) -> bool:
    return isinstance(item, str | Path) and Path(item).suffix.lower() in VIDEO_SUFFIXES


def _name(item: ImageLike, position: int) -> str:
    return str(item) if isinstance(item, str | Path) else f"#{position}"


def _to_array(item: ImageLike) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(item, str | Path):
        return read_image(item)
    if isinstance(item, bytes):
        return decode(item)
    if isinstance(item, Image.Image):
        if item.mode not in PLAIN_MODES:
            raise BadImage(f"a PIL image of mode {item.mode}; give the file itself, which is converted rightly")
        return np.asarray(ImageOps.exif_transpose(item).convert("RGB"))
    if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or 0 in item.shape:
        raise BadImage(f"an array of {item.dtype} {list(item.shape)}; uint8 [height, width, 3] is needed")
    return item


def list_inputs(arguments: Sequence[str], stdin: Iterable[bytes], tally: Tally | None = None) -> Iterator[str]:
    """Return the files of a command line: files, images and videos of folders (sorted), and for - the lines of
    `stdin`.

    Args:
      arguments: of the command line.
      stdin: the lines for `-`.
      tally: records the kept and left out files of folders.

    Raises:
      UserError: a folder without images; raised before any file is read.
    """
    parts: list[Iterable[str]] = []
    for argument in arguments:
        if argument == "-":
            parts.append(read_path_lines(stdin, "standard input"))
        elif Path(argument).is_dir():
            found = [str(path) for path in find_files(argument, IMAGE_SUFFIXES | VIDEO_SUFFIXES, tally)]
            if not found:
                suffixes = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
                raise UserError(f"{argument}: no images or videos in this folder ({suffixes})")
            parts.append(found)
        else:
            parts.append([argument])
    return chain.from_iterable(parts)
