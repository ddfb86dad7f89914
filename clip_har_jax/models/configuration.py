"""The sizes and options of two-tower models, and what reading them from a config.json shares."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.models.layers import ACTIVATIONS, TowerConfig
from clip_har_jax.models.temporal import KINDS as TEMPORAL_KINDS

IMAGE_POOLING, TEXT_POOLING = ("class", "mean", "attention"), ("end", "last")


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The image tower; the defaults are those of CLIP ViT-B/32.

    Attributes:
      pooling: class: the class token; mean: the mean of the patches, beside a class token (CLIPA); attention: a learned
        query over the patches, without a class token (SigLIP).
      pre_norm: a norm before the first layer.
      any_aspect: images of any aspect are given as packed patches (SigLIP 2 NaFlex); `image_size` is that of the
        square whose patches the position embeddings are for.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    pooling: str = "class"
    pre_norm: bool = True
    any_aspect: bool = False

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_class_tokens(self) -> int:
        """1, or 0 where nothing stands before the patches."""
        return 0 if self.pooling == "attention" else 1

    @property
    def num_tokens(self) -> int:
        return self.num_class_tokens + self.num_patches


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The text tower; the defaults are those of CLIP ViT-B/32. Without layers there is none, see `NO_TEXTS`.

    Attributes:
      pooling: end: at the first end token; last: at the last position.
      causal: a token attends only to itself and earlier ones.
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_layers: int = 12
    num_heads: int = 8
    vocab_size: int = 49408
    context_length: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1
    pooling: str = "end"
    causal: bool = True


NO_TEXTS = TextConfig(num_layers=0)  # the text tower of a folder that has the image tower alone


@dataclass(frozen=True)
class TwoTowerConfig:
    """The configuration of a two-tower model; a family's class sets `family` and its own defaults.

    Attributes:
      projection_dim: of the space that images and texts share.
      logit_scale_init_value: logarithm of the factor of cosines, before training.
      temporal: what the image tower does over the frames of a clip, of `models.temporal.KINDS`; a key of this
        project's own in config.json, which other readers ignore.
    """

    family: ClassVar[str]  # its name in `families.FAMILIES`, which is `model_type` in config.json
    max_logit_scale: ClassVar[float] = math.inf  # training keeps logit_scale at or below it

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    temporal: str = "mean"

    @property
    def has_texts(self) -> bool:
        """Whether there is a text tower; without one, a model needs a head that knows its classes."""
        return self.text.num_layers > 0

    @property
    def no_export(self) -> str:
        """The reason why such a model can't be exported; empty: it can."""
        if self.vision.any_aspect:
            return "a NaFlex model; exports take square images, so use a SigLIP of fixed resolution"
        if not self.has_texts:
            return "an image tower alone; exports have a text encoder, so use a model with a text tower"
        return ""


# our field -> the key in Hugging Face's config.json
_TOWER_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
}
_VISION_KEYS = _TOWER_KEYS | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT_KEYS = _TOWER_KEYS | {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}


def read_tower(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of a tower. As in transformers, `text_config_dict` of older files replaces `text_config`.

    Raises:
      UserError: not an object.
    """
    key = f"{name}_dict" if values.get(f"{name}_dict") is not None else name
    given = values.get(key)
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{key} is {given!r}; an object of settings is needed")
    return given or {}


def read_fields(defaults: Any, given: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a configuration from the file's keys; null and missing keys mean the default.

    Args:
      defaults: an instance of the dataclass.
      given: the file's values.
      keys: our field -> the file's key.

    Raises:
      UserError: a value of a wrong type.
    """
    fields = {ours: given[theirs] for ours, theirs in keys.items() if given.get(theirs) is not None}
    for ours, value in fields.items():
        kind = type(getattr(defaults, ours))
        accepted = int | float if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{keys[ours]} is {value!r}; a value of type {kind.__name__} is needed")
    return {
        ours: float(value) if isinstance(getattr(defaults, ours), float) else value for ours, value in fields.items()
    }


def read_towers(default: TwoTowerConfig, values: dict[str, Any]) -> tuple[TextConfig, VisionConfig]:
    """Return the towers in a Hugging Face config.json; null and missing keys mean the family's default.

    Raises:
      UserError: a value of a wrong type.
    """
    text, vision = read_tower(values, "text_config"), read_tower(values, "vision_config")
    if vision.get("num_channels") not in (None, 3):
        raise UserError(f"vision_config.num_channels is {vision['num_channels']!r}; images have 3, use another model")
    return (
        replace(default.text, **read_fields(default.text, text, _TEXT_KEYS)),
        replace(default.vision, **read_fields(default.vision, vision, _VISION_KEYS)),
    )


def write_towers(config: TwoTowerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the text tower and of the image tower for a Hugging Face config.json."""
    text, vision = config.text, config.vision
    return (
        {theirs: getattr(text, ours) for ours, theirs in _TEXT_KEYS.items()},
        {theirs: getattr(vision, ours) for ours, theirs in _VISION_KEYS.items()},
    )


def check_config(config: TwoTowerConfig) -> None:
    """Check that the sizes fit together.

    Raises:
      UserError: sizes below 1, heads that don't divide the width, patches larger than the image, an unknown activation
        or an epsilon out of range.
    """
    towers: list[tuple[str, TowerConfig]] = [("vision", config.vision)]
    for name, tower in [("text", config.text), *towers] if config.has_texts else towers:
        if min(tower.hidden_size, tower.intermediate_size, tower.num_layers, tower.num_heads) < 1:
            raise UserError(f"{name} tower: sizes below 1 ({tower})")
        if not 0 <= tower.layer_norm_eps < 1:  # not NaN either
            raise UserError(f"{name} tower: layer_norm_eps is {tower.layer_norm_eps}; from 0 to 1 is accepted")
        if tower.hidden_size % tower.num_heads:
            raise UserError(f"{name} tower: {tower.num_heads} heads don't divide a width of {tower.hidden_size}")
        if tower.hidden_act not in ACTIVATIONS:
            hint = nearest(tower.hidden_act, list(ACTIVATIONS))
            raise UserError(f"{name} tower: activation {tower.hidden_act!r} is unknown; {hint}")
    assert config.vision.pooling in IMAGE_POOLING and config.text.pooling in TEXT_POOLING
    if config.temporal not in TEMPORAL_KINDS:
        raise UserError(f"temporal is {config.temporal!r}; {nearest(config.temporal, list(TEMPORAL_KINDS))}")
    if not 0 < config.vision.patch_size <= config.vision.image_size:
        raise UserError(f"an image of {config.vision.image_size} px holds no patch of {config.vision.patch_size} px")
