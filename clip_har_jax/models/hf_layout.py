"""The tables between our parameters and the tensors of published files, strict both ways; numpy only.

Layers are stacked on the first dim here and numbered there.
The tables and what reads them stand in one file, over 300 lines, so that a family's names are found in one place.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from clip_har_jax.errors import UserError

Params = dict[str, Any]  # dotted path -> array
TEMPORAL_FILE = "temporal.safetensors"  # what a model of clips adds to CLIP, under our names
BUFFER = ".position_ids"  # end of the name of a buffer of older files, which isn't a weight
SHOWN = 12  # weights that an error names
IMAGE_ALONE = "_vision_model"  # end of the `model_type` of an image tower alone, as CLIPVisionModelWithProjection's


class Weight(NamedTuple):
    """Where a parameter of ours stands in a published file.

    Attributes:
      name: of the tensor, with {i} for the layer.
      transform: transpose: [out, in] there, [in, out] here; patch: [d, 3, p, p] there, [p * p * 3, d] here; lead1,
        lead2: one or two dims of size 1 more there.
      part, parts: which of `parts` equal pieces of the tensor's first dim it is, e.g. a key of joined queries, keys and
        values.
    """

    name: str
    transform: str = ""
    part: int = 0
    parts: int = 1


Table = dict[str, Weight]  # our name -> the tensor

_LINEAR = (("kernel", "weight", "transpose"), ("bias", "bias", ""))
_NORM = (("scale", "weight", ""), ("bias", "bias", ""))
_MLP = (("mlp.fc1", "mlp.fc1", _LINEAR), ("mlp.fc2", "mlp.fc2", _LINEAR))
_LAYER = (
    ("norm1", "layer_norm1", _NORM),
    ("attention.query", "self_attn.q_proj", _LINEAR),
    ("attention.key", "self_attn.k_proj", _LINEAR),
    ("attention.value", "self_attn.v_proj", _LINEAR),
    ("attention.out", "self_attn.out_proj", _LINEAR),
    ("norm2", "layer_norm2", _NORM),
    *_MLP,
)


def _expand(parts: list[tuple[str, str, Any]]) -> Table:
    """Return the entries of modules: our prefix, theirs, and the parameters of the kind."""
    return {f"{ours}.{a}": Weight(f"{theirs}.{b}", how) for ours, theirs, kind in parts for a, b, how in kind}


def _joined(ours: str, theirs: str) -> Table:
    """Return the entries of an attention whose queries, keys and values are one tensor, `theirs` + weight or bias."""
    return {
        f"{ours}.{name}.{a}": Weight(theirs + b, how, part, 3)
        for part, name in enumerate(("query", "key", "value"))
        for a, b, how in _LINEAR
    }


def _hf_towers() -> Table:
    """Return the parts that CLIP and SigLIP share in Hugging Face's layout."""
    table = {
        "text.token_embedding": Weight("text_model.embeddings.token_embedding.weight"),
        "text.position_embedding": Weight("text_model.embeddings.position_embedding.weight"),
        "vision.patch_embedding.kernel": Weight("vision_model.embeddings.patch_embedding.weight", "patch"),
        "vision.position_embedding": Weight("vision_model.embeddings.position_embedding.weight"),
    }
    parts = [
        ("text.final_norm", "text_model.final_layer_norm", _NORM),
        ("vision.post_norm", "vision_model.post_layernorm", _NORM),
    ]
    for tower in ("text", "vision"):
        parts += [
            (f"{tower}.layers.{ours}", f"{tower}_model.encoder.layers.{{i}}.{theirs}", kind)
            for ours, theirs, kind in _LAYER
        ]
    return table | _expand(parts)


TABLES: dict[str, Table] = {
    "clip": {
        "logit_scale": Weight("logit_scale"),
        "text_projection.kernel": Weight("text_projection.weight", "transpose"),
        "visual_projection.kernel": Weight("visual_projection.weight", "transpose"),
        "vision.class_embedding": Weight("vision_model.embeddings.class_embedding"),
        **_expand([("vision.pre_norm", "vision_model.pre_layrnorm", _NORM)]),  # the spelling of every published file
        **_hf_towers(),
    },
    "siglip": {
        "logit_scale": Weight("logit_scale", "lead1"),
        "logit_bias": Weight("logit_bias", "lead1"),
        "vision.patch_embedding.bias": Weight("vision_model.embeddings.patch_embedding.bias"),
        "vision.pool.probe": Weight("vision_model.head.probe", "lead2"),
        **_joined("vision.pool.attention", "vision_model.head.attention.in_proj_"),
        **_expand(
            [
                ("text_projection", "text_model.head", _LINEAR),
                ("vision.pool.attention.out", "vision_model.head.attention.out_proj", _LINEAR),
                ("vision.pool.norm", "vision_model.head.layernorm", _NORM),
                *((f"vision.pool.{ours}", f"vision_model.head.{theirs}", kind) for ours, theirs, kind in _MLP),
            ]
        ),
        **_hf_towers(),
    },
}


TABLES["siglip2"] = TABLES["siglip"] | {
    "vision.patch_embedding.kernel": Weight("vision_model.embeddings.patch_embedding.weight", "transpose")
}

_OPEN_CLIP_LAYER = (
    ("norm1", "ln_1", _NORM),
    ("attention.out", "attn.out_proj", _LINEAR),
    ("norm2", "ln_2", _NORM),
    ("mlp.fc1", "mlp.c_fc", _LINEAR),
    ("mlp.fc2", "mlp.c_proj", _LINEAR),
)
_TIMM_LAYER = (
    ("norm1", "norm1", _NORM),
    ("attention.out", "attn.proj", _LINEAR),
    ("norm2", "norm2", _NORM),
    *_MLP,
)


def _open_clip_text(prefix: str) -> Table:
    """Return the parts of a text tower in open_clip's layout, whose names begin so."""
    layer = prefix + "transformer.resblocks.{i}."
    return {
        "text.token_embedding": Weight(prefix + "token_embedding.weight"),
        "text.position_embedding": Weight(prefix + "positional_embedding"),
        **_joined("text.layers.attention", layer + "attn.in_proj_"),
        **_expand([("text.final_norm", prefix + "ln_final", _NORM)]),
        **_expand([(f"text.layers.{ours}", layer + theirs, kind) for ours, theirs, kind in _OPEN_CLIP_LAYER]),
    }


def _open_clip(prefix: str) -> Table:
    """Return the table of open_clip's CLIP, whose text tower's names begin so."""
    layer = "visual.transformer.resblocks.{i}."
    return {
        "logit_scale": Weight("logit_scale"),
        "text_projection.kernel": Weight(prefix + "text_projection"),
        "visual_projection.kernel": Weight("visual.proj"),
        "vision.class_embedding": Weight("visual.class_embedding"),
        "vision.position_embedding": Weight("visual.positional_embedding"),
        "vision.patch_embedding.kernel": Weight("visual.conv1.weight", "patch"),
        **_joined("vision.layers.attention", layer + "attn.in_proj_"),
        **_expand([("vision.pre_norm", "visual.ln_pre", _NORM), ("vision.post_norm", "visual.ln_post", _NORM)]),
        **_expand([(f"vision.layers.{ours}", layer + theirs, kind) for ours, theirs, kind in _OPEN_CLIP_LAYER]),
        **_open_clip_text(prefix),
    }


def _open_clip_siglip() -> Table:
    """Return the table of open_clip's SigLIP, whose image tower is timm's."""
    trunk, layer, pool = "visual.trunk.", "visual.trunk.blocks.{i}.", "visual.trunk.attn_pool."
    keys_and_values = {
        f"vision.pool.attention.{name}.{a}": Weight(pool + f"kv.{b}", how, part, 2)
        for part, name in enumerate(("key", "value"))
        for a, b, how in _LINEAR
    }
    modules = [
        ("text_projection", "text.text_projection", _LINEAR),
        ("vision.post_norm", trunk + "norm", _NORM),
        ("vision.pool.attention.query", pool + "q", _LINEAR),
        ("vision.pool.attention.out", pool + "proj", _LINEAR),
        ("vision.pool.norm", pool + "norm", _NORM),
        *((f"vision.pool.{ours}", pool + theirs, kind) for ours, theirs, kind in _MLP),
        *((f"vision.layers.{ours}", layer + theirs, kind) for ours, theirs, kind in _TIMM_LAYER),
    ]
    return {
        "logit_scale": Weight("logit_scale"),
        "logit_bias": Weight("logit_bias"),
        "vision.patch_embedding.kernel": Weight(trunk + "patch_embed.proj.weight", "patch"),
        "vision.patch_embedding.bias": Weight(trunk + "patch_embed.proj.bias"),
        "vision.position_embedding": Weight(trunk + "pos_embed", "lead1"),
        "vision.pool.probe": Weight(pool + "latent", "lead2"),
        **_joined("vision.layers.attention", layer + "attn.qkv."),
        **keys_and_values,
        **_expand(modules),
        **_open_clip_text("text."),
    }


TABLES |= {
    "open_clip": _open_clip(""),
    "open_clip_custom_text": _open_clip("text."),
    "open_clip_siglip": _open_clip_siglip(),
}


def _from_hf(value: np.ndarray, weight: Weight) -> np.ndarray:
    value = np.split(value, weight.parts)[weight.part] if weight.parts > 1 else value
    if weight.transform == "transpose":
        return value.T
    if weight.transform == "patch":
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value.reshape(value.shape[_lead(weight) :])


def _lead(weight: Weight) -> int:
    """Return the number of dims of size 1 that stand first in the file."""
    return {"lead1": 1, "lead2": 2}.get(weight.transform, 0)


def _hf_shape(shape: tuple[int, ...], weight: Weight) -> tuple[int, ...]:
    """Return the shape of the file's tensor, where ours has `shape`."""
    if weight.transform == "patch":
        patch = round((shape[0] / 3) ** 0.5)
        return shape[1], 3, patch, patch
    theirs = shape[::-1] if weight.transform == "transpose" else (1,) * _lead(weight) + shape
    return (theirs[0] * weight.parts, *theirs[1:]) if weight.parts > 1 else theirs


def _to_hf(value: np.ndarray, weight: Weight) -> np.ndarray:
    """Return the file's tensor, or the piece of it that a parameter of ours is."""
    if weight.transform == "patch":
        dim, channels, patch, _ = _hf_shape(value.shape, weight)
        value = value.reshape(patch, patch, channels, dim).transpose(3, 2, 0, 1)
    elif weight.transform == "transpose":
        value = value.T
    return np.array(value.reshape((1,) * _lead(weight) + value.shape), order="C")


def params_to_hf(params: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """Return flat parameters as the tensors of a file, in the names and shapes of `table`.

    Raises:
      UserError: some aren't in the table; names all of them.
    """
    if unknown := sorted(set(params) - set(table)):
        raise UserError(f"not parameters of this family of models: {', '.join(unknown)}")
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for ours, value in params.items():
        weight, value = table[ours], np.asarray(value, np.float32)
        layers = enumerate(value) if "{i}" in weight.name else [(0, value)]
        for i, layer in layers:
            pieces.setdefault(weight.name.format(i=i), {})[weight.part] = _to_hf(layer, weight)
    return {
        name: np.concatenate([of[part] for part in sorted(of)]) if len(of) > 1 else of[0] for name, of in pieces.items()
    }


def params_from_hf(
    tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str, table: Table
) -> Params:
    """Return the tensors of a file as flat float32 parameters of exactly `shapes`.

    Args:
      tensors: arrays, or objects with a shape that are read when they are converted to arrays.
      shapes: of the parameters.
      where: the folder, for messages.
      table: of the family's weights.

    Raises:
      UserError: missing, unexpected or misshapen weights; names the first `SHOWN` of them.
    """
    rest = {name for name in tensors if not name.endswith(BUFFER)}
    problems: dict[str, None] = {}  # in order, each once: several of our parameters may be pieces of one tensor
    fitting: dict[str, list[str]] = {}
    for ours, shape in shapes.items():
        weight = table[ours]
        stacked = "{i}" in weight.name
        names = [weight.name.format(i=i) for i in range(shape[0])] if stacked else [weight.name]
        rest -= set(names)
        if missing := [name for name in names if name not in tensors]:
            problems |= dict.fromkeys(f"missing {name}" for name in missing)
            continue
        wanted = _hf_shape(shape[1:] if stacked else shape, weight)
        if wrong := [name for name in names if tensors[name].shape != wanted]:
            problems |= dict.fromkeys(f"misshapen {name}: {tensors[name].shape}, not {wanted}" for name in wrong)
            continue
        fitting[ours] = names
    problems |= dict.fromkeys(f"unexpected {name}" for name in sorted(rest))
    if problems:
        named, more = list(problems)[:SHOWN], len(problems) - SHOWN
        listed = "; ".join([*named, *([f"and {more} more"] if more > 0 else [])])
        raise UserError(f"{where}: the weights don't fit config.json: {listed}; copy both files of one model")

    def convert(ours: str) -> np.ndarray:
        weight = table[ours]
        if "{i}" not in weight.name:
            return _from_hf(np.asarray(tensors[weight.name], np.float32), weight)
        stacked = np.empty(shapes[ours], np.float32)
        for layer, name in zip(stacked, fitting[ours], strict=True):  # one by one: no second copy of a tower
            layer[...] = _from_hf(np.asarray(tensors[name], np.float32), weight)
        return stacked

    with ThreadPoolExecutor() as pool:  # copying releases Python's lock
        return dict(zip(fitting, pool.map(convert, fitting), strict=True))


def hf_names(shapes: Mapping[str, tuple[int, ...]], table: Table) -> list[str]:
    """Return the names of the tensors that hold our parameters of these shapes."""
    named = [(table[ours].name, shape) for ours, shape in shapes.items()]
    names = [theirs.format(i=i) for theirs, shape in named for i in range(shape[0] if "{i}" in theirs else 1)]
    return list(dict.fromkeys(names))
