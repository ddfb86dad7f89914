"""Images from strangers: damaged, hostile, slow to decode; each is refused with its reason, and nothing breaks."""

import asyncio
import struct
import zlib
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from serving.service import Service
from tests.support.serving_setup import LABELS, running, saved


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
        answer = client.post("/v1/predict", **request)
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


def test_an_output_that_is_not_finite_is_no_answer(
    served: tuple[httpx.Client, Service], good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And spoils none of the others in its batch."""
    client, service = served
    model = service.models.get()
    black = saved(Image.new("RGB", (40, 40)), "PNG")
    run = model.backend.run_graph

    def with_nan(graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        outputs, lit = run(graph, *inputs), np.any(inputs[0].reshape(len(inputs[0]), -1), axis=1, keepdims=True)
        return [np.where(lit, output, np.nan) for output in outputs]

    monkeypatch.setattr(model.backend, "run_graph", with_nan)
    files = [("image", good), ("image", black), ("image", good)]
    answers = client.post("/v1/predict/batch", files=files).json()["predictions"]
    assert [(entry["error"] or {}).get("code") for entry in answers] == [None, "bad_model_output", None]
    for route in ("/v1/predict", "/v1/embed"):
        answer = client.post(route, content=black)
        assert answer.status_code == 500 and answer.json()["code"] == "bad_model_output"


def test_a_decoder_that_dies_is_replaced(served: tuple[httpx.Client, Service], good: bytes) -> None:
    client, _ = served
    for _ in range(2):
        for process in psutil.Process().children():
            if "loky" in " ".join(process.cmdline()) and "resource_tracker" not in " ".join(process.cmdline()):
                process.kill()
        assert client.post("/v1/predict", content=good).status_code == 200


def heavy_image(pixels: int = 4900) -> bytes:
    """Return a JPEG that is quickly sent and slowly decoded."""
    return saved(Image.new("RGB", (pixels, pixels), (200, 30, 90)), "JPEG")


def test_images_that_are_slow_to_decode_are_refused_and_bounded(folder: Path, good: bytes) -> None:
    """The model would take them all at once; it's the decoder that they wait for."""
    with running(folder, max_wait_s=0.5) as (client, service):
        data, slow = heavy_image(), 1.0
        service.decoder.seconds_per_image = slow  # as after many such images

        async def flood() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:
                return await asyncio.gather(*(many.post("/v1/predict", content=data) for _ in range(8)))

        answers = asyncio.run(flood())
        assert {answer.status_code for answer in answers} == {200, 503}
        assert {answer.json()["code"] for answer in answers if answer.status_code == 503} == {"overloaded"}
        assert (
            service.decoder.seconds_per_image != slow and service.decoder.estimated_wait_s == 0
        )  # it follows what they take
        late = client.post("/v1/predict", content=data, headers={"X-Timeout-Ms": "5"})
        assert late.status_code == 504 and late.json()["code"] == "deadline"
        assert client.post("/v1/predict", content=good).status_code == 200
