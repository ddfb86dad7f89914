"""The table of families of two-tower models.

A family has a file (its model, its config.json, its named sizes), a table of weights in `hf_layout.py` and a fixture in
tests/support/make_golden.py; CONTRIBUTING.md has the recipe.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.models import clip, naflex, siglip
from clip_har_jax.models.configuration import NO_TEXTS, TwoTowerConfig, check_config
from clip_har_jax.models.hf_layout import IMAGE_ALONE
from clip_har_jax.models.two_towers import TwoTowers
from clip_har_jax.preprocess import Preprocess


@dataclass(frozen=True)
class Family:
    """The parts of a family of two-tower models.

    Attributes:
      model: the class, made from a configuration, a runtime and `rngs`.
      config_from_hf, config_to_hf: convert the configuration from and to the values of a Hugging Face config.json.
      sizes: named sizes, with random weights.
      hub_sizes: published models -> the name of their size.
      preprocess: the image transform for a size in px, for folders without one.
    """

    model: Callable[..., TwoTowers]
    config_from_hf: Callable[[dict[str, Any]], TwoTowerConfig]
    config_to_hf: Callable[[TwoTowerConfig], dict[str, Any]]
    sizes: Mapping[str, TwoTowerConfig]
    hub_sizes: Mapping[str, str]
    preprocess: Callable[[int], Preprocess]


FAMILIES = {
    "clip": Family(clip.FlaxCLIPModel, clip.config_from_hf, clip.config_to_hf, clip.SIZES, clip.HUB_SIZES, Preprocess),
    "siglip": Family(
        siglip.FlaxSiglipModel,
        siglip.config_from_hf,
        siglip.config_to_hf,
        siglip.SIZES,
        siglip.HUB_SIZES,
        siglip.preprocess,
    ),
    "siglip2": Family(
        naflex.FlaxSiglip2Model,
        naflex.config_from_hf,
        naflex.config_to_hf,
        naflex.SIZES,
        naflex.HUB_SIZES,
        naflex.preprocess,
    ),
}
NAMED_SIZES = {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}
HUB_SIZES = {name: size for family in FAMILIES.values() for name, size in family.hub_sizes.items()}


def family_of(config: TwoTowerConfig) -> Family:
    """Return the family of a configuration."""
    return FAMILIES[config.family]


def config_from_hf(values: Any) -> TwoTowerConfig:
    """Return the configuration in a Hugging Face config.json; missing keys have Hugging Face's defaults.

    Raises:
      UserError: an unknown family, a value of a wrong type, or one that `check_config` refuses.
    """
    model_type = values.get("model_type", "clip") if isinstance(values, dict) else None
    family = str(model_type).removesuffix(IMAGE_ALONE)
    if family not in FAMILIES:
        raise UserError(f"model_type is {model_type!r}; {nearest(str(model_type), list(FAMILIES))}")
    if family == model_type:
        config = FAMILIES[family].config_from_hf(values)
        if not config.has_texts:
            raise UserError(f"text_config.num_hidden_layers is {config.text.num_layers}; 1 or more is needed")
    else:  # an image tower alone: its settings stand at the top; no text tower contradicts their width
        parts = {"vision_config": values, "text_config": {"projection_size": values.get("hidden_size")}}
        config = replace(FAMILIES[family].config_from_hf(values | parts), text=NO_TEXTS)
    check_config(config)
    return config


def config_to_hf(config: TwoTowerConfig) -> dict[str, Any]:
    """Return the contents of a config.json that transformers reads."""
    values = {"model_type": config.family, **family_of(config).config_to_hf(config)}
    return {
        **(values if config.has_texts else values["vision_config"]),
        "torch_dtype": "float32",
        **({"temporal": config.temporal} if config.temporal != "mean" else {}),
    }
