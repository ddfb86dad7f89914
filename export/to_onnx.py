"""ONNX by jax2onnx: operators of the standard domain alone, so that any runtime reads it; ONNX Runtime fuses at load.

It doesn't go through jax2tf: what that emits is one XlaCallModule operator, which no ONNX converter reads.
"""

import functools
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from export.graphs import Graph

OPSET = 23
MAX_PROTOBUF_BYTES = 2 * 10**9  # protobuf's own limit is 2 GiB; weights beyond it lie in a file beside
QUANTIZED = ["MatMul", "Gemm"]


def to_proto(graph: Graph) -> Any:
    """The graph as an `onnx.ModelProto`."""
    for name in ("jax2onnx", "onnx_ir"):  # tracebacks of plug-ins that don't load, warnings of untyped values
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import jax2onnx

    function = functools.partial(graph.function, graph.params)
    names = {"input_names": list(graph.inputs), "output_names": list(graph.outputs)}
    proto = jax2onnx.to_onnx(function, graph.specs("B"), model_name=graph.name, opset=OPSET, **names)
    if foreign := sorted({node.domain for node in proto.graph.node} - {"", "ai.onnx"}):
        raise AssertionError(f"operators of other domains: {foreign}")
    return proto


def save(proto: Any, path: Path) -> None:
    """Writes a model, its weights beside it where it is too large for one file."""
    import onnx

    if proto.ByteSize() > MAX_PROTOBUF_BYTES:
        onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save(proto, path)


def write_onnx(graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"]) -> None:
    """float32."""
    for graph in graphs:
        save(to_proto(graph), folder / f"{graph.name}.onnx")


def write_fp16(graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"]) -> None:
    """float16 inside, float32 outside, for GPUs."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for graph in graphs:
        save(convert_float_to_float16(to_proto(graph), keep_io_types=True), folder / f"{graph.name}.onnx")


def write_int8(
    graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"], static: bool = False
) -> None:
    """Weights of matrix products in 8 bits; activations scaled as they come, or (`static`) as `images` had them.

    The text encoder is quantised dynamically in both cases: images calibrate nothing in it.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    logging.getLogger().addFilter(lambda record: "pre-processing" not in record.getMessage())
    for graph in graphs:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "float32.onnx"
            save(to_proto(graph), source)
            target = folder / f"{graph.name}.onnx"
            if static and "image" in graph.inputs:
                quantize_static(
                    source,
                    target,
                    _Calibration(graph, images),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=QUANTIZED,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
            else:
                quantize_dynamic(source, target, QUANTIZED, per_channel=True, weight_type=QuantType.QInt8)


class _Calibration:
    """What `quantize_static` reads: one feed after the other, then None."""

    def __init__(self, graph: Graph, images: UInt8[np.ndarray, "n h w 3"]):
        classes = graph.inputs.get("class_weights")
        self._feeds = iter(
            [
                {"image": images[i : i + 1]} | ({"class_weights": _one_hot(i, classes[1][1])} if classes else {})
                for i in range(len(images))
            ]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _one_hot(i: int, count: Any) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[i % count][None]
