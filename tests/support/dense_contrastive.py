"""The contrastive losses by way of the whole similarity matrix: the oracle of `training.contrastive`."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def dense_contrastive_loss(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale: Float[Array, ""],
    mask: Float[Array, " b"],
    *,
    kind: str = "softmax",
    label: Int[Array, " b"] | None = None,
    logit_bias: Float[Array, ""] | float = 0.0,
) -> Float[Array, " b"]:
    """Return each pair's loss; the arguments are those of `contrastive_loss`."""
    image, text = (jnp.where(mask[:, None] > 0, side.astype(jnp.float32), 0) for side in (image, text))
    label = jnp.arange(len(mask)) if label is None else label
    valid = mask[None, :] > 0
    positive = (label[:, None] == label[None, :]) & valid

    def row_losses(logits: jax.Array) -> jax.Array:
        if kind == "sigmoid":
            return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, positive), axis=1, where=valid)
        targets = positive / jnp.maximum(jnp.sum(positive, axis=1, keepdims=True), 1)
        return optax.softmax_cross_entropy(jnp.where(valid, logits, -1e30), targets)

    logits = logit_scale * image @ text.T + logit_bias
    losses = row_losses(logits)
    return (losses if kind == "sigmoid" else (losses + row_losses(logits.T)) / 2) * mask
