"""Requests that are wrong or too large are told what is wrong."""

import socket
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from clip_har_jax.errors import UserError
from serving.server import supervise
from serving.settings import Settings
from serving.sockets import listen
from tests.support.serving_setup import running, saved


def test_a_body_too_large(client: httpx.Client) -> None:
    answer = client.post("/v1/predict", content=b"\xff\xd8\xff" + bytes(300_000))
    assert answer.status_code == 413 and answer.json()["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        yield b"\xff\xd8\xff"
        for _ in range(10):
            yield bytes(100_000)

    assert client.post("/v1/predict", content=chunks()).json()["code"] == "body_too_large"


def test_a_hundred_megabytes_are_refused_by_their_header(client: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        (lambda data: {"files": {"picture": data}}, 422),
        (lambda data: {"data": {"image": "text"}, "files": {"x": b""}}, 422),
        (lambda data: {"files": [("image", data), ("image", data)]}, 400),
        (lambda data: {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 422),
        (lambda data: {"content": data, "headers": {"Content-Type": "multipart/form-data"}}, 400),
        (lambda data: {"content": data, "params": {"top": 0}}, 422),
        (lambda data: {"content": data, "params": {"threshold": "nan"}}, 422),
        (lambda data: {"content": data, "params": {"classes": "one"}}, 422),
        (lambda data: {"content": data, "params": {"classes": "a,,b"}}, 422),
        (lambda data: {"content": data, "params": {"classes": ["cycling", "riding a bike"]}}, 422),
        (lambda data: {"content": data, "params": {"classes": ",".join(f"class {i}" for i in range(201))}}, 422),
        (lambda data: {"files": {"image": data}, "data": {"classes": "[1, 2]"}}, 422),
        (lambda data: {"files": {"image": data}, "data": {"classes": '{"a": ["b"], "c": [""]}'}}, 422),
        (lambda data: {"content": data, "params": {"model": "nobody"}}, 404),
        (lambda data: {"content": data, "params": {"model": "../har"}}, 404),
        (lambda data: {"content": data, "params": {"version": "x"}}, 404),
        (lambda data: {"content": data, "headers": {"X-Timeout-Ms": "-1"}}, 422),
        (lambda data: {"content": zlib.compress(data), "headers": {"Content-Encoding": "gzip"}}, 415),
    ],
)
def test_a_wrong_request_is_told(client: httpx.Client, good: bytes, request_of: Any, status: int) -> None:
    answer = client.post("/v1/predict", **request_of(good))
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json" and answer.json()["detail"]


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "1.5", "\u00b2".encode("latin-1"), "100"])
def test_a_wrong_length_of_kserves_header_is_told(client: httpx.Client, length: str | bytes) -> None:
    headers: Any = {"Inference-Header-Content-Length": length}  # bytes too: they aren't ASCII
    answer = client.post("/v2/models/har/infer", content=b"{}", headers=headers)
    assert answer.status_code == 422 and answer.json()["code"] == "invalid_request", answer.text


def test_a_full_disk_fails_no_upload(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms are read in memory; there is nowhere to put a file here."""
    large = saved(Image.effect_noise((2400, 1000), 90).convert("RGB"), "PNG")
    assert len(large) > 2_000_000
    with running(folder) as (client, _):
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
        assert client.post("/v1/predict", files={"image": large}).status_code == 200


def test_workers_without_room_for_their_metrics_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    made = Settings(model=folder, port=0, workers=2)
    with listen(made) as listener, pytest.raises(UserError, match=r"no room for the metrics .* set TMPDIR"):
        supervise(made, listener)


@pytest.mark.parametrize(
    ("request_of", "said"),
    [
        (lambda data: {"content": data, "params": {"classes": "a\nb,c"}}, "holds a control character"),
        (
            lambda data: {"files": {"image": ("a.jpg", data, "image/jpeg", {"X-Long": "y" * 100_000})}},
            "a part of the form has too many or too long headers",
        ),
        (
            lambda data: {"files": {"image": ("a.jpg", data, "image/jpeg", {f"X-{i}": "y" for i in range(100)})}},
            "a part of the form has too many or too long headers",
        ),
    ],
)
def test_the_true_cause_is_told(client: httpx.Client, good: bytes, request_of: Any, said: str) -> None:
    answer = client.post("/v1/predict", **request_of(good))
    assert answer.status_code in (400, 422) and said in answer.json()["detail"]


def test_a_place_in_a_body_is_named_without_gaps(client: httpx.Client) -> None:
    answer = client.post("/v2/models/har/infer", content=b"[1]", headers={"Content-Type": "application/json"})
    assert answer.json()["detail"].startswith("body: ")
