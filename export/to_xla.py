"""StableHLO by jax.export and SavedModel by jax2tf: both contain XLA's program, for CPUs, GPUs and TPUs."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import UInt8

from clip_har_jax.models.params import write_tensors
from export.graphs import Graph

PLATFORMS = ("cpu", "cuda", "tpu")


def _host(graph: Graph) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in graph.params.items()}


def write_stablehlo(graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"]) -> None:
    """Write one program per graph in `jax.export`'s versioned format, and once the weights, their first argument."""
    weights: dict[str, np.ndarray] = {}
    for graph in graphs:
        params = _host(graph)
        weights |= params
        batch, frames = export.symbolic_shape("b, t")
        shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params.items()}
        program = export.export(jax.jit(graph.function), platforms=PLATFORMS)(shapes, *graph.specs(batch, frames))
        (folder / f"{graph.name}.jax_export").write_bytes(program.serialize())
    write_tensors(folder / "weights.safetensors", weights)


def write_saved_model(graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"]) -> None:
    """Write one SavedModel: the classifier is `serving_default`, for TF Serving; other graphs have their names."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    module, signatures = tf.Module(), {}
    weights = {name: value for graph in graphs for name, value in _host(graph).items()}
    module.weights = {name: tf.Variable(value, trainable=False) for name, value in weights.items()}
    for graph in graphs:
        polymorphic = [None] + [f"({', '.join(map(str, shape))})" for _, shape in graph.inputs.values()]
        converted = jax2tf.convert(
            graph.function,
            polymorphic_shapes=polymorphic,
            native_serialization_platforms=PLATFORMS,
            with_gradient=False,
        )
        specs = [
            tf.TensorSpec([size if isinstance(size, int) else None for size in shape], tf.as_dtype(dtype), name=name)
            for name, (dtype, shape) in graph.inputs.items()
        ]
        function = _signature(converted, {name: module.weights[name] for name in graph.params}, graph.outputs)
        name = "serving_default" if graph.name == "classifier" else graph.name
        signatures[name] = tf.function(function, input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(folder), signatures=signatures)


def _signature(converted: Any, weights: dict[str, Any], outputs: tuple[str, ...]) -> Any:
    return lambda *inputs: dict(zip(outputs, converted(weights, *inputs), strict=True))
