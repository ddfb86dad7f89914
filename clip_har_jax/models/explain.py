"""Heat maps: the contribution of each image patch to the score of a class.

The decomposition of Gandelsman et al. 2024 (Interpreting CLIP's image representation, equations 4 to 6) for the last
attention layer, with the final norm treated as linear. It needs no backward pass, which some export formats can't
express.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clip_har_jax.models.clip import VisionTransformer
from clip_har_jax.models.layers import Block


def patch_embeds(
    vision: VisionTransformer, projection: Float[Array, "w d"], images: Float[Array, "b h w2 3"]
) -> Float[Array, "b n d"]:
    """Return the contribution of each patch to the image embedding (before L2 normalisation) in the last attention.

    Args:
      vision: image tower, its layers stacked or from `unstack`.
      projection: matrix from the tower's width to the shared space.
      images: normalised, channels last.
    """
    x, last = _entering_last(vision.layers, vision.embed_patches(images))
    norm, attention, scale = last.norm1, last.attention, vision.post_norm.scale
    assert scale is not None
    x = norm(x)
    batch, length, dim = x.shape
    heads = attention.num_heads
    shape = (batch, length, heads, dim // heads)
    query, key, value = (layer(x).reshape(shape) for layer in (attention.query, attention.key, attention.value))
    # Products and sums instead of einsum: ONNX's Einsum has no bfloat16.
    scores = jnp.sum(query[:, :1] * key, axis=-1) * (dim // heads) ** -0.5
    moved = (jax.nn.softmax(scores, axis=1)[..., None] * value).reshape(x.shape)
    added = jnp.matmul(moved, attention.out.kernel[...])
    added = (added - jnp.mean(added, axis=-1, keepdims=True)) * scale[...][None, None]
    return jnp.matmul(added, projection)[:, 1:]


def heat_map(patches: Float[Array, "b n d"], classes: Float[Array, "b d"]) -> Float[Array, "b g g"]:
    """Return the positive contributions of the patches to the score of a class, as a square map.

    Args:
      patches: from `patch_embeds`, in row-major order.
      classes: class embedding for each image.

    Returns:
      Values from 0 to 1; the largest of each image is 1.
    """
    relevance = jax.nn.relu(jnp.sum(patches * classes[:, None], axis=-1))
    heat = relevance / jnp.maximum(jnp.max(relevance, axis=1, keepdims=True), 1e-12)
    grid = round(patches.shape[1] ** 0.5)
    return heat.reshape(heat.shape[0], grid, grid)


def _entering_last(layers: Block | Sequence[Block], x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Block]:
    """Return the input of the last block, and that block."""
    if isinstance(layers, Sequence):
        for layer in layers[:-1]:
            x = layer(x, None, False)
        return x, layers[-1]
    graphdef, stacked = nnx.split(layers)

    def block(carried: tuple[jax.Array, jax.Array], params: object) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, _ = carried
        return (nnx.merge(graphdef, params)(x, None, False), x), None

    # The scan also computes the last block, in vain: without it the weights of all others would be copied.
    (_, x), _ = jax.lax.scan(block, (x, x), stacked)
    return x, nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[-1], stacked))
