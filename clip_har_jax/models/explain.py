"""Where a model looks: what each patch adds to the score of a class.

The decomposition of Gandelsman et al. 2024 (Interpreting CLIP's image representation, equations 4 to 6) for the last
attention layer, the last norm taken as linear. It needs no backward pass, which not all exported formats can express.
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
    """What each patch adds to the image's embedding, before that is normalised, by the last attention layer.

    Args:
      vision: its layers stacked, or as `unstack` gives them.
      projection: from the tower's width to the space that images and texts share.
      images: normalised.
    """
    x, last = _entering_last(vision.layers, vision.embed_patches(images))
    norm, attention, scale = last.norm1, last.attention, vision.post_norm.scale
    assert scale is not None
    x = norm(x)
    batch, length, dim = x.shape
    heads = attention.num_heads
    shape = (batch, length, heads, dim // heads)
    query, key, value = (layer(x).reshape(shape) for layer in (attention.query, attention.key, attention.value))
    # Sums, as ONNX's Einsum has no bfloat16.
    scores = jnp.sum(query[:, :1] * key, axis=-1) * (dim // heads) ** -0.5
    moved = (jax.nn.softmax(scores, axis=1)[..., None] * value).reshape(x.shape)
    added = jnp.matmul(moved, attention.out.kernel[...])
    added = (added - jnp.mean(added, axis=-1, keepdims=True)) * scale[...][None, None]
    return jnp.matmul(added, projection)[:, 1:]


def heat_map(patches: Float[Array, "b n d"], classes: Float[Array, "b d"]) -> Float[Array, "b g g"]:
    """What the patches add to a class's score, without what speaks against the class.

    Args:
      patches: as `patch_embeds` gives them, row after row of the image.
      classes: the direction in the shared space that is the class of each image.

    Returns:
      0 to 1 for each patch, 1 the largest of the image.
    """
    relevance = jax.nn.relu(jnp.sum(patches * classes[:, None], axis=-1))
    heat = relevance / jnp.maximum(jnp.max(relevance, axis=1, keepdims=True), 1e-12)
    grid = round(patches.shape[1] ** 0.5)
    return heat.reshape(heat.shape[0], grid, grid)


def _entering_last(layers: Block | Sequence[Block], x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Block]:
    """What the last block is given, and that block."""
    if isinstance(layers, Sequence):
        for layer in layers[:-1]:
            x = layer(x, None, False)
        return x, layers[-1]
    graphdef, stacked = nnx.split(layers)

    def block(carried: tuple[jax.Array, jax.Array], params: object) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, _ = carried
        return (nnx.merge(graphdef, params)(x, None, False), x), None

    # One block too many is computed; leaving out the last one's weights would copy all the others.
    (_, x), _ = jax.lax.scan(block, (x, x), stacked)
    return x, nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[-1], stacked))
