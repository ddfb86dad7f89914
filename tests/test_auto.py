"""Automated training: each step once, killed anywhere it goes on, and a gate that refuses leaves the champion."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from model_folders import write_images, write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
ROOT = Path(__file__).parents[1]
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
