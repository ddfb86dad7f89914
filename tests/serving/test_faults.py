"""What a service on an open address meets: hostile images, floods, clients that leave, models that don't load."""

import asyncio
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_har_jax.signing import SIGNATURE_FILE, sign
from serving.service import Service
from tests.support.serving_setup import LABELS, reseal, running, wait_for


@pytest.fixture(scope="module")
def folder(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy, beside which folders can be put to be loaded."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(served_folder.parent / "photos", root / "photos")
    return Path(shutil.copytree(served_folder, root / "export"))


@pytest.fixture(scope="module")
def good(folder: Path) -> bytes:
    return sorted((folder.parent / "photos").rglob("*.png"))[0].read_bytes()


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[httpx.Client, Service]]:
    with running(folder, models_dir=folder.parent, max_body_bytes=300_000) as both:
        yield both


@pytest.fixture
def client(served: tuple[httpx.Client, Service]) -> httpx.Client:
    return served[0]


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """Return a small file whose header says that it is a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bad_images() -> dict[str, tuple[bytes, int, str]]:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    jpeg = saved(small, "JPEG")
    frames = [small, small.rotate(90)]
    return {
        "empty": (b"", 422, "empty_body"),
        "text": (b"hello", 415, "unsupported_media_type"),
        "animated gif": (saved(small, "GIF", save_all=True, append_images=frames[1:]), 422, "bad_image"),
        "pages": (saved(small, "TIFF", save_all=True, append_images=frames[1:]), 422, "bad_image"),
        "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, "unsupported_media_type"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_media_type"),
        "only magic": (jpeg[:3], 422, "bad_image"),
        "truncated": (jpeg[: len(jpeg) // 2], 422, "bad_image"),
        "bomb": (png_claiming(50_000, 50_000), 422, "bad_image"),
        "just over": (png_claiming(5001, 5000), 422, "bad_image"),
        "animated": (saved(small, "WEBP", save_all=True, append_images=frames[1:]), 422, "bad_image"),
        "animated png": (saved(small, "PNG", save_all=True, append_images=frames[1:]), 422, "bad_image"),
        "a line": (saved(Image.new("RGB", (4000, 2)), "PNG"), 422, "bad_image"),
        "a pixel": (saved(Image.new("RGB", (1, 1)), "PNG"), 422, "bad_image"),
    }


@pytest.mark.parametrize("name", bad_images())
def test_a_bad_image_is_refused(client: httpx.Client, name: str) -> None:
    data, status, code = bad_images()[name]
    for request in ({"content": data}, {"files": {"image": data}}):
        answer = client.post("/v1/predict", **request)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
        assert "Traceback" not in answer.text


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_images_never_break_it(client: httpx.Client, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    image = bytearray(saved(Image.radial_gradient("L").resize((24, 24)).convert("RGB"), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    image = image[: data.draw(st.integers(1, len(image)))]
    answer = client.post("/v1/predict", content=bytes(image))
    assert answer.status_code in (200, 415, 422), answer.text
    if answer.status_code == 200:
        body = answer.json()
        assert body["label"] in LABELS and 0 <= body["score"] <= 1
        assert sum(entry["score"] for entry in body["top"]) == pytest.approx(1, abs=1e-3)


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
    answer = client.post("/v2/models/har/infer", content=b"{}", headers={"Inference-Header-Content-Length": length})
    assert answer.status_code == 422 and answer.json()["code"] == "invalid_request", answer.text


@pytest.mark.parametrize("folder_name", ["nowhere", "photos", "..", "a/b", "../model", "%2e%2e", "", "C:\\x"])
def test_a_path_trick_loads_nothing(client: httpx.Client, folder_name: str) -> None:
    before = client.get("/v1/models").json()["models"][0]["active"]
    answer = client.post("/v1/models/har/load", json={"folder": folder_name})
    assert answer.json()["code"] in ("invalid_request", "load_failed", "not_found")
    assert client.get("/v1/models").json()["models"][0]["active"] == before
    for path in ("/v1/models/..%2Fhar/load", "/v1/models/../har/load", "/v2/models/har%00/ready"):
        assert client.post(path, json={}).status_code in (404, 405, 422)


def test_a_link_out_of_the_folder_loads_nothing(client: httpx.Client, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    (folder.parent / "link").symlink_to(tmp_path / "elsewhere")
    assert client.post("/v1/models/har/load", json={"folder": "link"}).json()["code"] == "not_found"


def damage(folder: Path, target: Path) -> None:
    shutil.copytree(folder, target)
    data = bytearray((target / "onnx/classifier.onnx").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    (target / "onnx/classifier.onnx").write_bytes(data)


def test_a_damaged_folder_keeps_the_old_model(client: httpx.Client, folder: Path, good: bytes) -> None:
    before = client.post("/v1/predict", content=good).json()
    damage(folder, folder.parent / "damaged")
    shutil.copytree(folder, folder.parent / "unsealed")
    (folder.parent / "unsealed" / "manifest.json").unlink()
    for name, words in (("damaged", "changed since"), ("unsealed", "not sealed")):
        refuses(client, name, words)
        assert client.post("/v1/predict", content=good).json() == before
    assert client.get("/v2/health/ready").status_code == 200


def refuses(client: httpx.Client, name: str, words: str) -> None:
    """Loading the folder fails, in these words, and what was active stays."""
    answer = client.post("/v1/models/har/load", json={"folder": name})
    assert answer.status_code == 409 and words in answer.json()["detail"], answer.text
    assert "\n" not in answer.json()["detail"] and not answer.json()["detail"].startswith("/")
    status = client.get("/v1/models").json()["models"][0]
    assert status["status"] == "ready" and words in status["error"]


def another_model(target: Path, graph: str, shape: list[int]) -> None:
    """Change the weights of a graph that have this shape: each row becomes its neighbour."""
    import onnx
    from onnx import numpy_helper

    path = target / "onnx" / f"{graph}.onnx"
    model = onnx.load(path)
    (weights,) = (tensor for tensor in model.graph.initializer if list(tensor.dims) == shape)
    weights.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(weights), 1, axis=1), weights.name))
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("graph", "shape", "words"),
    [
        ("classifier", [16, 4], "logits of images in a batch aren't those of the exported model"),
        ("image_encoder", [32, 16], "embeddings of images aren't those"),
        ("text_encoder", [32, 16], "embeddings of texts aren't those"),
        ("explainer", [32, 16], "heat maps aren't those"),
    ],
)
def test_another_model_under_a_good_manifest_is_refused(
    client: httpx.Client, folder: Path, good: bytes, graph: str, shape: list[int], words: str
) -> None:
    """Its graphs run, its manifest is whole; only the golden outputs know."""
    before = client.post("/v1/predict", content=good).json()
    target = Path(shutil.copytree(folder, folder.parent / f"other-{graph}"))
    another_model(target, graph, shape)
    reseal(target)
    refuses(client, target.name, words)
    assert client.post("/v1/predict", content=good).json() == before


def test_embeddings_of_another_length_are_refused(client: httpx.Client, folder: Path) -> None:
    """They point the right way, but scores of classes in free text would be others."""
    target = Path(shutil.copytree(folder, folder.parent / "long-embeddings"))
    with np.load(target / "golden.npz") as file:
        golden = dict(file)
    np.savez_compressed(target / "golden.npz", **golden | {"text_embeds": golden["text_embeds"] * 2})
    reseal(target)
    refuses(client, target.name, "embeddings of texts aren't those")


def test_golden_outputs_that_are_damaged_or_missing(
    client: httpx.Client, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders of older exports have none: they load, with a note, if their graphs agree with one another."""
    broken, old, mixed, earlier = (
        Path(shutil.copytree(folder, folder.parent / name))
        for name in ("broken-golden", "old-export", "old-mixed", "without-heat-maps")
    )
    with np.load(earlier / "golden.npz") as golden:
        np.savez_compressed(earlier / "golden.npz", **{name: golden[name] for name in golden if name != "heat_maps"})
    with zipfile.ZipFile(broken / "golden.npz", "w") as archive, archive.open("pictures.npy", "w") as file:
        np.lib.format.write_array(file, np.asarray([{"a": 1}], object), allow_pickle=True)
    for copy in (old, mixed):
        (copy / "golden.npz").unlink()
    another_model(mixed, "classifier", [16, 4])
    for copy in (broken, old, mixed, earlier):
        reseal(copy)
    refuses(client, broken.name, "golden.npz: damaged (Object arrays cannot be loaded")
    for content in (b"PK", b"PK\x03\x04 and no more", b""):
        (broken / "golden.npz").write_bytes(content)
        reseal(broken)
        refuses(client, broken.name, "golden.npz: damaged")
    refuses(client, mixed.name, "the classifier and the encoders differ by")
    logger = logging.getLogger("har")
    logger.addHandler(caplog.handler)
    try:
        logger.setLevel("WARNING")
        client.post("/v1/models/har/load", json={"folder": old.name}).raise_for_status()
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel("ERROR")
    assert "no golden outputs" in caplog.text
    client.post("/v1/models/har/load", json={"folder": earlier.name}).raise_for_status()
    client.post("/v1/models/har/load", json={"folder": folder.name}).raise_for_status()


def test_a_folder_called_as_a_format_is(folder: Path, good: bytes, tmp_path: Path) -> None:
    """The manifest that counts is its own, not that of the folder around it; a format's is that of its export."""
    whole = Path(shutil.copytree(folder, tmp_path / "onnx"))
    for path in (whole, whole / "onnx"):
        with running(path) as (client, _):
            assert client.post("/v1/predict", content=good).status_code == 200
    (whole / "manifest.json").unlink()
    with running(whole, wait=False) as (_, service):
        wait_for(lambda: "not sealed" in (service.models.entry(None).error or ""))


@pytest.mark.parametrize("what", ["missing", "damaged"])
def test_without_a_model_it_lives_and_is_not_ready(folder: Path, good: bytes, tmp_path: Path, what: str) -> None:
    if what == "damaged":
        damage(folder, tmp_path / "model")
    with running(tmp_path / "model", wait=False) as (client, service):
        wait_for(lambda: service.models.entry(None).error)
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 503
        answer = client.post("/v1/predict", content=good)
        assert answer.status_code == 503 and answer.json()["code"] == "not_ready" and answer.headers["retry-after"]
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "model")
        assert client.post("/v1/models/har/load", json={}).status_code == 200
        assert client.post("/v1/predict", content=good).status_code == 200


def test_an_output_that_is_not_finite_is_no_answer(
    served: tuple[httpx.Client, Service], good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And spoils none of the others in its batch."""
    client, service = served
    model = service.models.get()
    black = saved(Image.new("RGB", (40, 40)), "PNG")
    run = model.backend._run

    def with_nan(graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        outputs = run(graph, *inputs)
        return [np.where(inputs[0].reshape(len(inputs[0]), -1).any(1)[:, None], output, np.nan) for output in outputs]

    monkeypatch.setattr(model.backend, "_run", with_nan)
    files = [("image", good), ("image", black), ("image", good)]
    answers = client.post("/v1/predict/batch", files=files).json()["predictions"]
    assert [(entry["error"] or {}).get("code") for entry in answers] == [None, "bad_model_output", None]
    for route in ("/v1/predict", "/v1/embed"):
        answer = client.post(route, content=black)
        assert answer.status_code == 500 and answer.json()["code"] == "bad_model_output"


def test_a_decoder_that_dies_is_replaced(served: tuple[httpx.Client, Service], good: bytes) -> None:
    client, service = served
    for _ in range(2):
        for process in list(service.decoder._pool._processes.values()):
            os.kill(process.pid, signal.SIGKILL)
        assert client.post("/v1/predict", content=good).status_code == 200


def test_fifty_switches_under_load(served: tuple[httpx.Client, Service], folder: Path, good: bytes) -> None:
    client, _ = served
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    actions = json.loads((other / "actions.json").read_text())
    actions["thresholds"] = {"abstain": 0.0}
    (other / "actions.json").write_text(json.dumps(actions))
    versions = {reseal(other)[:12], client.get("/v1/models").json()["models"][0]["active"]}
    seen, stop = Counter[tuple[int, str]](), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=client.base_url) as mine:
            while not stop.is_set():
                answer = mine.post("/v1/predict", content=good)
                seen[answer.status_code, answer.json().get("model", {}).get("version", answer.text)] += 1

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            for i in range(50):
                change = {"folder": "other" if i % 2 == 0 else folder.name}
                assert client.post("/v1/models/har/load", json=change).status_code == 200
        finally:
            stop.set()
        for future in asking:
            future.result()
    assert {status for status, _ in seen} == {200} and {version for _, version in seen} == versions, seen
    assert len(client.get("/v1/models").json()["models"][0]["versions"]) == 1  # those before are gone


def test_versions_side_by_side(served: tuple[httpx.Client, Service], folder: Path, good: bytes) -> None:
    client, _ = served
    twin = folder.parent / "twin"
    shutil.copytree(folder, twin)
    (twin / "note.txt").write_text("another digest")
    version = reseal(twin)[:12]
    before = client.get("/v1/models").json()["models"][0]["active"]
    client.post("/v1/models/har/load", json={"folder": "twin", "activate": False}).raise_for_status()
    assert client.post("/v1/predict", content=good).json()["model"]["version"] == before
    asked = client.post("/v1/predict", content=good, params={"version": version})
    assert asked.json()["model"]["version"] == version
    # Neither a reload nor a load of the active version beside itself changes what is active.
    assert client.post("/v1/models/har/load", json={}).json()["active"] == before
    client.post("/v1/models/har/load", json={"activate": False}).raise_for_status()
    assert client.delete(f"/v1/models/har/versions/{before}").json()["code"] == "conflict"
    assert client.delete(f"/v1/models/har/versions/{version}").status_code == 204
    assert client.post("/v1/predict", content=good, params={"version": version}).status_code == 404


def slow_down(service: Service, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make a batch of any size take `seconds`, and the service know it."""
    model = service.models.get()
    run = model.classify.run

    def slowly(items: list[Any]) -> Any:
        time.sleep(seconds)
        return run(items)

    monkeypatch.setattr(model.classify, "run", slowly)
    monkeypatch.setattr(model.classify, "run_in_one_thread", None)
    monkeypatch.setattr(model.costs, "factor", seconds / (model.costs.of_batch(1) / model.costs.factor))
    monkeypatch.setattr(model.costs, "best", 2)


def test_overload_is_refused_at_once(folder: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times what it can take: nothing waits beyond the limit, and what is taken is answered."""
    with running(folder, max_wait_s=0.5) as (client, service):
        slow_down(service, monkeypatch, 0.1)  # 20 images a second
        codes, waits = Counter[int](), []

        async def flood() -> None:
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(base_url=client.base_url, limits=limits, timeout=30) as many:

                async def one(i: int) -> None:
                    await asyncio.sleep(i / 80)
                    start = time.perf_counter()
                    answer = await many.post("/v1/predict", content=good)
                    codes[answer.status_code] += 1
                    if answer.status_code == 200:
                        waits.append(time.perf_counter() - start)
                    else:
                        assert answer.json()["code"] == "overloaded" and int(answer.headers["retry-after"]) >= 1

                await asyncio.gather(*(one(i) for i in range(160)))

        asyncio.run(flood())
        assert set(codes) == {200, 503} and min(codes.values()) > 10, codes
        assert max(waits) < 5
        assert service.batcher.estimated_wait_s == 0 and not service.batcher._queue


def heavy_image(pixels: int = 4900) -> bytes:
    """Return a JPEG that is quickly sent and slowly decoded."""
    return saved(Image.new("RGB", (pixels, pixels), (200, 30, 90)), "JPEG")


def test_images_that_are_slow_to_decode_are_refused_and_bounded(folder: Path, good: bytes) -> None:
    """The model would take them all at once; it's the decoder that they wait for."""
    with running(folder, max_wait_s=0.5) as (client, service):
        data, slow = heavy_image(), 1.0
        service.decoder._seconds = slow  # as after many such images

        async def flood() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:
                return await asyncio.gather(*(many.post("/v1/predict", content=data) for _ in range(8)))

        answers = asyncio.run(flood())
        assert {answer.status_code for answer in answers} == {200, 503}
        assert {answer.json()["code"] for answer in answers if answer.status_code == 503} == {"overloaded"}
        assert service.decoder._seconds < slow and service.decoder.estimated_wait_s == 0  # it follows what they take
        late = client.post("/v1/predict", content=data, headers={"X-Timeout-Ms": "5"})
        assert late.status_code == 504 and late.json()["code"] == "deadline"
        assert client.post("/v1/predict", content=good).status_code == 200


def test_a_deadline_ends_the_wait(folder: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder) as (client, service):
        slow_down(service, monkeypatch, 0.3)
        answer = client.post("/v1/predict", content=good, headers={"X-Timeout-Ms": "50"})
        assert answer.status_code == 504 and answer.json()["code"] == "deadline"


def test_a_client_that_leaves_costs_no_batch(folder: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder) as (client, service):
        slow_down(service, monkeypatch, 0.3)
        head = f"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(good)}\r\n\r\n".encode()
        for _ in range(5):  # the first is computed; the others wait in the queue when their clients leave
            with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
                connection.sendall(head + good)
                wait_for(lambda: service.batcher._lanes)
                time.sleep(0.03)
        assert client.post("/v1/predict", content=good).status_code == 200
        assert not service.batcher._lanes
        metrics = client.get("/metrics").text
        assert 'status="499"' in metrics
        computed = re.search(r"^har_batch_images_sum (\S+)", metrics, re.MULTILINE)
        assert computed and float(computed[1]) < 6, "images whose clients had left were computed"


def test_many_classes_hold_nobody_up(folder: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of texts are embedded a few at a time, and others' images are looked at in between."""
    with running(folder, request_timeout_s=60) as (client, service):
        text, begun = service.models.get().text, threading.Event()
        run = text.run

        def slowly(texts: list[str]) -> Any:
            assert len(texts) <= 8
            begun.set()
            time.sleep(0.03)
            return run(texts)

        monkeypatch.setattr(text, "run", slowly)
        names = ",".join(f"class {i}" for i in range(60))
        with ThreadPoolExecutor(1) as pool:
            many = pool.submit(client.post, "/v1/predict", content=good, params={"classes": names})
            assert begun.wait(10)
            with httpx.Client(base_url=client.base_url) as other:
                for _ in range(3):
                    assert other.post("/v1/predict", content=good).status_code == 200
                    assert not many.done(), "it has 23 batches of texts, or more"
            assert len(many.result().raise_for_status().json()["top"]) == 5
        begun.clear()
        client.post("/v1/predict", content=good, params={"classes": names}).raise_for_status()
        assert not begun.is_set(), "they are remembered"


def test_a_slow_body_is_ended(folder: Path) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
    with (
        running(folder, body_timeout_s=0.3) as (client, _),
        socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10) as connection,
    ):
        connection.sendall(head + b"\xff\xd8")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_one_client_cannot_take_it_all(folder: Path, good: bytes) -> None:
    with running(folder, rate_limit_per_s=1, rate_burst=3) as (client, _):
        answers = [client.post("/v1/predict", content=good) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert answers[-1].json()["code"] == "too_many_requests" and answers[-1].headers["retry-after"] == "1"
        assert client.get("/v2/health/ready").status_code == 200


def test_sigterm_loses_nothing_in_flight(folder: Path, good: bytes) -> None:
    """A real process; requests without a pause; each that was accepted is answered."""
    command = [sys.executable, "-m", "serving", f"--model={folder}", "--port=0"]
    environment = os.environ | {"HAR_RATE_LIMIT_PER_S": "0", "HAR_LOG_LEVEL": "INFO"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        address = json.loads(process.stderr.readline())["address"]
        codes, broken = Counter[int](), Counter[str]()

        def ask() -> None:
            with httpx.Client(base_url=address) as mine:
                while True:
                    try:
                        codes[mine.post("/v1/predict", content=good).status_code] += 1
                    except httpx.ConnectError:
                        return  # it has stopped listening
                    except httpx.TransportError as error:
                        broken[type(error).__name__] += 1
                        return

        with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=20)) as client:
            wait_for(lambda: client.get("/v2/health/ready").status_code == 200)
        with ThreadPoolExecutor(9) as pool:
            logged = pool.submit(process.stderr.read)
            asking = [pool.submit(ask) for _ in range(8)]
            wait_for(lambda: codes[200] > 50)
            process.send_signal(signal.SIGTERM)
            assert process.wait(25) == 0
            for future in asking:
                future.result()
        # A connection that idles as the drain begins is closed, which a client may notice only as it sends anew: what
        # the service took up is what counts.
        assert set(codes) == {200} and set(broken) <= {"RemoteProtocolError", "ReadError", "WriteError"}, (
            codes,
            broken,
        )
        lines = [json.loads(line) for line in logged.result().splitlines()]
        answered = Counter(line["status"] for line in lines if line.get("route") == "/v1/predict")
        assert answered == codes


def test_sighup_reads_the_folder_again(folder: Path, tmp_path: Path, good: bytes) -> None:
    shutil.copytree(folder, tmp_path / "model")
    command = [sys.executable, "-m", "serving", f"--model={tmp_path / 'model'}", "--port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = json.loads(process.stderr.readline())["address"]
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=20)) as client:
            wait_for(lambda: client.get("/v2/health/ready").status_code == 200)
            (tmp_path / "model" / "note.txt").write_text("another digest")
            version = reseal(tmp_path / "model")[:12]
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: client.post("/v1/predict", content=good).json()["model"]["version"] == version)
        process.send_signal(signal.SIGTERM)
        assert process.wait(25) == 0


def test_a_signature_is_asked_for(folder: Path, tmp_path: Path, good: bytes) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    for name in ("mine", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{name}.pem").write_bytes(text)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    with running(model, wait=False, signing_key=tmp_path / "mine.pub") as (client, service):
        wait_for(lambda: "not signed" in (service.models.entry(None).error or ""))
        sign(model, tmp_path / "other.pem")
        assert "signature isn't good" in client.post("/v1/models/har/load", json={}).json()["detail"]
        (model / SIGNATURE_FILE).unlink()
        sign(model, tmp_path / "mine.pem")
        assert client.post("/v1/models/har/load", json={}).status_code == 200
        assert client.post("/v1/predict", content=good).status_code == 200


@pytest.mark.slow
def test_several_workers_share_the_work_and_are_replaced(folder: Path, tmp_path: Path, good: bytes) -> None:
    shutil.copytree(folder, tmp_path / "model")
    command = [sys.executable, "-m", "serving", f"--model={tmp_path / 'model'}", "--port=0", "--workers=2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = json.loads(process.stderr.readline())["address"]
        threading.Thread(target=process.stderr.read, daemon=True).start()

        def ask(method: str, path: str, **content: Any) -> httpx.Response:
            """By a new connection, which either worker may take."""
            with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=20)) as client:
                return client.request(method, path, **content)

        def workers() -> list[int]:
            """Those of the process's children that are no helpers."""
            listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in listed}
            return [pid for pid, line in lines.items() if b"serving-worker" in line]

        wait_for(lambda: all(ask("GET", "/v2/health/ready").status_code == 200 for _ in range(8)))
        assert ask("POST", "/v1/models/har/load", json={}).json()["code"] == "conflict"
        first = workers()
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        wait_for(lambda: len(workers()) == 2 and first[0] not in workers())
        wait_for(lambda: all(ask("GET", "/v2/health/ready").status_code == 200 for _ in range(8)))
        (tmp_path / "model" / "note.txt").write_text("another digest")
        version = reseal(tmp_path / "model")[:12]
        process.send_signal(signal.SIGHUP)

        def served() -> set[str]:
            return {ask("POST", "/v1/predict", content=good).json()["model"]["version"] for _ in range(8)}

        wait_for(lambda: served() == {version})
        for _ in range(3):
            ask("POST", "/v1/predict", content=good).raise_for_status()
        counted = ask("GET", "/metrics").text
        assert 'har_requests_total{method="POST",route="/v1/predict",status="200"}' in counted
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_nginx_in_front_keeps_slow_clients_away(folder: Path, tmp_path: Path, good: bytes) -> None:
    """Headers that never end, and bodies that never come, don't reach the service; what does is answered."""
    (tmp_path / "tmp").mkdir()
    with running(folder) as (client, _), socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        front = probe.getsockname()[1]
        probe.close()
        text = (Path(__file__).parents[2] / "serving" / "nginx" / "har.conf").read_text()
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{client.base_url.port}").replace(":8080", f":{front}")
        (tmp_path / "har.conf").write_text(text)
        command = ["nginx", "-p", f"{tmp_path}/", "-c", str(tmp_path / "har.conf")]
        assert subprocess.run([*command, "-t"], capture_output=True).returncode == 0
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as nginx:
            try:
                address, retrying = f"http://127.0.0.1:{front}", httpx.HTTPTransport(retries=10)
                with httpx.Client(base_url=address, transport=retrying) as outside:
                    assert outside.post("/v1/predict", content=good).json()["label"] in LABELS
                    assert outside.get("/metrics").status_code == 404
                    assert outside.post("/v1/predict", content=bytes(11_000_000)).status_code == 413
                head = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                before = client.get("/metrics").text.count('route="/v1/predict"')
                with (
                    socket.create_connection(("127.0.0.1", front), timeout=20) as silent,
                    socket.create_connection(("127.0.0.1", front), timeout=20) as stalled,
                ):
                    silent.sendall(head)
                    stalled.sendall(head + b"Content-Length: 1000\r\n\r\nabc")
                    for connection in (silent, stalled):
                        assert connection.recv(100)[:12] in (b"", b"HTTP/1.1 408")
                assert client.get("/metrics").text.count('route="/v1/predict"') == before
            finally:
                nginx.terminate()
