"""SigLIP (Zhai et al. 2023) and SigLIP 2 of fixed resolution (Tschannen et al. 2025), as in Hugging Face's layout.

Images are pooled by a learned query, whose output is their embedding. Texts are seen in both directions, padded to the
full length, and pooled at their last position. Logits are pairwise: their sigmoid is the probability that a text
belongs to an image.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clip_har_jax.errors import UserError
from clip_har_jax.models.configuration import (
    TextConfig,
    TwoTowerConfig,
    VisionConfig,
    read_fields,
    read_tower,
    read_towers,
    write_towers,
)
from clip_har_jax.models.towers import project
from clip_har_jax.models.two_towers import TwoTowers
from clip_har_jax.preprocess import HALF, Preprocess

_SHARED: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_BASE: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "num_heads": 12}
_LARGE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_layers": 24, "num_heads": 16}
_SO400M: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_layers": 27, "num_heads": 16}
_GIANT: dict[str, Any] = {"hidden_size": 1536, "intermediate_size": 6144, "num_layers": 40, "num_heads": 16}


def _vision(sizes: dict[str, Any], **more: Any) -> VisionConfig:
    return VisionConfig(**{"patch_size": 16, **_SHARED, **sizes, **more}, pooling="attention", pre_norm=False)


def _text(sizes: dict[str, Any], **more: Any) -> TextConfig:
    shared = {"vocab_size": 32000, "context_length": 64, **_SHARED}
    return TextConfig(**{**shared, **sizes, **more}, pooling="last", causal=False)


@dataclass(frozen=True)
class SiglipConfig(TwoTowerConfig):
    """The configuration of a SigLIP; its defaults, like Hugging Face's, are those of B/16 at 224 px.

    Attributes:
      logit_bias_init_value: added to the logits, before training (section 3.2).
    """

    family: ClassVar[str] = "siglip"

    text: TextConfig = field(default_factory=lambda: _text(_BASE))
    vision: VisionConfig = field(default_factory=lambda: _vision(_BASE))
    projection_dim: int = 768
    logit_scale_init_value: float = math.log(10.0)
    logit_bias_init_value: float = -10.0


class FlaxSiglipModel(TwoTowers):
    """SigLIP with Hugging Face's parameters and call: the text tower alone is projected, and logits have a bias."""

    config: SiglipConfig

    def _make_projections(self, rngs: nnx.Rngs) -> None:
        text, dim = self.config.text, self.config.projection_dim
        if self.config.has_texts:
            self.text_projection = project(text, dim, self.runtime, rngs, use_bias=True)
        self.logit_bias = nnx.Param(jnp.asarray(self.config.logit_bias_init_value, jnp.float32))

    def project_image(self, features: Float[Array, "*b v"]) -> Float[Array, "*b d"]:
        return features

    def project_text(self, features: Float[Array, "*b w"]) -> Float[Array, "*b d"]:
        return self.text_projection(features)

    def similarity(self, image: Float[Array, "i d"], text: Float[Array, "t d"]) -> Float[Array, "i t"]:
        return super().similarity(image, text) + self.logit_bias[...]


def config_from_hf(values: dict[str, Any]) -> SiglipConfig:
    """Return the configuration in a Hugging Face config.json; missing keys have Hugging Face's defaults.

    Raises:
      UserError: a value of a wrong type, a tower without its pooling, or texts projected to another width than images.
    """
    default = SiglipConfig()
    text, vision = read_towers(default, values)
    if not read_tower(values, "vision_config").get("vision_use_head", True):
        raise UserError("vision_config.vision_use_head is false; a tower with its pooling head is needed")
    width = read_tower(values, "text_config").get("projection_size") or text.hidden_size
    if width != vision.hidden_size:
        raise UserError(f"text_config.projection_size is {width}, but images have {vision.hidden_size} dims")
    return SiglipConfig(text, vision, vision.hidden_size, **read_fields(default, values, {"temporal": "temporal"}))


def config_to_hf(config: TwoTowerConfig) -> dict[str, Any]:
    """Return the contents of a config.json that `transformers.SiglipModel` reads."""
    text, vision = write_towers(config)
    return {
        "architectures": ["SiglipModel"],
        "text_config": {"model_type": "siglip_text_model", **text, "projection_size": config.projection_dim},
        "vision_config": {"model_type": "siglip_vision_model", **vision},
    }


def preprocess(image_size_px: int) -> Preprocess:
    """Return SigLIP's image transform: both sides resized, values from -1 to 1."""
    return Preprocess(image_size_px, mean=HALF, std=HALF, keep_aspect=False)


def _published(size: str, patch_size: int, image_size: int, vocab_size: int) -> SiglipConfig:
    text, vision = {
        "base": (_BASE, _BASE),
        "large": (_LARGE, _LARGE),
        "so400m": (_SO400M, _SO400M),
        "giant-opt": (_SO400M, _GIANT),
    }[size]
    tower = _vision(vision, patch_size=patch_size, image_size=image_size)
    return SiglipConfig(_text(text, vocab_size=vocab_size), tower, tower.hidden_size)


# google/siglip and google/siglip2: the vocabulary, and the image sizes by size of the towers and of the patches
_PUBLISHED: dict[str, tuple[int, dict[tuple[str, int], tuple[int, ...]]]] = {
    "siglip": (
        32000,
        {("base", 16): (224, 256, 384, 512), ("large", 16): (256, 384), ("so400m", 14): (224, 384)},
    ),
    "siglip2": (
        256000,
        {
            ("base", 32): (256,),
            ("base", 16): (224, 256, 384, 512),
            ("large", 16): (256, 384, 512),
            ("so400m", 14): (224, 384),
            ("so400m", 16): (256, 384, 512),
            ("giant-opt", 16): (256, 384),
        },
    ),
}
_TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_layers": 2, "num_heads": 2}
SIZES: dict[str, TwoTowerConfig] = {
    # this project's own, for the embedded set
    "siglip-tiny": SiglipConfig(
        _text(_TINY, context_length=24), _vision(_TINY, image_size=64, patch_size=16), projection_dim=64
    ),
    **{
        f"{family}-{size}-patch{patch_size}-{image_size}": _published(size, patch_size, image_size, vocab_size)
        for family, (vocab_size, towers) in _PUBLISHED.items()
        for (size, patch_size), image_sizes in towers.items()
        for image_size in image_sizes
    },
}
HUB_SIZES = {f"google/{name}": name for name in SIZES if name != "siglip-tiny"}
