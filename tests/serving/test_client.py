"""The Python client, and the commands of docs/serving.md as they stand there."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.client import Client, ServiceError
from serving.security import new_key
from serving.service import Service
from tests.support.serving_setup import LABELS, running
from tests.support.videos import write_video

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def served(served_folder: Path) -> Iterator[tuple[httpx.Client, Service]]:
    with running(served_folder, rate_limit_per_s=0) as both:
        yield both


@pytest.fixture(scope="module")
def photo(served_folder: Path) -> Path:
    return sorted((served_folder.parent / "photos").rglob("*.png"))[0]


def test_the_client_knows_every_answer(served: tuple[httpx.Client, Service], photo: Path, tmp_path: Path) -> None:
    write_video(str(tmp_path / "clip.mp4"))
    with Client(str(served[0].base_url)) as client:
        assert client.ready()
        answer = client.predict(photo, top=2)
        assert answer.label in LABELS and len(answer.top) == 2
        assert client.predict(photo.read_bytes(), threshold=1.0).label is None
        free = client.predict(photo, classes={"juggling": ["a person juggling."], "climbing": []})
        assert {entry.label for entry in free.top} == {"juggling", "climbing"}
        batch = client.predict_batch([photo, b"not an image"])
        assert batch.predictions[0].label == answer.label
        assert batch.predictions[1].error is not None and batch.predictions[1].error.status == 415
        assert len(client.embed(photo).embedding) == 16
        assert client.explain(photo, label="running").label == "running"
        assert client.events(tmp_path / "clip.mp4", start_score=0.01, end_score=0).events
        assert client.load("har").active == client.models().models[0].active
        with pytest.raises(ServiceError, match="bad_image") as refused:
            client.predict(photo.read_bytes()[:80])
        assert refused.value.problem.code == "bad_image" and refused.value.problem.request_id


def test_the_client_tries_again_what_is_worth_it(served_folder: Path, photo: Path) -> None:
    key, line = new_key("alice")
    with running(served_folder, rate_limit_per_s=0.9, rate_burst=1, api_keys=line) as (plain, _):
        address = str(plain.base_url)
        with Client(address, key, retries=5) as patient, Client(address, key, retries=0) as hasty:
            assert {patient.predict(photo).label for _ in range(3)} <= set(LABELS)
            with pytest.raises(ServiceError, match="429 too_many_requests"):
                hasty.predict(photo)
        with Client(address) as stranger, pytest.raises(ServiceError, match="401 unauthorized"):
            stranger.predict(photo)
    with Client("http://127.0.0.1:9", retries=1) as lonely:
        assert not lonely.ready()
        with pytest.raises(httpx.ConnectError):
            lonely.predict(photo)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_of_the_documentation(served: tuple[httpx.Client, Service], photo: Path, tmp_path: Path) -> None:
    """Each `curl` of docs/serving.md, on a running service; each must be answered with success."""
    shutil.copy(photo, tmp_path / "photo.jpg")
    shutil.copy(photo, tmp_path / "other.jpg")
    write_video(str(tmp_path / "clip.mp4"))
    shutil.copy(tmp_path / "clip.mp4", tmp_path / "long.mp4")
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "serving.md").read_text(), re.S)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl")]
    assert len(commands) >= 10
    for command in commands:
        here = command.replace("http://127.0.0.1:8000", str(served[0].base_url)).replace(
            "curl", "curl -sS --fail-with-body", 1
        )
        done = subprocess.run(here, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
