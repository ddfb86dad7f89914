"""Exported graphs of clips: the answers of the model folder, whole or frame by frame; faults in them are caught."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from clip_har_jax import Predictor, UserError, bundle
from clip_har_jax.inference import golden
from clip_har_jax.inference.exported import ExportedBackend
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.inference.runtimes import SIGNATURE
from clip_har_jax.mlops.model_repository import write_model_repository
from export.model import OpenedModel, open_model, read_images, write_contract
from export.parity import FLOAT16, FLOAT32, INT8, check_parity
from export.run import ExportOptions, Proof, export_model, make_proof
from export.to_onnx import HEADS, NUM_CALIBRATION, QUANTIZED, CalibrationFeeds, write_fp16, write_int8, write_onnx
from export.to_xla import write_saved_model, write_stablehlo
from tests.support.export_folders import CLIP_FAULTS, LABELS, NUM_FRAMES, run_format
from tests.support.model_folders import IMAGE_SIZE_PX
from tests.support.videos import write_clip

WRITERS = {
    "onnx": (write_onnx, FLOAT32),
    "stablehlo": (write_stablehlo, FLOAT32),
    "onnx_fp16": (write_fp16, FLOAT16),
    "onnx_int8": (write_int8, INT8),
    "saved_model": (write_saved_model, FLOAT32),
}
Proven = tuple[OpenedModel, Proof]
IN_TOWER = ("st_adapter", "divided")  # each frame's features depend on the other frames
SHARED_WEIGHTS = ("stablehlo", "saved_model")  # formats that store the weights of all graphs once

# tensorflow and onnx_ir warn of their own dependencies while being imported
pytestmark = pytest.mark.filterwarnings("default")


def random_clips(count: int, length: int = NUM_FRAMES) -> np.ndarray:
    return np.random.default_rng(8).integers(0, 256, (count, length, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=np.uint8)


def export_clips(folder: Path, output: Path, *formats: str, **options: Any) -> Path:
    parity = export_model(str(folder), formats or ("onnx",), output, ExportOptions(**{"num_examples": 16, **options}))
    assert all(entry["passed"] for entry in parity.values()), parity
    return output


class Outputs:
    """An export in ONNX of each model of clips, made when it is asked for."""

    def __init__(self, folders: dict[str, Path], root: Path):
        self._folders, self._root = folders, root

    def __getitem__(self, name: str) -> Path:
        output = self._root / name
        return output if output.exists() else export_clips(self._folders[name], output)


@pytest.fixture(scope="module")
def outputs(clip_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    return Outputs(clip_folders, tmp_path_factory.mktemp("outputs"))


# One model whose frames are encoded apart and one whose tower looks over them in every run, the others in slow runs.
KINDS = [pytest.param(kind, marks=() if kind in ("head", "divided") else pytest.mark.slow) for kind in CLIP_FAULTS]


@pytest.mark.parametrize("name", KINDS)
def test_a_clip_is_answered_as_by_the_model_folder(
    clip_folders: dict[str, Path], outputs: Outputs, tmp_path: Path, name: str
) -> None:
    write_clip(tmp_path / "clip.mp4")
    ours, theirs = Predictor(clip_folders[name]), Predictor(outputs[name])
    mine, other = (predictor.predict([tmp_path / "clip.mp4"])[0] for predictor in (ours, theirs))
    assert dict(mine.top) == pytest.approx(dict(other.top), abs=1e-5)
    frames = random_clips(3)
    for clips in (frames, frames[:1], frames[:, ::-1]):
        np.testing.assert_allclose(theirs.backend.logits(clips), ours.backend.logits(clips), atol=1e-4)
        np.testing.assert_allclose(theirs.backend.embed(clips), ours.backend.embed(clips), atol=1e-5)
    images = frames[:, 0]
    np.testing.assert_allclose(theirs.backend.logits(images[:, None]), ours.backend.logits(images), atol=1e-4)
    moved = np.abs(theirs.backend.logits(frames) - theirs.backend.logits(frames[:, ::-1])).max()
    assert (moved < 1e-4) == (name in ("mean", "frame_attention")), "the order counts, or not, as in the model"


@pytest.mark.parametrize("name", KINDS)
def test_frames_encoded_one_by_one_give_the_same(outputs: Outputs, name: str) -> None:
    backend = ExportedBackend(outputs[name])
    signature = json.loads((outputs[name] / SIGNATURE).read_text())["graphs"]
    assert backend.takes_clips and backend.takes_frames == (name not in IN_TOWER)
    assert backend.num_frames == (NUM_FRAMES if name in IN_TOWER else None)
    assert signature["clip_classifier"]["outputs"] == ["probs", "logits", "clip_embeds"]
    if name in IN_TOWER:
        assert not {"frame_encoder", "clip_head"} & set(signature)
        with pytest.raises(UserError, match=f"takes clips of {NUM_FRAMES} frames, not 7"):
            backend.logits(random_clips(1, 7))
        return
    for length in (NUM_FRAMES, 7, 1):
        clips = random_clips(2, length)
        embeds = backend.embed_frames(clips.reshape(-1, *clips.shape[2:])).reshape(2, length, -1)
        np.testing.assert_allclose(backend.frame_logits(embeds), backend.logits(clips), atol=1e-4)


def format_cases() -> list[Any]:
    """Each model of clips in each format; the quickest format of some of them in every run."""
    quick = [("head", "stablehlo"), ("head", "onnx_int8")]
    return [
        pytest.param(kind, name, marks=() if (kind, name) in quick else pytest.mark.slow)
        for kind in CLIP_FAULTS
        for name in WRITERS
    ]


@pytest.fixture(scope="module")
def proofs(clip_folders: dict[str, Path], photos: Path) -> Callable[[str], Proven]:
    """Return a function that gives a model of clips and its answers; the formats of a model follow one another."""

    def proof(kind: str) -> Proven:
        model = open_model(str(clip_folders[kind]))
        return model, make_proof(model, *read_images(model, f"folder:{photos}", 20))

    return lru_cache(maxsize=1)(proof)


@pytest.mark.parametrize(("kind", "name"), format_cases())
def test_every_model_passes_in_every_format_and_a_fault_is_caught(
    proofs: Callable[[str], Proven], tmp_path: Path, kind: str, name: str
) -> None:
    write, bounds = WRITERS[name]
    model, proof = proofs(kind)
    cases = proof.cases
    write_contract(model, tmp_path)
    factor = -20 if name == "onnx_int8" else -2  # eight bits of random weights err by more than a small fault does
    lost = CLIP_FAULTS[kind]
    # In the graphs of clips alone, except where all graphs share their weights.
    changed = {
        graph.name: dataclasses.replace(graph, params=graph.params | {lost: factor * graph.params[lost]})
        for graph in model.graphs
        if lost in graph.params and graph.name.startswith("clip")
    }
    assert changed
    (tmp_path / name).mkdir()
    for faulty in (False, True):
        graphs = model.graphs
        if faulty and name not in SHARED_WEIGHTS:  # a file for each graph: the others stay
            graphs = tuple(changed.values())
        elif faulty:
            graphs = tuple(changed.get(graph.name, graph) for graph in graphs)
            shutil.rmtree(tmp_path / name)
            (tmp_path / name).mkdir()
        write(graphs, tmp_path / name, cases["image"])
        entry = check_parity(proof.expected, run_format(tmp_path, name, cases), bounds, LABELS, proof.true)
        assert entry["passed"] != faulty, entry
        assert ("clips_by_frame" in entry) == (kind not in IN_TOWER)
        if faulty:
            of_clips = [failure.startswith("clips") for failure in entry["failures"]]
            assert all(of_clips) or (name in SHARED_WEIGHTS and any(of_clips)), entry


@pytest.mark.slow
@pytest.mark.parametrize("num_examples", [16, 64])
def test_static_scales_of_a_clip_graph(clip_folders: dict[str, Path], tmp_path: Path, num_examples: int) -> None:
    options = {"static_int8": True, "num_examples": num_examples}
    output = export_clips(clip_folders["divided"], tmp_path / "out", "onnx_int8", **options)
    ours = JaxBackend(str(clip_folders["divided"])).logits(random_clips(2))
    theirs = ExportedBackend(output).logits(random_clips(2))
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(ours).max()


def test_only_inputs_of_products_with_weights_have_fixed_scales(clip_folders: dict[str, Path], tmp_path: Path) -> None:
    (graph,) = (graph for graph in open_model(str(clip_folders["divided"])).graphs if graph.name == "clip_classifier")
    write_int8((graph,), tmp_path, random_clips(1)[0], static=True)
    nodes = onnx.load(tmp_path / "clip_classifier.onnx").graph.node
    made_by = {output: node for node in nodes for output in node.output}
    products = [node for node in nodes if node.op_type in QUANTIZED]
    made = [(node, made_by.get(node.input[1])) for node in products]
    eight_bit = [node for node, maker in made if maker is not None and maker.op_type == "DequantizeLinear"]
    assert all(made_by[node.input[0]].op_type == "DequantizeLinear" for node in eight_bit)
    # In float: queries with keys, and their weights with values, over time; and the head's class logits.
    assert len(products) - len(eight_bit) == 3
    outputs = {node.output[0] for node in products}
    assert not [node for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] in outputs]


@pytest.mark.parametrize("static", [False, True])
def test_the_head_over_frames_stays_in_float(clip_folders: dict[str, Path], tmp_path: Path, static: bool) -> None:
    """In 8 bits a trained one gave 14 of 32 clips another class: it works on small differences between frames."""
    (graph,) = (graph for graph in open_model(str(clip_folders["head"])).graphs if graph.name == "clip_classifier")
    write_int8((graph,), tmp_path, random_clips(1)[0], static=static)
    model = onnx.load(tmp_path / "clip_classifier.onnx").graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.initializer}
    floating = [
        weights[name] for node in model.node if node.op_type in QUANTIZED for name in node.input if name in weights
    ]
    of_head = {name: value for name, value in graph.params.items() if name.startswith(HEADS) and value.ndim == 2}
    assert len(of_head) == len(floating) == 12
    for value in of_head.values():
        assert any(np.array_equal(value, weight) for weight in floating)


@pytest.mark.parametrize("count", [3, 100])
def test_calibration_covers_all_images(clip_folders: dict[str, Path], count: int) -> None:
    """The images of a folder are ordered by class."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 32, 32, 3))
    graphs = {graph.name: graph for graph in open_model(str(clip_folders["divided"])).graphs}
    feeds = list(iter(CalibrationFeeds(graphs["classifier"], images).get_next, None))
    numbers = [int(feed["image"].max()) for feed in feeds]
    assert len(feeds) == min(count, NUM_CALIBRATION) and (numbers[0], numbers[-1]) == (0, count - 1)
    assert set(np.diff(numbers)) <= {count // NUM_CALIBRATION, count // NUM_CALIBRATION + 1}
    clips = list(iter(CalibrationFeeds(graphs["clip_classifier"], images).get_next, None))
    assert [int(feed["frames"][0, 0].max()) for feed in clips] == numbers
    assert clips[-1]["frames"][0, :, 0, 0, 0].tolist() == [count - 1, 0, 1, 2], "consecutive, then from the first one"


@pytest.mark.slow
def test_a_model_of_images_answers_clips_too(folder: Path, photos: Path, tmp_path: Path) -> None:
    """By the mean of its frames' embeddings, as its folder does; the graph of whole clips comes with --clips."""
    ours, clips = JaxBackend(str(folder)).logits(random_clips(2)), random_clips(2)
    for whole in (False, True):
        output = export_clips(folder, tmp_path / f"{whole}", data=f"folder:{photos}", clips=whole)
        signature = json.loads((output / SIGNATURE).read_text())["graphs"]
        assert ("clip_classifier" in signature, "frame_encoder" in signature) == (whole, whole)
        backend = ExportedBackend(output)
        np.testing.assert_allclose(backend.logits(clips), ours, atol=1e-4)
        assert backend.takes_frames
    classes = ("juggling", "climbing a wall")
    free, given = ExportedBackend(output, classes=classes), JaxBackend(str(folder), classes)
    np.testing.assert_allclose(free.logits(clips), given.logits(clips), atol=1e-4)


def test_a_head_over_patches_has_the_whole_graph_alone(
    head_folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    output = export_clips(head_folders["cross_attention"], tmp_path / "out", data=f"folder:{photos}")
    backend = ExportedBackend(output)
    assert backend.takes_clips and not backend.takes_frames
    ours = JaxBackend(str(head_folders["cross_attention"])).logits(random_clips(2))
    np.testing.assert_allclose(backend.logits(random_clips(2)), ours, atol=1e-4)


def test_an_export_of_an_earlier_version_takes_images_alone(outputs: Outputs, tmp_path: Path) -> None:
    old = Path(shutil.copytree(outputs["head"], tmp_path / "old"))
    (old / bundle.MANIFEST).unlink()
    signature = json.loads((old / SIGNATURE).read_text())
    signature["graphs"] = {
        key: graph for key, graph in signature["graphs"].items() if not key.startswith(("clip", "frame"))
    }
    (old / SIGNATURE).write_text(json.dumps(signature))
    backend = ExportedBackend(old)
    assert not backend.takes_clips and golden.check(backend)
    with pytest.raises(UserError, match="an earlier version exported it, for images only; export the model again"):
        backend.logits(random_clips(1))
    write_clip(tmp_path / "clip.mp4")
    assert Predictor(old).predict([tmp_path / "clip.mp4"])[0].label in LABELS


@pytest.mark.parametrize("graph", ["clip_classifier", "clip_head"])
def test_golden_outputs_tell_other_weights_of_a_clip_graph(
    clip_folders: dict[str, Path], outputs: Outputs, tmp_path: Path, graph: str
) -> None:
    assert golden.check(ExportedBackend(outputs["head"]))
    model = open_model(str(clip_folders["head"]))
    other = Path(shutil.copytree(outputs["head"], tmp_path / "other"))
    (other / bundle.MANIFEST).unlink()
    changed = next(one for one in model.graphs if one.name == graph)
    lost = CLIP_FAULTS["head"]
    changed = dataclasses.replace(changed, params=changed.params | {lost: -changed.params[lost]})
    write_onnx((changed,), other / "onnx", np.zeros(0, np.uint8))
    bundle.seal(other)
    with pytest.raises(UserError, match=r"logits of clips.* aren't those of the exported model"):
        golden.check(ExportedBackend(other))


@pytest.mark.slow
def test_formats_are_proven_on_clips(clip_folders: dict[str, Path], tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for i, label in enumerate(LABELS[:3]):
        (videos / label).mkdir(parents=True)
        write_clip(videos / label / "a.mp4", count=10 + 5 * i)
    (videos / LABELS[0] / "broken.mp4").write_bytes(b"not a video")
    model = open_model(str(clip_folders["divided"]))
    images, true = read_images(model, f"video:{videos}", 4 * NUM_FRAMES)
    assert len(images) == 3 * NUM_FRAMES and true.tolist() == sorted([0, 1, 2] * NUM_FRAMES)
    for data in (f"video:{videos}", "motion"):
        output = export_clips(clip_folders["frame_attention"], tmp_path / data[:5], "stablehlo", data=data)
        entry = json.loads((output / "parity.json").read_text())["stablehlo"]
        assert entry["clips"]["num_clips"] == 8 and entry["clips"]["max_abs_error"] < 1e-4


@pytest.mark.parametrize("name", ["divided", "head", "frame_attention"])
def test_torchscript_is_refused_for_what_transformers_does_not_have(
    clip_folders: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.run.choose_formats", lambda *_: {"torchscript": None})  # torch isn't installed here
    with pytest.raises(UserError, match="no model in which the order of a clip's frames counts; use onnx"):
        export_model(str(clip_folders[name]), ["torchscript"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_triton_gets_the_clip_graphs(outputs: Outputs, tmp_path: Path) -> None:
    import onnxruntime

    written = write_model_repository(outputs["head"], tmp_path / "models", "har", "onnx", 8)
    assert written == ["har", "har_image_encoder", "har_text_encoder", "har_clip", "har_frame_encoder", "har_clip_head"]
    config = (tmp_path / "models" / "har_clip" / "config.pbtxt").read_text()
    assert f'name: "frames" data_type: TYPE_UINT8 dims: [-1, {IMAGE_SIZE_PX}, {IMAGE_SIZE_PX}, 3]' in config
    assert f'name: "probs" data_type: TYPE_FP32 dims: [{len(LABELS)}] label_filename: "labels.txt"' in config
    assert (tmp_path / "models" / "har_clip" / "labels.txt").read_text().split("\n")[0] == LABELS[0]
    session = onnxruntime.InferenceSession(tmp_path / "models" / "har_clip" / "1" / "model.onnx")
    probs = session.run(["probs"], {"frames": random_clips(2)})[0]
    np.testing.assert_allclose(probs, ExportedBackend(outputs["head"]).predict(random_clips(2)), atol=1e-6)
