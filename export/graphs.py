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
from clip_har_jax.models.heads import Features, Head, image_features
from clip_har_jax.models.layers import unstack
from clip_har_jax.models.params import Params, flat_params, unflatten
from clip_har_jax.models.temporal import HEAD as TIME_HEAD
from clip_har_jax.models.temporal import IN_BLOCKS
from clip_har_jax.models.two_towers import IMAGE_TOWER, TEXT_TOWER, TwoTowers
from clip_har_jax.preprocess import Preprocess

Shape = tuple[int | str, ...]  # "b" is a variable batch size, "t" a variable number of frames


class NotExpressible(Exception):  # noqa: N818
    """A format has no operation for a part of the model; the message names the part."""


@dataclass(frozen=True)
class Graph:
    """A function of named arrays.

    Attributes:
      function: takes `params` and the inputs in order; returns a tuple of arrays named `outputs`.
      params: its weights, by dotted path.
      inputs: name -> (data type, shape).
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    params: Params
    inputs: dict[str, tuple[str, Shape]]
    outputs: tuple[str, ...]

    def specs(self, batch: Any, frames: Any) -> list[jax.ShapeDtypeStruct]:
        """Return the inputs' shapes and types for a batch size and a number of frames, which may be symbolic."""
        free = {"b": batch, "t": frames}
        return [
            jax.ShapeDtypeStruct(tuple(free.get(size, size) for size in shape), np.dtype(dtype))  # type: ignore[arg-type]
            for dtype, shape in self.inputs.values()
        ]


@dataclass(frozen=True)
class ClipShape:
    """The clips that a model takes.

    Attributes:
      num_frames: frames of a clip.
      whole: write a graph of whole clips, and a frame encoder besides the image encoder.
    """

    num_frames: int
    whole: bool


class MatMulLinear(nnx.Linear):
    """`nnx.Linear` as one matrix product of any rank; ONNX Runtime runs the usual export 1.1 times slower."""

    def __call__(self, x: Float[Array, "*b i"], out_sharding: Any = None) -> Float[Array, "*b o"]:
        y = jnp.matmul(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


class GraphMaker:
    """Makes the graphs of a model from its parameters.

    Args:
      model: is modified: don't use it afterwards.
      preprocess: its normalisation is part of the graphs.
      head: from image features to class logits.
      temperature: divides the logits.
      multi_label: probabilities are the sigmoid of each label by itself, and not the softmax.
    """

    def __init__(
        self, model: TwoTowers, preprocess: Preprocess, head: Head, temperature: float, multi_label: bool = False
    ):
        whole: Any = model  # its layers are lists from here on
        self.config, self.head, self.temperature = model.config, head, temperature
        self._to_probs = jax.nn.sigmoid if multi_label else jax.nn.softmax
        whole.head = head
        for tower in (whole.vision, whole.text):
            tower.layers = nnx.List(unstack(tower.layers))
        for _, module in nnx.iter_graph(whole):
            if type(module) is nnx.Linear:
                module.__class__ = MatMulLinear
        _fold_normalisation(whole.vision, preprocess)
        self._graphdef, self._params = nnx.graphdef(whole), flat_params(whole)
        side = preprocess.image_size_px
        self._image = {"image": ("uint8", ("b", side, side, 3))}
        self._clip_shape = (side, side, 3)

    def _restore(self, given: Mapping[str, Any]) -> Any:
        # Merging needs every parameter; unused ones are scalars, which exporters drop.
        return nnx.merge(self._graphdef, unflatten({name: given.get(name, np.float32(0)) for name in self._params}))

    def _make(
        self,
        name: str,
        function: Any,
        uses: tuple[str, ...],
        inputs: dict[str, Any],
        *outputs: str,
        over_time: bool = False,
    ) -> Graph:
        """Return a graph with the parameters whose names begin with `uses`, with or without those of time attention."""
        used = [key for key in self._params if key.startswith(uses) and (over_time or ".time." not in key)]
        params = {key: self._params[key] for key in used}
        return Graph(name, function, params, inputs, outputs)

    def of_images(self) -> tuple[Graph, ...]:
        """Return the image encoder, the text encoder, the classifier and the explainer."""
        restore = self._restore

        def encode_text(given: Params, input_ids: Int[Array, "b t"]) -> tuple[Float[Array, "b d"]]:
            return (restore(given).encode_text(input_ids),)

        def classify(given: Params, images: UInt8[Array, "b h w 3"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
            model = restore(given)
            features = image_features(model, images.astype(jnp.float32), model.head.needs_patches)
            logits = model.head(features) / self.temperature
            return self._to_probs(logits), logits

        def explain(
            given: Params, images: UInt8[Array, "b h w 3"], class_weights: Float[Array, "b c"]
        ) -> tuple[Float[Array, "b g g"], Float[Array, "b n d"]]:
            model = restore(given)
            patches = patch_embeds(model, images.astype(jnp.float32))
            return heat_map(patches, jnp.matmul(class_weights, model.head.classes.kernel[...].T)), patches

        one_hot = {"class_weights": ("float32", ("b", self.head.classes.kernel.shape[1]))}
        text = {"input_ids": ("int32", ("b", self.config.text.context_length))}
        make = self._make
        return (
            self._encoder("image_encoder", "image_embeds"),
            make("text_encoder", encode_text, TEXT_TOWER, text, "text_embeds"),
            make("classifier", classify, (*IMAGE_TOWER, "head."), self._image, "probs", "logits"),
            make(
                "explainer", explain, (*IMAGE_TOWER, "head.classes."), self._image | one_hot, "heat_map", "patch_embeds"
            ),
        )

    def _encoder(self, name: str, output: str) -> Graph:
        def encode(given: Params, images: UInt8[Array, "b h w 3"]) -> tuple[Float[Array, "b d"]]:
            return (self._restore(given).encode_image(images.astype(jnp.float32)),)

        return self._make(name, encode, IMAGE_TOWER, self._image, output)

    def of_clips(self, clips: ClipShape) -> tuple[Graph, ...]:
        """Return the graphs of clips: one of a whole clip, and if possible an encoder of frames and a clip head.

        In some models a single frame has no features: the tower mixes the frames, or the head needs the patches of all
          frames. If the tower mixes them, the number of frames is that of `clips`; otherwise it is variable.
        """
        restore = self._restore
        in_tower = self.config.temporal in IN_BLOCKS
        apart = not in_tower and not self.head.needs_patches

        def answer(model: Any, features: Features) -> tuple[jax.Array, jax.Array, jax.Array]:
            logits = model.head(features) / self.temperature
            return self._to_probs(logits), logits, features.image

        def classify(given: Params, frames: UInt8[Array, "b t h w 3"]) -> tuple[jax.Array, jax.Array, jax.Array]:
            model = restore(given)
            return answer(model, image_features(model, frames.astype(jnp.float32), model.head.needs_patches))

        def pool(given: Params, frames: Float[Array, "b t d"]) -> tuple[jax.Array, jax.Array, jax.Array]:
            model = restore(given)
            return answer(model, Features(model.pool_frames(frames), None, frames))

        outputs = ("probs", "logits", "clip_embeds")
        graphs: tuple[Graph, ...] = ()
        if clips.whole or not apart:
            size = clips.num_frames if in_tower else "t"
            frames = {"frames": ("uint8", ("b", size, *self._clip_shape))}
            uses = (*IMAGE_TOWER, TIME_HEAD, "head.")
            graphs += (self._make("clip_classifier", classify, uses, frames, *outputs, over_time=True),)
        if clips.whole and apart:
            graphs += (self._encoder("frame_encoder", "frame_embeds"),)
        if apart:
            embeds = {"frame_embeds": ("float32", ("b", "t", self.config.projection_dim))}
            graphs += (self._make("clip_head", pool, (TIME_HEAD, "head."), embeds, *outputs),)
        return graphs


def make_graphs(
    model: TwoTowers,
    preprocess: Preprocess,
    head: Head,
    temperature: float,
    clips: ClipShape | None = None,
    multi_label: bool = False,
) -> tuple[Graph, ...]:
    """Return the graphs of a model, see `GraphMaker`; without `clips`, only those of images."""
    maker = GraphMaker(model, preprocess, head, temperature, multi_label)
    return maker.of_images() + (maker.of_clips(clips) if clips is not None else ())


def _fold_normalisation(vision: Any, preprocess: Preprocess) -> None:
    """Make a vision tower take pixels of 0 to 255: (pixels / 255 - mean) / std is linear, like the patch embedding."""
    mean, std = (np.asarray(values, np.float64)[None, :, None] for values in (preprocess.mean, preprocess.std))
    kernel = np.asarray(vision.patch_embedding.kernel[...], np.float64)
    of_channels = kernel.reshape(-1, 3, kernel.shape[-1])  # a flattened patch has its channels last
    positions = np.array(vision.position_embedding[...])
    positions[vision.config.num_class_tokens :] -= (of_channels * mean / std).sum(axis=(0, 1)).astype(np.float32)
    vision.patch_embedding.kernel[...] = jnp.asarray((of_channels / (255 * std)).reshape(kernel.shape), jnp.float32)
    vision.position_embedding[...] = jnp.asarray(positions)
