"""What TensorRT's engines are built of, run without a GPU: by ONNX Runtime, and by ONNX's own evaluator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from clip_har_jax import UserError
from clip_har_jax.models.pretrained import read_config
from export.formats import TENSORRT_BOUNDS, choose_formats
from export.model import OpenedModel, open_model, read_images
from export.parity import Arrays, check_parity, make_cases, run_cases
from export.run import reference
from export.to_onnx import CalibrationFeeds
from export.to_tensorrt import FLOATS, missing_for_tensorrt, typed_proto, unsupported, write_for_trtexec
from tests.support.export_folders import HEAD_FAULTS, LABELS

# onnx_ir warns of its own dependencies while being imported
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def proof(folder: Path, photos: Path) -> tuple[OpenedModel, Arrays, Arrays, np.ndarray]:
    """Return the model, what its graphs are run on, what the model gives, and the true classes."""
    model = open_model(str(folder))
    images, true = read_images(model, f"folder:{photos}", 20)
    prompts = [text for label in LABELS for text in model.actions.prompts[label]]
    cases = make_cases(images, model.backend.tokenize(prompts), len(LABELS))
    return model, cases, reference(model, cases), true


def run_protos(protos: dict[str, Any], model: OpenedModel, cases: Arrays, precision: str) -> Arrays:
    """ONNX Runtime has no bfloat16 on CPUs; ONNX's evaluator has, slowly."""
    if precision == "bf16":
        from onnx.reference import ReferenceEvaluator

        opened = {name: ReferenceEvaluator(proto) for name, proto in protos.items()}
    else:
        import onnxruntime

        opened = {
            name: onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
            for name, proto in protos.items()
        }
    graphs = {graph.name: graph for graph in model.graphs}

    def run(name: str, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        outputs = opened[name].run(list(graphs[name].outputs), dict(zip(graphs[name].inputs, inputs, strict=True)))
        assert isinstance(outputs, list)
        return outputs

    return run_cases(run, cases, ())


@pytest.mark.parametrize("precision", FLOATS)
def test_the_graphs_of_each_precision_compute_what_the_model_does(proof: Any, precision: str) -> None:
    model, cases, expected, true = proof
    protos = {graph.name: typed_proto(graph, precision, cases["image"]) for graph in model.graphs}
    for graph in model.graphs:
        proto = protos[graph.name]
        onnx.checker.check_model(proto, full_check=True)  # sorted, and each type fits: networks are strongly typed
        assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
        assert {value.type.tensor_type.elem_type for value in proto.graph.output} == {TensorProto.FLOAT}
        assert unsupported(proto, precision) == []
    entry = check_parity(
        expected, run_protos(protos, model, cases, precision), TENSORRT_BOUNDS[precision], LABELS, true
    )
    assert entry["passed"], entry
    lost = {name: typed_proto(graph, precision, cases["image"]) for name, graph in faulty(model).items()}
    entry = check_parity(expected, run_protos(lost, model, cases, precision), TENSORRT_BOUNDS[precision], LABELS, true)
    assert not entry["passed"]


def faulty(model: OpenedModel) -> dict[str, Any]:
    """Return the graphs without the bias of the image tower's last norm."""
    import dataclasses

    name = "vision.post_norm.bias"
    return {
        graph.name: dataclasses.replace(
            graph, params={key: 0 * value if key == name else value for key, value in graph.params.items()}
        )
        for graph in model.graphs
    }


def test_every_head_is_valid_and_on_the_list(proof: Any, head_folders: dict[str, Path]) -> None:
    for name in HEAD_FAULTS:
        classifier = open_model(str(head_folders[name])).graphs[2]
        for precision in ("bf16", "int8"):
            proto = typed_proto(classifier, precision, proof[1]["image"])
            onnx.checker.check_model(proto, full_check=True)
            assert unsupported(proto, precision) == [], name


def test_eight_bits_are_as_tensorrt_takes_them(proof: Any) -> None:
    """Signed, zero points of 0, weights by column; nothing quantised but the matrix products with weights."""
    model, cases = proof[0], proof[1]
    proto = typed_proto(model.graphs[2], "int8", cases["image"])
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    made_by = {output: node for node in proto.graph.node for output in node.output}
    quantised = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in quantised:
        zero = tensors[node.input[2]]
        assert zero.data_type == TensorProto.INT8 and not numpy_helper.to_array(zero).any()
        assert tensors[node.input[1]].data_type == TensorProto.FLOAT16
        assert (numpy_helper.to_array(tensors[node.input[1]]) > 0).all()
    products = [node for node in proto.graph.node if node.op_type == "MatMul"]
    with_weights = [
        node for node in products if made_by.get(node.input[1], node).op_type in ("MatMul", "DequantizeLinear")
    ]
    eight_bit = [node for node in products if all(made_by[name].op_type == "DequantizeLinear" for name in node.input)]
    first = next(node for node in products if node.input[1] in tensors)  # the patch embedding
    assert [node for node in with_weights if node not in eight_bit and node.input[1] in tensors] == [first]
    layers = read_config(model.folder).vision.num_layers
    assert len(eight_bit) == 6 * layers + 2  # q, k, v, out, fc1, fc2; the projection and the classes
    weight = made_by[eight_bit[0].input[1]]
    assert tensors[weight.input[0]].data_type == TensorProto.INT8 and len(tensors[weight.input[1]].dims) == 1
    outputs = {name for node in products for name in node.output}
    assert not [node for node in quantised if node.input[0] in outputs]
    assert not [node for node in typed_proto(model.graphs[1], "int8", cases["image"]).graph.node if node in quantised]
    assert len(list(iter(CalibrationFeeds(model.graphs[2], cases["image"][:3]).get_next, None))) == 3


def test_an_operator_that_is_not_on_the_list_is_told(proof: Any) -> None:
    proto = typed_proto(proof[0].graphs[2], "fp16", proof[1]["image"])
    proto.graph.node[0].op_type = "DynamicQuantizeLinear"
    assert unsupported(proto, "fp16") == ["DynamicQuantizeLinear"]
    proto.graph.node[0].op_type = "DequantizeLinear"  # listed in 8 bits alone
    assert unsupported(proto, "fp16") == ["DequantizeLinear"] and unsupported(proto, "int8") == []


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_commands_that_build_engines_are_written(proof: Any, tmp_path: Path, precision: str) -> None:
    model, cases = proof[0], proof[1]
    write_for_trtexec(model.graphs, tmp_path / "out", precision, cases["image"])
    script = (tmp_path / "out" / "build.sh").read_text()
    commands = [line for line in script.splitlines() if line.startswith("trtexec ")]
    for graph, command in zip(model.graphs, commands, strict=True):
        assert command.startswith(f"trtexec --onnx={graph.name}.onnx --saveEngine={graph.name}.engine --stronglyTyped ")
        assert (tmp_path / "out" / f"{graph.name}.onnx").is_file()
    assert "--minShapes=image:1x32x32x3 " in commands[2] and "--maxShapes=image:64x32x32x3 " in commands[2]
    assert "--maxShapes=image:64x32x32x3,class_weights:64x5 " in commands[3]
    with pytest.raises(UserError, match="not an empty folder"):
        write_for_trtexec(model.graphs, tmp_path / "out", precision, cases["image"])


@pytest.mark.skipif(missing_for_tensorrt() is None, reason="TensorRT is here")
def test_tensorrt_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="tensorrt"):
        choose_formats(["tensorrt"])
