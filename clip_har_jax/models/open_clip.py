"""Folders in open_clip's layout: open_clip_config.json with open_clip_model.safetensors, read and written.

Plain ViTs are read as CLIPs (OpenAI's, LAION's, DataComp's, DFN's, MetaCLIP's, CLIPA's), and timm's towers of SigLIP as
SigLIPs. Other towers are refused by name. The sources are open_clip 3.3.0 (model.py, transformer.py) and timm 1.0
(activations of SigLIP). Reading and writing stand in one file, over 300 lines, as they share its tables.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_har_jax.errors import UserError
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, TwoTowerConfig, VisionConfig, check_config
from clip_har_jax.models.hf_layout import TABLES, Table, params_to_hf
from clip_har_jax.models.params import write_tensors
from clip_har_jax.models.siglip import SIZES, SiglipConfig
from clip_har_jax.preprocess import CLIP_MEAN, CLIP_STD, RESAMPLING, Preprocess, check_triple
from clip_har_jax.text import Tokenizer
from clip_har_jax.tokenization import CleanedTokenizer, TextTokenizer, read_tokenizer

CONFIG, WEIGHTS, PICKLE = "open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
HEAD_WIDTH = 64  # of the image tower, if the configuration has none
_TIMM = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
_WITH_TANH = re.compile(r"base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt")  # the others' GELU is exact
# Options that plain ViTs and text transformers don't have; a value other than these is refused.
_PLAIN: dict[str, Any] = {
    "attentional_pool": False, "ls_init_value": None, "block_type": None, "qk_norm": False, "scaled_cosine_attn": False,
    "scale_heads": False, "scale_attn_inner": False, "scale_attn": False, "scale_fc": False, "hf_model_name": None,
    "embed_cls": False, "proj_type": "linear", "use_pad_mask": False, "tokenizer_mode": None,
}  # fmt: skip


def is_open_clip(folder: Path) -> bool:
    """Return whether the folder is in open_clip's layout; False if it has Hugging Face's too, which is preferred."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_open_clip_config(folder: Path) -> TwoTowerConfig:
    """Read the configuration of an open_clip folder.

    Raises:
      UserError: not JSON, another tower than a plain ViT, or an unsupported option; names the file.
    """
    path = folder / CONFIG
    try:
        config = _parse(_model_section(path))
        check_config(config)
        return config
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a configuration of open_clip ({error!r}); copy it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise UserError("not an object of settings; copy it again")
    return values


def _model_section(path: Path) -> dict[str, Any]:
    section = _read_json(path).get("model_cfg")
    if not isinstance(section, dict):
        raise UserError("key 'model_cfg' is missing; copy it again")
    return section


def _parse(model: dict[str, Any]) -> TwoTowerConfig:
    vision, text = model["vision_cfg"], model["text_cfg"]
    if "multimodal_cfg" in model:
        raise UserError("a CoCa with a text decoder; use a CLIP or SigLIP")
    for tower, values in (("vision_cfg", vision), ("text_cfg", text)):
        for key, plain in _PLAIN.items():
            if values.get(key, plain) != plain and not (plain is None and values[key] == "default"):
                raise UserError(f"{tower}.{key} is {values[key]!r}, which isn't a plain transformer; use another model")
    act = "quick_gelu" if model.get("quick_gelu") or model.get("force_quick_gelu") else "gelu"
    if name := vision.get("timm_model_name"):
        return _parse_siglip(name, model, _parse_text(text, "gelu"))
    if not isinstance(vision["layers"], int):
        raise UserError("a ResNet as image tower; use a model with a ViT")
    pool = {"tok": "class", "avg": "mean"}.get(vision.get("pool_type", "tok"))
    if pool is None or (pool == "mean" and not vision.get("final_ln_after_pool")):
        raise UserError("vision_cfg.pool_type: 'tok', or 'avg' with final_ln_after_pool, is needed")
    width = vision["width"]
    image_tower = VisionConfig(
        hidden_size=width,
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        num_layers=vision["layers"],
        num_heads=width // vision.get("head_width", HEAD_WIDTH),
        hidden_act=_activation(vision, act),
        layer_norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        image_size=_square(vision.get("image_size", 224)),
        patch_size=_square(vision["patch_size"]),
        pooling=pool,
        pre_norm=not vision.get("no_ln_pre", False),
    )
    if text.get("proj_bias") or model.get("init_logit_bias") is not None:
        raise UserError("text_cfg.proj_bias or init_logit_bias beside a plain ViT isn't known here; use another model")
    return CLIPConfig(_parse_text(text, act), image_tower, model["embed_dim"])


def _parse_text(text: dict[str, Any], act: str) -> TextConfig:
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos", "last"):
        raise UserError(f"text_cfg.pool_type is {pool!r}; 'argmax', 'eos' or 'last' is needed")
    width = text.get("width", 512)
    return TextConfig(
        hidden_size=width,
        intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
        num_layers=text.get("layers", 12),
        num_heads=text.get("heads", 8),
        hidden_act=_activation(text, act),
        layer_norm_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
        vocab_size=text.get("vocab_size", 49408),
        context_length=text.get("context_length", 77),
        eos_token_id=text["eos_id"] if pool == "eos" else 2,  # 2: at the largest id, see TextTransformer.end_positions
        pooling="last" if pool == "last" else "end",
        causal=not text.get("no_causal_mask", False),
    )


def _parse_siglip(name: str, model: dict[str, Any], text: TextConfig) -> SiglipConfig:
    found, vision = _TIMM.fullmatch(name), model["vision_cfg"]
    if found is None or vision.get("timm_pool") != "map" or vision.get("timm_proj") not in ("none", ""):
        raise UserError(f"timm's tower {name!r} isn't known here; use a plain ViT or a SigLIP")
    size, patch_size, image_size = found[1].replace("giantopt", "giant-opt"), int(found[2]), int(found[3])
    published = next(s for key, s in SIZES.items() if re.match(rf"siglip2?-{size}-", key)).vision
    vision_config = replace(
        published,
        hidden_act="gelu_pytorch_tanh" if _WITH_TANH.search(name) else "gelu",
        patch_size=patch_size,
        image_size=_square(vision.get("image_size", image_size)),
    )
    if not model["text_cfg"].get("proj_bias") or model.get("init_logit_bias") is None:
        raise UserError(f"timm's tower {name!r} without text_cfg.proj_bias and init_logit_bias isn't a SigLIP")
    return SiglipConfig(text, vision_config, vision_config.hidden_size)


def _activation(tower: dict[str, Any], act: str) -> str:
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return "gelu_pytorch_tanh" if tanh and act == "gelu" else act


def _square(size: Any) -> int:
    sides = size if isinstance(size, list) else [size, size]
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise UserError(f"size {size!r}; a whole number of px is needed, equal for both sides")
    return int(sides[0])


def open_clip_table(folder: Path) -> Table:
    """Return the table of the weights of an open_clip folder."""
    model = _model_section(folder / CONFIG)
    if model["vision_cfg"].get("timm_model_name"):
        return TABLES["open_clip_siglip"]
    return TABLES["open_clip_custom_text" if model.get("custom_text") else "open_clip"]


def read_open_clip_preprocess(folder: Path, image_size_px: int) -> Preprocess:
    """Return the image transform of an open_clip folder.

    Raises:
      UserError: an unsupported way of resizing.
    """
    given = _read_json(folder / CONFIG).get("preprocess_cfg") or {}
    if not isinstance(given, dict):
        raise UserError(f"{folder / CONFIG}: preprocess_cfg is no object of settings; copy it again")
    mode, names = given.get("resize_mode", "shortest"), {name: number for number, name in RESAMPLING.items()}
    interpolation = given.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in names:
        raise UserError(
            f"{folder / CONFIG}: preprocess_cfg with resize_mode {mode!r} and interpolation {interpolation!r}; "
            "shortest or squash, and bicubic or bilinear, are known"
        )
    try:
        mean, std = (
            check_triple(tuple(map(float, given.get(key) or default)), key)
            for key, default in (("mean", CLIP_MEAN), ("std", CLIP_STD))
        )
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f"{folder / CONFIG}: preprocess_cfg: {error}") from error
    return Preprocess(
        image_size_px,
        mean=mean,
        std=std,
        keep_aspect=mode == "shortest",
        resample=names[interpolation],
        round_crop=mode == "shortest",
    )


def read_open_clip_tokenizer(folder: Path) -> TextTokenizer:
    """Return the tokenizer of an open_clip folder, with open_clip's cleaning of texts and its padding."""
    tokenizer, text = read_tokenizer(folder), _model_section(folder / CONFIG)["text_cfg"]
    given = text.get("tokenizer_kwargs") or {}
    if isinstance(tokenizer, Tokenizer):
        is_own = not text.get("hf_tokenizer_name")  # open_clip's SimpleTokenizer
        return CleanedTokenizer(tokenizer, given.get("clean", "lower" if is_own else "whitespace"), is_own)
    settings: dict[str, Any] = {"clean": given.get("clean", "whitespace")}
    if given.get("strip_sep_token"):
        settings["zero_token_id"] = tokenizer.last_special_id
    return tokenizer.with_settings(**settings)


def write_open_clip(
    folder: str | Path, config: TwoTowerConfig, params: Mapping[str, Any], preprocess: Preprocess | None = None
) -> None:
    """Write open_clip_config.json and open_clip_model.safetensors, for `open_clip.create_model("local-dir:FOLDER")`.

    Raises:
      UserError: a model that open_clip can't express.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config.temporal != "mean":
        raise UserError(f"open_clip has no models of clips of kind {config.temporal!r}; save in the usual layout")
    model = _write_siglip(config) if isinstance(config, SiglipConfig) else _write_clip(config)
    preprocess = preprocess or Preprocess(config.vision.image_size)
    settings = {
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": RESAMPLING[preprocess.resample],
        "resize_mode": "shortest" if preprocess.keep_aspect else "squash",
    }
    table = TABLES["open_clip_siglip" if isinstance(config, SiglipConfig) else "open_clip"]
    (folder / CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": settings}, indent=2) + "\n")
    write_tensors(folder / WEIGHTS, params_to_hf(params, table), {"format": "pt"})


def _write_text(text: TextConfig, act: str) -> dict[str, Any]:
    pool = "last" if text.pooling == "last" else "argmax" if text.eos_token_id == 2 else "eos"
    values: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "hf_tokenizer_name": "local",  # open_clip reads the files of a local-dir, whatever the name
        "width": text.hidden_size,
        "heads": text.num_heads,
        "layers": text.num_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
        "no_causal_mask": not text.causal,
        "pool_type": pool,
        "norm_kwargs": {"eps": text.layer_norm_eps},
    }
    if act == "gelu_pytorch_tanh":
        values["act_kwargs"] = {"approximate": "tanh"}
    return values | ({"eos_id": text.eos_token_id} if pool == "eos" else {})


def _write_clip(config: TwoTowerConfig) -> dict[str, Any]:
    vision, text = config.vision, config.text
    if (vision.hidden_act == "quick_gelu") != (text.hidden_act == "quick_gelu"):
        raise UserError("open_clip can't have quick_gelu in one tower alone; save in the usual layout")
    tower = {
        "image_size": vision.image_size,
        "layers": vision.num_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "patch_size": vision.patch_size,
        "no_ln_pre": not vision.pre_norm,
        "pool_type": {"class": "tok", "mean": "avg"}[vision.pooling],
        "final_ln_after_pool": vision.pooling == "mean",
        "norm_kwargs": {"eps": vision.layer_norm_eps},
    }
    if vision.hidden_act == "gelu_pytorch_tanh":
        tower["act_kwargs"] = {"approximate": "tanh"}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": tower,
        "text_cfg": _write_text(text, text.hidden_act),
    }


def _write_siglip(config: SiglipConfig) -> dict[str, Any]:
    vision = config.vision
    sizes = {"base": 768, "large": 1024, "so400m": 1152, "giantopt": 1536}
    size = next((name for name, width in sizes.items() if width == vision.hidden_size), "")
    name = f"vit_{size}_patch{vision.patch_size}_siglip_{vision.image_size}"
    act = "gelu_pytorch_tanh" if _WITH_TANH.search(name) else "gelu"
    if not size or act != vision.hidden_act:
        raise UserError(
            f"timm has no tower of {vision.hidden_size} dims and patches of {vision.patch_size} px with "
            f"{vision.hidden_act!r}; save in the usual layout"
        )
    return {
        "embed_dim": config.projection_dim,
        "init_logit_bias": config.logit_bias_init_value,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": _write_text(config.text, config.text.hidden_act) | {"proj_bias": True},
    }
