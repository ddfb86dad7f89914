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
from clip_har_jax.models.explain import heat_map, patch_embeds
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
    ) -> tuple[Float[Array, "b g g"], Float[Array, "b n d"]]:
        model = restore(given)
        patches = patch_embeds(model.vision, model.visual_projection.kernel[...], to_floats(images))
        return heat_map(patches, class_weights @ model.classes.kernel[...].T), patches

    def make(name: str, function: Any, uses: tuple[str, ...], inputs: dict[str, Any], *outputs: str) -> Graph:
        return Graph(name, function, {key: params[key] for key in params if key.startswith(uses)}, inputs, outputs)

    vision, classifier = ("vision.", "visual_projection."), ("vision.", "visual_projection.", "classes.")
    return (
        make("image_encoder", encode_image, vision, images_first, "image_embeds"),
        make("text_encoder", encode_text, ("text.", "text_projection."), text, "text_embeds"),
        make("classifier", classify, classifier, images_first, "probs", "logits"),
        make("explainer", explain, classifier, images_first | one_hot, "heat_map", "patch_embeds"),
    )
