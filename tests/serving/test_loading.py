"""Models in and out: folders that are damaged, unsealed, elsewhere or of another model; switches under load."""

import json
import logging
import shutil
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from clip_har_jax.signing import SIGNATURE_FILE, sign
from serving.batcher import Costs
from serving.service import Service
from tests.support.serving_setup import reseal, running, wait_for


@pytest.fixture(scope="module")
def folder(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy, beside which folders can be put to be loaded."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(served_folder.parent / "photos", root / "photos")
    return Path(shutil.copytree(served_folder, root / "export"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[httpx.Client, Service]]:
    with running(folder, models_dir=folder.parent) as both:
        yield both


@pytest.fixture
def client(served: tuple[httpx.Client, Service]) -> httpx.Client:
    return served[0]


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
        ("clip_head", [16, 4], "logits of clips aren't those"),
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
    assert (golden["explained"] == golden["logits"].argmax(axis=1)).all()  # other classes may have empty heat maps
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


def test_each_export_is_measured_once_and_beside_another(
    client: httpx.Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, ...]] = []

    def measure(run: Callable[[np.ndarray], Any], example: np.ndarray) -> Costs:
        measured.append(example.shape)
        return real(run, example)

    real = Costs.measure
    monkeypatch.setattr(Costs, "measure", measure)
    other = folder.parent / "measured"
    shutil.copytree(folder, other)
    (other / "note.txt").write_text("a digest of its own")
    version = reseal(other)[:12]
    for _ in range(2):
        client.post("/v1/models/har/load", json={"folder": other.name, "activate": False}).raise_for_status()
        assert len(measured) == 1
    client.delete(f"/v1/models/har/versions/{version}").raise_for_status()


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
