"""Clips and streams of a model of clips over HTTP: the answers of the exported folder, whole, in windows, and live."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from clip_har_jax import Predictor
from clip_har_jax.inference.exported import ExportedBackend
from clip_har_jax.inference.sliding_windows import choose_windows, find_video_segments
from clip_har_jax.inference.stream import EventRules, find_events
from clip_har_jax.video.clips import iter_frames
from clip_har_jax.video.segments import SegmentRules
from export.run import ExportOptions, export_model
from serving.client import Client, ServiceError
from serving.service import Service
from tests.support.export_folders import LABELS, NUM_FRAMES, lively, write_clip_folders, write_heads
from tests.support.model_folders import IMAGE_SIZE_PX, write_image, write_model
from tests.support.serving_setup import running
from tests.support.videos import write_clip

pytestmark = pytest.mark.filterwarnings("default")  # jax2onnx warns of what it uses itself
EAGER: dict[str, Any] = {"start_score": 0.25, "end_score": 0.2}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return exported folders: a model whose frames are encoded apart, one whose tower looks over them, and
    one of images, whose head takes the patches of all frames together."""
    root = tmp_path_factory.mktemp("clips")
    folder = lively(write_model(root / "model", LABELS, temperature=1.7))
    models = write_clip_folders(folder, write_heads(folder, root / "heads"), root / "models")
    models["photos"] = root / "heads" / "cross_attention"
    for name in ("head", "divided", "photos"):
        parity = export_model(str(models[name]), ["onnx"], root / name, ExportOptions(num_examples=16))
        assert parity["onnx"]["passed"], parity
    return {name: root / name for name in ("head", "divided", "photos")}


@pytest.fixture(scope="module")
def served(exports: dict[str, Path]) -> Iterator[tuple[httpx.Client, Service]]:
    others = {name: exports[name] for name in ("divided", "photos")}
    with running(exports["head"], models=others, stream_budget_s=20, video_timeout_s=30) as both:
        yield both


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_clip(path, count=40)
    return path


@pytest.fixture(scope="module")
def reverse(clip: Path) -> Path:
    import av

    frames = [frame.image for frame in iter_frames(clip)][::-1]
    path = clip.with_name("reverse.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def top_of(answer: dict[str, Any]) -> dict[str, float]:
    return {one["label"]: one["score"] for one in answer["top"]}


@pytest.mark.parametrize("name", ["head", "divided"])
def test_a_clip_is_answered_by_the_clip_graph(
    served: tuple[httpx.Client, Service], exports: dict[str, Path], clip: Path, reverse: Path, name: str
) -> None:
    mine, other = Predictor(exports[name]).predict([clip, reverse])
    path = f"/v1/predict?model={'har' if name == 'head' else name}"
    answers = [served[0].post(path, content=video.read_bytes()).raise_for_status().json() for video in (clip, reverse)]
    for ours, theirs in zip((mine, other), answers, strict=True):
        assert top_of(theirs) == pytest.approx(dict(ours.top), abs=1e-5)
        assert set(theirs) == {"label", "score", "top", "abstained", "model"}
    assert max(abs(dict(mine.top)[label] - dict(other.top)[label]) for label in LABELS) > 0.01, "the order counts"
    for field in ("image", "video"):
        answer = served[0].post(path, files={field: ("clip.mp4", clip.read_bytes())}).raise_for_status().json()
        assert top_of(answer) == pytest.approx(dict(mine.top), abs=1e-5)


def test_a_photograph_is_answered_as_before(
    served: tuple[httpx.Client, Service], exports: dict[str, Path], tmp_path: Path
) -> None:
    image = write_image(tmp_path / "photo.png", seed=3)
    (ours,) = Predictor(exports["head"]).predict([image])
    answer = served[0].post("/v1/predict", content=image.read_bytes()).raise_for_status().json()
    assert top_of(answer) == pytest.approx(dict(ours.top), abs=1e-5) and "damage" not in answer


@pytest.mark.parametrize("name", ["head", "divided"])
def test_a_video_has_segments(
    served: tuple[httpx.Client, Service], exports: dict[str, Path], clip: Path, name: str
) -> None:
    backend = ExportedBackend(exports[name])
    windows = choose_windows(backend, hop_s=0.5)
    ours = find_video_segments(iter_frames(clip, windows.rate_hz), backend, windows, SegmentRules(0.25, 0.2, 0.0, 0.5))
    query = EAGER | {"hop_s": 0.5} | ({"model": "divided"} if name == "divided" else {})
    answer = served[0].post("/v1/videos", params=query, content=clip.read_bytes()).raise_for_status().json()
    assert ours.segments and (answer["frames"], answer["duration_s"]) == (ours.frames, ours.duration_s)
    spans = [(one["start_s"], one["end_s"], one["label"]) for one in answer["segments"]]
    assert spans == [segment[:3] for segment in ours.segments]
    assert [one["score"] for one in answer["segments"]] == pytest.approx([one.score for one in ours.segments], abs=1e-4)
    assert top_of(answer) == pytest.approx(dict(Predictor(exports[name]).predict([clip])[0].top), abs=1e-5)
    events = served[0].post("/v1/stream", params=query, content=clip.read_bytes()).raise_for_status().json()["events"]
    assert [(one["start_s"], one["end_s"], one["label"]) for one in events] == spans
    with Client(str(served[0].base_url)) as client:
        typed = client.video(clip, model="divided" if name == "divided" else None, hop_s=0.5, **EAGER)
    assert [(one.start_s, one.end_s, one.label) for one in typed.segments] == spans and typed.label == answer["label"]


def test_clips_in_free_words(served: tuple[httpx.Client, Service], exports: dict[str, Path], clip: Path) -> None:
    classes = ("juggling", "climbing a wall")
    (ours,) = Predictor(exports["head"], classes).predict([clip])
    answer = served[0].post("/v1/predict", params={"classes": ",".join(classes)}, content=clip.read_bytes()).json()
    assert top_of(answer) == pytest.approx(dict(ours.top), abs=1e-5)
    found = (
        served[0].post("/v1/videos", params=EAGER | {"classes": ",".join(classes)}, content=clip.read_bytes()).json()
    )
    assert {one["label"] for one in found["segments"]} <= set(classes) and found["segments"]


def open_stream(client: httpx.Client, **query: Any) -> ClientConnection:
    address = f"ws://127.0.0.1:{client.base_url.port}/v1/stream?{httpx.QueryParams(query)}"
    return connect(address, proxy=None)


def test_a_stream_encodes_each_frame_once_and_answers_at_each_hop(
    served: tuple[httpx.Client, Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = served[1].models.get().need_clips()
    counts = {"frame": 0, "head": 0, "whole": 0}
    for name in counts:
        lane = getattr(clips, name)

        def counted(items: list[Any], name: str = name, run: Any = lane.run) -> Any:
            counts[name] += len(items)
            return run(items)

        monkeypatch.setattr(lane, "run", counted)
        monkeypatch.setattr(lane, "run_in_one_thread", None)
    images = [write_image(tmp_path / f"{i}.png", seed=i % 3).read_bytes() for i in range(40)]
    messages: list[dict[str, Any]] = []
    with open_stream(served[0], window_s=0.8, hop_s=0.4, start_score=0.0, end_score=0.0) as socket:
        for image in images:  # 20 a second, of which a window of 4 frames in 0.8 s needs 5
            socket.send(image)
            time.sleep(0.05)
        while len([one for one in messages if one["type"] == "frame"]) < 2:
            messages.append(json.loads(socket.recv(timeout=20)))
    answers = [one for one in messages if one["type"] == "frame"]
    assert counts["whole"] == 0 and counts["head"] >= 2
    assert NUM_FRAMES <= counts["frame"] <= 16, "frames between those of the windows are not looked at"
    assert {one["label"] for one in answers[0]["top"]} <= set(LABELS) and answers[0]["skipped"] == 0
    assert answers[0]["time_s"] == pytest.approx(0.4, abs=0.35), "the middle of the first window"
    starts = [one for one in messages if one["type"] == "event"]
    assert {one["label"] for one in starts} == set(LABELS) and {one["id"] for one in starts} == set(range(1, 6))
    assert all(one["event"] == "start" and one["end_s"] is None and not one["final"] for one in starts)


def test_a_gap_in_a_stream_ends_all_actions_at_once(served: tuple[httpx.Client, Service], tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", seed=1).read_bytes()
    query = {"window_s": 0.4, "hop_s": 0.2, "start_score": 0.0, "end_score": 0.0, "min_duration_s": 0.0}
    with open_stream(served[0], **query) as socket:
        for _ in range(12):
            socket.send(image)
            time.sleep(0.1)
        time.sleep(1)  # longer than a window
        socket.send(image)  # no window is complete
        final: set[str] = set()
        while final != set(LABELS):
            message = json.loads(socket.recv(timeout=20))
            if message["type"] == "event" and message["final"]:
                assert message["start_s"] < message["end_s"]
                final.add(message["label"])


def test_a_stream_of_a_model_whose_tower_looks_over_the_frames(
    served: tuple[httpx.Client, Service], tmp_path: Path
) -> None:
    image = write_image(tmp_path / "a.png", seed=1).read_bytes()
    photo = served[0].post("/v1/predict?model=divided", content=image).json()
    with open_stream(served[0], model="divided", window_s=0.4, hop_s=0.2) as socket:
        for _ in range(12):
            socket.send(image)
            time.sleep(0.1)
        message = json.loads(socket.recv(timeout=20))
    assert message["type"] == "frame" and top_of(message) == pytest.approx(top_of(photo), abs=1e-4), "nothing moves"


def test_a_video_is_analysed_frame_by_frame_by_a_model_of_images(
    served: tuple[httpx.Client, Service], exports: dict[str, Path], clip: Path
) -> None:
    ours = find_events(iter_frames(clip, 5.0), ExportedBackend(exports["photos"]), EventRules(**EAGER))
    query = EAGER | {"model": "photos", "rate_hz": 5}
    answer = served[0].post("/v1/stream", params=query, content=clip.read_bytes()).raise_for_status().json()
    spans = [(event.label, event.start_s, event.end_s) for event in ours.events]
    assert spans and [(one["label"], one["start_s"], one["end_s"]) for one in answer["events"]] == spans


def test_streams_that_make_no_sense_are_refused(served: tuple[httpx.Client, Service]) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"window_s": 1, "hop_s": 2}, "hop_s is 2"),
        ({"window_s": 0}, "window_s"),
        ({"window_s": 10_000}, "window_s"),
        ({"max_delay_s": 0.1}, "max_delay_s is 0.1; an end is seen half a window and a hop later"),
        ({"start_score": 0.1, "end_score": 0.5}, "end_score"),
        ({"hop_s": "nan"}, "hop_s"),
    ]
    for query, detail in wrong:
        with pytest.raises(InvalidStatus) as refused:
            open_stream(served[0], **query)
        body = json.loads(refused.value.response.body)
        assert refused.value.response.status_code == 422 and detail in body["detail"], body
        answer = served[0].post("/v1/videos", params=query, content=b"unused")
        assert answer.status_code == 422 and answer.json()["code"] in ("invalid_request", "bad_video")


def test_bad_videos_have_one_clear_sentence(served: tuple[httpx.Client, Service], clip: Path, tmp_path: Path) -> None:
    import av

    sound = tmp_path / "sound.mp4"
    with av.open(sound, "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    write_clip(tmp_path / "one.mp4", count=1)
    write_clip(tmp_path / "variable.mp4", count=12, times=[0, 0.1, 0.2, 1.0, 1.1, 1.15, 2.2, 2.3, 2.4, 3.0, 3.5, 3.6])
    write_clip(tmp_path / "turned.mp4", count=12, rotation=90)
    data = clip.read_bytes()
    bad = {sound.read_bytes(): "bad_video", data[:300]: "bad_video", b"": "empty_body"}
    for content, code in bad.items():
        for path in ("/v1/predict", "/v1/videos"):
            answer = served[0].post(path, content=content)
            assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
            assert answer.json()["detail"].count("\n") == 0
    for name in ("one.mp4", "variable.mp4", "turned.mp4"):
        content = (tmp_path / name).read_bytes()
        assert served[0].post("/v1/predict", content=content).raise_for_status().json()["label"] in LABELS
        found = served[0].post("/v1/videos", params=EAGER, content=content).raise_for_status().json()
        assert all(0 <= one["start_s"] < one["end_s"] <= found["duration_s"] + 1e-6 for one in found["segments"])
    told = served[0].post("/v1/embed", content=data)
    assert told.status_code == 415 and "this is a video" in told.json()["detail"]
    with Client(str(served[0].base_url)) as client, pytest.raises(ServiceError, match="bad_video"):
        client.video(data[:300])


def test_an_export_of_an_earlier_version_says_so(served_folder: Path, clip: Path, tmp_path: Path) -> None:
    import shutil

    from clip_har_jax.inference.runtimes import SIGNATURE
    from tests.support.serving_setup import reseal

    old = Path(shutil.copytree(served_folder, tmp_path / "old"))
    signature = json.loads((old / SIGNATURE).read_text())
    signature["graphs"].pop("clip_head")
    (old / SIGNATURE).write_text(json.dumps(signature))
    reseal(old)
    with running(old) as (client, _):
        for path in ("/v1/predict", "/v1/videos", "/v1/stream?hop_s=0.5"):
            answer = client.post(path, content=clip.read_bytes())
            assert answer.status_code == 415 and "export it again" in answer.json()["detail"], answer.text
        assert client.post("/v1/stream", content=clip.read_bytes()).status_code == 200, "frame by frame, as ever"


@pytest.mark.parametrize("name", ["har", "divided"])
def test_kserve_takes_frames(served: tuple[httpx.Client, Service], exports: dict[str, Path], name: str) -> None:
    client, side = served[0], IMAGE_SIZE_PX
    frames = np.random.default_rng(0).integers(0, 256, (2, NUM_FRAMES, side, side, 3), dtype=np.uint8)
    inputs = {tensor["name"]: tensor for tensor in client.get(f"/v2/models/{name}").json()["inputs"]}
    assert inputs["frames"]["shape"] == [-1, NUM_FRAMES if name == "divided" else -1, side, side, 3]

    def infer(array: np.ndarray, **changes: Any) -> httpx.Response:
        tensor = {"name": "frames", "datatype": "UINT8", "shape": list(array.shape), "data": array.ravel().tolist()}
        outputs = [{"name": "probs"}, {"name": "image_embeds"}]
        return client.post(f"/v2/models/{name}/infer", json={"inputs": [tensor | changes], "outputs": outputs})

    answer = infer(frames).raise_for_status().json()
    arrays = {one["name"]: np.reshape(one["data"], one["shape"]) for one in answer["outputs"]}
    backend = ExportedBackend(exports["head" if name == "har" else name])
    np.testing.assert_allclose(arrays["probs"], backend.predict(frames), atol=1e-5)
    np.testing.assert_allclose(arrays["image_embeds"], backend.embed(frames), atol=1e-5)
    for wrong in (frames[:, :, :8], frames[:, :0], np.repeat(frames, 20, axis=1)):
        assert infer(wrong).status_code == 422
    assert infer(frames[:, :3]).status_code == (422 if name == "divided" else 200)
