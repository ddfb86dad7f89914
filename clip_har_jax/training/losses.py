"""Losses over class logits, exact under padding: rows of mask 0 have no effect."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32


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
    # Kept above 0: x^gamma with gamma < 1 has no finite slope at 0, so a p that rounds to 1 would give NaN.
    focus = jnp.maximum(-jnp.expm1(log_probs), 1e-12) ** focal_gamma if focal_gamma else 1.0
    losses = -jnp.sum(smoothed * focus * log_probs, axis=-1)
    return losses if class_weights is None else losses * (target @ class_weights)


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
