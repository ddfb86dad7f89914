"""The outcome of an evaluation, as data."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from clip_har_jax.evaluation.metrics import log_softmax


@dataclass(frozen=True)
class Predictions:
    """What the model says of each example that counts, in the order of the source."""

    index: Int32[np.ndarray, " n"]  # position in the source
    label: Int32[np.ndarray, " n"]
    predicted: Int32[np.ndarray, " n"]
    logits: Float32[np.ndarray, "n c"]  # temperature included

    @cached_property
    def probs(self) -> Float32[np.ndarray, "n c"]:
        """Class probabilities."""
        return np.exp(log_softmax(self.logits)).astype(np.float32)

    @property
    def score(self) -> Float32[np.ndarray, " n"]:
        """The probability of the predicted class."""
        return np.take_along_axis(self.probs, self.predicted[:, None], axis=1)[:, 0]


@dataclass(frozen=True)
class Shown:
    """An example that a person is shown, with the image as the model saw it."""

    index: int
    label: int
    predicted: int
    score: float
    image: UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class EvalResult:
    """The outcome of an evaluation."""

    labels: tuple[str, ...]
    metrics: dict[str, Any]  # the contents of metrics.json
    confusion: Int[np.ndarray, "c c"]  # number of examples by true (row) and predicted (column) class
    predictions: Predictions
    mistakes: tuple[Shown, ...]  # the most confident ones, most confident first
    unsure: tuple[Shown, ...] = ()  # right, but with the lowest probability; the lowest first
    sample: tuple[Shown, ...] = ()  # drawn at random
