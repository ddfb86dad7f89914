"""CLIPConfig: the sizes of a CLIP, from and to Hugging Face's config.json."""

from dataclasses import dataclass, field
from typing import Any

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.models.layers import ACTIVATIONS, TowerConfig
from clip_har_jax.models.temporal import KINDS as TEMPORAL_KINDS


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224
    patch_size: int = 32

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_layers: int = 12
    num_heads: int = 8
    vocab_size: int = 49408
    context_length: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1


@dataclass(frozen=True)
class CLIPConfig:
    """The configuration of a CLIP; its defaults, like Hugging Face's, are those of ViT-B/32.

    Attributes:
      temporal: what the image tower does over the frames of a clip, of `models.temporal.KINDS`; a key of this
        project's own in config.json, which other readers ignore.
    """

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    temporal: str = "mean"


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


def config_from_hf(values: Any) -> CLIPConfig:
    """Return the configuration in a Hugging Face config.json; missing keys have Hugging Face's defaults.

    Raises:
      UserError: not a CLIP, a value of a wrong type, or one that `check_config` refuses.
    """
    model_type = values.get("model_type", "clip") if isinstance(values, dict) else None
    if model_type != "clip":
        raise UserError(f"model_type is {model_type!r}; a 'clip' is needed")
    config = CLIPConfig(
        TextConfig(**_read_fields(TextConfig, _read_tower(values, "text_config"), _TEXT_KEYS)),
        VisionConfig(**_read_fields(VisionConfig, _read_tower(values, "vision_config"), _VISION_KEYS)),
        **_read_fields(
            CLIPConfig, values, {key: key for key in ("projection_dim", "logit_scale_init_value", "temporal")}
        ),
    )
    check_config(config)
    return config


def _read_tower(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of a tower. As in transformers, `text_config_dict` of older files replaces `text_config`."""
    key = f"{name}_dict" if values.get(f"{name}_dict") is not None else name
    given = values.get(key)
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{key} is {given!r}; an object of settings is needed")
    return given or {}


def _read_fields(cls: type, given: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Return the fields of the dataclass `cls` from the file's keys; null and missing keys mean the default."""
    fields = {ours: given[theirs] for ours, theirs in keys.items() if given.get(theirs) is not None}
    for ours, value in fields.items():
        kind = type(getattr(cls, ours))  # of the default
        if not isinstance(value, int | float if kind is float else kind):
            raise UserError(f"{keys[ours]} is {value!r}; a value of type {kind.__name__} is needed")
    return {ours: float(value) if isinstance(getattr(cls, ours), float) else value for ours, value in fields.items()}


def config_to_hf(config: CLIPConfig) -> dict[str, Any]:
    """Return the contents of a config.json that `transformers.CLIPModel` reads."""
    text = {theirs: getattr(config.text, ours) for ours, theirs in _TEXT_KEYS.items()}
    vision = {theirs: getattr(config.vision, ours) for ours, theirs in _VISION_KEYS.items()}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init_value,
        "text_config": {"model_type": "clip_text_model", "projection_dim": config.projection_dim, **text},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": config.projection_dim, **vision},
        "torch_dtype": "float32",
        **({"temporal": config.temporal} if config.temporal != "mean" else {}),
    }


def check_config(config: CLIPConfig) -> None:
    """Check that the sizes fit together.

    Raises:
      UserError: sizes below 1, heads that don't divide the width, patches larger than the image, an unknown activation.
    """
    for name, tower in (("text", config.text), ("vision", config.vision)):
        if min(tower.hidden_size, tower.intermediate_size, tower.num_layers, tower.num_heads) < 1:
            raise UserError(f"{name} tower: sizes below 1 ({tower})")
        if tower.hidden_size % tower.num_heads:
            raise UserError(f"{name} tower: {tower.num_heads} heads don't divide a width of {tower.hidden_size}")
        if tower.hidden_act not in ACTIVATIONS:
            hint = nearest(tower.hidden_act, list(ACTIVATIONS))
            raise UserError(f"{name} tower: activation {tower.hidden_act!r} is unknown; {hint}")
    if config.temporal not in TEMPORAL_KINDS:
        raise UserError(f"temporal is {config.temporal!r}; {nearest(config.temporal, list(TEMPORAL_KINDS))}")
    if not 0 < config.vision.patch_size <= config.vision.image_size:
        raise UserError(f"an image of {config.vision.image_size} px holds no patch of {config.vision.patch_size} px")
