"""ONNX by jax2onnx: only operators of the standard domain, for any runtime; ONNX Runtime fuses them when loading.

It doesn't use jax2tf, whose output is a single XlaCallModule operator that no ONNX converter can read.
"""

import functools
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from clip_har_jax.models.temporal import HEAD as TIME_HEAD
from export.graphs import Graph, NotExpressible

OPSET = 23
MAX_PROTOBUF_BYTES = 2 * 10**9  # protobuf's own limit is 2 GiB; larger weights are stored in a separate file
MIN_STREAMED_BYTES = 2**20  # size from which a weight is converted to float16 only while it is written
NUM_CALIBRATION = 32  # images, or clips of consecutive ones, that set the scales of activations
CALIBRATION_FRAMES = 8  # frames of each clip made of these images, for a model that takes any number
QUANTIZED = ["MatMul", "Gemm"]
HEADS = (TIME_HEAD, "head.")  # prefixes of the parameters after the image tower
# Fixed scales of outputs would limit logits and residual sums to the values seen with the calibration images.
NO_OUTPUTS = {"OpTypesToExcludeOutputQuantization": QUANTIZED}


def convert(graph: Graph, fuse: bool = True) -> Any:
    """Return the graph as an `onnx_ir.Model`: constants folded, dead code removed, attention as one operator.

    Args:
      graph: the graph to convert.
      fuse: whether attention is ONNX's Attention operator (opset 23), or matrix products and a softmax.

    Raises:
      NotExpressible: an operation that jax2onnx doesn't convert.
    """
    for name in ("jax2onnx", "onnx_ir"):  # tracebacks of plug-ins that don't load, warnings about untyped values
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import jax2onnx
    from onnxscript import optimizer, rewriter

    function = functools.partial(graph.function, graph.params)
    names = {"input_names": list(graph.inputs), "output_names": list(graph.outputs)}
    # As a model object: a proto would hold the weights a second time.
    try:
        model = jax2onnx.to_onnx(
            function, graph.specs("B", "T"), model_name=graph.name, opset=OPSET, return_mode="ir", **names
        )
    except NotImplementedError as error:
        raise NotExpressible(str(error)) from error
    optimizer.optimize(model)
    if fuse:
        rewriter.rewrite(model, attention_rules())
    if foreign := sorted({node.domain for node in model.graph} - {"", "ai.onnx"}):
        raise AssertionError(f"operators of other domains: {foreign}")
    return model


def to_proto(graph: Graph, fuse: bool = True) -> Any:
    """Return the result of `convert` as an `onnx.ModelProto`, which holds a second copy of the weights."""
    import onnx_ir

    return onnx_ir.to_proto(convert(graph, fuse))


def attention_rules() -> Any:
    """Return the rewrite rules that replace jax2onnx's version of `jax.nn.dot_product_attention` by one Attention.

    Its matrix products need transposed copies of queries, keys and values; ONNX Runtime's Attention doesn't.
    """
    from onnxscript.rewriter.pattern import ANY_VALUE, RewriteRule, RewriteRuleSet

    def attend(op: Any, x: Sequence[Any], heads: Any, masked: Callable[[Any], Any], scale: Any) -> Any:
        query = op.Transpose(op.Reshape(x[0], heads), perm=[0, 2, 1, 3])
        key = op.Transpose(op.Reshape(x[1], ANY_VALUE), perm=[0, 2, 3, 1])
        value = op.Transpose(op.Reshape(x[2], ANY_VALUE), perm=[0, 2, 1, 3])
        weights = op.Softmax(masked(op.Mul(op.MatMul(query, key), scale)), axis=3)
        return op.Reshape(op.Transpose(op.MatMul(weights, value), perm=[0, 2, 1, 3]), ANY_VALUE)

    def plain(op, query, key, value, heads, scale):  # type: ignore[no-untyped-def]
        return attend(op, (query, key, value), heads, lambda scores: scores, scale)

    def causal(op, query, key, value, heads, scale, mask):  # type: ignore[no-untyped-def]
        return attend(op, (query, key, value), heads, lambda scores: op.Where(mask, scores, ANY_VALUE), scale)

    def fused(op, query, key, value, heads, scale, mask=None, **others):  # type: ignore[no-untyped-def]
        count = int(heads.const_value.numpy()[2])
        sizes = {"q_num_heads": count, "kv_num_heads": count, "scale": float(scale.const_value.numpy())}
        return op.Attention(query, key, value, is_causal=int(mask is not None), **sizes)

    def is_triangle(context, mask=None, **others):  # type: ignore[no-untyped-def]
        return mask is None or bool((mask.const_value.numpy() == np.tril(mask.const_value.numpy())).all())

    return RewriteRuleSet([RewriteRule(pattern, fused, is_triangle) for pattern in (plain, causal)])


def save(model: Any, path: Path) -> None:
    """Write an `onnx_ir.Model`, with its weights in a separate file if it is too large for one.

    Weights are computed and written one by one.
    """
    import onnx_ir

    if sum(value.const_value.nbytes for value in model.graph.initializers.values()) > MAX_PROTOBUF_BYTES:
        beside = path.with_name(f"{path.name}.data")
        onnx_ir.save(model, path, external_data=beside.name)
        beside.chmod(path.stat().st_mode)  # onnx_ir makes the file readable only by its owner
    else:
        onnx_ir.save(model, path)


def write_onnx(graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"]) -> None:
    """Write each graph in float32."""
    for graph in graphs:
        save(convert(graph), folder / f"{graph.name}.onnx")


def write_fp16(graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"]) -> None:
    """Write each graph in float16, for GPUs."""
    for graph in graphs:
        save(to_float16(convert(graph)), folder / f"{graph.name}.onnx")


def to_float16(model: Any) -> Any:
    """Return the `onnx_ir.Model` in float16, with unchanged types of inputs and outputs; the argument is used up.

    The converter would copy large weights. It sees them as inputs, and `save` converts them one by one.
    """
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    outside = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    large = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.dtype == onnx_ir.DataType.FLOAT and value.const_value.nbytes > MIN_STREAMED_BYTES
    }
    for name in large:
        model.graph.inputs.append(value := model.graph.initializers.pop(name))
        value.const_value = None
    half = convert_float_to_float16(onnx_ir.to_proto(model), keep_io_types=outside)
    # The converter appends the casts of inputs to the end, and leaves wrong types where it adds others.
    del half.graph.value_info[:]
    model = onnx_ir.from_proto(half)
    for value in [value for value in model.graph.inputs if value.name in large]:
        model.graph.inputs.remove(value)
        value.const_value = onnx_ir.LazyTensor(
            functools.partial(_halve, large[value.name]), value.dtype, value.shape, name=value.name
        )
        model.graph.register_initializer(value)
    model.graph.sort()
    return model


def _halve(tensor: Any) -> Any:
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_np_to_float16

    return onnx_ir.tensor(convert_np_to_float16(tensor.numpy()))


def write_int8(
    graphs: tuple[Graph, ...], folder: Path, images: UInt8[np.ndarray, "n h w 3"], static: bool = False
) -> None:
    """Write each graph with 8-bit matrix products; activation scales are dynamic, or (`static`) set by `images`.

    The text encoder is always quantised dynamically: images can't calibrate it. The head of clips stays in float32, in
    the graph of whole clips too: it is small, and it works on the differences between frames, which are much smaller
    than the features that set an 8-bit scale.
    """
    import onnx_ir
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    quiet_quantiser()
    for graph in graphs:
        if graph.name == "clip_head":
            save(convert(graph), folder / f"{graph.name}.onnx")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            source, target = Path(scratch) / "float32.onnx", Path(scratch) / "int8.onnx"
            model = convert(graph)
            save(model, source)
            products = products_with_weights(model)
            floating = head_products(model, graph) if graph.name == "clip_classifier" else []
            del model  # large
            large = source.with_name(f"{source.name}.data").exists()
            if static and graph.name != "text_encoder":
                quantize_static(
                    source,
                    target,
                    CalibrationFeeds(graph, images),
                    quant_format=QuantFormat.QDQ,
                    nodes_to_quantize=[name for name in products if name not in floating],
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    use_external_data_format=large,
                    extra_options=NO_OUTPUTS,
                )
            else:
                quantize_dynamic(
                    source,
                    target,
                    QUANTIZED,
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=floating,
                    use_external_data_format=large,
                )
            save(onnx_ir.load(target), folder / f"{graph.name}.onnx")


def products_with_weights(model: Any) -> list[str]:
    """Return the names of the matrix products with weights, in order; `quantize_dynamic` takes the same by itself."""
    return [node.name for node in model.graph if node.op_type in QUANTIZED and node.inputs[1].is_initializer()]


def head_products(model: Any, graph: Graph) -> list[str]:
    """Return the names of the matrix products with weights of the head, which pools frames and gives class logits."""
    own = [np.asarray(value) for name, value in graph.params.items() if name.startswith(HEADS)]
    products = set(products_with_weights(model))
    return [
        node.name
        for node in model.graph
        if node.name in products and any(np.array_equal(node.inputs[1].const_value.numpy(), value) for value in own)
    ]


def quiet_quantiser() -> None:
    """Silence the quantiser's advice to prepare the graph, which `convert` has done."""
    logging.getLogger().addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()


class CalibrationFeeds:
    """The inputs that `quantize_static` reads: one feed after the other, then None.

    The feeds are evenly spaced over all images, as a data set may be ordered by class.
    """

    def __init__(self, graph: Graph, images: UInt8[np.ndarray, "n h w 3"]):
        starts = np.unique(np.linspace(0, len(images) - 1, NUM_CALIBRATION).astype(int))
        self._feeds = (self._feed(graph, images, start, number) for number, start in enumerate(starts))

    @staticmethod
    def _feed(graph: Graph, images: UInt8[np.ndarray, "n h w 3"], start: int, number: int) -> dict[str, np.ndarray]:
        feed = {}
        for name, spec in zip(graph.inputs, graph.specs(1, CALIBRATION_FRAMES), strict=True):
            if name == "frames":  # frames of a clip: consecutive images
                feed[name] = images[(start + np.arange(spec.shape[1])) % len(images)][None]
            elif name == "image":
                feed[name] = images[start : start + 1]
            else:
                feed[name] = np.eye(spec.shape[1], dtype=np.float32)[number % spec.shape[1]][None]
        return feed

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)
