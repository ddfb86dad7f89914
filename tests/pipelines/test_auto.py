"""Automated training: each step once, killed anywhere it goes on, and a gate that refuses leaves the champion."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support.model_folders import write_images, write_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LABELS = ("cycling", "running", "sleeping")
STEPS = ("data", "train", "evaluate", "export", "card", "register")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    root = tmp_path_factory.mktemp("auto")
    write_model(root / "start")
    write_images(root / "images", LABELS, per_class=12)
    config = root / "config.py"
    config.write_text(
        f"""from ml_collections import ConfigDict
def get_config():
    return ConfigDict({{
        "data": {{"train": "folder:{root / "images"}"}},
        "model": {{"name": "{root / "start"}"}},
        "train": {{"num_steps": 6, "global_batch_size": 8, "log_every_steps": 2}},
        "optim": {{"learning_rate": 1e-3}},
        "eval": {{"every_steps": 3, "batch_size": 8}},
        "checkpoint": {{"every_steps": 2}},
    }})
"""
    )
    return root


def command(root, *more):
    script = ROOT / "scripts" / "auto_train.py"
    return [sys.executable, script, f"--config={root / 'config.py'}", f"--workdir={root / 'work'}", *more]


def environment(root):
    return os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}


def run(root, *more):
    return subprocess.run(command(root, *more), cwd=root, env=environment(root), capture_output=True, text=True)


def ran(done):
    return [line.split(":")[0] for line in done.stderr.splitlines() if line.endswith(": running")]


def test_a_pass_killed_after_each_step_ends_as_an_unbroken_one(start):
    """SIGKILL as soon as a step is on record, then once more; SIGTERM while training."""
    state = start / "work" / "auto.json"

    def done_steps():
        return list(json.loads(state.read_text())) if state.exists() else []

    for kill_after in ("train", "export"):
        process = subprocess.Popen(
            command(start), cwd=start, env=environment(start), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while kill_after not in done_steps():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    last = run(start)
    assert last.returncode == 0, last.stderr
    assert ran(last) == ["card", "register"]
    assert done_steps() == list(STEPS)
    page = (start / "work" / "summary.html").read_text()
    assert "version 1 is the champion" in page

    again = run(start)
    assert again.returncode == 0 and ran(again) == []

    refused = run(start, "--config.optim.learning_rate=1e-9")
    assert refused.returncode == 1
    assert ran(refused) == ["train", "evaluate"]  # nothing is exported of a model that is no better
    assert "not exported: gain: top-1" in refused.stdout


def test_a_server_follows_the_alias_back_under_load(start):
    """A second version is let through, and rolled back while clients ask: no request fails, the first one answers."""
    from PIL import Image

    from clip_har_jax.mlops.model_registry import open_registry

    assert run(start, "--config.optim.learning_rate=1e-9", "--min_gain=-1").returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", environment(start)["MLFLOW_TRACKING_URI"])
        registry = open_registry("har")
    second = registry.pull("champion", "export", start / "served")
    assert second.number == 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), (40, 90, 160)).save(picture, "PNG")
    statuses, ended = [], threading.Event()

    def get(path):
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return json.load(answer)

    def ask():
        request = urllib.request.Request(
            f"http://{address}/v1/predict", picture.getvalue(), {"Content-Type": "image/png"}, method="POST"
        )
        while not ended.is_set():
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    statuses.append(answer.status)
            except urllib.error.HTTPError as error:
                statuses.append(error.code)

    def digest():
        return get("/v2/models/har")["parameters"]["model_digest"]

    serve = [sys.executable, "-m", "serving", f"--model={start / 'served'}", f"--port={address.split(':')[1]}"]
    watch = [sys.executable, str(ROOT / "scripts" / "registry.py"), "pull", f"--output={start / 'served'}", "--watch"]
    watch += ["--every_s=0.2", f"--reload_url=http://{address}/v1/models/har/load"]
    limits = {"HAR_DECODE_PROCESSES": "1", "HAR_RATE_LIMIT_PER_S": "0"}
    with (
        silent(serve, ROOT, environment(start) | limits) as server,
        silent(watch, start, environment(start)) as follower,
    ):
        try:
            wait_for(lambda: get("/v2/health/ready") is not None)
            assert digest() == second.digest
            clients = [threading.Thread(target=ask) for _ in range(3)]
            for client in clients:
                client.start()
            first = registry.rollback("champion")
            assert first.number == 1
            wait_for(lambda: digest() == first.digest)
            switched = len(statuses)
            wait_for(lambda: len(statuses) > switched + 20)
            ended.set()
            for client in clients:
                client.join()
        finally:
            ended.set()
            follower.terminate()
            server.terminate()
    assert len(statuses) > 20 and set(statuses) == {200}
    assert server.returncode == 0  # drained


def silent(command, folder, env):
    """Start a program whose output nobody reads."""
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_sigterm_is_handed_on_and_the_same_command_continues(start, tmp_path):
    more = ["--config.train.num_steps=5000", "--config.data.val=" + f"folder:{start / 'images'}"]
    line = [*command(start, *more)[:-2], f"--workdir={tmp_path / 'work'}", *more]
    process = subprocess.Popen(
        line, cwd=start, env=environment(start), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not list((tmp_path / "work" / "run" / "checkpoints").glob("*.manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    record = json.loads((tmp_path / "work" / "run" / "run.json").read_text())
    assert 0 < record["last_step"] < 5000


def test_mistakes_are_one_line(start, tmp_path):
    done = run(start, "--config.data.train=folder:nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = run(start, "--config.data.train=motion")
    assert done.returncode == 2 and done.stderr.startswith("error: motion: drawn clips need no preparation;")
    assert done.stderr.count("\n") == 1
    done = run(start, "--config.model.name=siglip2-naflex-tiny")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: config.model.name=siglip2-naflex-tiny: a NaFlex model;"
    )
