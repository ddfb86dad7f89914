"""LoRA adapters of PEFT: adapter_config.json with adapter_model.safetensors.

They are merged into their base model when read, and written after a training with low-rank updates. After peft 0.19
(tuners/lora): W + lora_alpha / r * B A, or lora_alpha / sqrt(r) with rsLoRA.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.errors import UserError
from clip_har_jax.files import read_object, write_json
from clip_har_jax.models.adapters import A, B
from clip_har_jax.models.hf_layout import Table
from clip_har_jax.models.params import write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


def is_adapter(folder: Path) -> bool:
    """Return whether the folder holds an adapter alone."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
      UserError: not LoRA, an option that isn't known here, or no base model.
    """
    path = folder / CONFIG
    settings = read_object(path)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {settings.get('peft_type')!r}; merge it into its model with PEFT")
    if given := [key for key in _UNSUPPORTED if settings.get(key)]:
        raise UserError(f"{path}: {given[0]} is {settings[given[0]]!r}; merge it into its model with PEFT")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {settings['bias']!r}; merge it into its model with PEFT")
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise UserError(f"{path}: base_model_name_or_path is missing; name the folder of the base model there")
    if not isinstance(settings.get("lora_alpha", 1), int | float):
        raise UserError(f"{path}: lora_alpha is {settings['lora_alpha']!r}; a number is needed")
    if type(settings.get("r")) is not int or settings["r"] < 1:
        raise UserError(f"{path}: r is {settings.get('r')!r}; a rank of 1 or more is needed")
    return settings


class _Merged:
    """A tensor plus an update, computed when it is converted to an array."""

    def __init__(self, base: Any, update: np.ndarray):
        self._base, self._update, self.shape = base, update, tuple(base.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(np.asarray(self._base, np.float32) + self._update, dtype)


def merge_adapter(folder: Path, tensors: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a base model with an adapter's updates added.

    Args:
      folder: of the adapter.
      tensors: of the base model, in Hugging Face's layout.
      adapter: the contents of adapter_model.safetensors.

    Raises:
      UserError: weights that aren't LoRA's, or that don't fit the base model; names the file and the weight.
    """
    settings, path = read_settings(folder), folder / WEIGHTS
    rank = settings["r"]
    scale = settings.get("lora_alpha", rank) / (rank**0.5 if settings.get("use_rslora") else rank)
    merged = dict(tensors)
    for name in sorted(adapter):
        layer, end = name.removeprefix(_PREFIX).rpartition(".lora_")[::2]
        if end not in ("A.weight", "B.weight") or f"{layer}.weight" not in tensors:
            raise UserError(f"{path}: {name} belongs to no layer of the base model; check base_model_name_or_path")
        if end == "B.weight":
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        if other not in adapter:
            raise UserError(f"{path}: {other} is missing; copy it again")
        update = scale * np.asarray(adapter[other], np.float32) @ np.asarray(adapter[name], np.float32)
        base = tensors[f"{layer}.weight"]
        if update.shape != tuple(base.shape):
            raise UserError(
                f"{path}: {name} is for a layer of {update.shape}, the base model's has {tuple(base.shape)}"
            )
        merged[f"{layer}.weight"] = _Merged(base, update)
    return merged


def write_adapter(folder: Path, params: Mapping[str, Any], table: Table, base: str, rank: int, alpha: float) -> None:
    """Write the low-rank updates among a model's parameters, for `peft.PeftModel.from_pretrained(base_model, folder)`.

    Args:
      folder: is there.
      params: updates have names that end in `adapters.A` and `adapters.B`; the others are ignored.
      table: of the family's weights in Hugging Face's layout.
      base: the base model's folder or Hub name.
      rank: of the updates.
      alpha: they are scaled by alpha / rank.

    Raises:
      UserError: an update of a layer that is no linear layer of its own in Hugging Face's layout.
    """
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(name for name in params if name.endswith(A)):
        layer = name.removesuffix(A)
        weight = table[f"{layer}.kernel"]
        if weight.transform != "transpose" or weight.parts > 1:
            raise UserError(f"PEFT can't express an update of {layer}, which is no linear layer of its own there")
        first, second = (np.asarray(params[layer + end], np.float32) for end in (A, B))
        pairs = enumerate(zip(first, second, strict=True)) if "{i}" in weight.name else [(0, (first, second))]
        for i, (a, b) in pairs:
            module = _PREFIX + weight.name.format(i=i).removesuffix(".weight")
            tensors |= {f"{module}.lora_A.weight": a.T.copy(), f"{module}.lora_B.weight": b.T.copy()}
    targets = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, settings)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
