"""What a run holds on its devices: one state, sharded from the moment it is made, at a start as when it continues."""

import gc
import math
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from clip_har_jax.config import make_config
from clip_har_jax.models.factory import make_base
from clip_har_jax.models.params import init_params, init_program
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.sharding import bytes_per_device
from clip_har_jax.trainer.initial_state import initial_state
from clip_har_jax.trainer.run import setup
from clip_har_jax.trainer.run_data import load_data
from clip_har_jax.trainer.train import train
from clip_har_jax.training.checkpoint import Checkpointer
from clip_har_jax.training.program import Program
from clip_har_jax.training.step_config import step_config
from tests.support.model_folders import write_images
from tests.support.runs import StopAt, config_with

LABELS = ("cycling", "running", "sleeping")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), LABELS, per_class=8)


def config_for(images, num_steps, **sections):
    values: dict[str, dict[str, Any]] = {
        "data": {"train": f"folder:{images}", "val_fraction": 0.25},
        "model": {"name": "mini"},
        "train": {"num_steps": num_steps, "global_batch_size": 8, "log_every_steps": 1},
        "eval": {"every_steps": 1000, "batch_size": 8},
        "checkpoint": {"every_steps": 3},
    }
    return config_with(values, sections)


def live_bytes():
    """Return the bytes of all arrays on each device.

    By their shardings: asking an array for its shards would make further arrays of the same buffers.
    """
    held: dict[jax.Device, int] = {}
    for array in jax.live_arrays():
        if not array.is_deleted():
            share = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
            for device in array.sharding.device_set:
                held[device] = held.get(device, 0) + share
    return held


class Scales:
    """A sink that notes the bytes that each step leaves on the fullest device."""

    def __init__(self):
        gc.collect()
        self.before, self.steps = max(live_bytes().values(), default=0), {}

    def write(self, step, metrics):
        if "train/loss" in metrics:
            gc.collect()
            self.steps[step] = max(live_bytes().values()) - self.before

    def close(self):
        pass


@pytest.mark.parametrize(("strategy", "ema_decay"), [("dp", 0.0), pytest.param("fsdp", 0.9, marks=pytest.mark.slow)])
def test_a_continued_run_holds_no_more_than_a_fresh_one(images, tmp_path, strategy, ema_decay):
    sections = {"mesh": {"strategy": strategy}, "optim": {"ema_decay": ema_decay}}
    fresh = Scales()
    assert train(config_for(images, 6, **sections), tmp_path, sinks=[fresh, StopAt(2)], quiet=True).exit_code
    continued = Scales()
    train(config_for(images, 6, **sections), tmp_path, sinks=[continued], quiet=True)
    assert {1, 2} <= set(fresh.steps) and set(continued.steps) == {4, 5, 6}
    base = make_base("mini", load_data(config_for(images, 3)).texts)
    config = config_for(images, 3, **sections)
    program = Program(step_config(config), base.config, base.preprocess, len(LABELS), 3, make_mesh(config.mesh))
    state = bytes_per_device(program.abstract_state())
    for scales in (fresh, continued):
        # Beside the state: batches on their way to the devices, prompts, and what a step returns.
        assert all(state <= held < 1.5 * state for held in scales.steps.values()), (state, scales.steps)
    assert max(continued.steps.values()) <= 1.05 * max(fresh.steps.values())


def test_random_weights_are_made_in_shards():
    """The program that makes them needs far less on a device than a whole copy takes, outputs and scratch together."""
    config = make_config({"mesh": {"strategy": "fsdp"}})
    base = make_base("tiny", ["running", "sleeping"])
    program = Program(step_config(config), base.config, base.preprocess, 2, 10, make_mesh(config.mesh))
    whole = sum(4 * int(np.prod(shape)) for shape in program.shapes.values())
    key = np.asarray(jax.random.key_data(jax.random.key(0)))
    needs = init_program(base.config, program.param_shardings).lower(key).compile().memory_analysis()
    assert needs.output_size_in_bytes + needs.temp_size_in_bytes < 0.5 * whole
    params, expected = init_params(base.config, 0, program.param_shardings), init_params(base.config, 0)
    assert {name: value.sharding for name, value in params.items()} == program.param_shardings
    assert bytes_per_device(params) < 0.2 * whole
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_start_from_random_weights_makes_no_whole_copy(images, tmp_path):
    config = config_for(images, 3, mesh={"strategy": "fsdp"})
    run = setup(config, epath.Path(tmp_path), load_data(config), make_base("mini", load_data(config).texts), {})
    gc.collect()
    before = live_bytes()
    with Checkpointer(tmp_path / "checkpoints", config.checkpoint) as checkpointer:
        initial = initial_state(run, checkpointer)
    gc.collect()
    gained = max(held - before.get(device, 0) for device, held in live_bytes().items())
    assert gained <= 1.01 * bytes_per_device((initial.state, initial.frozen))
