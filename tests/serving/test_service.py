"""The HTTP service: what it answers, and that it answers as the model does."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from websockets.sync.client import connect

from clip_har_jax import Predictor
from clip_har_jax.bundle import Actions
from clip_har_jax.image_formats import readable_formats
from clip_har_jax.inference.backends import ClassScores
from serving.api import make_answer
from serving.requests import AnswerOptions
from serving.security import PUBLIC, needed_scope, new_key
from serving.service import Service
from serving.settings import Settings
from tests.support.serving_setup import LABELS, running
from tests.support.videos import write_clip


@pytest.fixture(scope="module")
def folder(served_folder: Path) -> Path:
    return served_folder


@pytest.fixture(scope="module")
def photo(folder: Path) -> Path:
    return sorted((folder.parent / "photos").rglob("*.png"))[0]


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[httpx.Client, Service]]:
    with running(folder, models_dir=folder.parent) as both:
        yield both


@pytest.fixture
def client(served: tuple[httpx.Client, Service]) -> httpx.Client:
    return served[0]


def encoded(photo: Path, format: str) -> bytes:
    buffer = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    Image.open(photo).convert("RGB").save(buffer, format, **options)
    return buffer.getvalue()


def test_answers_as_the_model_does(client: httpx.Client, folder: Path, photo: Path) -> None:
    ours = Predictor(folder).predict([photo])[0]
    answer = (
        client.post("/v1/predict", files={"image": photo.read_bytes()}, params={"top": 4}).raise_for_status().json()
    )
    assert answer["label"] == ours.label and answer["score"] == pytest.approx(ours.score, abs=1e-5)
    assert {entry["label"]: entry["score"] for entry in answer["top"]} == pytest.approx(dict(ours.top), abs=1e-5)
    digest = json.loads((folder / "manifest.json").read_text())["digest"]
    assert answer["model"] == {"name": "har", "version": digest[:12], "digest": digest} and not answer["abstained"]
    embedding = client.post("/v1/embed", content=photo.read_bytes()).json()["embedding"]
    np.testing.assert_allclose(embedding, Predictor(folder).embed([photo])[0], atol=1e-5)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_takes_raw_bytes_by_what_they_are(client: httpx.Client, photo: Path, format: str) -> None:
    assert format in [one.name for one in readable_formats()], "the pinned Pillow reads it"
    data = encoded(photo, format)
    answer = client.post("/v1/predict", content=data, headers={"Content-Type": "application/octet-stream"})
    assert answer.status_code == 200 and answer.json()["label"] in LABELS


def test_threshold_abstains(client: httpx.Client, photo: Path) -> None:
    answer = client.post("/v1/predict", content=photo.read_bytes(), params={"threshold": 1, "top": 1}).json()
    assert answer["label"] is None and answer["abstained"] and answer["top"][0]["label"] in LABELS


def test_open_vocabulary_is_what_the_predictor_says(client: httpx.Client, folder: Path, photo: Path) -> None:
    classes = ["juggling", "climbing a wall", "sleeping"]
    ours = dict(Predictor(folder, classes).predict([photo])[0].top)
    by_query = client.post("/v1/predict", content=photo.read_bytes(), params={"classes": classes})
    by_form = client.post("/v1/predict", files={"image": photo.read_bytes()}, data={"classes": json.dumps(classes)})
    for answer in (by_query, by_form):
        assert {e["label"]: e["score"] for e in answer.raise_for_status().json()["top"]} == pytest.approx(
            ours, abs=1e-5
        )
    prompts = {"juggling": ["a photo of a person asleep."], "climbing": []}
    other = client.post("/v1/predict", files={"image": photo.read_bytes()}, data={"classes": json.dumps(prompts)})
    assert {entry["label"] for entry in other.raise_for_status().json()["top"]} == set(prompts)


def test_a_batch_goes_on_past_a_bad_image(client: httpx.Client, photo: Path) -> None:
    good = photo.read_bytes()
    files = [("image", ("a.png", good)), ("image", ("b.png", good[:90])), ("image", ("c.png", good))]
    answer = client.post("/v1/predict/batch", files=files).raise_for_status().json()["predictions"]
    assert [entry["filename"] for entry in answer] == ["a.png", "b.png", "c.png"]
    assert answer[0] | {"filename": None} == answer[2] | {"filename": None} and answer[0]["label"] in LABELS
    assert answer[1]["label"] is None and answer[1]["error"]["code"] == "bad_image"


def test_explains(client: httpx.Client, folder: Path, photo: Path) -> None:
    answer = client.post("/v1/explain", content=photo.read_bytes(), params={"label": "running"}).json()
    predictor = Predictor(folder)
    pixels = predictor.try_load(photo)
    expected = predictor.backend.explain(np.stack([pixels]), [LABELS.index("running")])[0]
    np.testing.assert_allclose(answer["heat_map"], expected, atol=1e-5)
    free = client.post("/v1/explain", content=photo.read_bytes(), params={"classes": "juggling,climbing"}).json()
    assert free["label"] in ("juggling", "climbing") and np.shape(free["heat_map"]) == expected.shape
    picture = client.post("/v1/explain", content=photo.read_bytes(), headers={"Accept": "image/png"})
    assert picture.headers["content-type"] == "image/png" and Image.open(io.BytesIO(picture.content)).size == (32, 32)


def test_classes_are_changed_while_it_runs(client: httpx.Client, photo: Path) -> None:
    base = client.get("/v1/models").json()["models"][0]["active"]
    change = {"add": {"juggling": ["a photo of a person juggling."], "climbing": []}, "remove": ["sleeping"]}
    status = client.post("/v1/models/har/classes", json=change).raise_for_status().json()
    assert re.fullmatch(re.escape(base) + r"\+c\d+", status["active"])
    answer = client.post("/v1/predict", content=photo.read_bytes()).json()
    assert {e["label"] for e in answer["top"]} == {"cycling", "drinking", "running", "juggling", "climbing"}
    assert answer["model"]["version"] == status["active"]
    again = client.post("/v1/models/har/classes", json={"remove": ["juggling"]}).raise_for_status().json()
    assert len(again["versions"][0]["labels"]) == 4 and again["active"] != status["active"]
    back = client.post("/v1/models/har/load", json={}).raise_for_status().json()
    assert back["active"] == base and back["versions"][0]["labels"] == list(LABELS)


def test_a_change_of_classes_keeps_the_scores_of_those_that_stay(client: httpx.Client, photo: Path) -> None:
    """Adding and removing a class leaves the probabilities as they were."""
    before = client.post("/v1/predict", content=photo.read_bytes()).json()
    client.post("/v1/models/har/classes", json={"add": {"juggling": []}}).raise_for_status()
    client.post("/v1/models/har/classes", json={"remove": ["juggling"]}).raise_for_status()
    after = client.post("/v1/predict", content=photo.read_bytes()).json()
    client.post("/v1/models/har/load", json={}).raise_for_status()
    for one, other in zip(before["top"], after["top"], strict=True):
        assert one["label"] == other["label"] and one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_the_kserve_client_of_pypi(client: httpx.Client, folder: Path, photo: Path) -> None:
    """In a process of its own: it brings gevent."""
    code = """
import json, sys
import numpy as np, tritonclient.http as kserve
address, photo = sys.argv[1:]
client = kserve.InferenceServerClient(address)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("har")
files = kserve.InferInput("image_bytes", [2], "BYTES")
files.set_data_from_numpy(np.array([open(photo, "rb").read()] * 2, object))
wanted = [kserve.InferRequestedOutput(name) for name in ("probs", "label", "image_embeds")]
wanted.append(kserve.InferRequestedOutput("logits", binary_data=False))
result = client.infer("har", [files], outputs=wanted, request_id="seven")
pixels = kserve.InferInput("image", [1, 32, 32, 3], "UINT8")
pixels.set_data_from_numpy(np.zeros((1, 32, 32, 3), np.uint8))
zeros = client.infer("har", [pixels])
try:
    client.infer("nobody", [pixels])
except kserve.InferenceServerException as error:
    refused = error.message()
print(json.dumps({
    "metadata": client.get_model_metadata("har"), "id": result.get_response()["id"], "refused": refused,
    "probs": result.as_numpy("probs").tolist(), "labels": [text.decode() for text in result.as_numpy("label")],
    "logits": list(result.as_numpy("logits").shape), "zeros": zeros.as_numpy("probs").tolist(),
}))
"""
    address = f"127.0.0.1:{client.base_url.port}"
    done = subprocess.run([sys.executable, "-c", code, address, str(photo)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    ours = Predictor(folder).predict([photo])[0]
    assert got["labels"] == [ours.label] * 2 and max(got["probs"][0]) == pytest.approx(ours.score, abs=1e-5)
    assert got["id"] == "seven" and got["logits"] == [2, 4] and "no model" in got["refused"]
    assert sum(got["zeros"][0]) == pytest.approx(1, abs=1e-5)
    digest = json.loads((folder / "manifest.json").read_text())["digest"]
    assert got["metadata"]["parameters"].items() >= {"digest": digest, "version": digest[:12]}.items()
    assert got["metadata"]["parameters"]["labels"] == list(LABELS)


def test_kserve_in_plain_json(client: httpx.Client, photo: Path) -> None:
    image = {"name": "image_bytes", "shape": [1], "datatype": "BYTES"}
    image["data"] = [base64.b64encode(photo.read_bytes()).decode()]
    answer = client.post("/v2/models/har/infer", json={"inputs": [image]}).raise_for_status().json()
    assert [output["name"] for output in answer["outputs"]] == ["probs", "label"]
    assert answer["outputs"][1]["data"][0] in LABELS
    for bad in ({"shape": [2]}, {"data": ["%"]}, {"datatype": "FP32"}, {"data": [7]}, {"shape": [99]}, {"name": "x"}):
        refused = client.post("/v2/models/har/infer", json={"inputs": [image | bad]})
        assert refused.status_code == 422 and refused.json()["error"] == refused.json()["detail"], bad
    for values in ("0," * 400_000 + "0", "[]," * 400_000 + "0", "[" * 400_000):
        body = f'{{"inputs": [{{"name": "image", "shape": [1], "datatype": "UINT8", "data": [{values}]}}]}}'
        assert "send the tensor in binary" in client.post("/v2/models/har/infer", content=body).json()["detail"]


def test_errors_have_one_form_and_an_id(client: httpx.Client) -> None:
    answer = client.get("/nowhere", headers={"X-Request-ID": "mine-1"})
    assert answer.status_code == 404 and answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "Not Found",
        "code": "not_found",
        "request_id": "mine-1",
    }
    forged = client.get("/nowhere", headers={"X-Request-ID": 'x"}\\n{"level'})
    assert re.fullmatch("[0-9a-f]{32}", forged.headers["x-request-id"])
    assert answer.headers["x-content-type-options"] == "nosniff" and "server" not in answer.headers


def test_the_counted_class_of_a_multi_label_model_is_that_of_the_answer() -> None:
    """Its most probable label may stay below its own threshold."""
    labels = ("run", "sit")
    actions = Actions(labels, {label: (label,) for label in labels}, label_thresholds={"run": 0.9, "sit": 0.3})
    call = MagicMock()
    call.model.configure_mock(name="m", labels=labels, actions=actions, abstain_below=None)
    answer = make_answer(call, None, ClassScores(np.array([0.8, 0.5]), None), AnswerOptions())
    assert (answer.label, answer.score, answer.top[0].label) == ("sit", 0.5, "run")
    call.service.metrics.predictions.labels.assert_called_once_with("m", "sit")


def test_metrics_count(client: httpx.Client, photo: Path) -> None:
    client.post("/v1/predict", content=photo.read_bytes()).raise_for_status()
    text = client.get("/metrics").text
    assert re.search(r'har_requests_total\{method="POST",route="/v1/predict",status="200"\} [1-9]', text)
    assert re.search(r'har_predictions_total\{label="\w+",model="har"\}', text) and "har_ready 1.0" in text


@pytest.mark.parametrize(
    "path", ["/v2/health/live", "/v2/health/ready", "/v1/models", "/v2/models/har", "/metrics", "/docs"]
)
def test_head_is_get_without_a_body(client: httpx.Client, path: str) -> None:
    answer, whole = client.head(path), client.get(path)
    assert answer.status_code == 200 and not answer.content
    assert answer.headers["content-type"] == whole.headers["content-type"]
    counted = f'har_requests_total{{method="HEAD",route="{path.replace("/har", "/{name}")}",status="200"}}'
    assert counted in client.get("/metrics").text


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/predict", "POST, OPTIONS"),
        ("/v1/stream", "POST, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v2/health/live", "GET, HEAD, OPTIONS"),
        ("/v1/models/har/versions/x", "DELETE, OPTIONS"),
        ("/docs/assets/swagger-ui.css", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_and_405_say_what_is_allowed(client: httpx.Client, path: str, allowed: str) -> None:
    answer = client.options(path)
    assert answer.status_code == 204 and answer.headers["allow"] == allowed
    refused = client.patch(path)
    assert refused.status_code == 405 and refused.headers["allow"] == allowed and allowed in refused.json()["detail"]
    assert client.options("/nowhere").status_code == 404


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> dict[str, Any]:
    """Return a request whose form is written out, as careless clients write theirs."""
    return {"content": b"".join(parts) + end, "headers": {"Content-Type": "multipart/form-data; boundary=b"}}


def part(data: bytes, disposition: str) -> bytes:
    return f"--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + data + b"\r\n"


@pytest.mark.parametrize(
    "disposition",
    [
        'name="image"; filename="a.png"',
        "name=\"image\"; filename*=UTF-8''%C3%A9t%C3%A9.png",
        "name=image; filename=a.png",
    ],
)
def test_a_file_is_a_file_however_it_is_named(client: httpx.Client, photo: Path, disposition: str) -> None:
    content = form(part(photo.read_bytes(), disposition))
    assert client.post("/v1/predict", **content).status_code == 200
    (answer,) = client.post("/v1/predict/batch", **content).raise_for_status().json()["predictions"]
    assert answer["filename"] == ("été.png" if "*" in disposition else "a.png")


def test_messages_name_the_true_cause(client: httpx.Client, photo: Path) -> None:
    data = photo.read_bytes()
    image = part(data, 'name="image"; filename="a.png"')

    def told(path: str = "/v1/predict", **request: Any) -> str:
        answer = client.post(path, **request)
        assert 400 <= answer.status_code < 500, answer.text
        return answer.json()["detail"]

    assert "send several to /v1/predict/batch" in told(**form(image, image))
    assert "over 64 images (HAR_MAX_BATCH_IMAGES)" in told("/v1/predict/batch", **form(*[image] * 65))
    for end in (b"", b"--b", image[:50]):
        assert "cut off" in told(**form(image, end=end))
    assert "isn't a file" in told(**form(part(data, 'name="image"')))
    assert "isn't a file" not in told(**form(part(data, 'name="picture"; filename="a"')))
    assert "is base64 text" in told(content=base64.b64encode(data))
    assert "is base64 text" in told(content=b"data:image/png;base64," + base64.b64encode(data))
    assert "is JSON" in told(json={"image": base64.b64encode(data).decode()})
    assert "-F image=@FILE" in told(data={"image": "@photo.jpg"})
    assert "JPEG, PNG, WebP" in told(content=b"hello")
    encoded = client.post("/v1/predict", content=data, headers={"Content-Encoding": "br"})
    assert encoded.status_code == 415 and "content encoding 'br'" in encoded.json()["detail"]
    assert encoded.headers["accept-encoding"] == "identity"
    assert client.post("/v1/predict", content=data, headers={"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("write", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
@pytest.mark.parametrize("before", ["", "data:image/png;base64,"])
def test_base64_is_taken_as_people_write_it(client: httpx.Client, photo: Path, write: Any, before: str) -> None:
    text = before + write(photo.read_bytes()).decode()
    for data in (text, text.rstrip("=\n")):
        image = {"name": "image_bytes", "shape": [1], "datatype": "BYTES", "data": [data]}
        assert client.post("/v2/models/har/infer", json={"inputs": [image]}).status_code == 200


ROUTES = {  # every route, by what a key needs for it: a new one must be thought about here
    None: {"GET /v2/health/live", "GET /v2/health/ready"},
    "metrics": {"GET /metrics"},
    "use": {
        *("POST /v1/predict", "POST /v1/predict/batch", "POST /v1/embed", "POST /v1/explain"),
        *("POST /v1/stream", "POST /v1/videos"),
        *("GET /v1/models", "GET /v2", "GET /v2/models/{name}", "GET /v2/models/{name}/ready"),
        *("GET /v2/models/{name}/versions/{version}", "GET /v2/models/{name}/versions/{version}/ready"),
        *("POST /v2/models/{name}/infer", "POST /v2/models/{name}/versions/{version}/infer"),
    },
    "admin": {
        *("POST /v1/models/{name}/load", "POST /v1/models/{name}/activate", "POST /v1/models/{name}/classes"),
        *("DELETE /v1/models/{name}/versions/{version}",),
    },
}


def test_every_route_is_closed_by_default(served: tuple[httpx.Client, Service], folder: Path, photo: Path) -> None:
    described = served[0].get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    assert routes == set().union(*ROUTES.values())
    for scope, names in ROUTES.items():
        for name in names:
            assert needed_scope(*name.split()) == scope, name
    assert needed_scope("GET", "/anything/new") == "admin" and needed_scope("GET", "/docs") == "admin"
    key, line = new_key("alice")
    admin_key, admin_line = new_key("root", ["admin"])
    with running(folder, api_keys=f"{line} {admin_line}") as (client, _):
        for name in routes | {"GET /docs", "GET /docs/assets/swagger-ui.css", "GET /openapi.json", "GET /nowhere"}:
            method, path = name.split()
            path = path.format(name="har", version="x")
            status = client.request(method, path).status_code
            assert status == (200 if path in PUBLIC else 401), name
            if path not in PUBLIC:
                for wrong in ("Bearer har_x", f"Basic {key}", "Bearer", key):
                    assert client.request(method, path, headers={"Authorization": wrong}).status_code == 401, name
        mine, admins = ({"Authorization": f"Bearer {k}"} for k in (key, admin_key))
        assert client.post("/v1/predict", content=photo.read_bytes(), headers=mine).status_code == 200
        for method, path in (("GET", "/metrics"), ("POST", "/v1/models/har/load"), ("GET", "/docs")):
            assert client.request(method, path, headers=mine).json()["code"] == "forbidden"
        assert client.post("/v1/models/har/load", json={}, headers=admins).status_code == 200


def test_the_docs_need_nobody_else(client: httpx.Client) -> None:
    """No other host's script runs in the page, and it works where there is no internet."""
    page = client.get("/docs").raise_for_status()
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) == 3
    for link in links:
        assert len(client.get(f"/{link}").raise_for_status().content) > 1000
    assert "https:" not in page.headers["content-security-policy"] and "url: 'openapi.json'" in page.text
    assert client.get("/docs/assets/..%2f__init__.py").status_code == 404


def test_web_pages_of_others_are_kept_out(client: httpx.Client, photo: Path) -> None:
    data = photo.read_bytes()
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert client.post("/v1/predict", content=data, headers=headers).json()["code"] == "forbidden"
    rebound = client.post("/v1/predict", content=data, headers={"Host": "evil.example"})
    assert rebound.json()["code"] == "host_not_allowed"
    own = {"Origin": f"http://127.0.0.1:{client.base_url.port}"}
    assert client.post("/v1/predict", content=data, headers=own).status_code == 200


def test_an_allowed_page_may_ask(folder: Path, photo: Path) -> None:
    with running(folder, allowed_origins=["https://app.example"]) as (client, _):
        asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        allowed = client.options("/v1/predict", headers=asks)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        answer = client.post("/v1/predict", content=photo.read_bytes(), headers={"Origin": "https://app.example"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_settings_are_shown_and_secrets_are_not() -> None:
    _, line = new_key("alice")
    done = run_cli("--print-settings", "--port=9000", HAR_API_KEYS=line, HAR_MAX_MEGAPIXELS="12.5")
    shown = json.loads(done.stdout)
    assert shown["port"] == 9000 and shown["max_megapixels"] == 12.5 and shown["max_body_bytes"] == 10_000_000
    assert line.rsplit(":")[-1] not in done.stdout and shown["api_keys"] == "**********"


def test_every_setting_is_documented() -> None:
    rows = re.findall(
        r"^\| `(HAR_\w+)` \| (.*?) \| (.*) \|$", (Path(__file__).parents[2] / "docs" / "serving.md").read_text(), re.M
    )
    assert [name for name, _, _ in rows] == [f"HAR_{name.upper()}" for name in Settings.model_fields]
    for (name, default, about), field in zip(rows, Settings.model_fields.values(), strict=True):
        assert about == field.description, name
        if isinstance(field.default, bool | int | float | str):
            assert json.loads(default.strip("`") if not isinstance(field.default, str) else f'"{default[1:-1]}"') == (
                field.default
            ), name


def test_threads_are_shared_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the cores among the workers; and what is set reaches the runtime, whose threads don't spin."""
    import onnxruntime

    from serving import settings

    monkeypatch.setattr(settings, "usable_cores", lambda: 6)
    by_default = {n: Settings(workers=n) for n in (1, 2, 8)}
    assert [made.compute_threads for made in by_default.values()] == [6, 3, 1]
    assert [made.decode_processes for made in by_default.values()] == [4, 3, 1]
    assert Settings(workers=2, compute_threads=5).compute_threads == 5
    opened: list[Any] = []
    session = onnxruntime.InferenceSession

    def recorded(path: Path, options: Any, **given: Any) -> Any:
        opened.append(options)
        return session(path, options, **given)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    with running(folder, compute_threads=1):
        assert len(opened) == 5  # one for each graph, of clips too
    for options in opened:
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ((), {}, "name a model"),
        (("--model=x", "--host=0.0.0.0"), {}, "API keys are needed"),
        (("--model=x",), {"HAR_API_KEYS": "alice:use:1234"}, "key 1 must be NAME:SCOPES:SHA256"),
        (("--model=x",), {"HAR_MAX_BODY": "1"}, "did you mean 'HAR_MAX_BODY_BYTES'?"),
        (("--model=x", "--port=99999"), {}, "HAR_PORT"),
        (("--model=x",), {"HAR_STATE_DIR": "/nowhere"}, "no folder that can be written"),
        (("--model=x", "--name=../x"), {}, "HAR_NAME"),
        (("--model=x",), {"HAR_MODELS": '{"a/b": "x"}'}, "a model's name is"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], environment: dict[str, str], words: str) -> None:
    done = run_cli(*arguments, **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


def loaded_libraries(pid: int) -> set[str]:
    """Return the heavy libraries that the processes started by a process have mapped."""
    children = psutil.Process(pid).children(recursive=True)
    assert children, "images and videos are decoded in processes of their own"
    paths = [path.path for child in children for path in child.memory_maps()]
    return {name for name in ("jaxlib", "tensorflow", "torch") if any(f"/{name}/" in path for path in paths)}


def test_needs_neither_jax_nor_tensorflow(folder: Path, photo: Path, tmp_path: Path) -> None:
    """For images, clips and streams; and, as the service that people start: ready, answers, ends with 0."""
    write_clip(tmp_path / "clip.mp4", count=20)
    clip = (tmp_path / "clip.mp4").read_bytes()
    code = """
import runpy, signal, sys, threading, time
from pathlib import Path
sys.argv = ["serving", *sys.argv[1:]]
try:
    runpy.run_module("serving", run_name="__main__", alter_sys=True)
finally:
    print(sorted({"jax", "flax", "tensorflow", "torch", "grain", "transformers"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, f"--model={folder}", "--port=0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process, ExitStack() as stack:
        stack.callback(process.terminate)  # else a failed assertion would wait for its end
        assert process.stderr is not None and process.stdout is not None
        address = json.loads(process.stderr.readline())["address"]
        transport = httpx.HTTPTransport(retries=10)
        with httpx.Client(base_url=address, transport=transport, timeout=60) as client:
            while client.get("/v2/health/ready").status_code != 200:
                assert process.poll() is None
            for path, content in (("predict", photo.read_bytes()), ("predict", clip), ("videos?hop_s=0.5", clip)):
                assert client.post(f"/v1/{path}", content=content).json()["label"] in LABELS
            assert "events" in client.post("/v1/stream", content=clip).json()
        stream = f"{address.replace('http', 'ws')}/v1/stream?window_s=0.1&hop_s=0.1"
        with connect(stream, proxy=None) as socket:
            for _ in range(5):
                socket.send(photo.read_bytes())
                time.sleep(0.05)
            assert json.loads(socket.recv(timeout=20))["type"] == "frame"
        if sys.platform == "linux":  # elsewhere the files that a process has mapped can't be listed
            assert not loaded_libraries(process.pid)
        process.send_signal(signal.SIGTERM)
        logged = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert process.stdout.read().strip() == "[]"
    assert process.returncode == 0 and logged[-1]["message"] == "ended"
