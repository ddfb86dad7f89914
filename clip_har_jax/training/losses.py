"""Losses over logits, exact under padding: rows of mask 0 count nowhere."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "b c"], label: Int[Array, " b"], label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Each row's softmax cross-entropy in nats, against labels smoothed towards uniform (Szegedy et al. 2016)."""
    target = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, target)


def masked_mean(values: Float[Array, " b"], mask: Float[Array, " b"]) -> Float[Array, ""]:
    """The mean over rows of mask 1; 0 where there are none."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)
