"""Triton's model repository, which KServe reads too: the ONNX graphs of an exported folder in its layout.

NAME/1/model.onnx, NAME/config.pbtxt and NAME/labels.txt, as Triton's model configuration describes them
(https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md).
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.folders import replace_folder

SIGNATURE = "signature.json"
TYPES = {"uint8": "TYPE_UINT8", "int32": "TYPE_INT32", "float32": "TYPE_FP32"}
# The outputs of each graph: shape without the batch; -1 stands for the model's width.
EMBEDDINGS = ("image_embeds", "text_embeds", "frame_embeds", "clip_embeds")
SHAPES: dict[str, str | int] = {"probs": "classes", "logits": "classes"} | dict.fromkeys(EMBEDDINGS, -1)
# graph -> suffix of the model's name
SERVED = {
    "classifier": "",
    "image_encoder": "_image_encoder",
    "text_encoder": "_text_encoder",
    "clip_classifier": "_clip",
    "frame_encoder": "_frame_encoder",
    "clip_head": "_clip_head",
}


def write_model_repository(export: Path, output: Path, name: str, format: str, max_batch_size: int) -> list[str]:
    """Write the repository; return the names of the models in it.

    Args:
      export: a sealed exported folder.
      output: the repository; existing models of these names are replaced.
      name: of the classifier; the other models have the suffixes in `SERVED`.
      format: one of the folder's ONNX formats.
      max_batch_size: most images that Triton may batch.

    Raises:
      UserError: not an exported folder, a changed file, or no such format in it.
    """
    digest = bundle.verify(export)
    if digest is None or not (export / SIGNATURE).is_file():
        raise UserError(f"--export={export}: not a sealed folder of `python -m export`")
    if not (export / format).is_dir() or not format.startswith("onnx"):
        there = [path.name for path in sorted(export.glob("onnx*")) if path.is_dir()]
        raise UserError(f"--format={format}: not in {export}; it has {', '.join(there) or 'no ONNX format'}")
    graphs = json.loads((export / SIGNATURE).read_text(encoding="utf-8"))["graphs"]
    labels = bundle.read_actions(export).labels
    written = []
    for graph, ending in SERVED.items():
        if graph not in graphs:
            continue
        model, labelled = f"{name}{ending}", "probs" in graphs[graph]["outputs"]
        config = _config(model, graphs[graph], len(labels), max_batch_size, digest, labelled)

        def fill(folder: Path, graph: str = graph, config: str = config, labelled: bool = labelled) -> None:
            (folder / "1").mkdir()
            shutil.copy(export / format / f"{graph}.onnx", folder / "1" / "model.onnx")
            for data in (export / format).glob(f"{graph}.onnx.*"):  # external weights of a large graph
                shutil.copy(data, folder / "1" / data.name)
            (folder / "config.pbtxt").write_text(config, encoding="utf-8")
            if labelled:
                (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")

        replace_folder(output / model, fill)
        written.append(model)
    return written


def _config(name: str, graph: Mapping[str, Any], classes: int, most: int, digest: str, labelled: bool) -> str:
    """Return config.pbtxt; it contains the digest, so that a served model can be traced."""
    inputs = []
    for key, (kind, shape) in graph["inputs"].items():
        dims = [size if isinstance(size, int) else -1 for size in shape[1:]]  # "t": any number of frames
        inputs.append(f'  {{ name: "{key}" data_type: {TYPES[kind]} dims: {dims} }}')
    outputs = []
    for key in graph["outputs"]:
        size = classes if SHAPES[key] == "classes" else SHAPES[key]
        label = ' label_filename: "labels.txt"' if labelled and key == "probs" else ""
        outputs.append(f'  {{ name: "{key}" data_type: TYPE_FP32 dims: [{size}]{label} }}')
    lines = [
        f'name: "{name}"',
        'platform: "onnxruntime_onnx"',
        f"max_batch_size: {most}",
        "input [",
        ",\n".join(inputs),
        "]",
        "output [",
        ",\n".join(outputs),
        "]",
        "dynamic_batching { max_queue_delay_microseconds: 2000 }",
        f'parameters {{ key: "digest" value: {{ string_value: "{digest}" }} }}',
    ]
    return "\n".join(lines) + "\n"
