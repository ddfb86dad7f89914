"""Other families of models and layouts, from a folder to a trained, exported and served model."""

import json
import shutil
import warnings
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from clip_har_jax import Predictor, load_config, train
from clip_har_jax.inference.stream import EventRules, find_events
from clip_har_jax.models.factory import load
from clip_har_jax.models.pretrained import read_config
from clip_har_jax.models.siglip import FlaxSiglipModel
from clip_har_jax.video.clips import iter_frames
from export.run import ExportOptions, export_model
from tests.support.make_golden import GOLDEN
from tests.support.model_folders import write_images, write_siglip
from tests.support.open_clip_folders import write_case
from tests.support.runs import LABELS, write_config
from tests.support.serving_setup import running
from tests.support.videos import write_video

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def write_open_clip(folder: Path, name: str) -> Path:
    return write_case(shutil.copytree(GOLDEN / f"open_clip_{name}", folder), {"clip": "gelu"}.get(name, name))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("siglip", ("flyp", "sigmoid")), ("clip", ("full", "")), ("clipa", ("full", "")), ("siglip", ("lora", ""))],
)
def test_folder_is_trained_exported_and_served(kind: str, method: tuple[str, str], tmp_path: Path) -> None:
    folder = write_siglip(tmp_path / "base", LABELS) if kind == "siglip" else write_open_clip(tmp_path / "base", kind)
    photos = write_images(tmp_path / "photos", LABELS, per_class=8)
    config = write_config(tmp_path, (folder, photos), num_steps=4)
    overrides = [f"--config.method.name={method[0]}", *([f"--config.method.loss={method[1]}"] if method[1] else [])]
    train(load_config(str(config), overrides), tmp_path / "run")
    model = tmp_path / "run" / "model"
    assert read_config(model).vision == read_config(folder).vision
    if kind == "siglip":
        before, after = (load(str(path)).model for path in (folder, model))
        assert isinstance(before, FlaxSiglipModel) and isinstance(after, FlaxSiglipModel)
        if method[1] == "sigmoid":
            assert float(before.logit_bias[...]) != float(after.logit_bias[...])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax2onnx warns of what it uses itself
        options = ExportOptions(f"folder:{photos}", num_examples=8)
        parity = export_model(str(model), ("onnx", "stablehlo"), tmp_path / "export", options)
    assert all(of["passed"] for of in parity.values()), parity
    photo = next((photos / LABELS[0]).iterdir())
    write_video(str(tmp_path / "clip.mp4"))
    with running(tmp_path / "export", stream_budget_s=60) as (client, _):
        check_images(client, model, photo, has_sigmoid=kind == "siglip")
        check_frames(client, photo)
        check_video(client, model, tmp_path / "clip.mp4")


def check_images(client: httpx.Client, model: Path, photo: Path, has_sigmoid: bool) -> None:
    """The service scores a photograph as the model does, among its own actions and among others in free words."""
    for classes in (None, ("juggling", "climbing a wall")):
        query = {"classes": list(classes)} if classes else {}
        answer = client.post("/v1/predict", params=query, content=photo.read_bytes())
        assert answer.status_code == 200, answer.text
        found = {one["label"]: one for one in answer.json()["top"]}
        expected = Predictor(model, classes).predict([photo])[0].to_dict()["top"]
        assert found.keys() == set(classes or LABELS)
        for one in expected:
            assert found[one["label"]] == pytest.approx(one, abs=1e-4)
            assert ("sigmoid" in one) == has_sigmoid
    assert client.post("/v1/explain", content=photo.read_bytes()).status_code == 200


def check_frames(client: httpx.Client, photo: Path) -> None:
    """A frame over the WebSocket is scored as the same picture in a request, also among actions in free words."""
    for query in ("", "&classes=juggling&classes=climbing"):
        answer = client.post(f"/v1/predict?top=5{query}", content=photo.read_bytes()).json()
        address = f"ws://127.0.0.1:{client.base_url.port}/v1/stream?smoothing=none{query}"
        with connect(address, proxy=None) as socket:
            socket.send(photo.read_bytes())
            message = json.loads(socket.recv(timeout=60))
        assert message["type"] == "frame", message
        scores = {one["label"]: one["score"] for one in message["top"]}
        assert scores == pytest.approx({one["label"]: one["score"] for one in answer["top"]}, abs=1e-4)


def check_video(client: httpx.Client, model: Path, video: Path) -> None:
    """The events in a video are those that the model folder itself finds."""
    rules = EventRules(start_score=0.01, end_score=0.0, min_duration_s=0.1)
    expected = find_events(iter_frames(video, 5.0), Predictor(model).backend, rules)
    query = "start_score=0.01&end_score=0&min_duration_s=0.1&threshold=0&rate_hz=5"
    answer = client.post(f"/v1/stream?{query}", content=video.read_bytes())
    assert answer.status_code == 200, answer.text
    assert answer.json()["frames"] == expected.frames == 10
    events = [(event["label"], event["start_s"]) for event in answer.json()["events"]]
    assert events == [(event.label, event.start_s) for event in expected.events] and events
