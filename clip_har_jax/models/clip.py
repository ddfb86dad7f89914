"""FlaxCLIPModel: CLIP (Radford et al. 2021) in flax.nnx, with Hugging Face's configuration and call.

transformers 5 removed its Flax classes. This class has the same arguments and outputs, and what training needs besides:
scanned layers, rematerialisation, logical axis names for sharding, and flash attention. Why an own class:
docs/adr/0001-own-flaxclipmodel.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from clip_har_jax.models.configuration import CLIPConfig, TextConfig, VisionConfig, check_config
from clip_har_jax.models.layers import DropPath, Runtime, TowerConfig, apply_layers, layer_norm, linear, make_layers
from clip_har_jax.models.temporal import FrameTransformer, make_block_part


class VisionTransformer(nnx.Module):
    """The image tower up to the pooled, normalised class token; before the projection."""

    def __init__(self, config: VisionConfig, runtime: Runtime, rngs: nnx.Rngs, temporal: str = "mean"):
        dim, patch_dim = config.hidden_size, 3 * config.patch_size**2
        self.config, self.runtime = config, runtime
        normal = nnx.initializers.normal(dim**-0.5)
        self.class_embedding = nnx.Param(normal(rngs.params(), (dim,)), out_sharding=("embed",))
        self.patch_embedding = linear(
            patch_dim, dim, (None, "embed"), rngs, runtime, std=patch_dim**-0.5, use_bias=False
        )
        self.position_embedding = nnx.Param(
            normal(rngs.params(), (config.num_patches + 1, dim)), out_sharding=(None, "embed")
        )
        self.pre_norm = layer_norm(dim, config.layer_norm_eps, rngs, runtime)
        self.layers = make_layers(config, runtime, rngs, make_block_part(temporal, config, runtime))
        self.post_norm = layer_norm(dim, config.layer_norm_eps, rngs, runtime)

    def embed_patches(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Return the input tokens of the first layer, class token first."""
        batch, size, patch = images.shape[0], self.config.image_size, self.config.patch_size
        if images.shape[1:3] != (size, size):
            raise ValueError(f"images are {images.shape[2]}x{images.shape[1]} px, the model takes {size}x{size}")
        grid = size // patch
        # The patch convolution as one matrix product: as fast on GPUs and TPUs, and faster on CPUs.
        images = images[:, : grid * patch, : grid * patch]
        patches = images.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embedding(patches.reshape(batch, grid * grid, patch * patch * 3))
        class_token = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (batch, 1, x.shape[-1]))
        x = jnp.concatenate([class_token, x], axis=1) + self.position_embedding[...].astype(x.dtype)[None]
        return self.pre_norm(x)

    def tokens(
        self, images: Float[Array, "b h w 3"], drop: DropPath | None = None, num_frames: int | None = None
    ) -> Float[Array, "b n d"]:
        """Return the output tokens of the last layer, class token first, before the final norm.

        Args:
          images: or the frames of clips, clip after clip.
          drop: stochastic depth; None: every layer counts.
          num_frames: of each clip; None: images.
        """
        x = self.embed_patches(images)
        return apply_layers(self.layers, x, self.runtime, drop=drop, num_frames=num_frames)

    def __call__(
        self, images: Float[Array, "b h w 3"], drop: DropPath | None = None, num_frames: int | None = None
    ) -> Float[Array, "b d"]:
        if not isinstance(self.layers, Sequence):
            return self.post_norm(self.tokens(images, drop, num_frames)[:, 0])
        # Only the class token of the last layer is needed, which saves a fifteenth of ViT-B/32.
        x = apply_layers(self.layers[:-1], self.embed_patches(images), self.runtime, num_frames=num_frames)
        return self.post_norm(self.layers[-1].first_token(x, num_frames)[:, 0])


class TextTransformer(nnx.Module):
    """The text tower up to the pooled end token; before the projection."""

    def __init__(self, config: TextConfig, runtime: Runtime, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.config, self.runtime = config, runtime
        self.token_embedding = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (config.vocab_size, dim)), out_sharding=("vocab", "embed")
        )
        self.position_embedding = nnx.Param(
            nnx.initializers.normal(0.01)(rngs.params(), (config.context_length, dim)), out_sharding=(None, "embed")
        )
        self.layers = make_layers(config, runtime, rngs)
        self.final_norm = layer_norm(dim, config.layer_norm_eps, rngs, runtime)

    def end_positions(self, input_ids: Int[Array, "b t"]) -> Int[Array, " b"]:
        """Return the position at which each text is pooled: its first end token.

        OpenAI's published configurations have `eos_token_id: 2`. Hugging Face's rule then is to pool at the largest id.
        """
        if self.config.eos_token_id == 2:
            return jnp.argmax(input_ids, axis=-1)
        return jnp.argmax(input_ids == self.config.eos_token_id, axis=-1)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        context: Float[Array, "b n d"] | None = None,
    ) -> Float[Array, "b d"]:
        """Return the pooled features; `context` is inserted after the begin token, like token embeddings."""
        dtype, end = self.runtime.dtype, self.end_positions(input_ids)
        x = self.token_embedding[...].astype(dtype)[input_ids]
        if context is not None:
            x, end = jnp.concatenate([x[:, :1], context.astype(dtype), x[:, 1:]], axis=1), end + context.shape[1]
        length = x.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"texts of {length} tokens; the model takes at most {self.config.context_length}")
        x = x + self.position_embedding[:length].astype(dtype)[None]
        mask = None if attention_mask is None else attention_mask[:, None, None, :].astype(bool)
        x = self.final_norm(apply_layers(self.layers, x, self.runtime, mask=mask, is_causal=True))
        return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]


class CLIPOutput(NamedTuple):
    """The outputs of `FlaxCLIPModel`, with Hugging Face's names; embeddings are L2-normalised."""

    logits_per_image: Float[Array, "i t"]
    logits_per_text: Float[Array, "t i"]
    text_embeds: Float[Array, "t d"]
    image_embeds: Float[Array, "i d"]


def normalize_images(
    images: UInt8[Array, "b *t h w 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b *t h w 3"]:
    """Return the images normalised as CLIP does; on the device, so that uint8 and not float32 images are sent to it."""
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


def _projection(tower: TowerConfig, dim: int, runtime: Runtime, rngs: nnx.Rngs) -> nnx.Linear:
    """Return the projection from the width of a tower to the shared space of images and texts."""
    width = tower.hidden_size
    return linear(width, dim, ("embed", None), rngs, runtime, std=width**-0.5, use_bias=False)


class FlaxCLIPModel(nnx.Module):
    """CLIP with Hugging Face's parameters and call.

    Args:
      config: the sizes.
      runtime: data type, rematerialisation, attention implementation, sharding of activations.
      rngs: source of the random initial weights.
    """

    def __init__(self, config: CLIPConfig, runtime: Runtime = Runtime(), *, rngs: nnx.Rngs):
        check_config(config)
        self.config, self.runtime = config, runtime
        with nnx.use_eager_sharding(False):  # parallel/sharding.py applies the axis names later
            self.text = TextTransformer(config.text, runtime, rngs)
            self.vision = VisionTransformer(config.vision, runtime, rngs, config.temporal)
            self.text_projection = _projection(config.text, config.projection_dim, runtime, rngs)
            self.visual_projection = _projection(config.vision, config.projection_dim, runtime, rngs)
            self.time_head = FrameTransformer(config.projection_dim, rngs) if config.temporal == "head" else None
            self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    def __call__(
        self,
        input_ids: Int[Array, "t n"],
        pixel_values: Float[Array, "i 3 h w"],
        attention_mask: Int[Array, "t n"] | None = None,
    ) -> CLIPOutput:
        """Return the similarity of each image to each text.

        >>> model = FlaxCLIPModel.from_pretrained("model")
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
        logits = jnp.exp(self.logit_scale[...]) * image @ text.T
        return CLIPOutput(logits, logits.T, text, image)

    def get_text_features(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b d"]:
        """Return projected text features, not normalised."""
        return self.text_projection(self.text(input_ids, attention_mask))

    def get_image_features(self, pixel_values: Float[Array, "b 3 h w"]) -> Float[Array, "b d"]:
        """Return projected image features, not normalised."""
        return self.visual_projection(self.vision(pixel_values.transpose(0, 2, 3, 1)))

    def encode_text(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b d"]:
        """Return L2-normalised text embeddings in float32.

        >>> model = FlaxCLIPModel.from_pretrained("model")
        >>> model.encode_text(jnp.zeros((2, 24), jnp.int32)).shape
        (2, 16)
        """
        return l2_normalize(self.get_text_features(input_ids))

    def encode_image(self, images: Float[Array, "b *t h w 3"], drop: DropPath | None = None) -> Float[Array, "b d"]:
        """Return L2-normalised embeddings in float32.

        >>> model = FlaxCLIPModel.from_pretrained("model")
        >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
        >>> model.encode_image(normalize_images(images, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))).shape
        (2, 16)

        Args:
          images: normalised, channels last; or clips [b, t, h, w, 3], whose frames `pool_frames` joins.
          drop: stochastic depth; None: off.
        """
        if images.ndim == 5:
            return self.pool_frames(self.encode_frames(images, drop))
        return l2_normalize(self.visual_projection(self.vision(images.astype(self.runtime.dtype), drop)))

    def encode_prompts(self, input_ids: Int[Array, "p t"], context: Float[Array, "p n w"]) -> Float[Array, "p d"]:
        """Return L2-normalised embeddings of texts with `context` inserted after the begin token."""
        return l2_normalize(self.text_projection(self.text(input_ids, context=context)))

    def encode_frames(self, clips: Float[Array, "b t h w 3"], drop: DropPath | None = None) -> Float[Array, "b t d"]:
        """Return L2-normalised embeddings of each frame of normalised clips; temporal models see the other frames."""
        frames = clips.reshape(-1, *clips.shape[2:]).astype(self.runtime.dtype)
        features = self.visual_projection(self.vision(frames, drop, clips.shape[1]))
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
    def from_pretrained(cls, name_or_folder: str, runtime: Runtime = Runtime()) -> "FlaxCLIPModel":
        """Load a Hub name or a folder in the Hugging Face layout; see `models.pretrained.load_pretrained`."""
        from clip_har_jax.models.pretrained import load_pretrained

        return load_pretrained(name_or_folder, runtime)

    def save_pretrained(self, folder: str) -> None:
        """Write config.json and model.safetensors, which `transformers.CLIPModel.from_pretrained` opens."""
        from clip_har_jax.models.pretrained import save_pretrained

        save_pretrained(self, folder)
