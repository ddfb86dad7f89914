"""TensorRT engines from ONNX graphs, with NVIDIA's Python API; it needs NVIDIA's libraries and a GPU. Elsewhere,

  python -m export.to_tensorrt --model=runs/demo/model --output=for_tensorrt --precision=int8

writes ONNX graphs of operators that NVIDIA supports, and build.sh, which builds engines from them with NVIDIA's
trtexec. `write_tensorrt` and build.sh have never been run: no such machine was available.

TensorRT 11 has only strongly typed networks, which 10 supports too: an engine computes in the types of its graph. So
the graph is converted here, and the builder may not choose the precision.
"""

import json
import shlex
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from clip_har_jax import cli
from clip_har_jax.errors import UserError
from export.graphs import Graph
from export.to_onnx import (
    NO_OUTPUTS,
    NUM_CALIBRATION,
    CalibrationFeeds,
    products_with_weights,
    quiet_quantiser,
    save,
    to_float16,
    to_proto,
)

MAX_BATCH = 64
SIZES = ((1, 1), (8, 8), (MAX_BATCH, 64))  # smallest, usual and largest batch, and frames of a clip
WORKSPACE_BYTES = 4 * 2**30
# type of the numbers that aren't quantised, in the terms of NVIDIA's list and trtexec
FLOATS = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "int8": "FP16"}
OPERATORS = Path(__file__).with_name("tensorrt_operators.json")


def missing_for_tensorrt() -> str | None:
    """Return what this machine lacks for building an engine, in words; None: nothing."""
    if find_spec("tensorrt") is None:
        return "the package tensorrt isn't installed; pip install tensorrt, on a machine with an NVIDIA GPU"
    try:
        import tensorrt
    except Exception as error:  # only the bindings are installed, not the library
        return f"NVIDIA's library libnvinfer can't be loaded ({error}); install TensorRT from NVIDIA"
    try:
        if tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR)) is None:
            return "no NVIDIA GPU that TensorRT can use"
    except Exception as error:
        return f"no NVIDIA GPU that TensorRT can use ({error})"
    return None


def typed_proto(graph: Graph, precision: str, images: UInt8[np.ndarray, "n h w 3"]) -> Any:
    """Return the ONNX graph for an engine of a precision; inputs and outputs have the same types in all precisions.

    Args:
      graph: the graph to convert.
      precision: of `FLOATS`. int8: the matrix products of the image tower have 8 bits, the rest is float16. The text
        encoder is then float16, as it runs only once per set of classes.
      images: set the scales of int8 activations.
    """
    import onnx_ir

    proto = to_proto(graph, fuse=False)
    if precision == "int8" and {"image", "frames"} & set(graph.inputs):
        proto = quantize(proto, graph, images)
    if precision == "bf16":
        return to_bfloat16(proto)
    return proto if precision == "fp32" else onnx_ir.to_proto(to_float16(onnx_ir.from_proto(proto)))


def quantize(proto: Any, graph: Graph, images: UInt8[np.ndarray, "n h w 3"]) -> Any:
    """Insert QuantizeLinear and DequantizeLinear before matrix products with weights (TensorRT's explicit
    quantisation).

    Signed, zero points of 0, one scale for activations and one per column of weights, no quantised outputs. The first
    product isn't quantised: pixels from 0 to 255 would lose a bit in signed numbers.
    """
    import onnx
    import onnx_ir
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quiet_quantiser()
    model = onnx_ir.from_proto(proto)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "float32.onnx", Path(scratch) / "int8.onnx"
        save(model, source)
        quantize_static(
            source,
            target,
            CalibrationFeeds(graph, images),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=products_with_weights(model)[1:],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=source.with_name(f"{source.name}.data").exists(),
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, **NO_OUTPUTS},
        )
        return onnx.load(target)


def to_bfloat16(proto: Any) -> Any:
    """Convert to bfloat16, with float32 inputs and outputs: ONNX Runtime's float16 converter, with the other type."""
    import ml_dtypes
    import onnx_ir
    from onnx import TensorProto, numpy_helper

    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    half = onnx_ir.to_proto(to_float16(onnx_ir.from_proto(proto)))
    del half.graph.value_info[:]
    for tensor in half.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(exact[tensor.name].astype(ml_dtypes.bfloat16), tensor.name))
    for node in half.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
            assert attribute.t.data_type != TensorProto.FLOAT16, f"{node.name}: a constant outside of the initialisers"
    return half


def unsupported(proto: Any, precision: str) -> list[str]:
    """Return the operators of an ONNX graph that NVIDIA's list lacks for a precision of `FLOATS`.

    Operators that only move or compare integers are checked with the integer types.
    """
    listed = json.loads(OPERATORS.read_text(encoding="utf-8"))["operators"]
    used = {node.op_type for node in proto.graph.node}
    types = {FLOATS[precision], "INT64", "BOOL"} | ({"INT8"} if precision == "int8" else set())
    return sorted(name for name in used if not types & set(listed.get(name, ())))


def trtexec_command(graph: Graph, onnx: Path) -> str:
    """Return the command that builds the same engine with NVIDIA's tool."""

    def shapes(batch: int, frames: int) -> str:
        specs = zip(graph.inputs, graph.specs(batch, frames), strict=True)
        return ",".join(f"{name}:" + "x".join(map(str, spec.shape)) for name, spec in specs)

    return shlex.join(
        [
            "trtexec",
            f"--onnx={onnx}",
            f"--saveEngine={onnx.with_suffix('.engine')}",
            "--stronglyTyped",
            "--noTF32",
            *(f"--{name}Shapes={shapes(*sizes)}" for name, sizes in zip(("min", "opt", "max"), SIZES, strict=True)),
            f"--timingCacheFile={onnx.with_name('timing.cache')}",
        ]
    )


def write_tensorrt(
    graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"], precision: str = "fp16"
) -> None:
    """Build one engine per graph for batches of 1 to `MAX_BATCH`; return the facts of the build."""
    import onnx_ir
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    cache_path = folder / "timing.cache"
    for graph in graphs:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / f"{graph.name}.onnx"
            save(onnx_ir.from_proto(typed_proto(graph, precision, images)), source)
            if not parser.parse_from_file(str(source)):
                raise RuntimeError(f"{graph.name}: {parser.get_error(0)}")
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
        config.clear_flag(trt.BuilderFlag.TF32)  # it would round float32 to 10 bits
        profile = builder.create_optimization_profile()
        for name, *specs in zip(graph.inputs, *(graph.specs(*sizes) for sizes in SIZES), strict=True):
            profile.set_shape(name, *[spec.shape for spec in specs])
        config.add_optimization_profile(profile)
        cache = config.create_timing_cache(cache_path.read_bytes() if cache_path.exists() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise RuntimeError(f"{graph.name}: TensorRT built no engine")
        (folder / f"{graph.name}.engine").write_bytes(engine)
        cache_path.write_bytes(config.get_timing_cache().serialize())
    about = {"tensorrt": trt.__version__, "precision": precision, "max_batch": MAX_BATCH}
    (folder / "engine.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def write_for_trtexec(
    graphs: Sequence[Graph], folder: Path, precision: str, images: UInt8[np.ndarray, "n h w 3"]
) -> None:
    """Write ONNX graphs and build.sh.

    Raises:
      UserError: NVIDIA's list lacks an operator for this precision, or the folder isn't empty.
    """
    import onnx_ir

    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    commands = []
    for graph in graphs:
        proto = typed_proto(graph, precision, images)
        if missing := unsupported(proto, precision):
            raise UserError(f"{graph.name}: TensorRT has no {', '.join(missing)} in {precision}")
        save(onnx_ir.from_proto(proto), folder / f"{graph.name}.onnx")
        commands.append(trtexec_command(graph, Path(f"{graph.name}.onnx")))
    script = "\n".join(["#!/bin/sh", 'set -e; cd "$(dirname "$0")"', *commands, ""])
    (folder / "build.sh").write_text(script, encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Refuse a non-empty folder.

    Raises:
      UserError: the folder isn't empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output={folder}: not an empty folder; name another one")


def main() -> int:
    parser = cli.make_parser(__doc__)
    cli.add_model(parser)
    cli.add_output(parser, "for_tensorrt")
    parser.add_argument("--precision", choices=tuple(FLOATS), default="fp16", help="e.g. --precision=fp16 (default)")
    cli.add_data(parser, "images that set the scales of int8, e.g. --data=folder:photos", default="synthetic")
    arguments = parser.parse_args()
    from export.model import open_model, read_images

    output = Path(arguments.output)
    check_folder(output)
    model = open_model(arguments.model)
    images, _ = read_images(model, arguments.data, NUM_CALIBRATION)
    write_for_trtexec(model.graphs, output, arguments.precision, images)
    print(f"on a machine with TensorRT: sh {arguments.output}/build.sh")
    return 0


if __name__ == "__main__":
    cli.run(main)
