"""Frames over a WebSocket and videos by POST, to action events."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from clip_har_jax.image_formats import format_titles
from clip_har_jax.inference.exported import ExportedBackend
from clip_har_jax.inference.stream import EventRules, find_events
from clip_har_jax.video.clips import iter_frames
from clip_har_jax.video.decoding import TooSlow
from serving.security import new_key
from serving.service import Service
from serving.telemetry import configure_logging
from serving.videos import read_frames
from tests.support.serving_setup import LABELS, running, wait_for
from tests.support.videos import write_video

EAGER = "start_score=0.01&end_score=0&min_duration_s=0.1"


@pytest.fixture(scope="module")
def served(served_folder: Path) -> Iterator[tuple[httpx.Client, Service]]:
    # A budget for machines that are busy with other tests: a frame that is too old has no answer.
    with running(served_folder, max_sessions_per_client=2, max_stream_fps=20, stream_budget_s=10) as both:
        yield both


@pytest.fixture(scope="module")
def frame(served_folder: Path) -> bytes:
    return sorted((served_folder.parent / "photos").rglob("*.png"))[0].read_bytes()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(str(path))
    return path


def open_stream(client: httpx.Client, query: str = EAGER, **options: Any) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{client.base_url.port}/v1/stream?{query}", proxy=None, **options)


def receive(socket: ClientConnection) -> dict[str, Any]:
    return json.loads(socket.recv(timeout=10))


def exchange(socket: ClientConnection, message: Any, **options: Any) -> str | bytes:
    socket.send(message, **options)
    return socket.recv(timeout=10)


def test_frames_in_events_out(served: tuple[httpx.Client, Service], frame: bytes) -> None:
    answer = served[0].post("/v1/predict", content=frame).json()
    with open_stream(served[0]) as socket:
        messages = []
        for _ in range(4):
            socket.send(frame)
            messages.append(receive(socket))
            time.sleep(0.06)
        assert [message["frame"] for message in messages if message["type"] == "frame"][:2] == [1, 2]
        while messages[-1]["type"] != "event":
            messages.append(receive(socket))
        event = messages[-1]
    first = messages[0]
    assert first["label"] == answer["label"] and first["top"] == answer["top"] and first["model"] == answer["model"]
    assert first["skipped"] == 0 and 0 < first["latency_ms"] < 10_000
    assert event["event"] == "start" and event["label"] == answer["label"] and event["end_s"] is None
    wait_for(lambda: "har_stream_sessions 0.0" in served[0].get("/metrics").text)


def test_what_cannot_work_is_refused_with_the_reason(served: tuple[httpx.Client, Service]) -> None:
    wrong = {"model=nobody": 404, "classes=one": 422, "top=x": 422, "start_score=0.1&end_score=0.5": 422}
    for query, status in wrong.items():
        with pytest.raises(InvalidStatus) as refused:
            open_stream(served[0], query)
        assert refused.value.response.status_code == status
        assert json.loads(refused.value.response.body)["detail"]
    with pytest.raises(InvalidStatus) as refused:
        open_stream(served[0], origin="https://evil.example")
    assert refused.value.response.status_code == 403


def test_a_stream_needs_a_key(served_folder: Path, frame: bytes) -> None:
    key, line = new_key("alice")
    metrics_key, metrics_line = new_key("prometheus", ["metrics"])
    with running(served_folder, api_keys=f"{line} {metrics_line}") as (client, _):
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {metrics_key}"}, 403)):
            with pytest.raises(InvalidStatus) as refused:
                open_stream(client, additional_headers=headers)
            assert refused.value.response.status_code == status
        with open_stream(client, additional_headers={"Authorization": f"Bearer {key}"}) as socket:
            socket.send(frame)
            assert receive(socket)["label"] in LABELS


def test_sessions_are_counted(served: tuple[httpx.Client, Service]) -> None:
    with open_stream(served[0]), open_stream(served[0]):
        with pytest.raises(InvalidStatus) as refused:
            open_stream(served[0])
        assert refused.value.response.status_code == 429
    wait_for(lambda: not served[1]._sessions)
    with open_stream(served[0]):
        pass


def test_a_bad_frame_is_told_and_the_stream_goes_on(served: tuple[httpx.Client, Service], frame: bytes) -> None:
    with open_stream(served[0]) as socket:
        socket.send(b"not an image")
        assert receive(socket) | {"request_id": ""} == {
            "type": "error",
            "frame": 1,
            "title": "Unsupported Media Type",
            "status": 415,
            "detail": f"not an image by its first bytes; taken are {format_titles()}",
            "code": "unsupported_media_type",
            "request_id": "",
        }
        time.sleep(0.1)
        socket.send(frame)
        assert receive(socket)["type"] == "frame"


def test_text_ends_the_stream(served: tuple[httpx.Client, Service]) -> None:
    with open_stream(served[0]) as socket:
        socket.send("hello")
        with pytest.raises(ConnectionClosed, match=r"1008.*binary"):
            socket.recv(timeout=10)


def test_a_flood_is_cut_off(served: tuple[httpx.Client, Service], frame: bytes) -> None:
    """And others are answered meanwhile."""

    def flood(socket: ClientConnection) -> None:
        for _ in range(100_000):
            socket.send(frame)

    with open_stream(served[0]) as socket, pytest.raises(ConnectionClosed, match=r"1008.*20 frames a second"):
        flood(socket)
    assert served[0].post("/v1/predict", content=frame).status_code == 200


def test_the_newest_frame_wins(served_folder: Path, frame: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(served_folder, max_stream_fps=60, stream_budget_s=5) as (client, service):
        model = service.models.get()
        run = model.classify.run

        def slowly(items: list[Any]) -> Any:
            time.sleep(0.2)
            return run(items)

        monkeypatch.setattr(model.classify, "run", slowly)
        with open_stream(client) as socket:
            for _ in range(30):
                socket.send(frame)
                time.sleep(0.02)
            numbers: list[int] = []
            while not numbers or numbers[-1] < 30:
                message = receive(socket)
                if message["type"] == "frame":
                    numbers.append(message["frame"])
                    skipped = message["skipped"]
        assert numbers == sorted(numbers) and len(numbers) < 10
        assert skipped == 30 - len(numbers)


def test_a_switch_of_the_model_ends_what_went_on(served_folder: Path, frame: bytes) -> None:
    with running(served_folder) as (client, _), open_stream(client) as socket:
        socket.send(frame)
        before = receive(socket)["model"]["version"]
        client.post("/v1/models/har/classes", json={"add": {"juggling": []}}).raise_for_status()
        time.sleep(0.15)
        socket.send(frame)
        while (message := receive(socket))["type"] != "frame":
            pass
        assert message["model"]["version"] == before + "+c1" and len(message["top"]) == 5


def test_a_video_gives_what_the_engine_finds(
    served: tuple[httpx.Client, Service], served_folder: Path, video: Path
) -> None:
    rules = EventRules(start_score=0.01, end_score=0.0, min_duration_s=0.1)
    ours = find_events(iter_frames(video, 5.0), ExportedBackend(served_folder), rules)
    for request in ({"content": video.read_bytes()}, {"files": {"video": video.read_bytes()}}):
        answer = served[0].post(f"/v1/stream?{EAGER}&rate_hz=5", **request).raise_for_status().json()
        assert answer["frames"] == ours.frames == 10 and answer["duration_s"] == pytest.approx(ours.duration_s)
        assert [(e["label"], e["start_s"], e["end_s"]) for e in answer["events"]] == [
            (event.label, event.start_s, event.end_s) for event in ours.events
        ]


@pytest.mark.parametrize("smoothing", ["attention", "none"])
def test_a_video_in_free_words(served: tuple[httpx.Client, Service], video: Path, smoothing: str) -> None:
    query = f"{EAGER}&smoothing={smoothing}&classes=juggling,climbing"
    answer = served[0].post(f"/v1/stream?{query}", content=video.read_bytes()).raise_for_status().json()
    assert {event["label"] for event in answer["events"]} <= {"juggling", "climbing"} and answer["events"]


def test_a_video_that_takes_too_long_ends(served_folder: Path, frame: bytes, video: Path) -> None:
    """And meanwhile images are decoded; nor does the service's own end wait for it."""
    with running(served_folder, video_timeout_s=2, max_videos=1) as (client, service):
        busy = service.video_decoder._pool.submit(time.sleep, 600)  # as another's video
        late = client.post("/v1/stream", content=video.read_bytes())
        assert late.status_code == 504 and late.json()["code"] == "deadline"
        assert client.post("/v1/predict", content=frame).status_code == 200
        assert not busy.done()
    with pytest.raises(TooSlow, match="over 0 s"):  # also where none of the frames is looked at
        list(iter_frames(video, 0.001, time_limit_s=0.0))
    preprocess = ExportedBackend(served_folder).preprocess
    with pytest.raises(TooSlow):
        read_frames(video.read_bytes(), 4.0, 100, preprocess, 25.0, 0.0)


def test_a_bad_video_is_told(served: tuple[httpx.Client, Service], served_folder: Path, video: Path) -> None:
    data = video.read_bytes()
    for content, code in ((b"", "empty_body"), (b"hello", "bad_video"), (data[:200], "bad_video")):
        answer = served[0].post("/v1/stream", content=content)
        assert answer.status_code == 422 and answer.json()["code"] == code
    with running(served_folder, max_video_frames=3, max_video_bytes=len(data)) as (client, _):
        long = client.post("/v1/stream", content=data).json()
        assert long["code"] == "bad_video" and "over 3 frames" in long["detail"]
        assert client.post("/v1/stream", content=data + b"x").status_code == 413


def test_a_stream_ends_with_the_service(served_folder: Path, frame: bytes) -> None:
    with ExitStack() as outlives:
        with running(served_folder) as (client, _):
            socket = outlives.enter_context(open_stream(client))
            socket.send(frame)
            assert receive(socket)["label"] in LABELS
        with pytest.raises(ConnectionClosed, match=r"1012|1001"):
            socket.recv(timeout=20)


def test_a_path_without_a_websocket_is_not_found(served: tuple[httpx.Client, Service]) -> None:
    for path in ("/v1/predict", "/nothing", "/docs/assets/x"):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://127.0.0.1:{served[0].base_url.port}{path}", proxy=None)
        body = refused.value.response.body
        assert refused.value.response.status_code == 404 and body is not None
        assert "/v1/stream" in json.loads(body)["detail"]


def test_a_message_of_too_many_fragments_is_refused_with_the_reason(served: tuple[httpx.Client, Service]) -> None:
    """The last fragment, an empty one, is the 1,001st: a client that sends more may fail before it reads the reason."""
    with open_stream(served[0]) as socket, pytest.raises(ConnectionClosed) as closed:
        exchange(socket, (b"x" for _ in range(1000)))
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1009, "over 1000 fragments in a message")


def test_bad_text_of_a_client_is_no_traceback_in_the_log(
    served: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("har", "uvicorn", "uvicorn.error"):  # configure_logging sets these
        logger = logging.getLogger(name)
        for attribute in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, attribute, getattr(logger, attribute))
    configure_logging("INFO")
    with open_stream(served[0]) as socket, pytest.raises(ConnectionClosed) as closed:
        exchange(socket, b"\xff\xff", text=True)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1007
    wait_for(lambda: '"method": "WS"' in capsys.readouterr().err)
    logging.getLogger("uvicorn.error").error("Invalid UTF-8 sequence received from client.")
    assert not capsys.readouterr().err
