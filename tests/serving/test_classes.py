"""Classes that are changed by text while the service runs, and where such changes are kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.serving_setup import LABELS, reseal, running, wait_for

CHANGE = {
    "add": {"juggling": ["a photo of a person juggling.", "juggling balls"], "climbing": []},
    "remove": ["sleeping"],
}
CHANGED = ["cycling", "drinking", "running", "juggling", "climbing"]


@pytest.fixture
def photo(served_folder: Path) -> bytes:
    return sorted((served_folder.parent / "photos").rglob("*.png"))[0].read_bytes()


def change(client: httpx.Client, **body: Any) -> None:
    client.post("/v1/models/har/classes", json=body).raise_for_status()


def active(client: httpx.Client) -> tuple[str, list[str]]:
    """Return the version that answers, and its labels."""
    (status,) = client.get("/v1/models").json()["models"]
    (labels,) = (entry["labels"] for entry in status["versions"] if entry["version"] == status["active"])
    return status["active"], labels


def test_a_change_outlasts_loads_and_restarts(served_folder: Path, photo: bytes, tmp_path: Path) -> None:
    with running(served_folder, state_dir=tmp_path) as (client, _):
        base, own = active(client)
        change(client, **CHANGE)
        changed = active(client)
        assert changed == (f"{base}+c1", CHANGED) and own == list(LABELS)
        answer = client.post("/v1/predict", content=photo).json()
        client.post("/v1/models/har/load", json={}).raise_for_status()
        assert active(client) == changed
    with running(served_folder, state_dir=tmp_path) as (client, _):
        assert active(client) == changed
        again = client.post("/v1/predict", content=photo).json()
        assert again["model"] == answer["model"]
        for one, other in zip(again["top"], answer["top"], strict=True):
            assert one["label"] == other["label"] and one["score"] == pytest.approx(other["score"], abs=1e-5)
        change(client, remove=["climbing"])
    with running(served_folder, state_dir=tmp_path) as (client, _):
        assert active(client) == (f"{base}+c2", CHANGED[:-1])
        change(client, reset=True)
        assert active(client) == (base, list(LABELS)) and not list(tmp_path.iterdir())
    with running(served_folder, state_dir=tmp_path) as (client, _):
        assert active(client) == (base, list(LABELS))


def test_without_a_folder_a_change_lasts_until_the_next_load(served_folder: Path) -> None:
    with running(served_folder) as (client, _):
        base, _ = active(client)
        change(client, **CHANGE)
        change(client, reset=True, add={"juggling": []})
        assert active(client) == (f"{base}+c2", [*LABELS, "juggling"])
        client.post("/v1/models/har/load", json={}).raise_for_status()
        assert active(client) == (base, list(LABELS))


def test_another_model_has_its_own_changes(served_folder: Path, tmp_path: Path) -> None:
    """And one that is gone back to has the changes it had."""
    state, models = tmp_path / "state", tmp_path / "models"
    state.mkdir()
    other = Path(shutil.copytree(served_folder, models / "other"))
    shutil.copytree(served_folder, models / "first")
    (other / "note.txt").write_text("another digest")
    version = reseal(other)[:12]
    with running(models / "first", models_dir=models, state_dir=state) as (client, _):
        change(client, **CHANGE)
        first = active(client)
        client.post("/v1/models/har/load", json={"folder": "other"}).raise_for_status()
        assert active(client) == (version, list(LABELS))
        client.post("/v1/models/har/load", json={"folder": "first"}).raise_for_status()
        assert active(client) == first


def test_a_change_that_cannot_be_kept_is_not_made(served_folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with running(served_folder, state_dir=state) as (client, _):
        before = active(client)
        shutil.rmtree(state)
        refused = client.post("/v1/models/har/classes", json=CHANGE)
        assert refused.status_code == 500 and "can't be kept in state_dir" in refused.json()["detail"]
        assert active(client) == before


@pytest.mark.parametrize(
    "wrong",
    [
        "{",
        "[]",
        {"changes": 0},
        {"classes": {"a": ["b"]}},
        {"classes": {"cycling": ["a"], "riding a bike": ["b"]}},
        {"classes": {"Fixing Cars": ["a"], "fixing cars": ["b"]}},
        {"digest": "x"},
        {"classes": {"a": [], "b": ["c"]}},
    ],
)
def test_a_damaged_change_loads_nothing_else(served_folder: Path, tmp_path: Path, wrong: Any) -> None:
    """Classes that nobody asked for would be a wrong answer; the line says which file it is."""
    digest = json.loads((served_folder / "manifest.json").read_text())["digest"]
    good = {"digest": digest, "changes": 3, "classes": {"juggling": ["a"], "climbing": ["b"]}}
    path = tmp_path / f"har-{digest[:16]}.json"
    path.write_text(wrong if isinstance(wrong, str) else json.dumps(good | wrong))
    with running(served_folder, wait=False, state_dir=tmp_path) as (client, service):
        wait_for(lambda: service.models.entry(None).error)
        error = service.models.entry(None).error
        assert error is not None and error.startswith(f"{path.name}: ") and "\n" not in error
        assert client.get("/v2/health/ready").status_code == 503
        path.write_text(json.dumps(good))
        client.post("/v1/models/har/load", json={}).raise_for_status()
        assert active(client) == (f"{digest[:12]}+c3", ["juggling", "climbing"])
