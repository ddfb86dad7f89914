"""The result of an evaluation, as data."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int32, UInt8
from scipy.sparse import csr_array

from clip_har_jax.evaluation.metrics import log_softmax, rank_of_label


@dataclass(frozen=True)
class Scores:
    """A few numbers per example from which all metrics can be computed, independent of the number of classes.

    Attributes:
      index: position in the source.
      label: the true class.
      predicted: the most probable class.
      score: the probability of the predicted class.
      nll: negative log-likelihood of the true class, in nats.
      rank: of the true class by probability; 0: it is the predicted class.
    """

    index: Int32[np.ndarray, " n"]
    label: Int32[np.ndarray, " n"]
    predicted: Int32[np.ndarray, " n"]
    score: Float32[np.ndarray, " n"]
    nll: Float32[np.ndarray, " n"]
    rank: Int32[np.ndarray, " n"]

    @classmethod
    def of_probs(cls, label: Int[np.ndarray, " n"], probs: Float[np.ndarray, "n c"]) -> "Scores":
        """Return the scores of probabilities in the order of their source."""
        count, predicted = len(label), probs.argmax(axis=-1)
        own = probs[np.arange(count), label].astype(np.float64)
        nll = -np.log(np.maximum(own, np.finfo(np.float64).tiny))
        columns = np.arange(count), label, predicted, probs.max(axis=-1), nll, rank_of_label(probs, label)
        types = (np.int32, np.int32, np.int32, np.float32, np.float32, np.int32)
        return cls(*(column.astype(kind) for column, kind in zip(columns, types, strict=True)))

    @classmethod
    def join(cls, parts: Sequence["Scores"]) -> "Scores":
        """Return the scores of all parts, in the order of the source."""
        order = np.argsort(np.concatenate([part.index for part in parts]), kind="stable")
        columns = (np.concatenate([getattr(part, field.name) for part in parts])[order] for field in fields(cls))
        return cls(*columns)


@dataclass(frozen=True)
class Predictions:
    """The model's outputs for examples, in the order of the source."""

    index: Int32[np.ndarray, " n"]  # position in the source
    label: Int32[np.ndarray, " n"]
    predicted: Int32[np.ndarray, " n"]
    logits: Float32[np.ndarray, "n c"]  # divided by the temperature

    @cached_property
    def probs(self) -> Float32[np.ndarray, "n c"]:
        """Class probabilities."""
        return np.exp(log_softmax(self.logits)).astype(np.float32)

    @property
    def score(self) -> Float32[np.ndarray, " n"]:
        """The probability of the predicted class."""
        return np.take_along_axis(self.probs, self.predicted[:, None], axis=1)[:, 0]

    @cached_property
    def scores(self) -> Scores:
        """The same predictions without one column per class."""
        nll = -np.take_along_axis(log_softmax(self.logits), self.label[:, None], axis=1)[:, 0].astype(np.float32)
        rank = rank_of_label(self.logits, self.label)
        return Scores(self.index, self.label, self.predicted, self.score, nll, rank)

    @classmethod
    def join(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Return the predictions of all parts, in the order of the source."""
        order = np.argsort(np.concatenate([part.index for part in parts]), kind="stable")
        names = ("index", "label", "predicted", "logits")
        return cls(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in names))


@dataclass(frozen=True)
class Shown:
    """An example to show to a person, with the image, or the frames of the clip, as the model saw it."""

    index: int
    label: int
    predicted: int
    score: float
    image: UInt8[np.ndarray, "*t h w 3"]


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
      labels: names of the c classes.
      metrics: the contents of metrics.json.
      confusion: number of examples by true (row) and predicted (column) class, [c, c]; sparse, since c may be 10,000.
      scores: of each example.
      kept: the predictions with their logits; None: `evaluate` passed them to its sinks.
      mistakes: the most confident ones, most confident first.
      unsure: correct ones with the lowest probability; the lowest first.
      sample: drawn at random.
    """

    labels: tuple[str, ...]
    metrics: dict[str, Any]
    confusion: csr_array
    scores: Scores
    kept: Predictions | None = None
    mistakes: tuple[Shown, ...] = ()
    unsure: tuple[Shown, ...] = ()
    sample: tuple[Shown, ...] = ()

    @property
    def predictions(self) -> Predictions:
        """The predictions with their logits, of an evaluation without sinks."""
        assert self.kept is not None, "an evaluation with sinks keeps no logits"
        return self.kept
