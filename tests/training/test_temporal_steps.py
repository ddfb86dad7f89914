"""Temporal models in the training step: equal on every mesh, by every method, with FLOPs as the traced program has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax.batch import Batch
from clip_har_jax.config import make_config
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.models.flops import clip_flops, forward_flops, matmul_flops, temporal_flops
from clip_har_jax.models.params import make_model
from clip_har_jax.models.temporal import KINDS, is_temporal
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.sharding import batch_sharding, put_local_rows
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.methods import ClassInputs
from clip_har_jax.training.program import Program
from clip_har_jax.training.step_config import step_config
from tests.support.model_folders import random_params

SIZE = CLIPConfig(
    TextConfig(vocab_size=101, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, context_length=8),
    VisionConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, image_size=16, patch_size=8),
    projection_dim=16,
)
NUM_CLASSES, BATCH_SIZE, NUM_FRAMES = 4, 8, 3
PROMPTS = np.random.default_rng(0).integers(1, 100, (NUM_CLASSES, 8), dtype=np.int32)
ADDING = [kind for kind in KINDS if kind != "mean"]


def make_program(kind, strategy="dp", **sections):
    config = make_config(
        {
            "mesh": {"strategy": strategy},
            "data": {"train": "motion", "video": {"num_frames": NUM_FRAMES}},
            "train": {"global_batch_size": BATCH_SIZE},
            "eval": {"batch_size": 8},
            "optim": {"learning_rate": 2e-3, "warmup_fraction": 0.0, "eps": 1e-3},
            **sections,
        }
    )
    mesh = make_mesh(config.mesh, jax.devices()[: 4 if strategy == "tp" else 8])
    clip = dataclasses.replace(SIZE, temporal=kind)
    return Program(step_config(config), clip, Preprocess(16), NUM_CLASSES, num_steps=10, mesh=mesh)


def start_of(program):
    """Host weights of which nothing that the kind or the method adds is 0, and class embeddings."""
    rng = np.random.default_rng(2)
    params = random_params(program.sizes)
    classes = rng.normal(size=(NUM_CLASSES, SIZE.projection_dim)).astype(np.float32)
    classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
    own = program.method.init_extra(params, program.shapes, classes, np.asarray([5, 6], np.int32), 0)
    lively = {name: value for name, value in params.items() if is_temporal(name)} | own
    noise = {name: 0.1 * rng.normal(size=np.shape(value)).astype(np.float32) for name, value in lively.items()}
    return {**params, **{name: np.asarray(value) + noise[name] for name, value in lively.items()}}, classes


def batch_of(program):
    rng = np.random.default_rng(1)
    clips = rng.integers(0, 256, (BATCH_SIZE, NUM_FRAMES, 16, 16, 3), dtype=np.uint8)
    labels = (np.arange(BATCH_SIZE) % NUM_CLASSES).astype(np.int32)
    mask = np.ones(BATCH_SIZE, np.float32)
    mask[3] = 0
    return put_local_rows(
        Batch(clips, labels, mask, np.arange(BATCH_SIZE, dtype=np.int32)), batch_sharding(program.mesh)
    )


def classes_of(program, embeddings):
    if not program.trains_text:
        return ClassInputs(None, None, jnp.asarray(embeddings))
    prompts = PROMPTS[:, : 8 - program.method.context_length]
    ids, class_of_prompt = program.place_prompts(prompts, list(range(NUM_CLASSES)))
    return ClassInputs(ids, class_of_prompt, None)


def trained(program):
    """Return each step's loss, the parameters after three steps, and those before."""
    params, embeddings = start_of(program)
    state, frozen = program.place(params)
    losses = []
    for _ in range(3):
        state, metrics, _ = program.train_step(state, frozen, classes_of(program, embeddings), batch_of(program))
        losses.append(float(metrics.compute()["loss"]))
    return losses, jax.device_get(state.params), params


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "divided" else pytest.mark.slow) for kind in ADDING]
)
def test_every_mesh_learns_the_same(kind):
    losses, params, before = trained(make_program(kind))
    assert losses[2] < losses[0]
    moved = {name for name in params if is_temporal(name) and np.abs(params[name] - before[name]).max() > 0}
    # Softmax doesn't depend on what is added to all keys alike.
    assert moved == {name for name in params if is_temporal(name) and not name.endswith("key.bias")}
    for strategy in ("fsdp", "tp"):
        found = trained(make_program(kind, strategy))
        np.testing.assert_allclose(found[0], losses, rtol=1e-4, err_msg=strategy)
        for name, value in params.items():
            np.testing.assert_allclose(found[1][name], value, atol=1e-5, err_msg=f"{strategy} {name}")


def test_fsdp_and_tp_shard_what_is_added():
    for strategy in ("fsdp", "tp"):
        for kind in ADDING:
            program = make_program(kind, strategy)
            kernels = [name for name in program.trainable if is_temporal(name) and name.endswith("kernel")]
            assert kernels
            for name in kernels:
                sharding = program.param_shardings[name]
                assert sharding.shard_shape(program.shapes[name]) != program.shapes[name], (strategy, name)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "remat"), [("divided", "full"), ("st_adapter", "dots")])
def test_rematerialised_steps_learn_the_same(kind, remat):
    losses, params, _ = trained(make_program(kind, "fsdp"))
    found = trained(make_program(kind, "fsdp", model={"remat": remat}))
    np.testing.assert_allclose(found[0], losses, rtol=1e-5)
    for name, value in params.items():
        np.testing.assert_allclose(found[1][name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        pytest.param(method, kind, marks=() if (method, kind) == ("lora", "st_adapter") else pytest.mark.slow)
        for method in ("lora", "prompt")
        for kind in ("head", "st_adapter", "divided")
    ],
)
def test_a_method_trains_its_own_and_what_is_added(kind, method):
    settings = {"name": method, "lora_rank": 4, "prompt_length": 2}
    losses, params, before = trained(make_program(kind, method=settings))
    assert losses[2] < losses[0]
    own = "prompt.context" if method == "prompt" else ".lora_b"
    assert {name for name in params if not is_temporal(name)} == {name for name in params if own[:6] in name}
    assert any(is_temporal(name) for name in params)
    for name in params:
        if (is_temporal(name) or own in name) and not name.endswith("key.bias"):
            assert np.abs(params[name] - before[name]).max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_probe_learns_from_the_features_of_clips(kind):
    program = make_program(kind, method={"name": "linear_probe"})
    assert all(name.startswith("head.") for name in program.trainable)
    params, _ = start_of(program)
    state, frozen = program.place(params)
    found = program.feature_step({**state.params, **frozen}, batch_of(program))[0]
    model = make_model(
        program.sizes, {name: jnp.asarray(v) for name, v in params.items() if not name.startswith("head.")}
    )
    clips = np.asarray(batch_of(program).image, np.float32) / 255
    mean, std = (np.asarray(values, np.float32) for values in (program.preprocess.mean, program.preprocess.std))
    np.testing.assert_allclose(found, model.encode_image(jnp.asarray((clips - mean) / std)), atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_clip_are_those_of_the_traced_program(kind, num_frames):
    config = dataclasses.replace(SIZE, temporal=kind)
    model = make_model(config, random_params(config))
    traced = jax.make_jaxpr(model.encode_image)(jnp.zeros((2, num_frames, 16, 16, 3)))
    assert matmul_flops(traced) == 2 * clip_flops(config, num_frames)
    assert temporal_flops(config, num_frames) == clip_flops(config, num_frames) - num_frames * forward_flops(
        config.vision, config.projection_dim
    )


@pytest.mark.parametrize("kind", ["mean", "head", "divided"])
def test_flops_of_a_step_are_those_of_the_traced_program(kind):
    program = make_program(kind)
    traced = program.train_step.trace(*program.abstract_arguments(NUM_CLASSES))
    logits = 3 * 2 * BATCH_SIZE * NUM_CLASSES * SIZE.projection_dim
    prompts = -NUM_CLASSES % 8 * 3 * forward_flops(SIZE.text, SIZE.projection_dim)  # texts that fill the mesh
    assert matmul_flops(traced.jaxpr) == program.flops_per_step(NUM_CLASSES) + logits + prompts


def test_flops_of_a_frozen_tower_leave_out_its_kernels():
    program = make_program("st_adapter")
    forward = NUM_FRAMES * forward_flops(SIZE.vision, SIZE.projection_dim)
    text = 3 * NUM_CLASSES * forward_flops(SIZE.text, SIZE.projection_dim)
    clip = 2 * forward + 3 * temporal_flops(program.sizes, NUM_FRAMES)
    assert program.flops_per_step(NUM_CLASSES) == BATCH_SIZE * clip + text
