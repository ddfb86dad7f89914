"""SigLIP 2 NaFlex (Tschannen et al. 2025, section 2.4.2): images of any aspect, in Hugging Face's layout `siglip2`.

An image is resized to at most so many patches, close to its own aspect. The position embeddings are interpolated to the
grid of each image, and the padding after its patches is masked. Texts are those of SigLIP.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from PIL import Image

from clip_har_jax.errors import UserError
from clip_har_jax.models import siglip
from clip_har_jax.models.configuration import TwoTowerConfig, read_tower
from clip_har_jax.models.layers import DropPath, apply_layers
from clip_har_jax.models.siglip import FlaxSiglipModel, SiglipConfig
from clip_har_jax.models.towers import VisionTransformer
from clip_har_jax.models.two_towers import TwoTowersOutput, l2_normalize
from clip_har_jax.patches import GRID_BITS
from clip_har_jax.preprocess import HALF, Preprocess

PATCH_SIZE_PX, NUM_PATCHES = 16, 256  # Hugging Face's defaults, which are those of all published models


@dataclass(frozen=True)
class Siglip2Config(SiglipConfig):
    """The configuration of a SigLIP 2 NaFlex."""

    family: ClassVar[str] = "siglip2"


def unpack(
    images: Float[Array, "b n p 3"],
) -> tuple[Float[Array, "b m q"], Int[Array, "b 2"]]:
    """Return the patches of packed images and the grid of each, its rows and columns.

    Args:
      images: from `patches.pack_patches`, normalised: brighter pixels of the first row are set bits.
    """
    header = images[:, 0]
    bits = header[:, 1 : 1 + GRID_BITS, :2] > header[:, :1, :2]
    grid = jnp.sum(bits * 2 ** jnp.arange(GRID_BITS)[None, :, None], axis=1)
    # A row of zeros stands for an image that can't be read; it counts nowhere, but must stay finite.
    return images[:, 1:].reshape(images.shape[0], images.shape[1] - 1, -1), jnp.maximum(grid, 1)


def grid_mask(grid: Int[Array, "b 2"], length: int) -> Bool[Array, "b n"]:
    """Return which of `length` patches belong to a grid."""
    return jnp.arange(length)[None] < jnp.prod(grid, axis=1, keepdims=True)


def interpolation_weights(place: Int[Array, "b n"], count: Int[Array, "b 1"], size: int) -> Float[Array, "b n s"]:
    """Return the weights of `size` source points at each place of `count` points of the same line.

    Bilinear with antialiasing, as `F.interpolate(mode="bilinear", align_corners=False, antialias=True)` in torch: a
    triangle around each point, as wide as the distance of the coarser points.
    """
    scale = size / count.astype(jnp.float32)
    center = (place + 0.5) * scale - 0.5
    distance = jnp.abs(jnp.arange(size, dtype=jnp.float32)[None, None] - center[..., None])
    weights = jnp.maximum(1 - distance / jnp.maximum(scale, 1)[..., None], 0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


class NaFlexTransformer(VisionTransformer):
    """The image tower of NaFlex; its input is packed patches."""

    def __call__(
        self, images: Float[Array, "b n p 3"], drop: DropPath | None = None, num_frames: int | None = None
    ) -> Float[Array, "b d"]:
        patches, grid = unpack(images)
        return self.encode(patches, grid, grid_mask(grid, patches.shape[1]), drop)

    def encode(
        self,
        patches: Float[Array, "b n q"],
        grid: Int[Array, "b 2"],
        mask: Bool[Array, "b n"],
        drop: DropPath | None = None,
    ) -> Float[Array, "b d"]:
        """Return the features of images.

        Args:
          patches: normalised, each flattened row by row, channels last.
          grid: rows and columns of each image.
          mask: the patches that belong to the image.
          drop: stochastic depth; None: off.
        """
        x = self.patch_embedding(patches)
        x = x + self.positions(grid, patches.shape[1]).astype(x.dtype)
        keys = mask[:, None, None, :]
        x = self.post_norm(apply_layers(self.layers, x, self.runtime, mask=keys, drop=drop))
        assert self.pool is not None
        return self.pool(x, keys)

    def positions(self, grid: Int[Array, "b 2"], length: int) -> Float[Array, "b n d"]:
        """Return the position embeddings, interpolated to the grid of each image; those of padding are its first."""
        side = math.isqrt(self.config.num_patches)
        index = jnp.where(grid_mask(grid, length), jnp.arange(length)[None], 0)
        rows, columns = grid[:, :1], grid[:, 1:]
        vertical = interpolation_weights(index // columns, rows, side)
        horizontal = interpolation_weights(index % columns, columns, side)
        weights = (vertical[..., :, None] * horizontal[..., None, :]).reshape(*index.shape, side * side)
        return jnp.matmul(weights, self.position_embedding[...].astype(jnp.float32))

    def tokens(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: the patches of an image of any aspect have no fixed places."""
        raise UserError(
            "a NaFlex model has no fixed grid of patches, which this needs; use a SigLIP of fixed resolution"
        )

    embed_patches = tokens


class FlaxSiglip2Model(FlaxSiglipModel):
    """SigLIP 2 NaFlex with Hugging Face's parameters and call."""

    image_tower: ClassVar[type[VisionTransformer]] = NaFlexTransformer

    def __call__(
        self,
        input_ids: Int[Array, "t n"],
        pixel_values: Float[Array, "i m q"],
        attention_mask: Int[Array, "t n"] | None = None,
        pixel_attention_mask: Int[Array, "i m"] | None = None,
        spatial_shapes: Int[Array, "i 2"] | None = None,
    ) -> TwoTowersOutput:
        """Return the similarity of each image to each text, from the outputs of transformers' Siglip2ImageProcessor.

        Args:
          input_ids: token ids.
          pixel_values: patches, normalised and flattened, with padding.
          attention_mask: of the texts.
          pixel_attention_mask: 1 for patches, 0 for padding; None: as `spatial_shapes` says.
          spatial_shapes: rows and columns of each image.

        Raises:
          UserError: no spatial shapes.
        """
        text = l2_normalize(self.get_text_features(input_ids, attention_mask))
        image = l2_normalize(self.get_patch_features(pixel_values, pixel_attention_mask, spatial_shapes))
        logits = self.similarity(image, text)
        return TwoTowersOutput(logits, logits.T, text, image)

    def get_patch_features(
        self,
        pixel_values: Float[Array, "i m q"],
        pixel_attention_mask: Int[Array, "i m"] | None = None,
        spatial_shapes: Int[Array, "i 2"] | None = None,
    ) -> Float[Array, "i d"]:
        """Return image features, not normalised; arguments and errors as of the call."""
        if spatial_shapes is None:
            raise UserError("a NaFlex model needs spatial_shapes, the rows and columns of patches of each image")
        length = pixel_values.shape[1]
        mask = grid_mask(spatial_shapes, length) if pixel_attention_mask is None else pixel_attention_mask.astype(bool)
        assert isinstance(self.vision, NaFlexTransformer)
        return self.project_image(self.vision.encode(pixel_values, spatial_shapes, mask))


def config_from_hf(values: dict[str, Any]) -> Siglip2Config:
    """Return the configuration in a Hugging Face config.json; missing keys have Hugging Face's defaults.

    Raises:
      UserError: as `siglip.config_from_hf`; a number of patches that isn't a square.
    """
    given = read_tower(values, "vision_config")
    count = given.get("num_patches") or NUM_PATCHES
    if type(count) is not int or count < 1 or math.isqrt(count) ** 2 != count:
        raise UserError(f"vision_config.num_patches is {count!r}; the square of a whole number is needed")
    read = siglip.config_from_hf({**values, "vision_config": {**given, "image_size": None}, "vision_config_dict": None})
    size = math.isqrt(count) * read.vision.patch_size
    vision = replace(read.vision, image_size=size, any_aspect=True)
    return Siglip2Config(read.text, vision, read.projection_dim, read.logit_scale_init_value, temporal=read.temporal)


def config_to_hf(config: TwoTowerConfig) -> dict[str, Any]:
    """Return the contents of a config.json that `transformers.Siglip2Model` reads."""
    values = siglip.config_to_hf(config)
    vision = {key: value for key, value in values["vision_config"].items() if key != "image_size"}
    return {
        "architectures": ["Siglip2Model"],
        "text_config": values["text_config"] | {"model_type": "siglip2_text_model"},
        "vision_config": vision | {"model_type": "siglip2_vision_model", "num_patches": config.vision.num_patches},
    }


def preprocess(image_size_px: int) -> Preprocess:
    """Return NaFlex's image transform, for as many patches as a square of this size has."""
    most = (image_size_px // PATCH_SIZE_PX) ** 2
    bilinear = int(Image.Resampling.BILINEAR)
    return Preprocess(
        image_size_px,
        mean=HALF,
        std=HALF,
        keep_aspect=False,
        resample=bilinear,
        patch_size_px=PATCH_SIZE_PX,
        max_num_patches=most,
    )


def _of_any_aspect(size: TwoTowerConfig) -> Siglip2Config:
    return Siglip2Config(size.text, replace(size.vision, any_aspect=True), size.projection_dim)


SIZES: dict[str, TwoTowerConfig] = {
    "siglip2-naflex-tiny": _of_any_aspect(siglip.SIZES["siglip-tiny"]),  # this project's own, for the embedded set
    "siglip2-base-patch16-naflex": _of_any_aspect(siglip.SIZES["siglip2-base-patch16-256"]),
    "siglip2-so400m-patch16-naflex": _of_any_aspect(siglip.SIZES["siglip2-so400m-patch16-256"]),
}
HUB_SIZES = {f"google/{name}": name for name in SIZES if name != "siglip2-naflex-tiny"}
