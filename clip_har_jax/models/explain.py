"""Heat maps: the contribution of each image patch to the score of a class.

The decomposition of Gandelsman et al. 2024 (Interpreting CLIP's image representation, equations 4 to 6) for the last
attention before pooling, with the final norm treated as linear. Where a learned query pools the patches, its attention
is the last one, and the MLP after it is left out. It needs no backward pass, which some export formats can't express.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clip_har_jax.models.layers import Attention, Block
from clip_har_jax.models.two_towers import TwoTowers


def patch_embeds(model: TwoTowers, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
    """Return the contribution of each patch to the image embedding (before L2 normalisation) in the last attention.

    Args:
      model: the layers of its image tower stacked or from `unstack`.
      images: normalised, channels last.
    """
    vision = model.vision
    if vision.pool is not None:
        tokens = vision.post_norm(vision.tokens(images))
        return model.project_image(_moved(vision.pool.attention, vision.pool.queries(tokens), tokens))
    x, last = _entering_last(vision.layers, vision.embed_patches(images))
    scale = vision.post_norm.scale
    assert scale is not None
    tokens = last.norm1(x)
    added = _moved(last.attention, tokens[:, :1] if vision.config.pooling == "class" else tokens[:, 1:], tokens)
    added = (added - jnp.mean(added, axis=-1, keepdims=True)) * scale[...][None, None]
    return model.project_image(added)[:, 1:]


def _moved(
    attention: Attention, queries: Float[Array, "b q d"], tokens: Float[Array, "b n d"]
) -> Float[Array, "b n d"]:
    """Return the vector that each token adds to the output of the attention, in the mean over the queries."""
    batch, length, dim = tokens.shape
    heads = attention.num_heads

    def by_head(x: Float[Array, "b n d"]) -> Float[Array, "b h n e"]:
        return x.reshape(batch, x.shape[1], heads, dim // heads).transpose(0, 2, 1, 3)

    query, key = by_head(attention.query(queries)), by_head(attention.key(tokens))
    # Products in place of einsum: ONNX's Einsum has no bfloat16.
    scores = jnp.matmul(query, key.transpose(0, 1, 3, 2)) * (dim // heads) ** -0.5
    weights = jnp.mean(jax.nn.softmax(scores, axis=-1), axis=2).transpose(0, 2, 1)
    value = attention.value(tokens).reshape(batch, length, heads, dim // heads)
    return jnp.matmul((weights[..., None] * value).reshape(tokens.shape), attention.out.kernel[...])


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
