"""Optimisers and schedules by name: what they do to weights, how their state is sharded, and that a run continues."""

import functools

import jax
import numpy as np
import pytest

from clip_har_jax.config import OPTIMIZERS, SCHEDULES, OptimConfig, make_config
from clip_har_jax.errors import UserError
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training import optim
from clip_har_jax.training.program import Program
from clip_har_jax.training.step_config import step_config
from tests.support.model_folders import random_params

SIZE = CLIPConfig(
    TextConfig(vocab_size=101, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, context_length=8),
    VisionConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, image_size=16, patch_size=8),
    projection_dim=16,
)
RATE = 0.01


@functools.cache
def make_program(name: str, devices: int, **settings: object) -> Program:
    schedule = "constant" if name in optim.AVERAGES else "cosine"
    values = {"name": name, "schedule": schedule, "learning_rate": RATE, "warmup_fraction": 0.0, **settings}
    config = make_config({"mesh": {"strategy": "fsdp"}, "optim": values, "train": {"global_batch_size": 8}})
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    return Program(step_config(config), SIZE, Preprocess(16), num_classes=3, num_steps=10, mesh=mesh)


def update(program: Program, steps: int = 2) -> tuple[dict[str, np.ndarray], object]:
    """Return the weights after `steps` updates by fixed gradients, and the optimiser's state."""
    rng = np.random.default_rng(0)
    state, _ = program.place(random_params(SIZE))
    grads = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in state.params.items()}

    @jax.jit
    def step(params: dict[str, jax.Array], opt_state: object) -> tuple[dict[str, jax.Array], object]:
        updates, opt_state = program.optimizer.update(grads, opt_state, params)
        return {name: value + updates[name] for name, value in params.items()}, opt_state

    params, opt_state = state.params, state.opt_state
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return {name: np.asarray(value) for name, value in params.items()}, opt_state


def test_the_names_that_a_config_accepts_are_those_that_exist() -> None:
    assert set(OPTIMIZERS) == set(optim.OPTIMIZERS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("adamw", "muon") else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_a_sharded_optimiser_does_the_same_as_one_device(name: str) -> None:
    one, _ = update(make_program(name, 1))
    eight, _ = update(make_program(name, 8))
    for key, value in one.items():
        np.testing.assert_allclose(eight[key], value, atol=2e-5, err_msg=key)
    assert any(np.any(one[key] != value) for key, value in random_params(SIZE).items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_sharded_as_their_parameters(name: str) -> None:
    program = make_program(name, 8)
    state, _ = program.place(random_params(SIZE))
    kernel = state.params["vision.layers.mlp.fc1.kernel"]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert moments
    assert {leaf.sharding for leaf in moments} == {kernel.sharding}
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_muon_takes_steps_of_one_size_in_every_direction_of_a_matrix() -> None:
    program = make_program("muon", 1, weight_decay=0.0, clip_norm=1e6)
    before = random_params(SIZE)
    after, _ = update(program, steps=1)
    name = "vision.layers.attention.query.kernel"
    for layer in range(2):
        moved = np.linalg.svd(after[name][layer] - np.asarray(before[name])[layer], compute_uv=False)
        # The Newton-Schulz iteration brings each singular value near 1; the update is then scaled to a common RMS.
        size = RATE * optim.MUON_RMS * 32**0.5
        assert np.quantile(moved, 0.1) > 0.6 * size
        assert moved.max() < 1.3 * size
    bias = "vision.layers.mlp.fc1.bias"  # Adam's first step is of one size in each element, here with Nesterov momentum
    moved = np.abs(after[bias] - np.asarray(before[bias]))
    np.testing.assert_allclose(moved, moved[0, 0], rtol=1e-3)
    assert RATE <= moved[0, 0] < 1.5 * RATE


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("adamw", "muon") else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_weight_decay_pulls_kernels_by_the_learning_rate_and_nothing_else(name: str) -> None:
    without, _ = update(make_program(name, 1, weight_decay=0.0), steps=1)
    with_decay, _ = update(make_program(name, 1, weight_decay=0.5), steps=1)
    start = random_params(SIZE)
    for key in ("vision.layers.mlp.fc1.kernel", "visual_projection.kernel"):
        np.testing.assert_allclose(without[key] - with_decay[key], 0.5 * RATE * start[key], atol=1e-6, err_msg=key)
    for key in ("vision.layers.mlp.fc1.bias", "text.token_embedding", "logit_scale"):
        np.testing.assert_array_equal(without[key], with_decay[key], err_msg=key)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("lion", "adafactor") else ()) for name in OPTIMIZERS],
)
def test_frozen_layers_and_lower_rates_hold_for_every_optimiser(name: str) -> None:
    start = random_params(SIZE)
    method, train = {"freeze": ("text.layers.0.*",)}, {"global_batch_size": 8}
    schedule = "constant" if name in optim.AVERAGES else "cosine"
    rates = {"name": name, "schedule": schedule, "learning_rate": RATE, "warmup_fraction": 0.0, "layer_decay": 0.5}
    config = make_config({"method": method, "train": train, "optim": rates})
    program = Program(
        step_config(config), SIZE, Preprocess(16), 3, num_steps=10, mesh=make_mesh(config.mesh, jax.devices()[:1])
    )
    after, opt_state = update(program, steps=1)
    evaluated = optim.evaluated_weights(config.optim)
    weights = [after] if evaluated is None else [after, jax.device_get(evaluated(opt_state, after))]
    for each in weights:
        np.testing.assert_allclose(
            each["text.layers.mlp.fc1.kernel"][0], start["text.layers.mlp.fc1.kernel"][0], atol=1e-7
        )
        moved = np.abs(each["vision.layers.mlp.fc1.bias"] - start["vision.layers.mlp.fc1.bias"]).mean(axis=1)
        assert moved[0] == pytest.approx(moved[1] / 2, rel=0.1)


def test_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        config = OptimConfig(schedule=schedule, learning_rate=1.0, warmup_fraction=0.2, decay_fraction=0.5)
        return [float(optim.make_schedule(config, 10)(step)) for step in range(11)]

    assert rates("constant") == pytest.approx([0, 0.5, *[1] * 9])
    assert rates("wsd") == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert rates("cosine") == pytest.approx([0, 0.5, *(0.5 * (1 + np.cos(np.pi * np.arange(9) / 8)))], abs=1e-6)
    assert set(SCHEDULES) == {"constant", "wsd", "cosine"}


def test_an_average_with_a_falling_rate_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.schedule=constant"):
        make_program("schedule_free_adamw", 1, schedule="cosine")
