"""CLIP (Radford et al. 2021) in flax.nnx, with Hugging Face's configuration and call.

transformers 5 removed its Flax classes. FlaxCLIPModel has the same arguments and outputs, and what training needs
besides: scanned layers, rematerialisation, logical axis names for sharding, and flash attention. Why an own class:
docs/adr/0001-own-flaxclipmodel.md.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from clip_har_jax.models.configuration import (
    TextConfig,
    TwoTowerConfig,
    VisionConfig,
    read_fields,
    read_towers,
    write_towers,
)
from clip_har_jax.models.towers import project
from clip_har_jax.models.two_towers import TwoTowers


@dataclass(frozen=True)
class CLIPConfig(TwoTowerConfig):
    """The configuration of a CLIP; its defaults, like Hugging Face's, are those of ViT-B/32."""

    family: ClassVar[str] = "clip"
    max_logit_scale: ClassVar[float] = math.log(100.0)  # Radford et al. 2021, section 2.5


class FlaxCLIPModel(TwoTowers):
    """CLIP with Hugging Face's parameters and call: both towers are projected without a bias."""

    def _make_projections(self, rngs: nnx.Rngs) -> None:
        dim = self.config.projection_dim
        if self.config.has_texts:
            self.text_projection = project(self.config.text, dim, self.runtime, rngs)
        self.visual_projection = project(self.config.vision, dim, self.runtime, rngs)

    def project_image(self, features: Float[Array, "*b v"]) -> Float[Array, "*b d"]:
        return self.visual_projection(features)

    def project_text(self, features: Float[Array, "*b w"]) -> Float[Array, "*b d"]:
        return self.text_projection(features)


def config_from_hf(values: dict[str, Any]) -> CLIPConfig:
    """Return the configuration in a Hugging Face config.json; missing keys have Hugging Face's defaults.

    Raises:
      UserError: a value of a wrong type.
    """
    default, keys = CLIPConfig(), {key: key for key in ("projection_dim", "logit_scale_init_value", "temporal")}
    return CLIPConfig(*read_towers(default, values), **read_fields(default, values, keys))


def config_to_hf(config: TwoTowerConfig) -> dict[str, Any]:
    """Return the contents of a config.json that `transformers.CLIPModel` reads."""
    shared = {"projection_dim": config.projection_dim}
    text, vision = write_towers(config)
    return {
        "architectures": ["CLIPModel"],
        **shared,
        "logit_scale_init_value": config.logit_scale_init_value,
        "text_config": {"model_type": "clip_text_model", **shared, **text},
        "vision_config": {"model_type": "clip_vision_model", **shared, **vision},
    }


_LARGE_TEXT = TextConfig(hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12)
_LARGE_VISION = VisionConfig(hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, patch_size=14)

# Sizes of Radford et al. 2021, tables 19 and 20; mini and tiny are this project's own, for the embedded set.
SIZES: dict[str, TwoTowerConfig] = {
    "mini": CLIPConfig(
        TextConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, context_length=24),
        VisionConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, image_size=32, patch_size=8),
        projection_dim=32,
    ),
    "tiny": CLIPConfig(
        TextConfig(hidden_size=64, intermediate_size=256, num_layers=2, num_heads=2, context_length=24),
        VisionConfig(hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4, image_size=64, patch_size=16),
        projection_dim=64,
    ),
    "ViT-B/32": CLIPConfig(),
    "ViT-B/16": CLIPConfig(vision=VisionConfig(patch_size=16)),
    "ViT-L/14": CLIPConfig(_LARGE_TEXT, _LARGE_VISION, projection_dim=768),
    "ViT-L/14@336": CLIPConfig(_LARGE_TEXT, dataclasses.replace(_LARGE_VISION, image_size=336), projection_dim=768),
}
HUB_SIZES = {
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "ViT-B/32",
    "openai/clip-vit-base-patch32": "ViT-B/32",
    "openai/clip-vit-base-patch16": "ViT-B/16",
    "openai/clip-vit-large-patch14": "ViT-L/14",
    "openai/clip-vit-large-patch14-336": "ViT-L/14@336",
}
