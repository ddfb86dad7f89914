"""Losses over class logits, exact under padding: rows of mask 0 have no effect."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from clip_har_jax.config import MethodConfig

LEAST = 1e-12  # x^gamma with gamma < 1 has no finite slope at 0, so a p that rounds to 0 would give NaN


def cross_entropy(
    logits: Float[Array, "b c"],
    target: Float[Array, "b c"],
    *,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    class_weights: Float[Array, " c"] | None = None,
) -> Float[Array, " b"]:
    """Return the softmax cross-entropy of each row, in nats.

    Args:
      logits: of the classes.
      target: probability of each class: one-hot, or a mixture for mixed images.
      label_smoothing: share of the target that is distributed evenly over all classes (Szegedy et al. 2016).
      focal_gamma: exponent of the focal loss, which scales by (1 - p)^gamma (Lin et al. 2017, equation 4); 0: off.
      class_weights: weight of the examples of each class.
    """
    log_probs = jax.nn.log_softmax(logits)
    smoothed = optax.smooth_labels(target, label_smoothing)
    focus = _power(-jnp.expm1(log_probs), focal_gamma)
    losses = -jnp.sum(smoothed * focus * log_probs, axis=-1)
    return losses if class_weights is None else losses * (target @ class_weights)


def binary_cross_entropy(
    logits: Float[Array, "b c"],
    target: Float[Array, "b c"],
    *,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    class_weights: Float[Array, " c"] | None = None,
) -> Float[Array, " b"]:
    """Return the binary cross-entropy of each row, summed over the labels, in nats.

    The sum keeps the gradient of one logit as large as that of the cross-entropy, so rates can stay the same.

    Args:
      logits: of the labels, each by itself.
      target: probability of each label: 0 or 1, or between for mixed images.
      label_smoothing: share of the target that is replaced by one half.
      focal_gamma: exponent of the focal loss for both answers (Lin et al. 2017, equation 4); 0: off.
      class_weights: weight of each label's part of the sum.
    """
    probs = jax.nn.sigmoid(logits)
    smoothed = target * (1 - label_smoothing) + label_smoothing / 2
    present = _power(1 - probs, focal_gamma) * jax.nn.log_sigmoid(logits)
    absent = _power(probs, focal_gamma) * jax.nn.log_sigmoid(-logits)
    return _sum_labels(smoothed, present, absent, class_weights)


def asymmetric(
    logits: Float[Array, "b c"],
    target: Float[Array, "b c"],
    *,
    label_smoothing: float = 0.0,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    margin: float = 0.05,
    class_weights: Float[Array, " c"] | None = None,
) -> Float[Array, " b"]:
    """Return the asymmetric loss of each row (Ridnik et al. 2021, equations 4 to 7), summed over the labels, in nats.

    Absent labels, of which most images have many, count less the surer the model is that they are absent, and not at
    all below a probability of `margin`.

    Args:
      logits: of the labels, each by itself.
      target: probability of each label: 0 or 1, or between for mixed images.
      label_smoothing: as in `binary_cross_entropy`.
      gamma_pos: exponent of 1 - p for present labels.
      gamma_neg: exponent of the shifted p for absent labels.
      margin: subtracted from p for absent labels.
      class_weights: weight of each label's part of the sum.
    """
    probs = jax.nn.sigmoid(logits)
    smoothed = target * (1 - label_smoothing) + label_smoothing / 2
    shifted = jnp.maximum(probs - margin, 0.0)
    present = _power(1 - probs, gamma_pos) * jax.nn.log_sigmoid(logits)
    # Without a margin 1 - p may round to 0; with one it is at least the margin.
    log_absent = jnp.log(1 - shifted) if margin else jax.nn.log_sigmoid(-logits)
    absent = _power(shifted, gamma_neg) * log_absent
    return _sum_labels(smoothed, present, absent, class_weights)


def _power(values: Float[Array, "b c"], gamma: float) -> Float[Array, "b c"] | float:
    return jnp.maximum(values, LEAST) ** gamma if gamma else 1.0


def _sum_labels(
    target: Float[Array, "b c"],
    present: Float[Array, "b c"],
    absent: Float[Array, "b c"],
    class_weights: Float[Array, " c"] | None,
) -> Float[Array, " b"]:
    """Return minus the sum over the labels of the log-likelihood of each answer, weighted by its probability."""
    parts = target * present + (1 - target) * absent
    return -jnp.sum(parts if class_weights is None else parts * class_weights[None], axis=-1)


ClassLoss = Callable[[Float[Array, "b c"], Float[Array, "b c"]], Float[Array, " b"]]  # logits, target -> losses
# name in method.loss -> the function, and the keys of a method's config by the names of its arguments
LOSSES: dict[str, tuple[Callable[..., Float[Array, " b"]], dict[str, str]]] = {
    "cross_entropy": (cross_entropy, {"label_smoothing": "label_smoothing", "focal_gamma": "focal_gamma"}),
    "binary_cross_entropy": (
        binary_cross_entropy,
        {"label_smoothing": "label_smoothing", "focal_gamma": "focal_gamma"},
    ),
    "asymmetric": (
        asymmetric,
        {
            "label_smoothing": "label_smoothing",
            "gamma_pos": "asymmetric_gamma_pos",
            "gamma_neg": "asymmetric_gamma_neg",
            "margin": "asymmetric_margin",
        },
    ),
}


def make_class_loss(name: str, config: MethodConfig, class_weights: Float[np.ndarray, " c"] | None) -> ClassLoss:
    """Return the loss of this name with the config's settings."""
    function, keys = LOSSES[name]
    weights = None if class_weights is None else jnp.asarray(class_weights)
    settings = {argument: getattr(config, key) for argument, key in keys.items()}
    return partial(function, class_weights=weights, **settings)


def make_target(label: Int[Array, " b"] | UInt8[Array, "b c"], num_classes: int) -> Float[Array, "b c"]:
    """Return the probability of each class: one-hot, or in multi-label data 0 or 1 for each label."""
    return jax.nn.one_hot(label, num_classes) if label.ndim == 1 else label.astype(jnp.float32)


def is_right(logits: Float[Array, "b c"], label: Int[Array, " b"] | UInt8[Array, "b c"]) -> Bool[Array, " b"]:
    """Return whether the most probable class is the true one, or in multi-label data one of the image's labels."""
    best = jnp.argmax(logits, -1)
    return best == label if label.ndim == 1 else jnp.take_along_axis(label, best[:, None], axis=1)[:, 0] > 0


def balanced_weights(counts: Sequence[int], beta: float) -> Float32[np.ndarray, " c"]:
    """Return the weight of each class: inverse to its effective number of examples (Cui et al. 2019, equation 2).

    They average 1 over the examples, so the learning rate can stay the same.

    Args:
      counts: examples of each class.
      beta: 0: equal weights; near 1: weights inverse to the counts.
    """
    numbers = np.asarray(counts, np.float64)
    weights = (1 - beta) / (1 - np.power(beta, np.maximum(numbers, 1)))
    return (weights * numbers.sum() / (weights * numbers).sum()).astype(np.float32)


def masked_mean(values: Float[Array, " b"], mask: Float[Array, " b"]) -> Float[Array, ""]:
    """Return the mean over rows of mask 1; 0 where there are none."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)
