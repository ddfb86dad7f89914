"""The computations of an exported model as JAX functions: everything except decoding and resizing.

They compute the same as the model in a form that other runtimes run faster: layers are unrolled, the last layer
computes only the token that is used, and the normalisation of pixels is folded into the patch embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from clip_har_jax.models.explain import heat_map, patch_embeds
from clip_har_jax.models.heads import Head, image_features
from clip_har_jax.models.layers import unstack
from clip_har_jax.models.params import Params, flat_params, unflatten
from clip_har_jax.models.two_towers import IMAGE_TOWER, TEXT_TOWER, TwoTowers
from clip_har_jax.preprocess import Preprocess

Shape = tuple[int | str, ...]  # "b" is a variable batch size


@dataclass(frozen=True)
class Graph:
    """A function of named arrays.

    Attributes:
      function: of `params` and the inputs in order; returns a tuple of arrays named `outputs`.
      params: its weights, by dotted path.
      inputs: name -> (data type, shape).
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    params: Params
    inputs: dict[str, tuple[str, Shape]]
    outputs: tuple[str, ...]

    def specs(self, batch: Any) -> list[jax.ShapeDtypeStruct]:
        """Return the inputs' shapes and types for a batch size, which may be symbolic."""
        return [
            jax.ShapeDtypeStruct(tuple(batch if size == "b" else size for size in shape), np.dtype(dtype))
            for dtype, shape in self.inputs.values()
        ]


class MatMulLinear(nnx.Linear):
    """`nnx.Linear` as one matrix product of any rank; ONNX Runtime runs the usual export 1.1 times slower."""

    def __call__(self, x: Float[Array, "*b i"], out_sharding: Any = None) -> Float[Array, "*b o"]:
        y = jnp.matmul(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


def make_graphs(model: TwoTowers, preprocess: Preprocess, head: Head, temperature: float) -> tuple[Graph, ...]:
    """Return the image encoder, the text encoder, the classifier and the explainer of a model.

    Args:
      model: is modified: don't use it afterwards.
      preprocess: its normalisation is part of the graphs.
      head: from image features to class logits.
      temperature: divides the logits.
    """
    whole: Any = model  # its layers are lists from here on
    whole.head = head
    for tower in (whole.vision, whole.text):
        tower.layers = nnx.List(unstack(tower.layers))
    for _, module in nnx.iter_graph(whole):
        if type(module) is nnx.Linear:
            module.__class__ = MatMulLinear
    _fold_normalisation(whole.vision, preprocess)
    graphdef, params = nnx.graphdef(whole), flat_params(whole)
    num_classes = head.classes.kernel.shape[1]
    images_first = {"image": ("uint8", ("b", preprocess.image_size_px, preprocess.image_size_px, 3))}
    one_hot = {"class_weights": ("float32", ("b", num_classes))}
    text = {"input_ids": ("int32", ("b", model.config.text.context_length))}

    def restore(given: Mapping[str, Any]) -> Any:
        # Merging needs every parameter; unused ones are scalars, which exporters drop.
        return nnx.merge(graphdef, unflatten({name: given.get(name, np.float32(0)) for name in params}))

    def encode_image(given: Params, images: UInt8[Array, "b h w 3"]) -> tuple[Float[Array, "b d"]]:
        return (restore(given).encode_image(images.astype(jnp.float32)),)

    def encode_text(given: Params, input_ids: Int[Array, "b t"]) -> tuple[Float[Array, "b d"]]:
        return (restore(given).encode_text(input_ids),)

    def classify(given: Params, images: UInt8[Array, "b h w 3"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
        model = restore(given)
        logits = model.head(image_features(model, images.astype(jnp.float32), model.head.needs_patches)) / temperature
        return jax.nn.softmax(logits), logits

    def explain(
        given: Params, images: UInt8[Array, "b h w 3"], class_weights: Float[Array, "b c"]
    ) -> tuple[Float[Array, "b g g"], Float[Array, "b n d"]]:
        model = restore(given)
        patches = patch_embeds(model, images.astype(jnp.float32))
        return heat_map(patches, jnp.matmul(class_weights, model.head.classes.kernel[...].T)), patches

    def make(name: str, function: Any, uses: tuple[str, ...], inputs: dict[str, Any], *outputs: str) -> Graph:
        return Graph(name, function, {key: params[key] for key in params if key.startswith(uses)}, inputs, outputs)

    return (
        make("image_encoder", encode_image, IMAGE_TOWER, images_first, "image_embeds"),
        make("text_encoder", encode_text, TEXT_TOWER, text, "text_embeds"),
        make("classifier", classify, (*IMAGE_TOWER, "head."), images_first, "probs", "logits"),
        make("explainer", explain, (*IMAGE_TOWER, "head.classes."), images_first | one_hot, "heat_map", "patch_embeds"),
    )


def _fold_normalisation(vision: Any, preprocess: Preprocess) -> None:
    """Make a vision tower take pixels of 0 to 255: (pixels / 255 - mean) / std is linear, like the patch embedding."""
    mean, std = (np.asarray(values, np.float64)[None, :, None] for values in (preprocess.mean, preprocess.std))
    kernel = np.asarray(vision.patch_embedding.kernel[...], np.float64)
    of_channels = kernel.reshape(-1, 3, kernel.shape[-1])  # a flattened patch has its channels last
    positions = np.array(vision.position_embedding[...])
    positions[vision.config.num_class_tokens :] -= (of_channels * mean / std).sum(axis=(0, 1)).astype(np.float32)
    vision.patch_embedding.kernel[...] = jnp.asarray((of_channels / (255 * std)).reshape(kernel.shape), jnp.float32)
    vision.position_embedding[...] = jnp.asarray(positions)
