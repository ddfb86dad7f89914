"""Triton's layout: its configuration parses by Triton's own definition and fits the ONNX graphs."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, save

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.mlops.model_repository import write_model_repository
from clip_har_jax.text import make_prompts

LABELS = ("cycling", "running", "sleeping")
SIZE_PX = 4


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Return a sealed folder with a real, tiny classifier: the mean pixel, once a class."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "onnx").mkdir()
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["b", SIZE_PX, SIZE_PX, 3])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3]) for name in ("probs", "logits")]
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probs"]),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
    graph = helper.make_graph(nodes, "classifier", [image], outputs, [axes])
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        folder / "onnx/classifier.onnx",
    )
    signature = {"inputs": {"image": ["uint8", ["b", SIZE_PX, SIZE_PX, 3]]}, "outputs": ["probs", "logits"]}
    (folder / "signature.json").write_text(json.dumps({"graphs": {"classifier": signature}}))
    bundle.write_actions(folder, bundle.Actions(LABELS, make_prompts(LABELS)))
    bundle.seal(folder, "a" * 64)
    return folder


def test_the_repository_is_what_triton_reads(export, tmp_path):
    from tritonclient.grpc import model_config_pb2

    assert write_model_repository(export, tmp_path, "har", "onnx", 8) == ["har"]
    config = text_format.Parse((tmp_path / "har" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.name == "har" and config.max_batch_size == 8
    assert config.parameters["digest"].string_value == bundle.verify(export)
    session = onnxruntime.InferenceSession(tmp_path / "har" / "1" / "model.onnx")
    kinds = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}
    for given, asked in ((session.get_inputs(), config.input), (session.get_outputs(), config.output)):
        for array, entry in zip(given, asked, strict=True):
            assert array.name == entry.name
            assert kinds[array.type] == model_config_pb2.DataType.Name(entry.data_type)
            assert array.shape[1:] == list(entry.dims)  # Triton adds the batch's axis itself
    labels = (tmp_path / "har" / config.output[0].label_filename).read_text().splitlines()
    assert tuple(labels) == LABELS
    probs = session.run(["probs"], {"image": np.zeros((2, SIZE_PX, SIZE_PX, 3), np.uint8)})[0]
    assert probs.shape == (2, 3)


def test_mistakes_are_one_line(export, tmp_path):
    with pytest.raises(UserError, match="it has onnx"):
        write_model_repository(export, tmp_path, "har", "onnx_int8", 8)
    with pytest.raises(UserError, match="not a sealed folder"):
        write_model_repository(Path(tmp_path), tmp_path, "har", "onnx", 8)
