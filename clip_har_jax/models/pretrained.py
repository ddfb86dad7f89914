"""Reading and writing model folders, in the Hugging Face layout or open_clip's.

Pickles (`pytorch_model.bin`) are read by torch alone, without running their code, and refused where it isn't installed.
Reading and writing stand in one file, over 300 lines, so that what is written is read by the same rules.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from clip_har_jax.errors import UserError
from clip_har_jax.models.configuration import TwoTowerConfig
from clip_har_jax.models.families import config_from_hf, config_to_hf, family_of
from clip_har_jax.models.hf_layout import BUFFER, TABLES, TEMPORAL_FILE, params_from_hf, params_to_hf
from clip_har_jax.models.layers import Runtime
from clip_har_jax.models.open_clip import (
    PICKLE,
    WEIGHTS,
    is_open_clip,
    open_clip_table,
    read_open_clip_config,
    read_open_clip_preprocess,
    read_open_clip_tokenizer,
    write_open_clip,
)
from clip_har_jax.models.params import Params, abstract_model, flat_params, make_model, write_tensors
from clip_har_jax.models.peft_adapters import WEIGHTS as ADAPTER
from clip_har_jax.models.peft_adapters import is_adapter, merge_adapter, read_settings
from clip_har_jax.models.pickles import has_torch, read_pickle
from clip_har_jax.models.resolve import resolve_folder
from clip_har_jax.models.temporal import split_temporal
from clip_har_jax.models.two_towers import IMAGE_TOWER, TwoTowers
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.tokenization import CheckedTokenizer, NoTokenizer, TextTokenizer, read_tokenizer

_NUMPY = ("F64", "F32", "F16")  # types of safetensors that numpy has; BF16 needs another library


def read_config(folder: Path) -> TwoTowerConfig:
    """Read config.json of a model folder, or open_clip_config.json.

    Raises:
      UserError: missing, not JSON, or not a model of a known family.
    """
    if is_adapter(folder):
        return read_config(_base_of(folder))
    if is_open_clip(folder):
        return read_open_clip_config(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; {_instead(folder)}")
    try:
        return config_from_hf(json.loads(path.read_text(encoding="utf-8")))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy it again") from error


def _instead(folder: Path) -> str:
    """Return the advice for a folder without a model; the output of `transformers.Trainer` has its models below it."""
    below = (path.parent.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*/*config.json"))
    steps = [int(step) for step in below if step.isdecimal()]
    if steps:
        last = folder / f"checkpoint-{max(steps)}"
        return f"it holds the checkpoints of a training; name one of them, such as {last}"
    return "a model folder in the Hugging Face layout or open_clip's is needed"


def read_params(folder: Path, config: TwoTowerConfig) -> Params:
    """Read the weights of a model folder as float32 numpy arrays.

    The first of these is read: model.safetensors, sharded safetensors with an index, flax_model.msgpack,
    pytorch_model.bin; of an open_clip folder, open_clip_model.safetensors or open_clip_pytorch_model.bin.

    Raises:
      UserError: no weights, unreadable ones, or ones that don't match the configuration (all are named).
    """
    shapes = {name: value.shape for name, value in flat_params(abstract_model(config)).items()}
    own, added = split_temporal(shapes)
    stored = own if config.has_texts else _image_tower(own)
    table = open_clip_table(folder) if is_open_clip(folder) else TABLES[config.family]
    params = params_from_hf(_read_model_tensors(folder), stored, str(folder), table)
    # An image tower alone is stored without the scale and the bias of logits.
    scalars = {name: np.float32(getattr(config, f"{name}_init_value")) for name in own.keys() - stored.keys()}
    return params | scalars | _read_temporal(folder, added)


def _image_tower(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name.startswith(IMAGE_TOWER)}


def _read_model_tensors(folder: Path) -> dict[str, Any]:
    """Return the tensors of a model folder or an adapter, under the names of its layout."""
    if is_open_clip(folder):
        return _read_open_clip_tensors(folder)
    if not is_adapter(folder):
        return _read_tensors(folder)
    base = _base_of(folder)
    if is_open_clip(base):
        raise UserError(f"{folder}: an adapter of a folder in open_clip's layout; name one in Hugging Face's")
    return merge_adapter(folder, _read_tensors(base), _read_safetensors(folder / ADAPTER))


def _base_of(adapter: Path) -> Path:
    """Return the folder of an adapter's base model; a path in its settings may be relative to the adapter."""
    name = read_settings(adapter)["base_model_name_or_path"]
    beside = adapter / name
    base = beside if beside.is_dir() else resolve_folder(name)
    if is_adapter(base):
        raise UserError(f"{adapter}: its base model {name} is an adapter too; merge that one with PEFT")
    return base


def _read_temporal(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Read the temporal parameters of a clip model, of exactly `shapes`."""
    path = folder / TEMPORAL_FILE
    if not shapes:
        return {}
    if not path.is_file():
        raise UserError(f"{folder}: config.json names a temporal model, but {TEMPORAL_FILE} is missing; copy it again")
    params = _read_safetensors(path)
    given = {name: value.shape for name, value in params.items()}
    if wrong := sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)):
        raise UserError(f"{path}: {wrong[0]} is {given.get(wrong[0])}, not {shapes.get(wrong[0])}; copy it again")
    return {name: np.asarray(value, np.float32) for name, value in params.items()}


def _read_tensors(folder: Path) -> dict[str, Any]:
    single, index, msgpack = (
        folder / name for name in ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
    )
    if single.is_file():
        return _read_safetensors(single)
    if index.is_file():
        tensors: dict[str, Any] = {}
        for shard in _read_shard_names(index):
            if not (folder / shard).is_file():
                raise UserError(f"{folder}: {shard}, named by {index.name}, is missing")
            tensors |= _read_safetensors(folder / shard)
        return tensors
    if msgpack.is_file():
        return _read_msgpack(msgpack)
    if (pickle := folder / "pytorch_model.bin").is_file() and has_torch():
        return read_pickle(pickle)
    found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
    raise UserError(
        f"{folder}: no model.safetensors or flax_model.msgpack (pickled weights found: {found}; they can run code "
        "when read: save the model again with safe_serialization=True, or install torch, which reads "
        "pytorch_model.bin without that)"
    )


def _read_open_clip_tensors(folder: Path) -> dict[str, Any]:
    if (folder / WEIGHTS).is_file():
        return _read_safetensors(folder / WEIGHTS)
    if not (folder / PICKLE).is_file():
        raise UserError(f"{folder}: {WEIGHTS} is missing; copy it again")
    if not has_torch():
        raise UserError(
            f"{folder / PICKLE}: pickled weights can run code when read; save them as {WEIGHTS}, or install torch, "
            "which reads them without that"
        )
    return read_pickle(folder / PICKLE)


def _read_shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors ({error!r}); copy it again") from error


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of a safetensors file that is read when it is converted: a large model is never in memory twice."""

    path: Path
    name: str
    shape: tuple[int, ...]
    framework: str  # numpy doesn't know bfloat16

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        try:
            # Opened for each tensor: an open file keeps all that was read from it mapped in memory.
            with (
                jax.default_device(jax.local_devices(backend="cpu")[0]),
                safe_open(self.path, self.framework) as file,
            ):
                return np.asarray(file.get_tensor(self.name), dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: can't be read ({error}); copy it again") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a file by name, without reading them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not iterable itself
            for name, one in slices.items():
                if one.get_dtype() not in (*_NUMPY, "BF16") and not name.endswith(BUFFER):
                    raise UserError(
                        f"{path}: {name} is of type {one.get_dtype()}, as quantised weights are; use the model's float "
                        "weights"
                    )
            return {
                name: _StoredTensor(path, name, tuple(one.get_shape()), "np" if one.get_dtype() in _NUMPY else "flax")
                for name, one in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: can't be read ({error}); copy it again") from error


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a Flax CLIP of transformers 4, under their PyTorch names and layouts."""
    from flax.serialization import msgpack_restore

    try:
        tree = msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack raises many kinds of exceptions for a damaged file
        raise UserError(f"{path}: can't be read ({error}); copy it again") from error
    tensors: dict[str, np.ndarray] = {}
    for name, value in traverse_util.flatten_dict(tree, sep=".").items():
        name, value = name.replace(".scale", ".weight"), np.asarray(value)
        if name.endswith(".kernel"):
            name = re.sub(r"kernel$", "weight", name)
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        tensors[re.sub(r"embedding\.embedding$", "embedding.weight", name)] = value
    return tensors


def resize_positions(params: Params, old: TwoTowerConfig, new: TwoTowerConfig) -> Params:
    """Return the parameters with position embeddings interpolated (bicubic) to the patches of another image size."""
    if old.vision.num_patches == new.vision.num_patches:
        return params
    embedding = np.asarray(params["vision.position_embedding"])
    dim = embedding.shape[-1]
    side, new_side = (round(config.vision.num_patches**0.5) for config in (old, new))
    first = old.vision.num_class_tokens
    grid = embedding[first:].reshape(side, side, dim)
    grid = np.asarray(jax.image.resize(grid, (new_side, new_side, dim), "bicubic", antialias=False))
    return params | {"vision.position_embedding": np.concatenate([embedding[:first], grid.reshape(-1, dim)])}


def load_pretrained(name_or_folder: str, runtime: Runtime = Runtime()) -> TwoTowers:
    """Return a model with the weights of a Hub name or a folder.

    Raises:
      UserError: as `resolve_folder`, `read_config` and `read_params`.
    """
    folder = resolve_folder(name_or_folder)
    config = read_config(folder)
    return make_model(config, on_device(read_params(folder, config)), runtime)


def on_device(params: Params) -> Params:
    """Return host arrays as arrays of the default device; `params` is emptied, so that few are held twice."""
    return {name: jax.numpy.asarray(params.pop(name)) for name in list(params)}


def read_preprocess(folder: Path, image_size_px: int) -> Preprocess:
    """Read how a model folder's images are transformed; without image settings, as the family's published models do.

    Raises:
      UserError: settings that can't be read, or that don't fit the model.
    """
    if is_adapter(folder):
        return read_preprocess(_base_of(folder), image_size_px)
    if is_open_clip(folder) and not (folder / "preprocessor_config.json").is_file():
        return read_open_clip_preprocess(folder, image_size_px)
    config = read_config(folder)
    if not Preprocess.is_in(folder):
        return family_of(config).preprocess(image_size_px)
    preprocess = Preprocess.from_folder(folder, image_size_px)
    patch_size = config.vision.patch_size if config.vision.any_aspect else 0
    if preprocess.patch_size_px != patch_size:
        kind = f"a NaFlex model with patches of {patch_size} px" if patch_size else "a model of a fixed resolution"
        raise UserError(
            f"{folder}: {kind}, but the image settings are for {preprocess.patch_size_px or 'no'} px; copy the model's "
            "own preprocessor_config.json"
        )
    return preprocess


def read_folder_tokenizer(folder: Path) -> TextTokenizer:
    """Read the tokenizer of a model folder, in either layout."""
    if is_adapter(folder):
        return read_folder_tokenizer(_base_of(folder))
    config = read_config(folder)
    if not config.has_texts:
        return NoTokenizer(str(folder))
    tokenizer = read_open_clip_tokenizer(folder) if is_open_clip(folder) else read_tokenizer(folder)
    return CheckedTokenizer(tokenizer, config.text.vocab_size, str(folder))


def save_pretrained(model: TwoTowers, folder: str | Path, layout: str = "") -> None:
    """Write a model.

    Args:
      model: it.
      folder: made if it isn't there.
      layout: open_clip: that layout; empty: as `write_params` chooses.
    """
    if layout not in ("", "open_clip"):
        raise UserError(f"layout {layout!r}; 'open_clip', or none")
    if layout == "open_clip":
        write_open_clip(folder, model.config, flat_params(model))
    else:
        write_params(folder, model.config, flat_params(model))


def write_params(folder: str | Path, config: TwoTowerConfig, params: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors of flat parameters in the Hugging Face layout.

    A model that this layout can't express, such as CLIPA, is written in open_clip's.
    """
    folder = Path(folder)
    again = config_from_hf(config_to_hf(config))
    if (again.text, again.vision) != (config.text, config.vision):
        write_open_clip(folder, config, params)
        return
    folder.mkdir(parents=True, exist_ok=True)
    own, added = split_temporal(params)
    own = own if config.has_texts else _image_tower(own)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n")
    write_tensors(folder / "model.safetensors", params_to_hf(own, TABLES[config.family]), {"format": "pt"})
    if added:
        write_tensors(folder / TEMPORAL_FILE, {name: np.asarray(value, np.float32) for name, value in added.items()})
