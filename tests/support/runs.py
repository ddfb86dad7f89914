"""Training runs as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.xla import cpu_flags

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train.py"
LABELS = ("cycling", "running", "sleeping")


def write_config(folder, start, num_steps, save_every=1, learning_rate=1e-3):
    path = folder / "config.py"
    path.write_text(
        f"""from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {{
            "data": {{"train": "folder:{start[1]}", "val_fraction": 0.25}},
            "model": {{"name": "{start[0]}"}},
            "train": {{"num_steps": {num_steps}, "global_batch_size": 8, "log_every_steps": 1}},
            "optim": {{"learning_rate": {learning_rate}}},
            "eval": {{"every_steps": 100000, "batch_size": 8}},
            "checkpoint": {{"every_steps": {save_every}}},
        }}
    )
"""
    )
    return path


def environment(devices=1, **more):
    return {
        **os.environ,
        "XLA_FLAGS": cpu_flags(devices),
        "JAX_PLATFORMS": "cpu",
        **{k: str(v) for k, v in more.items()},
    }


def start_run(config, workdir, *more, script=TRAIN, env=None, before=(), stderr=subprocess.PIPE):
    command = [*before, sys.executable, str(script), f"--config={config}", f"--workdir={workdir}", *more]
    return subprocess.Popen(command, text=True, env=env or environment(), stdout=subprocess.PIPE, stderr=stderr)


def finish(process, timeout_s=240):
    stdout, stderr = process.communicate(timeout=timeout_s)
    return process.returncode, stdout, stderr
