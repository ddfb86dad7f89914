"""The towers of two-tower models: a transformer over the patches of an image, and one over the tokens of a text.

Families differ in the pooling of a tower's tokens and in a few options, listed in `configuration.py`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.models.layers import (
    MLP,
    Attention,
    DropPath,
    Runtime,
    TowerConfig,
    apply_layers,
    layer_norm,
    linear,
    make_layers,
)
from clip_har_jax.models.temporal import make_block_part


class AttentionPooling(nnx.Module):
    """Attention of one learned query over all tokens, then an MLP (Zhai et al. 2022, section 3.3; SigLIP's pooling)."""

    def __init__(self, config: TowerConfig, runtime: Runtime, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.probe = nnx.Param(nnx.initializers.normal(dim**-0.5)(rngs.params(), (dim,)), out_sharding=("embed",))
        self.attention = Attention(config, runtime, rngs)
        self.norm = layer_norm(dim, config.layer_norm_eps, rngs, runtime)
        self.mlp = MLP(config, runtime, rngs)

    def queries(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b 1 d"]:
        """Return the learned query, once per image."""
        return jnp.broadcast_to(self.probe[...].astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[2]))

    def __call__(
        self, tokens: Float[Array, "b n d"], mask: Bool[Array, "b 1 1 n"] | None = None
    ) -> Float[Array, "b d"]:
        """Return the pooled tokens; `mask` names those that count, None: all."""
        x = self.attention(tokens, mask, False, queries=self.queries(tokens))
        return (x + self.mlp(self.norm(x)))[:, 0]

    def each(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Return each token pooled as if it were the only one."""
        x = self.attention.out(self.attention.value(tokens))
        return x + self.mlp(self.norm(x))


class VisionTransformer(nnx.Module):
    """The image tower up to the pooled features; before the projection."""

    def __init__(self, config: VisionConfig, runtime: Runtime, rngs: nnx.Rngs, temporal: str = "mean"):
        dim, patch_dim, by_attention = config.hidden_size, 3 * config.patch_size**2, config.pooling == "attention"
        self.config, self.runtime = config, runtime
        normal = nnx.initializers.normal(dim**-0.5)
        self.class_embedding = (
            nnx.Param(normal(rngs.params(), (dim,)), out_sharding=("embed",)) if config.num_class_tokens else None
        )
        self.patch_embedding = linear(
            patch_dim, dim, (None, "embed"), rngs, runtime, std=patch_dim**-0.5, use_bias=by_attention
        )
        self.position_embedding = nnx.Param(
            normal(rngs.params(), (config.num_tokens, dim)), out_sharding=(None, "embed")
        )
        self.pre_norm = layer_norm(dim, config.layer_norm_eps, rngs, runtime) if config.pre_norm else None
        self.layers = make_layers(config, runtime, rngs, make_block_part(temporal, config, runtime))
        self.post_norm = layer_norm(dim, config.layer_norm_eps, rngs, runtime)
        self.pool = AttentionPooling(config, runtime, rngs) if by_attention else None

    def embed_patches(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Return the input tokens of the first layer; the class token, if there is one, comes first."""
        batch, size, patch = images.shape[0], self.config.image_size, self.config.patch_size
        if images.shape[1:3] != (size, size):
            raise ValueError(f"images are {images.shape[2]}x{images.shape[1]} px, the model takes {size}x{size}")
        grid = size // patch
        # The patch convolution as one matrix product: as fast on GPUs and TPUs, and faster on CPUs.
        images = images[:, : grid * patch, : grid * patch]
        patches = images.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embedding(patches.reshape(batch, grid * grid, patch * patch * 3))
        if self.class_embedding is not None:
            class_token = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (batch, 1, x.shape[-1]))
            x = jnp.concatenate([class_token, x], axis=1)
        x = x + self.position_embedding[...].astype(x.dtype)[None]
        return x if self.pre_norm is None else self.pre_norm(x)

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
        if self.config.pooling == "class" and isinstance(self.layers, Sequence):
            # Only the class token of the last layer is needed, which saves a fifteenth of ViT-B/32.
            x = apply_layers(self.layers[:-1], self.embed_patches(images), self.runtime, num_frames=num_frames)
            return self.post_norm(self.layers[-1].first_token(x, num_frames)[:, 0])
        return self.pooled(self.tokens(images, drop, num_frames))

    def pooled(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Return the features of the image from the last layer's tokens."""
        if self.pool is not None:
            return self.pool(self.post_norm(tokens))
        return self.post_norm(tokens[:, 0] if self.config.pooling == "class" else jnp.mean(tokens[:, 1:], axis=1))

    def each_patch(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b p d"]:
        """Return the features of each patch from the last layer's tokens, in the same space as those of the image."""
        patches = self.post_norm(tokens[:, self.config.num_class_tokens :])
        return patches if self.pool is None else self.pool.each(patches)


class TextTransformer(nnx.Module):
    """The text tower up to the pooled token; before the projection."""

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
        """Return the position of the first end token of each text.

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
        """Return the pooled features; `context` is inserted after the begin token, like token embeddings.

        Texts that are pooled at their last position have no begin token: for them the context comes first.
        """
        dtype, end, by_last = self.runtime.dtype, self.end_positions(input_ids), self.config.pooling == "last"
        x = self.token_embedding[...].astype(dtype)[input_ids]
        if context is not None:
            start = 0 if by_last else 1
            x = jnp.concatenate([x[:, :start], context.astype(dtype), x[:, start:]], axis=1)
            end = end + context.shape[1]
        length = x.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"texts of {length} tokens; the model takes at most {self.config.context_length}")
        x = x + self.position_embedding[:length].astype(dtype)[None]
        mask = None if attention_mask is None else attention_mask[:, None, None, :].astype(bool)
        x = self.final_norm(apply_layers(self.layers, x, self.runtime, mask=mask, is_causal=self.config.causal))
        return x[:, -1] if by_last else jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]


def project(tower: TowerConfig, dim: int, runtime: Runtime, rngs: nnx.Rngs, use_bias: bool = False) -> nnx.Linear:
    """Return the projection from the width of a tower to the shared space of images and texts."""
    width = tower.hidden_size
    return linear(width, dim, ("embed", None), rngs, runtime, std=width**-0.5, use_bias=use_bias)
