"""The table between our parameters and the tensors of a Hugging Face CLIP, strict both ways; numpy only.

Layers are stacked on the first dim here and numbered there.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from clip_har_jax.errors import UserError

Params = dict[str, Any]  # dotted path -> array

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
        ("vision.pre_norm", "vision_model.pre_layrnorm", _NORM),  # the spelling of every published file
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


def params_from_hf(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> Params:
    """Return Hugging Face's tensors as flat float32 parameters of exactly `shapes`.

    Args:
      tensors: arrays, or objects with a shape that are read when they are converted to arrays.
      shapes: of the parameters.
      where: the folder, for messages.

    Raises:
      UserError: missing, unexpected or misshapen weights; names all of them in one message.
    """
    rest = {name for name in tensors if not name.endswith(".position_ids")}  # a buffer of older files, not a weight
    problems: list[str] = []
    fitting: dict[str, list[str]] = {}
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
        fitting[ours] = names
    problems += [f"unexpected {name}" for name in sorted(rest)]
    if problems:
        raise UserError(f"{where}: the weights don't fit config.json: {'; '.join(problems)}")

    def convert(ours: str) -> np.ndarray:
        theirs, transform = TABLE[ours]
        if "{i}" not in theirs:
            return _from_hf(np.asarray(tensors[theirs], np.float32), transform)
        stacked = np.empty(shapes[ours], np.float32)
        for layer, name in zip(stacked, fitting[ours], strict=True):  # one by one: no second copy of a tower
            layer[...] = _from_hf(np.asarray(tensors[name], np.float32), transform)
        return stacked

    with ThreadPoolExecutor() as pool:  # copying releases Python's lock
        return dict(zip(fitting, pool.map(convert, fitting), strict=True))


def hf_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names of Hugging Face's tensors that hold our parameters of these shapes."""
    named = [(TABLE[ours][0], shape) for ours, shape in shapes.items()]
    return [theirs.format(i=i) for theirs, shape in named for i in range(shape[0] if "{i}" in theirs else 1)]
