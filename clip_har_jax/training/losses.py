"""Losses over class logits, exact under padding: rows of mask 0 count nowhere."""

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
    """Each row's softmax cross-entropy in nats.

    Args:
      target: each row's share of each class: one-hot, or of several where images are mixed.
      label_smoothing: share of the target that goes to all classes alike (Szegedy et al. 2016).
      focal_gamma: classes found with probability p count (1 - p)^gamma (Lin et al. 2017, equation 4); 0: all alike.
      class_weights: what a class's examples count.
    """
    log_probs = jax.nn.log_softmax(logits)
    smoothed = optax.smooth_labels(target, label_smoothing)
    # Above 0, where a power below 1 has no slope: a p that rounds to 1 would make the gradient NaN.
    focus = jnp.maximum(-jnp.expm1(log_probs), 1e-12) ** focal_gamma if focal_gamma else 1.0
    losses = -jnp.sum(smoothed * focus * log_probs, axis=-1)
    return losses if class_weights is None else losses * (target @ class_weights)


def balanced_weights(counts: Sequence[int], beta: float) -> Float32[np.ndarray, " c"]:
    """Return the weight of each class: inverse to its effective number of examples (Cui et al. 2019, equation 2).

    They average 1 over the examples, so that the learning rate needn't change with them.

    Args:
      counts: examples of each class.
      beta: 0: all alike; towards 1: inverse to the counts.
    """
    numbers = np.asarray(counts, np.float64)
    weights = (1 - beta) / (1 - np.power(beta, np.maximum(numbers, 1)))
    return (weights * numbers.sum() / (weights * numbers).sum()).astype(np.float32)


def masked_mean(values: Float[Array, " b"], mask: Float[Array, " b"]) -> Float[Array, ""]:
    """Return the mean over rows of mask 1; 0 where there are none."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)
