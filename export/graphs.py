"""What an exported model computes, as JAX functions: everything but decoding and resizing is inside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, UInt8

from clip_har_jax.models.clip import FlaxCLIPModel, normalize_images
from clip_har_jax.models.layers import unstack
from clip_har_jax.models.params import Params, flat_params, unflatten
from clip_har_jax.preprocess import Preprocess

Shape = tuple[int | str, ...]  # "b" is a free batch size


@dataclass(frozen=True)
class Graph:
    """A function of named arrays.

    Attributes:
      function: of `params` and the inputs in order; gives a tuple of arrays named `outputs`.
      params: what it computes with, by dotted path.
      inputs: name -> (data type, shape).
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    params: Params
    inputs: dict[str, tuple[str, Shape]]
    outputs: tuple[str, ...]

    def specs(self, batch: Any) -> list[jax.ShapeDtypeStruct]:
        """The inputs' shapes and types for a batch size, which may be symbolic."""
        return [
            jax.ShapeDtypeStruct(tuple(batch if size == "b" else size for size in shape), np.dtype(dtype))
            for dtype, shape in self.inputs.values()
        ]


def make_graphs(
    model: FlaxCLIPModel, preprocess: Preprocess, classes: Float32[np.ndarray, "c d"], scale: float
) -> tuple[Graph, ...]:
    """The image encoder, the text encoder, the classifier and the explainer of a model.

    Args:
      model: whose layers are unstacked here.
      preprocess: whose normalisation the graphs do.
      classes: class embeddings.
      scale: what cosine similarities are multiplied by: exp(logit_scale) / temperature.
    """
    whole: Any = model  # not a FlaxCLIPModel any more: its layers unstacked, its classes added
    for tower in (whole.vision, whole.text):
        tower.layers = nnx.List(unstack(tower.layers))
    # As a layer, so that exporters make one operator of it.
    whole.classes = nnx.Linear(*classes.T.shape, use_bias=False, rngs=nnx.Rngs(0))
    whole.classes.kernel[...] = jnp.asarray(scale * classes.T)
    graphdef, params = nnx.graphdef(whole), flat_params(whole)
    images_first = {"image": ("uint8", ("b", preprocess.image_size_px, preprocess.image_size_px, 3))}
    one_hot = {"class_weights": ("float32", ("b", len(classes)))}
    text = {"input_ids": ("int32", ("b", model.config.text.context_length))}

    def restore(given: Mapping[str, Any]) -> Any:
        # Merging needs every parameter; those that a graph doesn't use are scalars, which no exporter keeps.
        return nnx.merge(graphdef, unflatten({name: given.get(name, np.float32(0)) for name in params}))

    def to_floats(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        return normalize_images(images, preprocess.mean, preprocess.std)

    def encode_image(given: Params, images: UInt8[Array, "b h w 3"]) -> tuple[Float[Array, "b d"]]:
        return (restore(given).encode_image(to_floats(images)),)

    def encode_text(given: Params, input_ids: Int[Array, "b t"]) -> tuple[Float[Array, "b d"]]:
        return (restore(given).encode_text(input_ids),)

    def classify(given: Params, images: UInt8[Array, "b h w 3"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
        model = restore(given)
        logits = model.classes(model.encode_image(to_floats(images)))
        return jax.nn.softmax(logits), logits

    def explain(
        given: Params, images: UInt8[Array, "b h w 3"], class_weights: Float[Array, "b c"]
    ) -> tuple[Float[Array, "b g g"]]:
        return (heat_map(restore(given), to_floats(images), class_weights),)

    def make(name: str, function: Any, uses: tuple[str, ...], inputs: dict[str, Any], *outputs: str) -> Graph:
        return Graph(name, function, {key: params[key] for key in params if key.startswith(uses)}, inputs, outputs)

    vision, classifier = ("vision.", "visual_projection."), ("vision.", "visual_projection.", "classes.")
    return (
        make("image_encoder", encode_image, vision, images_first, "image_embeds"),
        make("text_encoder", encode_text, ("text.", "text_projection."), text, "text_embeds"),
        make("classifier", classify, classifier, images_first, "probs", "logits"),
        make("explainer", explain, classifier, images_first | one_hot, "heat_map"),
    )


def heat_map(model: Any, images: Float[Array, "b h w 3"], class_weights: Float[Array, "b c"]) -> Float[Array, "b g g"]:
    """What each patch adds to a class's score by the last attention layer, without what speaks against the class.

    The decomposition of Gandelsman et al. 2024 (Interpreting CLIP's image representation, equations 4 to 6) for the
    last layer, the last norm taken as linear. It needs no backward pass, which not all formats can express.

    Args:
      model: with unstacked layers and `classes`.
      images: normalised.
      class_weights: 1 at the class that is explained, else 0.

    Returns:
      0 to 1 for each patch, 1 the largest of the image.
    """
    vision = model.vision
    x = vision.embed_patches(images)
    for layer in vision.layers[:-1]:
        x = layer(x, None, False)
    norm, attention = vision.layers[-1].norm1, vision.layers[-1].attention
    x = norm(x)
    batch, length, dim = x.shape
    heads = attention.num_heads
    shape = (batch, length, heads, dim // heads)
    query, key, value = (layer(x).reshape(shape) for layer in (attention.query, attention.key, attention.value))
    scores = jnp.einsum("bhd,bnhd->bhn", query[:, 0], key) * (dim // heads) ** -0.5
    moved = (jnp.einsum("bhn->bnh", jax.nn.softmax(scores))[..., None] * value).reshape(x.shape)
    added = moved @ attention.out.kernel[...]
    added = (added - jnp.mean(added, axis=-1, keepdims=True)) * vision.post_norm.scale[...][None, None]
    direction = class_weights @ (model.visual_projection.kernel[...] @ model.classes.kernel[...]).T
    relevance = jax.nn.relu(jnp.einsum("bnd,bd->bn", added, direction))[:, 1:]
    heat = relevance / jnp.maximum(jnp.max(relevance, axis=1, keepdims=True), 1e-12)
    grid = vision.config.image_size // vision.config.patch_size
    return heat.reshape(batch, grid, grid)
