"""The protocol of two-tower models, and the parts that all families share.

Training, methods, heads, export, explain, planner and service use a model only through `TwoTowers`, and its sizes
through `configuration.TwoTowerConfig`. A family (`clip.py`) defines how its towers are made and projected;
`families.py` lists the families.
"""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from clip_har_jax.errors import UserError
from clip_har_jax.models.configuration import TwoTowerConfig, check_config
from clip_har_jax.models.layers import DropPath, Runtime
from clip_har_jax.models.temporal import IN_BLOCKS, FrameTransformer
from clip_har_jax.models.towers import TextTransformer, VisionTransformer

# The parameters of each tower, including its projection, by prefix; the same in all families.
IMAGE_TOWER, TEXT_TOWER = ("vision.", "visual_projection."), ("text.", "text_projection.")


class TwoTowersOutput(NamedTuple):
    """The outputs of a model, with Hugging Face's names; embeddings are L2-normalised."""

    logits_per_image: Float[Array, "i t"]
    logits_per_text: Float[Array, "t i"]
    text_embeds: Float[Array, "t d"]
    image_embeds: Float[Array, "i d"]


def normalize_images(
    images: UInt8[Array, "b *t h w 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b *t h w 3"]:
    """Return the images normalised for the model; done on the device, so that uint8 images are transferred."""
    shape = (1,) * (images.ndim - 1) + (3,)
    shift, scale = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - shift) / scale


def l2_normalize(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Return `x` with unit length along the last dim, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def mean_class_embeddings(
    embeddings: Float[Array, "p d"], class_of_prompt: Int[Array, " p"], num_classes: int
) -> Float[Array, "c d"]:
    """Return the L2-normalised mean embedding of each class; prompts of a class >= num_classes are padding."""
    sums = jax.ops.segment_sum(embeddings, class_of_prompt, num_classes)
    counts = jax.ops.segment_sum(jnp.ones(len(class_of_prompt)), class_of_prompt, num_classes)
    return l2_normalize(sums / counts[:, None])


class TwoTowers(nnx.Module):
    """An image tower and a text tower that embed into one space.

    A family's class makes its projections in `_make_projections` and applies them in `project_image` and
    `project_text`. Parameters have the names `vision.*`, `visual_projection.*`, `text.*`, `text_projection.*`,
    `logit_scale` and, in some families, `logit_bias`.

    Args:
      config: the sizes.
      runtime: data type, rematerialisation, attention implementation, sharding of activations.
      rngs: source of the random initial weights.
    """

    image_tower: ClassVar[type[VisionTransformer]] = VisionTransformer

    def __init__(self, config: TwoTowerConfig, runtime: Runtime = Runtime(), *, rngs: nnx.Rngs):
        check_config(config)
        self.config, self.runtime = config, runtime
        with nnx.use_eager_sharding(False):  # parallel/sharding.py applies the axis names later
            self.text = TextTransformer(config.text, runtime, rngs) if config.has_texts else None
            self.vision = self.image_tower(config.vision, runtime, rngs, config.temporal)
            self._make_projections(rngs)
            self.time_head = FrameTransformer(config.projection_dim, rngs) if config.temporal == "head" else None
            self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    @abstractmethod
    def _make_projections(self, rngs: nnx.Rngs) -> None:
        """Make the projections and further parameters of the family."""

    @abstractmethod
    def project_image(self, features: Float[Array, "*b v"]) -> Float[Array, "*b d"]:
        """Return an image tower's features in the shared space, not normalised."""

    @abstractmethod
    def project_text(self, features: Float[Array, "*b w"]) -> Float[Array, "*b d"]:
        """Return a text tower's features in the shared space, not normalised."""

    def similarity(self, image: Float[Array, "i d"], text: Float[Array, "t d"]) -> Float[Array, "i t"]:
        """Return the logits of all pairs of images and texts, from L2-normalised embeddings."""
        return jnp.exp(self.logit_scale[...]) * image @ text.T

    def __call__(
        self,
        input_ids: Int[Array, "t n"],
        pixel_values: Float[Array, "i 3 h w"],
        attention_mask: Int[Array, "t n"] | None = None,
    ) -> TwoTowersOutput:
        """Return the similarity of each image to each text.

        >>> model = TwoTowers.from_pretrained("model")
        >>> texts, images = jnp.zeros((2, 24), jnp.int32), jnp.zeros((3, 3, 32, 32))
        >>> model(texts, images).logits_per_image.shape
        (3, 2)

        Args:
          input_ids: token ids, padded after the end token.
          pixel_values: normalised images, channels first as in Hugging Face's model.
          attention_mask: 1 for tokens, 0 for padding; None: no padding is masked.
        """
        text = l2_normalize(self.get_text_features(input_ids, attention_mask))
        image = l2_normalize(self.get_image_features(pixel_values))
        logits = self.similarity(image, text)
        return TwoTowersOutput(logits, logits.T, text, image)

    def get_text_features(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b d"]:
        """Return projected text features, not normalised."""
        return self.project_text(self._text_tower(input_ids, attention_mask))

    @property
    def _text_tower(self) -> TextTransformer:
        if self.text is None:
            raise UserError("this model has an image tower alone; use a model with a text tower")
        return self.text

    def get_image_features(self, pixel_values: Float[Array, "b 3 h w"]) -> Float[Array, "b d"]:
        """Return projected image features, not normalised."""
        return self.project_image(self.vision(pixel_values.transpose(0, 2, 3, 1)))

    def encode_text(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b d"]:
        """Return L2-normalised text embeddings in float32.

        >>> model = TwoTowers.from_pretrained("model")
        >>> model.encode_text(jnp.zeros((2, 24), jnp.int32)).shape
        (2, 16)
        """
        return l2_normalize(self.get_text_features(input_ids))

    def encode_image(self, images: Float[Array, "b *t h w 3"], drop: DropPath | None = None) -> Float[Array, "b d"]:
        """Return L2-normalised embeddings in float32.

        >>> model = TwoTowers.from_pretrained("model")
        >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
        >>> model.encode_image(normalize_images(images, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))).shape
        (2, 16)

        Args:
          images: normalised, channels last; or clips [b, t, h, w, 3], whose frames `pool_frames` joins.
          drop: stochastic depth; None: off.
        """
        if images.ndim == 5:
            return self.pool_frames(self.encode_frames(images, drop))
        return l2_normalize(self.project_image(self.vision(images.astype(self.runtime.dtype), drop)))

    def encode_prompts(self, input_ids: Int[Array, "p t"], context: Float[Array, "p n w"]) -> Float[Array, "p d"]:
        """Return L2-normalised embeddings of texts with `context` inserted after the begin token."""
        return l2_normalize(self.project_text(self._text_tower(input_ids, context=context)))

    def encode_tokens(
        self, images: Float[Array, "b h w 3"], drop: DropPath | None = None, num_frames: int | None = None
    ) -> tuple[Float[Array, "b d"], Float[Array, "b p d"]]:
        """Return the embedding of each image and of each of its patches, L2-normalised, in the space of the texts."""
        tokens = self.vision.tokens(images.astype(self.runtime.dtype), drop, num_frames)
        image, patches = self.vision.pooled(tokens), self.vision.each_patch(tokens)
        return l2_normalize(self.project_image(image)), l2_normalize(self.project_image(patches))

    def frames_in_blocks(self, clips: Float[Array, "b t h w 3"]) -> int | None:
        """Return the number of frames that the blocks of the image tower mix; None: they see each frame alone."""
        return clips.shape[1] if self.config.temporal in IN_BLOCKS else None

    def encode_frames(self, clips: Float[Array, "b t h w 3"], drop: DropPath | None = None) -> Float[Array, "b t d"]:
        """Return L2-normalised embeddings of each frame of normalised clips; temporal models see the other frames."""
        frames = clips.reshape(-1, *clips.shape[2:]).astype(self.runtime.dtype)
        features = self.project_image(self.vision(frames, drop, self.frames_in_blocks(clips)))
        return l2_normalize(features).reshape(*clips.shape[:2], -1)

    def pool_frames(self, frames: Float[Array, "b t d"]) -> Float[Array, "b d"]:
        """Return L2-normalised embeddings of clips from those of their frames."""
        added = 0.0 if self.time_head is None else self.time_head(frames)
        return l2_normalize((frames + added).mean(axis=1))

    def encode_classes(
        self, input_ids: Int[Array, "p t"], class_of_prompt: Int[Array, " p"], num_classes: int
    ) -> Float[Array, "c d"]:
        """Return class embeddings: the L2-normalised mean of the L2-normalised embeddings of a class's prompts."""
        return mean_class_embeddings(self.encode_text(input_ids), class_of_prompt, num_classes)

    @classmethod
    def from_pretrained(cls, name_or_folder: str, runtime: Runtime = Runtime()) -> Any:
        """Load a Hub name or a folder; see `models.pretrained.load_pretrained`.

        Raises:
          UserError: as that function, or the model belongs to another family.
        """
        from clip_har_jax.models.pretrained import load_pretrained

        model = load_pretrained(name_or_folder, runtime)
        if not isinstance(model, cls):
            raise UserError(f"{name_or_folder}: a {type(model).__name__}, not a {cls.__name__}; use load_model")
        return model

    def save_pretrained(self, folder: str, layout: str = "") -> None:
        """Write config.json and model.safetensors, which the `from_pretrained` of transformers opens.

        With the layout "open_clip": open_clip_config.json and open_clip_model.safetensors.
        """
        from clip_har_jax.models.pretrained import save_pretrained

        save_pretrained(self, folder, layout)
