"""What the OpenAPI document says is what the service does."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from clip_har_jax.image_formats import readable_formats
from tests.support.serving_setup import running


@pytest.fixture(scope="module")
def client(served_folder: Path) -> Iterator[httpx.Client]:
    with running(served_folder, models_dir=served_folder.parent) as (client, _):
        yield client


@pytest.mark.parametrize(
    ("options", "routes"),
    [
        (["--exclude-path=/v1/stream", "--exclude-path=/v1/videos"], 19),
        # The hooks put a real video into every upload, a wrong one too, which the one check would take for accepted.
        # Wrong videos have tests of their own (test_streams.py).
        (["--include-path=/v1/stream", "--include-path=/v1/videos", "--exclude-checks=negative_data_rejection"], 2),
    ],
)
def test_schemathesis_with_every_check(client: httpx.Client, options: list[str], routes: int) -> None:
    """Examples, coverage, fuzzing and sequences of calls; seeded, so that a failure comes again."""
    command = ["schemathesis", "run", f"{client.base_url}/openapi.json", "--checks=all", "--max-examples=5", "--seed=1"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert f"Tested: {routes}" in done.stdout


def test_the_document_has_examples_and_errors(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    predict = document["paths"]["/v1/predict"]["post"]
    taken = {one.media_type for one in readable_formats()}
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "video/mp4", *taken}
    assert {"200", "401", "413", "415", "422", "429", "503", "504"} <= set(predict["responses"])
    assert document["components"]["schemas"]["ProblemBody"]["properties"]["code"]["examples"] == ["bad_image"]
    assert "swagger" in client.get("/docs").text
