"""A model of several labels from training to evaluation, and the commands that refuse it."""

import json
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from onnxruntime import InferenceSession

from clip_har_jax import bundle
from clip_har_jax.config import make_config
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.multi_label import MultiLabelResult
from clip_har_jax.evaluation.paired import read_predictions
from clip_har_jax.inference.backends import above_thresholds, probabilities
from clip_har_jax.inference.bulk import predict_bulk
from clip_har_jax.inference.predictor import Predictor
from clip_har_jax.inference.sliding_windows import choose_windows, find_video_segments
from clip_har_jax.inference.stream import EventRules, find_events
from clip_har_jax.pipelines.calibrate import calibrate_model
from clip_har_jax.pipelines.evaluate import evaluate_model, print_result
from clip_har_jax.pipelines.method_comparison import check_comparison
from clip_har_jax.trainer.result import Result
from clip_har_jax.trainer.result import print_result as print_training
from clip_har_jax.trainer.run_data import load_data
from clip_har_jax.trainer.train import train
from clip_har_jax.video.segments import SegmentRules
from export.run import ExportOptions, export_model
from tests.support.model_folders import write_model
from tests.support.multi_label_images import COLOURS, write_multi_label_images
from tests.support.serving_setup import running

pytestmark = pytest.mark.filterwarnings("default")  # the exporter's dependencies warn of their own


class Trained(NamedTuple):
    result: Result
    workdir: Path
    data: str


def config_of(spec: str, model: object, **sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "data": {"train": spec, "val_fraction": 0.25, "multi_label": True, "num_workers": 0},
        "model": {"name": str(model)},
        "train": {"num_steps": 60, "global_batch_size": 16, "log_every_steps": 20},
        "optim": {"learning_rate": 3e-3},
        "eval": {"every_steps": 30, "batch_size": 16},
        "checkpoint": {"every_steps": 30},
    }
    values["data"]["augment"] = {"crop_scale_min": 1.0, "flip": False}
    return values | {name: {**values.get(name, {}), **section} for name, section in sections.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("multi_label")
    data = write_multi_label_images(root / "images", 240)
    config = make_config(config_of(data, write_model(root / "start")))
    return Trained(train(config, root / "run", quiet=True), root / "run", data)


@pytest.mark.slow
def test_labels_are_learned_and_each_gets_a_threshold(trained: Trained) -> None:
    metrics = trained.result.metrics
    assert metrics["map_interval"][0] > metrics["baselines"]["chance"]
    assert metrics["map"] > 0.9  # chance is 0.4
    assert trained.result.uses == ("evaluate", "predict", "export", "serve")
    actions = bundle.read_actions(str(trained.result.model))
    assert (actions.labels, actions.head, actions.multi_label) == (tuple(COLOURS), "linear", True)
    assert set(actions.label_thresholds) == set(COLOURS)
    assert actions.thresholds == {}
    calibration = json.loads((trained.workdir / "model" / "calibration.json").read_text())
    assert calibration["label_thresholds"] == actions.label_thresholds
    lines = [json.loads(line) for line in (trained.workdir / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "val/map" in line]
    assert [line["step"] for line in validated] == [30, 60]
    assert {"val/map_micro", "val/coverage_error", "val/nll", "val/label_ece"} <= set(validated[0])
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0] < 3.0  # near ln 2 for each of three labels, since the head starts at their shares
    record = json.loads((trained.workdir / "run.json").read_text())
    assert record["map"] == metrics["map"]


@pytest.mark.slow
def test_the_result_names_map(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    print_training(trained.result)
    assert f"mAP is {trained.result.metrics['map']:.3f}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_uses_the_thresholds_of_the_folder(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_multi_label_images(tmp_path / "test", 60, seed=1)
    model = str(trained.result.model)
    result = evaluate_model(model, data, tmp_path / "out", batch_size=16)
    assert isinstance(result, MultiLabelResult)
    thresholds = bundle.read_actions(model).label_thresholds
    assert {name: row["threshold"] for name, row in result.metrics["per_class"].items()} == thresholds
    assert result.metrics["map"] > 0.9  # chance is 0.4
    assert result.metrics["data"] == data
    print_result(result, tmp_path / "out")
    assert "coverage" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Mean average precision" in page  # the run's curve
    assert "data.multi_label" in page  # a setting that differs from the default
    (tmp_path / "test" / "data.csv").write_text("filename,label\n0.png,run|jump\n")
    with pytest.raises(UserError, match=r"label 'jump' \(1 images\) is none of the 3 classes"):
        evaluate_model(model, data, tmp_path / "other")
    with pytest.raises(UserError, match="of images with several labels each"):
        read_predictions(str(tmp_path / "out"))


@pytest.mark.slow
def test_commands_for_one_label_refuse_the_model(trained: Trained, tmp_path: Path) -> None:
    model = str(trained.result.model)
    with pytest.raises(UserError, match=r"a multi-label model, and one label for each image is needed here"):
        calibrate_model(model, "synthetic", tmp_path / "calibrated")
    assert not (tmp_path / "calibrated").exists()
    predictor = Predictor(model)
    with pytest.raises(UserError, match="segments follow one action at a time"):
        find_video_segments([], predictor.backend, choose_windows(predictor.backend), SegmentRules(), 4)
    with pytest.raises(UserError, match="events follow one action at a time"):
        find_events([], predictor.backend, EventRules())


@pytest.fixture(scope="module")
def exported(trained: Trained) -> Path:
    folder = trained.workdir / "export"
    parity = export_model(str(trained.result.model), ["onnx"], folder, ExportOptions(trained.data, num_examples=16))
    assert parity["onnx"]["passed"], parity
    return folder


@pytest.mark.slow
def test_predictions_are_the_labels_that_reach_their_thresholds(trained: Trained, exported: Path) -> None:
    model, images = str(trained.result.model), sorted((trained.workdir.parent / "images").glob("*.png"))[:30]
    predictor = Predictor(model)
    predicted = predictor.predict(images)
    thresholds = bundle.read_actions(model).label_thresholds
    assert bundle.read_actions(exported).label_thresholds == thresholds
    pixels = np.stack([predictor.try_load(path) for path in images])
    assert all(isinstance(row, np.ndarray) for row in pixels)
    probs = 1 / (1 + np.exp(-predictor.backend.logits(pixels).astype(np.float64)))
    assert {len(one.labels or ()) for one in predicted} >= {1, 2}
    for one, own in zip(predicted, probs, strict=True):
        wanted = {name: p for name, p in zip(COLOURS, own, strict=True) if p >= thresholds[name]}
        assert one.labels is not None
        assert dict(one.labels) == pytest.approx(wanted, abs=1e-5)
        scores = [score for _, score in one.labels]
        assert scores == sorted(scores, reverse=True)
        best = one.labels[0] if one.labels else one.top[0]
        assert (one.label, one.score) == best
        assert one.abstained == (not wanted)
        written = one.to_dict()
        assert list(written) == ["input", "label", "score", "top", "labels", "abstained"]
        assert written["labels"] == [{"label": name, "score": score} for name, score in one.labels]
    for one, other in zip(predicted, Predictor(exported).predict(images), strict=True):
        assert dict(one.labels or ()) == pytest.approx(dict(other.labels or ()), abs=1e-4)


def test_labels_reach_their_thresholds_or_not() -> None:
    actions = bundle.Actions(("run", "sit"), {"run": ("a",), "sit": ("b",)}, label_thresholds={"run": 0.5, "sit": 0.2})
    assert above_thresholds(np.array([0.5, 0.7]), actions) == (("sit", 0.7), ("run", 0.5))
    assert above_thresholds(np.array([0.49, 0.1]), actions) == ()
    np.testing.assert_allclose(probabilities(np.zeros((1, 2), np.float32), True), 0.5)
    np.testing.assert_allclose(probabilities(np.zeros((1, 4), np.float32), False), 0.25)


@pytest.mark.slow
def test_an_exported_graph_gives_sigmoids(exported: Path) -> None:
    session = InferenceSession(exported / "onnx" / "classifier.onnx", providers=["CPUExecutionProvider"])
    side = session.get_inputs()[0].shape[1]
    image = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    probs, logits = session.run(["probs", "logits"], {"image": image})
    np.testing.assert_allclose(probs, 1 / (1 + np.exp(-logits)), atol=1e-6)


@pytest.mark.slow
def test_the_service_gives_the_labels(trained: Trained, exported: Path) -> None:
    images = [trained.workdir.parent / "images" / f"{i}.png" for i in range(6)]
    with running(exported) as (client, _):
        for path, wanted in zip(images, Predictor(exported).predict(images), strict=True):
            answer = client.post("/v1/predict", content=path.read_bytes()).json()
            given = {entry["label"]: entry["score"] for entry in answer["labels"]}
            assert given == pytest.approx(dict(wanted.labels or ()), abs=1e-5)
            assert answer["abstained"] == wanted.abstained
            assert answer["label"] == (None if wanted.abstained else wanted.label)
            assert len(answer["top"]) == 3
        every = client.post("/v1/predict?threshold=0", content=images[0].read_bytes()).json()
        assert {entry["label"] for entry in every["labels"]} == set(COLOURS)
        none = client.post("/v1/predict?threshold=1", content=images[0].read_bytes()).json()
        assert (none["labels"], none["label"], none["abstained"]) == ([], None, True)
        files = [("image", (path.name, path.read_bytes(), "image/png")) for path in images]
        batch = client.post("/v1/predict/batch", files=files).json()["predictions"]
        single = client.post("/v1/predict", content=images[1].read_bytes()).json()
        assert batch[1]["labels"] == [
            {"label": e["label"], "score": pytest.approx(e["score"])} for e in single["labels"]
        ]
        refused = client.post("/v1/videos", content=b"x")
        assert refused.status_code == 415
        assert "gives several labels" in refused.json()["detail"]


@pytest.mark.slow
def test_bulk_predictions_and_the_command_give_the_labels(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = trained.workdir.parent / "images"
    predictor = Predictor(str(trained.result.model))
    predict_bulk(predictor, str(images), tmp_path / "bulk", part_size=50)
    parts = sorted((tmp_path / "bulk").glob("predictions-*/*.parquet"))
    rows = {row["input"]: row["labels"] for part in parts for row in pq.read_table(part).to_pylist()}
    some = [str(images / f"{i}.png") for i in range(8)]
    for one in predictor.predict(some):
        assert rows[one.input] == [label for label, _ in one.labels or ()]
    monkeypatch.setattr("sys.argv", ["predict.py", f"--model={trained.result.model}", *some])
    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "predict.py"))["main"]
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    for one, line in zip(predictor.predict(some), lines, strict=True):
        told = ", ".join(f"{score:.3f} {label}" for label, score in one.labels or ())
        assert line == f"{told or 'no label'}  {one.input}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"shots": 2}}, "config.data.shots counts images by their one label"),
        ({"data": {"classes": ("run", "sit")}}, "config.data.classes chooses images by their one label"),
        ({"data": {"sampling": "class_balanced"}}, "draws images by their one label"),
        ({"data": {"train": "synthetic"}}, "config.data.train: synthetic: gives each image one label"),
        ({"data": {"train": "webdataset:x.tar"}}, "image-text pairs have no labels"),
        ({"data": {"labels": ("run", "sit")}}, "label 'wave'"),
    ],
)
def test_settings_that_need_one_label_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    data = write_multi_label_images(tmp_path, 12)
    config = make_config(config_of(data, "tiny", **changes))
    with pytest.raises(UserError) as info:
        load_data(config)
    assert said in str(info.value)


def test_validation_images_without_any_label_are_refused(tmp_path: Path) -> None:
    data = write_multi_label_images(tmp_path, 12)
    (tmp_path / "val.csv").write_text("filename,label\n0.png,\n")
    values = config_of(data, "tiny")
    values["data"]["val"] = f"csv:{tmp_path}/val.csv"
    with pytest.raises(UserError, match="none of the validation images has a label"):
        load_data(make_config(values))


def test_comparisons_refuse_multi_label_data() -> None:
    with pytest.raises(UserError, match=r"compare[.]py judges models by top-1 accuracy"):
        check_comparison(make_config({"data": {"multi_label": True}}), ["full"], [0])
