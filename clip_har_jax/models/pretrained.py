"""Conversion between a Hugging Face folder and parameters, by one table; both directions are strict.

Here layers are stacked on the first dim; Hugging Face numbers them. Pickles (`pytorch_model.bin`) are refused.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from clip_har_jax.errors import UserError
from clip_har_jax.models.clip import FlaxCLIPModel
from clip_har_jax.models.configuration import CLIPConfig, config_from_hf, config_to_hf
from clip_har_jax.models.layers import Runtime
from clip_har_jax.models.params import Params, abstract_model, flat_params, make_model, write_tensors

_LINEAR = (("kernel", "weight", "transpose"), ("bias", "bias", ""))
_NORM = (("scale", "weight", ""), ("bias", "bias", ""))
_LAYER = (
    ("norm1", "layer_norm1", _NORM),
    ("attention.query", "self_attn.q_proj", _LINEAR),
    ("attention.key", "self_attn.k_proj", _LINEAR),
    ("attention.value", "self_attn.v_proj", _LINEAR),
    ("attention.out", "self_attn.out_proj", _LINEAR),
    ("norm2", "layer_norm2", _NORM),
    ("mlp.fc1", "mlp.fc1", _LINEAR),
    ("mlp.fc2", "mlp.fc2", _LINEAR),
)


def _table() -> dict[str, tuple[str, str]]:
    """Return our name -> (Hugging Face's name with {i} for the layer, transform)."""
    table = {
        "logit_scale": ("logit_scale", ""),
        "text_projection.kernel": ("text_projection.weight", "transpose"),
        "visual_projection.kernel": ("visual_projection.weight", "transpose"),
        "text.token_embedding": ("text_model.embeddings.token_embedding.weight", ""),
        "text.position_embedding": ("text_model.embeddings.position_embedding.weight", ""),
        "vision.class_embedding": ("vision_model.embeddings.class_embedding", ""),
        "vision.patch_embedding.kernel": ("vision_model.embeddings.patch_embedding.weight", "patch"),
        "vision.position_embedding": ("vision_model.embeddings.position_embedding.weight", ""),
    }
    parts = [
        ("text.final_norm", "text_model.final_layer_norm", _NORM),
        ("vision.pre_norm", "vision_model.pre_layrnorm", _NORM),  # spelled so in every published file
        ("vision.post_norm", "vision_model.post_layernorm", _NORM),
    ]
    for tower in ("text", "vision"):
        parts += [
            (f"{tower}.layers.{ours}", f"{tower}_model.encoder.layers.{{i}}.{theirs}", kind)
            for ours, theirs, kind in _LAYER
        ]
    for ours, theirs, kind in parts:
        table |= {f"{ours}.{a}": (f"{theirs}.{b}", transform) for a, b, transform in kind}
    return table


TABLE = _table()


def _from_hf(value: np.ndarray, transform: str) -> np.ndarray:
    if transform == "transpose":  # [out, in] -> [in, out]
        return value.T
    if transform == "patch":  # [d, 3, p, p] -> [p * p * 3, d]
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value


def _hf_shape(shape: tuple[int, ...], transform: str) -> tuple[int, ...]:
    """Return the shape of Hugging Face's tensor, where ours has `shape`."""
    if transform == "patch":
        patch = round((shape[0] / 3) ** 0.5)
        return shape[1], 3, patch, patch
    return shape[::-1] if transform == "transpose" else shape


def _to_hf(value: np.ndarray, transform: str) -> np.ndarray:
    if transform == "transpose":
        return np.array(value.T, order="C")
    if transform == "patch":
        dim, channels, patch, _ = _hf_shape(value.shape, transform)
        return np.array(value.reshape(patch, patch, channels, dim).transpose(3, 2, 0, 1), order="C")
    return np.array(value, order="C")


def params_to_hf(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return flat parameters as Hugging Face's tensors.

    Raises:
      UserError: some aren't parameters of CLIP; names all of them.
    """
    if unknown := sorted(set(params) - set(TABLE)):
        raise UserError(f"not parameters of a CLIP: {', '.join(unknown)}")
    tensors: dict[str, np.ndarray] = {}
    for ours, value in params.items():
        theirs, transform = TABLE[ours]
        value = np.asarray(value, np.float32)
        if "{i}" in theirs:
            tensors |= {theirs.format(i=i): _to_hf(layer, transform) for i, layer in enumerate(value)}
        else:
            tensors[theirs] = _to_hf(value, transform)
    return tensors


def params_from_hf(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], where: str) -> Params:
    """Return Hugging Face's tensors as flat float32 parameters of exactly `shapes`.

    Raises:
      UserError: missing, unexpected or misshapen weights; names all of them in one message.
    """
    rest = {name for name in tensors if not name.endswith(".position_ids")}  # a buffer of older files, not a weight
    problems, params = [], {}
    for ours, shape in shapes.items():
        theirs, transform = TABLE[ours]
        stacked = "{i}" in theirs
        names = [theirs.format(i=i) for i in range(shape[0])] if stacked else [theirs]
        rest -= set(names)
        if missing := [name for name in names if name not in tensors]:
            problems += [f"missing {name}" for name in missing]
            continue
        wanted = _hf_shape(shape[1:] if stacked else shape, transform)
        if wrong := [name for name in names if tensors[name].shape != wanted]:
            problems += [f"misshapen {name}: {tensors[name].shape}, not {wanted}" for name in wrong]
            continue
        layers = [_from_hf(np.asarray(tensors[name], np.float32), transform) for name in names]
        params[ours] = np.stack(layers) if stacked else layers[0]
    problems += [f"unexpected {name}" for name in sorted(rest)]
    if problems:
        raise UserError(f"{where}: the weights don't fit config.json: {'; '.join(problems)}")
    return params


def read_config(folder: Path) -> CLIPConfig:
    """Read config.json of a model folder.

    Raises:
      UserError: missing, not JSON, or not a CLIP.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; a model folder in the Hugging Face layout is needed")
    try:
        return config_from_hf(json.loads(path.read_text(encoding="utf-8")))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy it again") from error


def read_params(folder: Path, config: CLIPConfig) -> Params:
    """Read the weights of a model folder as float32 numpy arrays.

    The first of these is read: model.safetensors, sharded safetensors with an index, flax_model.msgpack.

    Raises:
      UserError: no weights, unreadable ones, or ones that don't fit the configuration (all named).
    """
    shapes = {name: value.shape for name, value in flat_params(abstract_model(config)).items()}
    return params_from_hf(_read_tensors(folder), shapes, str(folder))


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    single, index, msgpack = (
        folder / name for name in ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
    )
    if single.is_file():
        return _read_safetensors(single)
    if index.is_file():
        tensors: dict[str, np.ndarray] = {}
        for shard in _read_shard_names(index):
            if not (folder / shard).is_file():
                raise UserError(f"{folder}: {shard}, named by {index.name}, is missing")
            tensors |= _read_safetensors(folder / shard)
        return tensors
    if msgpack.is_file():
        return _read_msgpack(msgpack)
    found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
    raise UserError(
        f"{folder}: no model.safetensors or flax_model.msgpack (pickled weights found: {found}; they can run code "
        "when read, save the model again with safe_serialization=True)"
    )


def _read_shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors ({error!r}); copy it again") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file  # the numpy reader knows no bfloat16

    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return {name: np.asarray(value) for name, value in load_file(str(path)).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: can't be read ({error}); copy it again") from error


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a Flax CLIP of transformers 4, under their PyTorch names and layouts."""
    from flax.serialization import msgpack_restore

    try:
        tree = msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack raises many kinds on a damaged file
        raise UserError(f"{path}: can't be read ({error}); copy it again") from error
    tensors: dict[str, np.ndarray] = {}
    for name, value in traverse_util.flatten_dict(tree, sep=".").items():
        name, value = name.replace(".scale", ".weight"), np.asarray(value)
        if name.endswith(".kernel"):
            name = re.sub(r"kernel$", "weight", name)
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        tensors[re.sub(r"embedding\.embedding$", "embedding.weight", name)] = value
    return tensors


def resize_positions(params: Params, old: CLIPConfig, new: CLIPConfig) -> Params:
    """Return the parameters with position embeddings interpolated (bicubic) to the patches of another image size."""
    if old.vision.num_patches == new.vision.num_patches:
        return params
    embedding = np.asarray(params["vision.position_embedding"])
    dim = embedding.shape[-1]
    side, new_side = (round(config.vision.num_patches**0.5) for config in (old, new))
    grid = embedding[1:].reshape(side, side, dim)
    grid = np.asarray(jax.image.resize(grid, (new_side, new_side, dim), "bicubic", antialias=False))
    return params | {"vision.position_embedding": np.concatenate([embedding[:1], grid.reshape(-1, dim)])}


def resolve_folder(name_or_folder: str) -> Path:
    """Return the folder, or for a Hub name the folder of its files, which are downloaded once.

    Raises:
      UserError: neither a folder nor a name that the Hub knows, or the Hub can't be reached.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_folder):
        raise UserError(f"{name_or_folder}: no such folder, and not a Hub name (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "flax_model.msgpack", "*.jinja"]
    try:
        return Path(snapshot_download(name_or_folder, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises its own, requests' and httpx's kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name_or_folder}: not a folder here, and the Hub can't give it ({reason}); without a network, name the "
            "folder of a CLIP that was downloaded elsewhere"
        ) from error


def load_pretrained(name_or_folder: str, runtime: Runtime = Runtime()) -> FlaxCLIPModel:
    """Return a model with the weights of a Hub name or a folder.

    Raises:
      UserError: as `resolve_folder`, `read_config` and `read_params`.
    """
    folder = resolve_folder(name_or_folder)
    config = read_config(folder)
    return make_model(config, jax.tree.map(jax.numpy.asarray, read_params(folder, config)), runtime)


def save_pretrained(model: FlaxCLIPModel, folder: str | Path) -> None:
    """Write config.json and model.safetensors in the Hugging Face layout."""
    write_params(folder, model.config, flat_params(model))


def write_params(folder: str | Path, config: CLIPConfig, params: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors of flat parameters in the Hugging Face layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n")
    write_tensors(folder / "model.safetensors", params_to_hf(params), {"format": "pt"})
