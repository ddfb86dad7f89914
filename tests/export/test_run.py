"""Exported formats: proven equal to the model, refused where they aren't, read back by the public interface."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
import pytest

from clip_har_jax import Predictor, UserError, bundle
from clip_har_jax.inference import exported, runtimes
from clip_har_jax.models.factory import load
from clip_har_jax.models.heads import make_head
from clip_har_jax.models.params import init_params
from clip_har_jax.models.pretrained import read_config, write_params
from clip_har_jax.preprocess import PREPROCESS_VERSION
from clip_har_jax.signing import sign, verify_signature
from export import formats
from export.graphs import Graph, NotExpressible, make_graphs
from export.model import OpenedModel, open_model, read_images, write_contract
from export.parity import FLOAT16, FLOAT32, INT8, check_parity, make_cases
from export.run import ExportOptions, Proof, export_model, make_proof, reference
from export.to_onnx import convert, write_fp16, write_int8, write_onnx
from export.to_xla import write_saved_model, write_stablehlo
from tests.support.export_folders import HEAD_FAULTS, LABELS, run_format
from tests.support.model_folders import write_image

FORMATS = ("onnx", "onnx_fp16", "onnx_int8", "stablehlo")
SLOW_FORMATS = [
    *FORMATS,
    pytest.param("saved_model", marks=pytest.mark.slow),
]  # TensorFlow's takes as long as the others
WRITERS: dict[str, Callable[..., None]] = {
    "onnx": write_onnx,
    "stablehlo": write_stablehlo,
    "saved_model": write_saved_model,
    "onnx_fp16": write_fp16,
    "onnx_int8": write_int8,
}
BOUNDS = {"onnx_fp16": FLOAT16, "onnx_int8": INT8}  # of the others: FLOAT32

OPTIONS = {field.name for field in dataclasses.fields(ExportOptions)}

# tensorflow and onnx_ir warn of their own dependencies while being imported
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def output(folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The formats that every run proves."""
    return export_all(folder, photos, tmp_path_factory.mktemp("exported") / "out", FORMATS)


def export_all(folder: Path, photos: Path, output: Path, names: tuple[str, ...]) -> Path:
    """Export to `output` in these formats, all of which must pass, and return it."""
    parity = export_model(str(folder), names, output, ExportOptions(f"folder:{photos}", num_examples=20))
    assert {name: entry["passed"] for name, entry in parity.items()} == dict.fromkeys(names, True), parity
    return output


def test_the_folder_says_what_it_is(folder: Path, output: Path) -> None:
    assert runtimes.formats_in(output) == ["onnx", "onnx_int8", "onnx_fp16", "stablehlo"]
    actions = json.loads((output / "actions.json").read_text())
    assert actions["labels"] == list(LABELS) and actions["temperature"] == 1.7
    assert actions["preprocess"] == {"name": "clip_har_jax.preprocess", "version": PREPROCESS_VERSION}
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["source"] == bundle.verify(folder)
    assert {f"{name}/classifier.onnx" for name in ("onnx", "onnx_fp16", "onnx_int8")} < set(manifest["files"])
    parity = json.loads((output / "parity.json").read_text())
    for name, entry in parity.items():
        assert set(entry) >= {"max_abs_error", "top1_agreement", "num_examples", "passed"}, name
        assert (entry["num_examples"], entry["num_hard"]) == (20, 4)
    for name in ("onnx", "stablehlo"):
        assert parity[name]["max_abs_error"] < 1e-4


@pytest.mark.parametrize("name", SLOW_FORMATS)
def test_predicts_as_the_model(folder: Path, output: Path, photos: Path, tmp_path: Path, name: str) -> None:
    if name not in FORMATS:
        output = export_all(folder, photos, tmp_path / "out", (*FORMATS, name))
        assert runtimes.formats_in(output) == ["onnx", "onnx_int8", "onnx_fp16", "stablehlo", name]
        assert json.loads((output / "parity.json").read_text())[name]["max_abs_error"] < 1e-4
    images = sorted(photos.rglob("*.png"))
    ours, theirs = Predictor(folder), Predictor(output / name)
    tolerance = 0.05 if name in BOUNDS else 1e-5
    for mine, other in zip(ours.predict(images), theirs.predict(images), strict=True):
        assert dict(mine.top) == pytest.approx(dict(other.top), abs=tolerance)
    np.testing.assert_allclose(ours.embed(images), theirs.embed(images), atol=10 * tolerance)


@pytest.mark.parametrize("name", ["onnx", "stablehlo"])
@pytest.mark.parametrize("classes", [(), ("juggling", "climbing a wall")])
def test_explains_as_the_model(folder: Path, output: Path, photos: Path, name: str, classes: tuple[str, ...]) -> None:
    ours, theirs = Predictor(folder, classes, batch_size=4), Predictor(output / name, classes, batch_size=4)
    images = np.stack([ours.try_load(path) for path in sorted(photos.rglob("*.png"))[:6]])
    indices = [0, 1, 1, 0, 1, 0]
    maps = theirs.backend.explain(images, indices)
    np.testing.assert_allclose(maps, ours.backend.explain(images, indices), atol=1e-4)
    assert maps.shape == (6, 2, 2) and maps.min() >= 0 and maps.max() == 1
    with pytest.raises(UserError, match="class 7 isn't there"):
        theirs.backend.explain(images[:1], [7])
    with pytest.raises(UserError, match="2 classes to explain for 1 images"):
        ours.backend.explain(images[:1], [0, 1])


def test_new_classes_go_through_the_text_encoder(folder: Path, output: Path, photos: Path) -> None:
    images, classes = sorted(photos.rglob("*.png"))[:5], ["juggling", "climbing a wall", "sleeping"]
    ours, theirs = (Predictor(path, classes).predict(images) for path in (folder, output))
    for mine, other in zip(ours, theirs, strict=True):
        assert dict(mine.top) == pytest.approx(dict(other.top), abs=1e-5)


def test_predicting_with_onnx_imports_neither_jax_nor_tensorflow(output: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", seed=5)
    code = (
        "import sys; from clip_har_jax import Predictor; "
        f"print(Predictor({str(output)!r}).predict([{str(image)!r}])[0].label); "
        "print(sorted({'jax', 'flax', 'tensorflow', 'torch', 'grain'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    label, imported = done.stdout.splitlines()
    assert label in LABELS and imported == "[]"


def test_stablehlo_runs_without_this_package(output: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    code = f"""
import json, sys, jax, numpy as np
from jax import export
from safetensors.numpy import load_file
names = json.load(open({str(output / "signature.json")!r}))["graphs"]["classifier"]["params"]
weights = load_file({str(output / "stablehlo" / "weights.safetensors")!r})
program = export.deserialize(bytearray(open({str(output / "stablehlo" / "classifier.jax_export")!r}, "rb").read()))
probs, logits = program.call({{name: weights[name] for name in names}}, np.load({str(tmp_path / "images.npy")!r}))
np.save({str(tmp_path / "logits.npy")!r}, logits)
print("clip_har_jax" in sys.modules, program.platforms, program.calling_convention_version > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False ('cpu', 'cuda', 'tpu') True"
    expected = exported.ExportedBackend(output, "onnx").logits(np.load(tmp_path / "images.npy"))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)


def test_a_changed_byte_is_refused(output: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    path = copy / "onnx" / "classifier.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"onnx/classifier.onnx: changed since the model was sealed"):
        Predictor(copy)


def test_a_signature_is_of_its_key_and_its_files(output: Path, tmp_path: Path) -> None:
    for name in ("private", "other"):
        make_key(tmp_path / f"{name}.pem", tmp_path / f"{name}.pub")
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    with pytest.raises(UserError, match="not signed"):
        verify_signature(copy, tmp_path / "private.pub")
    sign(copy, tmp_path / "private.pem")
    (copy / "README.md").write_text("a card comes later")
    verify_signature(copy, tmp_path / "private.pub")
    assert bundle.verify(copy) == bundle.verify(output)
    with pytest.raises(UserError, match=r"isn't good for .*other.pub"):
        verify_signature(copy, tmp_path / "other.pub")
    with pytest.raises(UserError, match="no private key"):
        sign(copy, tmp_path / "private.pub")
    with pytest.raises(UserError, match=r"none.pem: no private key .*No such file"):  # before anything is computed
        export_model("unused", ["onnx"], tmp_path / "out", ExportOptions(signing_key=str(tmp_path / "none.pem")))
    # Whoever changes a file can write a manifest that fits, but no signature.
    (copy / "actions.json").write_text((copy / "actions.json").read_text().replace("1.7", "1.6"))
    (copy / "manifest.json").unlink()
    bundle.seal(copy)
    with pytest.raises(UserError, match=r"isn't good for .*private.pub"):
        verify_signature(copy, tmp_path / "private.pub")


def make_key(private: Path, public: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))


def test_another_preprocessing_is_refused(output: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    (copy / "manifest.json").unlink()
    actions = bundle.read_actions(copy)
    bundle.write_actions(copy, dataclasses.replace(actions, preprocess_version=PREPROCESS_VERSION + 1))
    with pytest.raises(UserError, match="preprocessing of version"):
        Predictor(copy)


def test_a_format_that_is_not_there_is_refused(output: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(output, copy, ignore=shutil.ignore_patterns("manifest.json"))
    with pytest.raises(UserError, match="holds no saved_model; it has onnx"):
        exported.ExportedBackend(copy, "saved_model")
    with pytest.raises(UserError, match="no format"):
        exported.ExportedBackend(copy, "onxx")


@pytest.fixture(scope="module")
def proof(folder: Path, photos: Path) -> tuple[OpenedModel, dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Return the model, what formats are run on, what the model gives, and the true classes."""
    model = open_model(str(folder))
    images, true = read_images(model, f"folder:{photos}", 20)
    prompts = [text for label in LABELS for text in model.actions.prompts[label]]
    cases = make_cases(images, model.backend.tokenize(prompts), len(LABELS))
    return model, cases, reference(model, cases), true


def changed_mean(model: OpenedModel, folder: Path) -> Any:
    mean = (0.0, 0.0, 0.0)
    return graphs_of(model, dataclasses.replace(model.backend.preprocess, mean=mean), folder)


def swapped_channel(model: OpenedModel, folder: Path) -> Any:
    preprocess = model.backend.preprocess
    return graphs_of(
        model, dataclasses.replace(preprocess, mean=preprocess.mean[::-1], std=preprocess.std[::-1]), folder
    )


def dropped_bias(model: OpenedModel, folder: Path) -> Any:
    """Of the image tower's last norm."""
    graphs = graphs_of(model, model.backend.preprocess, folder)
    name = "vision.post_norm.bias"
    return tuple(
        dataclasses.replace(graph, params=graph.params | {name: 0 * graph.params[name]})
        if name in graph.params
        else graph
        for graph in graphs
    )


def graphs_of(model: OpenedModel, preprocess: Any, folder: Path) -> Any:
    head = make_head(model.head, model.head_params)
    return make_graphs(load(str(model.folder)).model, preprocess, head, model.temperature)


def head_formats(names: tuple[str, ...]) -> list[Any]:
    """Each head in each of these formats; some in the quickest format in every run, the others in the slow ones."""
    quick = {(head, names[0]) for head in ("linear", "cross_attention")}
    return [
        pytest.param(head, name, marks=() if (head, name) in quick else pytest.mark.slow)
        for head in HEAD_FAULTS
        for name in names
    ]


@pytest.fixture(scope="module")
def head_proofs(head_folders: dict[str, Path], photos: Path) -> Callable[[str], tuple[OpenedModel, Proof]]:
    """Return a function that gives a model with a head and its answers; the formats of a head follow one another."""

    def proof(head: str) -> tuple[OpenedModel, Proof]:
        model = open_model(str(head_folders[head]))
        return model, make_proof(model, *read_images(model, f"folder:{photos}", 12))

    return lru_cache(maxsize=1)(proof)


@pytest.mark.parametrize(("head", "name"), head_formats(("onnx", "stablehlo", "saved_model", "onnx_fp16", "onnx_int8")))
def test_every_head_is_in_the_graph_and_a_fault_in_it_is_caught(
    head_proofs: Callable[[str], tuple[OpenedModel, Proof]], tmp_path: Path, head: str, name: str
) -> None:
    model, proof = head_proofs(head)
    cases, bounds = proof.cases, BOUNDS.get(name, FLOAT32)
    write_contract(model, tmp_path)
    factor = -20 if name == "onnx_int8" else -2  # eight bits of random weights err by more than a small fault does
    lost = f"head.{HEAD_FAULTS[head]}"
    changed = {
        graph.name: dataclasses.replace(graph, params=graph.params | {lost: factor * graph.params[lost]})
        for graph in model.graphs
        if lost in graph.params
    }
    (tmp_path / name).mkdir()
    for faulty in (False, True):
        graphs = model.graphs
        if faulty and name.startswith("onnx"):  # a file for each graph: the others stay
            graphs = tuple(changed.values())
        elif faulty:
            graphs = tuple(changed.get(graph.name, graph) for graph in graphs)
            shutil.rmtree(tmp_path / name)
            (tmp_path / name).mkdir()
        WRITERS[name](graphs, tmp_path / name, cases["image"])
        entry = check_parity(proof.expected, run_format(tmp_path, name, cases), bounds, LABELS, proof.true)
        assert entry["passed"] != faulty, entry


def test_an_exported_head_takes_no_new_classes(head_folders: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    parity = export_model(str(head_folders["linear"]), ["onnx"], tmp_path / "out", ExportOptions(f"folder:{photos}", 4))
    assert parity["onnx"]["passed"]
    with pytest.raises(UserError, match=r"'linear' head of .* knows only its own 5 actions"):
        Predictor(tmp_path / "out", ["juggling", "climbing a wall"])


def test_a_head_that_a_format_cannot_express_is_one_line(
    folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: OpenedModel, target: Path, images: np.ndarray) -> None:
        raise NotExpressible("the 'new' head isn't written in torch")

    monkeypatch.setitem(formats.FORMATS, "onnx", formats.Format(write, FLOAT32, ()))
    with pytest.raises(UserError, match="--formats=onnx: can't express this model with its 'linear' head"):
        export_model(str(folder), ["onnx"], tmp_path / "out", ExportOptions(f"folder:{photos}", num_examples=2))
    assert list(tmp_path.iterdir()) == []


def test_an_operation_that_onnx_cannot_express_has_its_own_error() -> None:
    graph = Graph("lu", lambda _, x: (jax.lax.linalg.lu(x)[0],), {}, {"x": ("float32", ("b", 2, 2))}, ("y",))
    with pytest.raises(NotExpressible, match="lu currently supports rank-2 inputs only"):
        convert(graph)


FAULTS = {"changed mean": changed_mean, "swapped channel": swapped_channel, "dropped bias": dropped_bias}
QUICK_FAULTS = {("onnx_fp16", "dropped bias"), ("onnx_int8", "swapped channel"), ("stablehlo", "changed mean")}


@pytest.mark.parametrize(
    ("name", "fault"),
    [  # each fault in the quickest format, and each quick format with one of them
        pytest.param(name, fault, marks=() if name == "onnx" or (name, fault) in QUICK_FAULTS else pytest.mark.slow)
        for name in WRITERS
        for fault in FAULTS
    ],
)
def test_the_gate_catches_a_fault(proof: Any, output: Path, tmp_path: Path, name: str, fault: str) -> None:
    model, cases, expected, true = proof
    shutil.copy(output / "signature.json", tmp_path)
    (tmp_path / name).mkdir()
    WRITERS[name](FAULTS[fault](model, tmp_path), tmp_path / name, cases["image"])
    entry = check_parity(expected, run_format(tmp_path, name, cases), BOUNDS.get(name, FLOAT32), LABELS, true)
    assert not entry["passed"]
    assert any(word in failure for failure in entry["failures"] for word in ("above 0.0001", "below 0.99"))
    assert entry["worst_example"]["model"]["label"] in LABELS


def test_a_failure_leaves_no_artefact_and_exits_3(
    folder: Path, output: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formats are copies of an export of the same model, one of them with a faulty graph."""

    def write_faulty(model: OpenedModel, target: Path, images: np.ndarray) -> None:
        shutil.copytree(output / "onnx", target, dirs_exist_ok=True)
        faulty = {graph.name: graph for graph in dropped_bias(model, target)}
        write_onnx((faulty["classifier"],), target, images)

    def write_good(model: OpenedModel, target: Path, images: np.ndarray) -> None:
        shutil.copytree(output / "stablehlo", target, dirs_exist_ok=True)

    monkeypatch.setitem(formats.FORMATS, "onnx", formats.Format(write_faulty, FLOAT32, ()))
    monkeypatch.setitem(formats.FORMATS, "stablehlo", formats.Format(write_good, FLOAT32, ()))
    from export.__main__ import main

    argv = ["export", f"--model={folder}", "--formats=onnx,stablehlo", f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", [*argv, f"--data=folder:{photos}", "--num_examples=20"])
    assert main() == 3
    assert runtimes.formats_in(tmp_path / "out") == ["stablehlo"]
    assert not json.loads((tmp_path / "out" / "parity.json").read_text())["onnx"]["passed"]
    monkeypatch.setattr(sys, "argv", [*argv[:2], "--formats=onnx", f"--output={tmp_path / 'none'}", *sys.argv[4:]])
    assert main() == 3
    assert not (tmp_path / "none").exists()


def outputs(**changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 4)).astype(np.float32)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    embeds = rng.normal(size=(200, 8)).astype(np.float32)
    same = {"single_logits": logits[:4], "odd_logits": logits[:3], "image_embeds": embeds, "text_embeds": embeds[:8]}
    maps = {"heat_map": probs[:8], "patch_embeds": probs[:8]}
    return {"probs": probs, "logits": logits, **maps, **same, **changes}


def test_bounds() -> None:
    true = np.zeros(200, np.int32)
    assert check_parity(outputs(), outputs(), FLOAT32, "abcd", true)["passed"]
    close, flipped = outputs()["logits"].copy(), outputs()["logits"].copy()
    close[0], flipped[0] = (0.01, 0, -1, -1), (0, 0.005, -1, -1)  # 0.51% of the 196 that aren't hard
    assert check_parity(outputs(logits=close), outputs(logits=flipped), INT8, "abcd", true)["passed"]
    assert not check_parity(outputs(logits=close), outputs(logits=flipped), FLOAT16, "abcd", true)["passed"]
    nan = outputs()["heat_map"] * np.nan
    entry = check_parity(outputs(), outputs(heat_map=nan), INT8, "abcd", true)
    assert not entry["passed"] and "heat_map" in entry["failures"][0]
    # A model that predicts one class of four: agreement says nothing, so the embeddings count.
    one = outputs(logits=outputs()["logits"] + np.asarray([9, 0, 0, 0], np.float32))
    assert check_parity(one, one, INT8, "abcd", true)["weak"]
    wrong_head = one | {"logits": one["logits"] + np.asarray([0, 2, 0, 0], np.float32)}
    assert not check_parity(one, wrong_head, INT8, "abcd", true)["passed"]
    turned = outputs()["image_embeds"] + np.asarray([1, 0, 0, 0, 0, 0, 0, 0], np.float32)
    assert not check_parity(one, one | {"image_embeds": turned}, INT8, "abcd", true)["passed"]
    assert not check_parity(outputs(), outputs(image_embeds=turned), INT8, "abcd", true)["passed"]  # of the hard images
    turned[-4:] = outputs()["image_embeds"][-4:]
    assert check_parity(outputs(), outputs(image_embeds=turned), INT8, "abcd", true)["passed"]
    # What the classifier doesn't use is bounded too, of every model.
    words = outputs()["text_embeds"] + np.asarray([1, 0, 0, 0, 0, 0, 0, 0], np.float32)
    entry = check_parity(outputs(), outputs(text_embeds=words), INT8, "abcd", true)
    assert not entry["passed"] and "cosine of an embedding" in entry["failures"][0]
    assert not check_parity(outputs(), outputs(text_embeds=0 * words), INT8, "abcd", true)["passed"]
    entry = check_parity(outputs(), outputs(patch_embeds=outputs()["patch_embeds"][::-1]), INT8, "abcd", true)
    assert not entry["passed"] and "explainer" in entry["failures"][0]


def test_towers_of_more_than_ten_layers_keep_their_order(folder: Path, tmp_path: Path) -> None:
    """Layer 10 must not come before layer 2."""
    deep = tmp_path / "deep"
    shutil.copytree(folder, deep)
    config = read_config(deep)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_layers=12))
    write_params(deep, config, init_params(config, seed=0))
    (deep / bundle.MANIFEST).unlink()
    model = open_model(str(deep))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    graph = model.graphs[0]
    ours = jax.jit(graph.function)(graph.params, images)[0]
    np.testing.assert_allclose(ours, model.backend.embed(images), atol=1e-5)


def test_weights_too_large_for_one_file_lie_beside_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.to_onnx.MAX_PROTOBUF_BYTES", 0)
    monkeypatch.setattr("export.to_onnx.MIN_STREAMED_BYTES", 64)
    model = open_model(str(folder))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    write_contract(model, tmp_path)
    (tmp_path / "onnx").mkdir()
    write_onnx(model.graphs[:1], tmp_path / "onnx", images)
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"image_encoder.onnx", "image_encoder.onnx.data"}
    assert len({path.stat().st_mode for path in (tmp_path / "onnx").iterdir()}) == 1
    (embeds,) = runtimes.Graphs(tmp_path, "onnx").run("image_encoder", images)
    np.testing.assert_allclose(embeds, model.backend.embed(images), atol=1e-5)
    (tmp_path / "onnx_fp16").mkdir()
    write_fp16(model.graphs[:1], tmp_path / "onnx_fp16", images)
    (embeds,) = runtimes.Graphs(tmp_path, "onnx_fp16").run("image_encoder", images)
    np.testing.assert_allclose(embeds, model.backend.embed(images), atol=1e-2)
    stored = onnx.load(tmp_path / "onnx_fp16" / "image_encoder.onnx").graph.initializer
    assert {tensor.data_type for tensor in stored if len(tensor.dims) > 1} <= {
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.INT64,
    }
    for static in (False, True):
        shutil.rmtree(tmp_path / "onnx_int8", ignore_errors=True)
        (tmp_path / "onnx_int8").mkdir()
        write_int8(model.graphs[:1], tmp_path / "onnx_int8", images, static)
        names = {path.name for path in (tmp_path / "onnx_int8").iterdir()}
        assert names == {"image_encoder.onnx", "image_encoder.onnx.data"}
        (embeds,) = runtimes.Graphs(tmp_path, "onnx_int8").run("image_encoder", images)
        assert ((embeds * model.backend.embed(images)).sum(axis=-1) > 0.99).all()


def test_the_heat_map_is_of_the_class_that_is_asked_for(proof: Any) -> None:
    heat = proof[2]["heat_map"]
    assert heat.shape == (8, 2, 2) and heat.min() >= 0 and heat.max() == 1
    model, graph = proof[0], proof[0].graphs[3]
    image = np.repeat(proof[1]["image"][:1], len(LABELS), axis=0)
    maps, _ = jax.jit(graph.function)(graph.params, image, np.eye(len(LABELS), dtype=np.float32))
    assert len({np.asarray(one).tobytes() for one in maps}) > 1 and len(model.actions.labels) == len(maps)


def test_a_signature_of_another_version_is_one_line(output: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(output, tmp_path / "old"))
    (old / "manifest.json").unlink()
    signature = json.loads((old / runtimes.SIGNATURE).read_text())
    changes: list[dict[str, Any]] = [{"graphs": {"classifier": {}}}, {"logit_scale": None}, {"graphs": []}]
    for change in changes:
        (old / runtimes.SIGNATURE).write_text(json.dumps(signature | change))
        with pytest.raises(UserError, match=r"signature\.json: written by another version .* export the model again"):
            Predictor(old)


def test_mistakes_are_one_line(folder: Path, photos: Path, tmp_path: Path) -> None:
    def refused(pattern: str, **changes: Any) -> None:
        arguments: dict[str, Any] = {"path": str(folder), "formats": ["onnx"], "output": tmp_path / "out"} | changes
        options: dict[str, Any] = {"data": f"folder:{photos}"}
        options |= {key: arguments.pop(key) for key in changes if key in OPTIONS}
        with pytest.raises(UserError, match=pattern):
            export_model(**arguments, options=ExportOptions(**options))

    refused("'onxn' is unknown; did you mean 'onnx'", formats=["onxn"])
    refused("named twice", formats=["onnx", "onnx"])
    refused("name one or more of onnx", formats=[])
    refused("num_examples=0", num_examples=0)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    for overwrite in (False, True):  # what isn't an export is never deleted
        refused("not empty, and no export that could be replaced", output=full, overwrite=overwrite)
        refused("not empty, and no export", output=folder, overwrite=overwrite)
        refused("not empty, and no export", output=folder.parent, overwrite=overwrite)
    refused("the model lies there", output=folder / "export")
    assert bundle.verify(folder)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / runtimes.SIGNATURE).write_text("{}")
    refused("not empty; name another folder, or replace it with --overwrite", output=tmp_path / "old")
    refused("a file; name a folder", output=full / "mine.txt")
    assert (full / "mine.txt").read_text() == "kept"
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "config.json").write_text("{}")
    refused("config.json: changed since the model was sealed", path=str(broken))
    (broken / "manifest.json").unlink()
    (broken / "config.json").unlink()
    refused("config.json", path=str(broken))


@pytest.mark.parametrize(
    "name", ["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stablehlo", "saved_model"))]
)
def test_a_disk_that_fills_in_the_middle_leaves_nothing(folder: Path, photos: Path, tmp_path: Path, name: str) -> None:
    """A real process that may write no file over 60 kB: less than graphs or weights, more than what comes before."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from clip_har_jax import cli; from export.__main__ import main; cli.run(main)"
    )
    flags = [f"--model={folder}", f"--formats={name}", f"--output={tmp_path / 'out'}", f"--data=folder:{photos}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--num_examples=2"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": ""},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "can't be written" in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_full_disk_leaves_nothing(
    folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(model: OpenedModel, target: Path, images: np.ndarray) -> None:
        (target / "classifier.onnx").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(formats.FORMATS, "onnx", formats.Format(write_half, FLOAT32, ()))
    with pytest.raises(UserError, match="No space left on device"):
        export_model(str(folder), ["onnx"], tmp_path / "out", ExportOptions(f"folder:{photos}", num_examples=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["replaced", pytest.param("removed", marks=pytest.mark.slow)])
def test_a_model_that_changes_during_its_export_is_refused(
    kind: str, folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each format reads the weights again, so the formats would be of two models, under the digest of the first."""
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder, model)

    def write(opened: OpenedModel, target: Path, images: np.ndarray) -> None:
        model.rename(tmp_path / "old")
        if kind == "replaced":  # as by a training that is started again: equal contents would do
            shutil.copytree(folder, model)
        (target / "classifier.onnx").write_bytes(b"of which model?")

    monkeypatch.setitem(formats.FORMATS, "onnx", formats.Format(write, FLOAT32, ()))
    with pytest.raises(UserError, match=r"model: its files changed while they were read"):
        export_model(str(model), ["onnx"], output, ExportOptions(f"folder:{photos}", num_examples=2))
    assert not output.exists()
