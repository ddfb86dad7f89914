"""The protocol of backends, which run models, and functions that they share."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8

from clip_har_jax import bundle
from clip_har_jax.config import VideoConfig
from clip_har_jax.errors import UserError
from clip_har_jax.names import name_key
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.text import make_prompts, phrase
from clip_har_jax.video.sampling import FrameSampling


@runtime_checkable
class Backend(Protocol):
    """A loaded model with its classes; takes any number of images, transformed by `preprocess`."""

    path: Path
    digest: str | None  # of the sealed model folder; None: not sealed
    actions: bundle.Actions
    labels: tuple[str, ...]
    preprocess: Preprocess
    sigmoid: bundle.Sigmoid | None  # from logits to the probability of each class alone; None: no logit bias

    @property
    def takes_clips(self) -> bool:
        """Return whether clips [b, t, h, w, 3] are taken beside images [b, h, w, 3]; older exports take only images."""

    @property
    def takes_frames(self) -> bool:
        """Return whether the frames of a clip can be encoded one by one."""

    @property
    def num_frames(self) -> int | None:
        """Return the number of frames that a clip must have; None: any."""

    def logits(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Return class logits of images or clips, divided by the temperature."""

    def predict(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Return class probabilities of images or clips."""

    def embed(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b d"]:
        """Return L2-normalised embeddings of images or clips."""

    def embed_frames(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n d"]:
        """Return the features of single frames, the input of `frame_logits`; requires `takes_frames`."""

    def frame_logits(self, embeds: Float32[np.ndarray, "b t d"]) -> Float32[np.ndarray, "b c"]:
        """Return class logits of clips from the features of their frames; equal to `logits` of the clips."""

    def explain(
        self, images: UInt8[np.ndarray, "b h w 3"], class_indices: Sequence[int]
    ) -> Float32[np.ndarray, "b g g"]:
        """Return a heat map of a class for each image: a value from 0 to 1 per patch, the largest of an image is 1.

        `class_indices` are positions in `labels`, one for each image.
        """


def split_classes(text: str | None) -> tuple[str, ...]:
    """Return the names in the value of --classes, separated by commas; none for None.

    Raises:
      UserError: an empty name.
    """
    names = tuple(name.strip() for name in text.split(",")) if text is not None else ()
    if not all(names):
        raise UserError(f'--classes={text!r}: a name is empty; write e.g. --classes="riding a bike,sleeping"')
    return names


def check_classes(classes: Sequence[str]) -> None:
    """Refuse classes that a model can't tell apart.

    Raises:
      UserError: fewer than two, or two with the same phrase.
    """
    if len(classes) < 2:
        raise UserError(f"--classes: two or more are needed, not {', '.join(map(repr, classes)) or 'none'}")
    seen: dict[str, str] = {}
    for label in classes:
        key = name_key(phrase(label))
        if key in seen:
            raise UserError(f"--classes: {seen[key]!r} and {label!r} mean the same; leave one out")
        seen[key] = label


def choose_actions(
    folder: Path, classes: Sequence[str], default_classes: Sequence[str] = (), multi_label: bool = False
) -> bundle.Actions:
    """Return the classes to recognise: `classes` if given, else the folder's own, else `default_classes`.

    The frames of clips are sampled with the folder's settings for any classes.

    Raises:
      UserError: there are none, they can't be told apart, or the folder's head knows only its own classes; or a
        multi-label model without `multi_label`.
    """
    video = {}
    if bundle.has_actions(folder):
        actions = bundle.read_actions(folder)
        video = actions.video
        if not classes:
            if actions.multi_label and not multi_label:
                raise UserError(
                    f"{folder}: a multi-label model, and one label for each image is needed here; evaluate.py, "
                    "predict.py, predict_bulk.py and export take it"
                )
            return actions
        if actions.head != "cosine":
            raise UserError(
                f"--classes: the {actions.head!r} head of {folder} knows only its own {len(actions.labels)} actions; "
                "leave --classes out, or use a model with the cosine head"
            )
    labels = tuple(classes or default_classes)
    if not labels:
        raise UserError(f'{folder}: names no actions (actions.json); say e.g. --classes="riding a bike,sleeping"')
    check_classes(labels)
    return bundle.Actions(labels, make_prompts(labels), video=video)


def mean_by_class(embeddings: Float32[np.ndarray, "p d"], counts: Sequence[int]) -> Float32[np.ndarray, "c d"]:
    """Return class embeddings: the mean of each class's normalised text embeddings, normalised again.

    Args:
      embeddings: of all prompts, class after class.
      counts: the number of prompts of each class.
    """
    means = np.stack([group.mean(axis=0) for group in np.split(embeddings, np.cumsum(counts)[:-1])])
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def check_indices(indices: Sequence[int], num_images: int, num_classes: int) -> Int64[np.ndarray, " b"]:
    """Return the classes to explain as an array.

    Raises:
      UserError: not one per image, or one out of range.
    """
    array = np.asarray(indices, np.int64).reshape(-1)
    if len(array) != num_images:
        raise UserError(f"{len(array)} classes to explain for {num_images} images; give one for each image")
    if outside := [int(i) for i in array if not 0 <= i < num_classes]:
        raise UserError(f"class {outside[0]} isn't there; 0 to {num_classes - 1} are")
    return array


def check_finite(logits: np.ndarray, path: Path) -> None:
    """Refuse outputs of damaged weights; `logits` have any shape.

    Raises:
      UserError: NaN or infinity.
    """
    if not np.isfinite(logits).all():
        raise UserError(f"{path}: the model gives NaN or infinity; its weights are damaged")


def pad(rows: np.ndarray, size: int) -> np.ndarray:
    """Return `rows` [n, ...] followed by rows of zeros, `size` in total."""
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])


def clip_sampling(actions: bundle.Actions) -> FrameSampling:
    """Return how the frames of a clip are sampled: as in training, or for a model of images, by the default."""
    video = asdict(VideoConfig()) | actions.video
    return FrameSampling(video["num_frames"], video["sampling"], video["rate_hz"], video["num_views"])


def rows_at_once(inputs: np.ndarray, batch_size: int) -> int:
    """Return the number of rows in a batch of about `batch_size` images; rows are images or clips [n, t, h, w, 3]."""
    return max(1, batch_size // inputs.shape[1]) if inputs.ndim == 5 else batch_size


def softmax(logits: Float[np.ndarray, "*b c"]) -> Float[np.ndarray, "*b c"]:
    """Return the softmax over the last dim, in the precision of the logits."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def choose_sigmoid(actions: bundle.Actions, logit_bias: float | None) -> bundle.Sigmoid | None:
    """Return the calibrated sigmoid of these classes, else the model's own; None without a logit bias, or with a head.

    Args:
      actions: the classes, with their temperature.
      logit_bias: the model's own, of logits at temperature 1.
    """
    if logit_bias is None or actions.head != "cosine":
        return None
    return actions.sigmoid or bundle.Sigmoid(actions.temperature, logit_bias)


class ClassScores(NamedTuple):
    """The scores of one input.

    Attributes:
      probs: the softmax over the classes; of a multi-label model the sigmoid of each label by itself.
      sigmoid: the probability of each class alone; None: the model has no logit bias.
    """

    probs: Float[np.ndarray, " c"]
    sigmoid: Float[np.ndarray, " c"] | None


def score_views(
    logits: Float[np.ndarray, "v c"], sigmoid: bundle.Sigmoid | None, multi_label: bool = False
) -> ClassScores:
    """Return the mean scores over the views of one input; see `probabilities` for `multi_label`."""
    probs = probabilities(logits, multi_label).mean(axis=0)
    return ClassScores(probs, None if sigmoid is None else sigmoid(logits).mean(axis=0))


def probabilities(logits: Float[np.ndarray, "*b c"], multi_label: bool) -> Float[np.ndarray, "*b c"]:
    """Return the softmax over the classes; of a multi-label model the sigmoid of each label by itself."""
    return bundle.Sigmoid(1.0, 0.0)(logits).astype(logits.dtype) if multi_label else softmax(logits)


def above_thresholds(
    probs: Float[np.ndarray, " c"], actions: bundle.Actions, threshold: float | None = None
) -> tuple[tuple[str, float], ...]:
    """Return the labels of a multi-label model that reach their thresholds, the most probable first.

    Args:
      probs: of the model's labels.
      actions: with the thresholds.
      threshold: for all labels, in place of their own; None: their own.
    """
    limits = actions.label_thresholds if threshold is None else dict.fromkeys(actions.labels, threshold)
    order = np.argsort(-probs, kind="stable")
    found = ((actions.labels[i], float(probs[i])) for i in order)
    return tuple((label, prob) for label, prob in found if prob >= limits[label])


def need_one_label(actions: bundle.Actions, what: str) -> None:
    """Refuse a multi-label model.

    Raises:
      UserError: the model gives an image any number of labels.
    """
    if actions.multi_label:
        raise UserError(f"{what} follow one action at a time, and the model gives several labels; use one without")
