"""The formats: how each is written, how much it may differ from the model, and which packages it needs.

To add a format, write a file `to_*.py`, a row here, and a row in `clip_har_jax.inference.runtimes.RUNTIMES`, which
opens it.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.inference.runtimes import RUNTIMES
from clip_har_jax.models.pretrained import read_config
from export.model import OpenedModel
from export.parity import BFLOAT16, FLOAT16, FLOAT32, INT8, Bounds
from export.to_onnx import write_fp16, write_int8, write_onnx
from export.to_tensorrt import missing_for_tensorrt, write_tensorrt
from export.to_torch import TorchGraphs, write_torchscript
from export.to_xla import write_saved_model, write_stablehlo

Write = Callable[[OpenedModel, Path, UInt8[np.ndarray, "n h w 3"]], None]


class Format(NamedTuple):
    """One format.

    Attributes:
      write: writes a model into an empty folder; the images set the scales of int8 activations.
      bounds: how much the format may differ from the model.
      packages: needed to write it.
    """

    write: Write
    bounds: Bounds
    packages: tuple[str, ...]


def _from_graphs(write: Callable[..., None]) -> Write:
    return lambda model, folder, images: write(model.graphs, folder, images)


def _torchscript(model: OpenedModel, folder: Path, images: np.ndarray) -> None:
    graphs = TorchGraphs(
        model.folder,
        model.backend.preprocess,
        model.head,
        model.head_params,
        model.temperature,
        model.actions.multi_label,
    )
    write_torchscript(graphs, [graph.name for graph in model.graphs], folder)


def check_torchscript(folder: Path, is_temporal: bool, formats: Collection[str]) -> None:
    """Refuse TorchScript for a model that isn't a CLIP of transformers.

    Args:
      folder: of the model.
      is_temporal: the order of a clip's frames counts.
      formats: names of the formats to write.

    Raises:
      UserError: such a model with TorchScript.
    """
    if "torchscript" not in formats:
        return
    if read_config(folder).family != "clip" or not (folder / "config.json").is_file():
        raise UserError(
            "--formats=torchscript: only CLIPs in the Hugging Face layout are written; use onnx, saved_model or "
            "stablehlo"
        )
    if is_temporal:
        raise UserError(
            "--formats=torchscript: transformers has no model in which the order of a clip's frames counts; "
            "use onnx, saved_model or stablehlo"
        )


ONNX = ("jax2onnx", "onnx", "onnxscript")
FORMATS = {
    "onnx": Format(_from_graphs(write_onnx), FLOAT32, ONNX),
    "onnx_fp16": Format(_from_graphs(write_fp16), FLOAT16, ONNX),
    "onnx_int8": Format(_from_graphs(write_int8), INT8, ONNX),
    "saved_model": Format(_from_graphs(write_saved_model), FLOAT32, ("tensorflow",)),
    "stablehlo": Format(_from_graphs(write_stablehlo), FLOAT32, ()),
    "torchscript": Format(_torchscript, FLOAT32, ("torch", "transformers")),
    "tensorrt": Format(_from_graphs(write_tensorrt), FLOAT16, ONNX),
}
TENSORRT_BOUNDS = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16, "int8": INT8}


def choose_formats(names: Sequence[str], static_int8: bool = False, precision: str = "fp16") -> dict[str, Format]:
    """Return the formats of these names; refuse those that can't be written and checked here, before any computation.

    Args:
      names: of `FORMATS`.
      static_int8: fix the scales of int8 activations with some of the images, instead of computing them for each input.
      precision: number format of TensorRT's engines, a key of `TENSORRT_BOUNDS`.

    Raises:
      UserError: an unknown or repeated format, or its packages or its hardware are missing.
    """
    if not names:
        raise UserError(f"--formats: name one or more of {', '.join(FORMATS)}")
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--formats: {name!r} is unknown; {nearest(name, list(FORMATS))}")
        if names.count(name) > 1:
            raise UserError(f"--formats: {name!r} is named twice")
        if name == "tensorrt" and (lacking := missing_for_tensorrt()):
            raise UserError(f"--formats=tensorrt: {lacking}")
        needed = dict.fromkeys(FORMATS[name].packages + RUNTIMES[name][0])
        if missing := [package for package in needed if find_spec(package) is None]:
            extra = "torch" if name == "torchscript" else "export"
            raise UserError(
                f"--formats={name}: needs {', '.join(missing)}, which isn't installed; pip install -e '.[{extra}]'"
            )
    chosen = {name: FORMATS[name] for name in names}
    if static_int8 and "onnx_int8" in chosen:
        chosen["onnx_int8"] = chosen["onnx_int8"]._replace(write=_from_graphs(partial(write_int8, static=True)))
    if "tensorrt" in chosen:
        write = _from_graphs(partial(write_tensorrt, precision=precision))
        chosen["tensorrt"] = chosen["tensorrt"]._replace(write=write, bounds=TENSORRT_BOUNDS[precision])
    return chosen
