"""TensorRT engines from ONNX graphs, by NVIDIA's Python API; only where its libraries and a GPU are. Elsewhere:

  python -m export.to_tensorrt --model=runs/demo/model --output=for_tensorrt

writes ONNX graphs of operators that NVIDIA's list has, and build.sh, which makes engines of them with NVIDIA's trtexec.
`write_tensorrt` and build.sh have never run: no such machine was at hand.
"""

import json
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from clip_har_jax import cli
from clip_har_jax.errors import UserError
from export.graphs import Graph
from export.to_onnx import save, to_proto

MAX_BATCH = 64
OPTIMAL_BATCH = 8
WORKSPACE_BYTES = 4 * 2**30
OPERATORS = Path(__file__).with_name("tensorrt_operators.json")


def missing_for_tensorrt() -> str | None:
    """What this machine lacks to build an engine, in words; None: nothing."""
    if find_spec("tensorrt") is None:
        return "the package tensorrt isn't installed; pip install tensorrt, on a machine with an NVIDIA GPU"
    try:
        import tensorrt
    except Exception as error:  # the bindings alone: the library isn't there
        return f"NVIDIA's library libnvinfer can't be loaded ({error}); install TensorRT from NVIDIA"
    try:
        if tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR)) is None:
            return "no NVIDIA GPU that TensorRT can use"
    except Exception as error:
        return f"no NVIDIA GPU that TensorRT can use ({error})"
    return None


def unsupported(proto: Any, precision: str) -> list[str]:
    """The operators of an ONNX graph that NVIDIA's list doesn't give for a precision (FP32, FP16 or BF16).

    Operators that only move or compare integers are held against the integer types.
    """
    listed = json.loads(OPERATORS.read_text(encoding="utf-8"))["operators"]
    used = {node.op_type for node in proto.graph.node}
    return sorted(name for name in used if not {precision, "INT64", "BOOL"} & set(listed.get(name, ())))


def trtexec_command(graph: Graph, onnx: Path, precision: str = "fp16") -> str:
    """The command that builds the same engine with NVIDIA's own tool."""

    def shapes(batch: int) -> str:
        return ",".join(
            f"{name}:" + "x".join(str(batch if size == "b" else size) for size in shape)
            for name, (_, shape) in graph.inputs.items()
        )

    parts = [
        "trtexec",
        f"--onnx={onnx}",
        f"--saveEngine={onnx.with_suffix('.engine')}",
        f"--minShapes={shapes(1)}",
        f"--optShapes={shapes(OPTIMAL_BATCH)}",
        f"--maxShapes={shapes(MAX_BATCH)}",
        f"--timingCacheFile={onnx.with_name('timing.cache')}",
    ]
    return shlex.join(parts + ([f"--{precision}"] if precision != "fp32" else []))


def write_tensorrt(
    graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"], precision: str = "fp16"
) -> None:
    """An engine a graph for batches of 1 to `MAX_BATCH`, and what it was built for."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    cache_path = folder / "timing.cache"
    for graph in graphs:
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(to_proto(graph, fuse=False).SerializeToString()):
            raise RuntimeError(f"{graph.name}: {parser.get_error(0)}")
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
        if precision != "fp32":
            config.set_flag({"fp16": trt.BuilderFlag.FP16, "bf16": trt.BuilderFlag.BF16}[precision])
        profile = builder.create_optimization_profile()
        for name, (_, shape) in graph.inputs.items():
            batches = (1, OPTIMAL_BATCH, MAX_BATCH)
            profile.set_shape(name, *[tuple(n if size == "b" else size for size in shape) for n in batches])
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


def write_for_trtexec(graphs: Sequence[Graph], folder: Path, precision: str) -> None:
    """ONNX graphs, and build.sh beside them.

    Raises:
      UserError: an operator that NVIDIA's list doesn't have for this precision; the folder isn't empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output={folder}: not an empty folder; name another one")
    folder.mkdir(parents=True, exist_ok=True)
    commands = []
    for graph in graphs:
        proto = to_proto(graph, fuse=False)
        if missing := unsupported(proto, precision.upper()):
            raise UserError(f"{graph.name}: TensorRT has no {', '.join(missing)} in {precision}")
        save(proto, folder / f"{graph.name}.onnx")
        commands.append(trtexec_command(graph, Path(f"{graph.name}.onnx"), precision))
    script = "\n".join(["#!/bin/sh", 'set -e; cd "$(dirname "$0")"', *commands, ""])
    (folder / "build.sh").write_text(script, encoding="utf-8")


def main() -> int:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a model folder, e.g. --model=runs/demo/model")
    add("--output", required=True, metavar="DIR", help="where to write, e.g. --output=for_tensorrt")
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp16", help="e.g. --precision=fp16 (default)")
    arguments = parser.parse_args()
    from export.run import open_model

    write_for_trtexec(open_model(arguments.model).graphs, Path(arguments.output), arguments.precision)
    print(f"on a machine with TensorRT: sh {arguments.output}/build.sh")
    return 0


if __name__ == "__main__":
    cli.run(main)
