"""A run whose work folder is on an object store (gs://), against a server of this machine."""

import json
import re
import signal

import pytest

from tests.support.model_folders import write_images, write_model
from tests.support.object_store import Bucket, store_server
from tests.support.runs import LABELS, environment, finish, start_run, write_config

WORKDIR = "gs://bucket/run"


@pytest.fixture
def address():
    """Return the address of a running store."""
    with store_server() as (_, address):
        yield address


def steps(bucket):
    """Return the checkpoints that are whole."""
    found = (re.fullmatch(r"run/checkpoints/(\d+)/commit_success.txt", name) for name in bucket.names("run/"))
    return sorted(int(match[1]) for match in found if match)


@pytest.mark.slow
def test_a_run_on_an_object_store(address, tmp_path):
    """Stopped, continued past a damaged checkpoint, ended with a sealed model folder."""
    start = write_model(tmp_path / "model"), write_images(tmp_path / "images", LABELS, per_class=8)
    bad = start[1] / "running" / "bad.png"
    bad.write_bytes(b"not an image")
    config = write_config(tmp_path, start, num_steps=400, save_every=4)
    more = ("--config.data.max_bad_fraction=0.2",)
    bucket = Bucket(address)
    store = environment(STORAGE_EMULATOR_HOST=address, TENSORSTORE_GCS_HTTP_URL=address)

    with (tmp_path / "stderr").open("w") as stderr:  # a pipe that isn't read stalls the run: gcsfs says much
        first = start_run(config, WORKDIR, *more, env=store, stderr=stderr)
        for line in first.stdout:
            if line.startswith("step 9/"):
                break
        first.send_signal(signal.SIGTERM)
        code, _, _ = finish(first)
    assert code == 128 + signal.SIGTERM, (tmp_path / "stderr").read_text()
    assert "run/lock.json" not in bucket.names("run/")

    before, newest = steps(bucket)[-2:]
    name = next(name for name in bucket.names(f"run/checkpoints/{newest}/") if "/d/" in name)
    data = bucket.read(name)
    bucket.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    short = f"--config.train.num_steps={newest + 2}"
    code, stdout, stderr = finish(start_run(config, WORKDIR, *more, short, env=store))
    assert code == 0, stderr
    assert f"checkpoint {newest} is damaged" in stdout
    assert f"continuing at step {before}" in stdout
    assert name.replace("/checkpoints/", "/checkpoints_damaged/") in bucket.names("run/")
    manifest = json.loads(bucket.read("run/model/manifest.json"))
    assert {"model.safetensors", "actions.json", "run.json"} <= manifest["files"].keys()
    logged = [json.loads(line) for line in bucket.read("run/metrics.jsonl").decode().splitlines()]
    assert [line["step"] for line in logged if "train/loss" in line] == list(range(1, newest + 3))
    assert str(bad) in bucket.read("run/bad_inputs.jsonl").decode()
    assert json.loads(bucket.read("run/run.json"))["starts"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "falls silent"])
def test_a_run_whose_store_ends_first_ends_too_in_one_line(fault, tmp_path):
    """The clients of a store go on for minutes or for good: of a dead one 390 s, of a silent one over 700 s."""
    start = write_model(tmp_path / "model"), write_images(tmp_path / "images", LABELS, per_class=8)
    config = write_config(tmp_path, start, num_steps=400, save_every=4)
    with store_server() as (server, address), (tmp_path / "stderr").open("w") as stderr:
        store = environment(STORAGE_EMULATOR_HOST=address, TENSORSTORE_GCS_HTTP_URL=address)
        run = start_run(config, WORKDIR, env=store, stderr=stderr)
        for line in run.stdout:
            if line.startswith("step 9/"):
                break
        server.send_signal(fault)
        code, _, _ = finish(run)
    said = [line for line in (tmp_path / "stderr").read_text().splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(said) == 1 and re.fullmatch(r"error: gs://bucket/run.*what was saved stays whole", said[0])
