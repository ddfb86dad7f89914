"""Methods over two processes, for real: what one process with as many devices learns, fits and writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.model_folders import write_images, write_model
from tests.support.xla import cpu_flags

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LABELS = ("cycling", "running", "sleeping")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a folder of weights and one of images."""
    root = tmp_path_factory.mktemp("start")
    return write_model(root / "model"), write_images(root / "images", LABELS, per_class=8)


def train(start, workdir, cache, method, processes):
    """Trains over four devices and gives the losses, what was retained, and all that the model folder holds."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config=configs/finetune.py"]
    command += [f"--workdir={workdir}", f"--config.data.train=folder:{start[1]}", f"--config.model.name={start[0]}"]
    settings = {
        "method.name": method,
        "method.lora_rank": 4,
        "method.wise_ft": "(0.5,1.0)",
        "mesh.strategy": "fsdp",
        "train.num_steps": 4,
        "train.log_every_steps": 1,
        "optim.learning_rate": 1e-2,
        "optim.eps": 1e-3,  # a gradient that is 0 but for rounding makes no update
        "retention.data": f"folder:{start[1]}",
        "retention.max_drop": 1.0,
    }
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    if processes > 1:
        launcher = str(ROOT / "scripts" / "launch_distributed.py")
        command = [sys.executable, launcher, f"--processes={processes}", "--devices_per_process=2", "--", *command[1:]]
    environment = os.environ | {
        "XLA_FLAGS": cpu_flags(devices=4 // processes),
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(cache),
    }
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "run.json").read_text())["num_processes"] == processes
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    retained = json.loads((workdir / "retention.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for path in sorted((workdir / "model").glob("*.safetensors")):
        tensors |= {f"{path.stem} {name}": value for name, value in load_file(path).items()}
    return losses, [retained["before"], retained["after"]], tensors


@pytest.mark.parametrize("method", ["lora", "lp_ft"])
def test_two_processes_learn_what_one_does(method, start, tmp_path):
    one = train(start, tmp_path / "one", tmp_path / "cache", method, 1)
    # Another cache: what the single process kept would spare the two the computing.
    cache = tmp_path / "other cache"
    two = train(start, tmp_path / "two", cache, method, 2)
    assert len(one[0]) == 4
    np.testing.assert_allclose(two[0], one[0], rtol=1e-4)
    assert two[1] == one[1]
    assert two[2].keys() == one[2].keys()
    for name, value in one[2].items():
        np.testing.assert_allclose(two[2][name], value, atol=1e-4, err_msg=name)
    if method == "lp_ft":  # both have written the features, and both read them now
        kept = inodes(cache)
        assert len(kept) == 2  # of training and validation, and nothing half written
        train(start, tmp_path / "probe", cache, "linear_probe", 2)
        assert inodes(cache) == kept


def inodes(cache):
    return {path.name: path.stat().st_ino for path in (cache / "clip_har_jax" / "features").iterdir()}
