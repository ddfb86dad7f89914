"""Training runs: their configs, a stop at a step, the weights they leave, and runs as processes of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.config import RunConfig, make_config
from clip_har_jax.models.factory import load
from clip_har_jax.models.params import flat_params
from tests.support.xla import cpu_flags

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train.py"
LABELS = ("cycling", "running", "sleeping")


def config_with(values: Mapping[str, Mapping[str, Any]], sections: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """Return the config of some values, with the keys of some sections set otherwise."""
    return make_config({name: {**values.get(name, {}), **sections.get(name, {})} for name in {*values, *sections}})


class StopAt:
    """A sink that stops the run as SIGTERM does, when a metric of a step is known."""

    def __init__(self, step: int, metric: str = "train/loss"):
        self.step, self.metric = step, metric

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step == self.step and self.metric in metrics:
            signal.raise_signal(signal.SIGTERM)

    def close(self) -> None:
        pass


def params_of(model: object) -> dict[str, np.ndarray]:
    """Return the parameters of a model folder."""
    return {name: np.asarray(value) for name, value in flat_params(load(str(model)).model).items()}


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
