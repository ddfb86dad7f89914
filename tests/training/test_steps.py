"""The training step: every mesh, part size and policy gives the same gradients; what isn't finite is left out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clip_har_jax.batch import Batch
from clip_har_jax.config import make_config
from clip_har_jax.data.manifest import make_manifest, write_split_manifest
from clip_har_jax.errors import UserError
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.models.families import NAMED_SIZES
from clip_har_jax.models.params import abstract_model, flat_params, init_params
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.sharding import batch_sharding, put_local_rows
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.methods import ClassInputs
from clip_har_jax.training.optim import freeze_masks, layer_scales
from clip_har_jax.training.program import Program
from clip_har_jax.training.step_config import step_config
from clip_har_jax.training.steps import make_gradients

SIZE = CLIPConfig(
    TextConfig(vocab_size=101, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, context_length=8),
    VisionConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, image_size=16, patch_size=8),
    projection_dim=16,
)
NUM_CLASSES, BATCH_SIZE = 5, 16
PROMPTS = np.random.default_rng(0).integers(1, 100, (7, 8), dtype=np.int32)  # 7: no mesh divides it
CLASS_OF_PROMPT = [0, 0, 1, 2, 3, 4, 4]
MESHES = {"one": 1, "dp": 8, "fsdp": 8, "tp": 4, "fsdp_tp": 8}


def make_program(strategy="one", **sections):
    sections = {"mesh": {"strategy": "dp" if strategy == "one" else strategy}, **sections}
    train = {"global_batch_size": BATCH_SIZE, **sections.pop("train", {})}
    config = make_config({"train": train, "eval": {"batch_size": 8}, **sections})
    mesh = make_mesh(config.mesh, jax.devices()[: MESHES.get(strategy, 8)])
    return Program(step_config(config), SIZE, Preprocess(16), NUM_CLASSES, num_steps=10, mesh=mesh)


@functools.cache
def averaging():
    """Return a program that several tests run."""
    return make_program("fsdp", optim={"ema_decay": 0.5, "warmup_fraction": 0.0})


@functools.cache
def start():
    """Host weights, with a logit scale at which gradients are neither tiny nor clipped."""
    return {name: np.asarray(value) for name, value in init_params(SIZE, 0).items()}


def start_of(program):
    """Host weights with what a method adds to them: updates, a context or a head, none of which is 0."""
    rng = np.random.default_rng(2)
    classes = rng.normal(size=(NUM_CLASSES, SIZE.projection_dim)).astype(np.float32)
    classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
    own = program.method.init_extra(start(), program.shapes, classes, np.asarray([5, 6], np.int32), 0)
    own = {
        name: np.asarray(value) + 0.1 * rng.normal(size=value.shape).astype(np.float32) for name, value in own.items()
    }
    return {**start(), **own}, classes


def make_batch(program):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (BATCH_SIZE, 16, 16, 3), dtype=np.uint8)
    labels = rng.integers(0, NUM_CLASSES, BATCH_SIZE).astype(np.int32)
    mask = np.ones(BATCH_SIZE, np.float32)
    mask[[3, 9]] = 0
    batch = Batch(images, labels, mask, np.arange(BATCH_SIZE, dtype=np.int32))
    return put_local_rows(batch, batch_sharding(program.mesh))


def arguments_of(program):
    state, frozen = program.place(start())
    prompts, class_of_prompt = program.place_prompts(PROMPTS, CLASS_OF_PROMPT)
    return state, frozen, ClassInputs(prompts, class_of_prompt, None), make_batch(program)


def gradients_of(program):
    """Return the loss's rows and gradients, as host arrays."""
    gradients = make_gradients(
        program.method, program.config, program.preprocess, program.shardings.params, program.mesh
    )
    state, frozen, classes, batch = arguments_of(program)
    grads, losses, _ = jax.jit(gradients)(state.params, frozen, classes, batch, jax.random.key(0))
    return jax.device_get((grads, losses))


@functools.cache
def expected():
    return gradients_of(make_program())


def assert_equal_gradients(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(found[1], wanted[1], rtol=tolerance, atol=tolerance)
    largest = max(np.abs(value).max() for value in wanted[0].values())
    for name, value in wanted[0].items():
        np.testing.assert_allclose(found[0][name], value, rtol=0, atol=tolerance * largest, err_msg=name)


@pytest.mark.parametrize(
    "strategy", ["dp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "tp")), "fsdp_tp"]
)
def test_gradients_of_all_strategies_equal_those_of_one_device(strategy):
    assert_equal_gradients(gradients_of(make_program(strategy)), expected())


def test_gradients_of_an_explicit_mesh_equal_those_of_one_device():
    assert_equal_gradients(gradients_of(make_program("mixed", mesh={"data": 2, "fsdp": 2, "tensor": 2})), expected())


METHODS = {name: {"name": name} for name in ("lora", "prompt", "adapter", "bitfit", "flyp", "lp_ft")}
METHODS["sigmoid"] = {"name": "full", "loss": "sigmoid"}
FAST = ("lora",)


def trained(strategy, name):
    """Each step's loss and the trained parameters after three steps of a method."""
    # With this eps a gradient that is 0 but for rounding makes no update.
    optim = {"learning_rate": 1e-2, "warmup_fraction": 0.0, "eps": 1e-3}
    program = make_program(strategy, method={"lora_rank": 4, "prompt_length": 2, **METHODS[name]}, optim=optim)
    params, embeddings = start_of(program)
    state, frozen = program.place(params)
    prompts = (*program.place_prompts(PROMPTS[:, :6], CLASS_OF_PROMPT), None)
    classes = ClassInputs(*(prompts if program.trains_text else (None, None, jnp.asarray(embeddings))))
    losses = []
    for _ in range(3):
        state, metrics, _ = program.train_step(state, frozen, classes, make_batch(program))
        losses.append(float(metrics.compute()["loss"]))
    return losses, jax.device_get(state.params)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in METHODS]
)
def test_every_method_learns_the_same_on_every_mesh(name):
    losses, params = trained("dp", name)
    assert losses[2] < losses[0]
    for strategy in ("fsdp", "tp"):
        found = trained(strategy, name)
        np.testing.assert_allclose(found[0], losses, rtol=1e-4, err_msg=strategy)
        for key, value in params.items():
            np.testing.assert_allclose(found[1][key], value, atol=1e-5, err_msg=f"{strategy} {key}")


def test_features_are_the_same_on_every_mesh():
    """What a linear probe and a Tip-Adapter are fitted to."""
    found = []
    for strategy in ("dp", "fsdp", "tp"):
        program = make_program(strategy, method={"name": "linear_probe"})
        state, frozen = program.place(start())
        found.append(np.asarray(program.feature_step({**state.params, **frozen}, make_batch(program))[0]))
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)


def test_rows_pass_by_layers_in_training_alone():
    drops, keeps = (make_program(method={"drop_path": rate}) for rate in (0.5, 0.0))
    _, losses = gradients_of(drops)
    assert not np.any(np.isclose(losses, expected()[1], atol=1e-4))
    answers = []
    for program in (drops, keeps):
        state, frozen, classes, batch = arguments_of(program)
        embeddings = program.class_step({**state.params, **frozen}, classes)
        answers.append(program.eval_step(state.params, frozen, ClassInputs(None, None, embeddings), batch)[0])
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize(("strategy", "rows"), [pytest.param("fsdp", 2, marks=pytest.mark.slow), ("fsdp_tp", 4)])
def test_activations_stay_with_their_rows(strategy, rows):
    """No device computes with all images of a batch, though the weights are sharded over the same axis."""
    program = make_program(strategy)
    text = program.train_step.lower(*program.abstract_arguments(len(PROMPTS))).compile().as_text()
    tokens = (16 // 8) ** 2 + 1
    assert f"f32[{rows},{tokens},{SIZE.vision.hidden_size}]" in text
    assert f"f32[{BATCH_SIZE},{tokens}," not in text


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        ("one", 4),
        ("fsdp_tp", 2),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("one", 2), ("fsdp_tp", 4))),
    ],
)
def test_accumulated_gradients_equal_those_of_the_whole_batch(strategy, parts):
    program = make_program(strategy, train={"accumulation_steps": parts})
    assert_equal_gradients(gradients_of(program), expected())


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_rematerialisation_changes_no_gradient(remat):
    assert_equal_gradients(gradients_of(make_program("fsdp", model={"remat": remat})), expected())


def test_bfloat16_computes_with_float32_masters():
    program = make_program("fsdp", model={"compute_dtype": "bfloat16"})
    state, metrics, _ = program.train_step(*arguments_of(program))
    mask = np.asarray(make_batch(program).mask)
    loss, wanted = metrics.compute()["loss"], (expected()[1] * mask).sum() / mask.sum()
    np.testing.assert_allclose(loss, wanted, rtol=0.05)
    assert abs(loss - wanted) > 1e-5
    assert all(
        value.dtype == jnp.float32 for value in jax.tree.leaves((state.params, state.opt_state[2])) if value.ndim
    )


def test_shardings_of_each_strategy():
    layer = "vision.layers.mlp.fc1.kernel"
    wanted = {
        "dp": P(None, None, None),
        "fsdp": P(None, "fsdp", None),
        "tp": P(None, None, "tensor"),
        "fsdp_tp": P(None, "fsdp", "tensor"),
    }
    for strategy, spec in wanted.items():
        program = make_program(strategy)
        state, _ = program.place(start())
        assert program.param_shardings[layer].spec == spec
        assert state.params[layer].sharding == program.param_shardings[layer]
        # ZeRO: the optimiser's moments lie as their parameters do
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == state.params[layer].shape]
        assert len(moments) >= 2
        assert all(x.sharding.spec == spec for x in moments if x.shape[-1] == 64)
        assert program.param_shardings["text.token_embedding"].spec == P(None, spec[1])  # 101 tokens: never padded


def test_a_strategy_that_does_not_fit_names_the_parameter():
    odd = dataclasses.replace(SIZE, vision=dataclasses.replace(SIZE.vision, intermediate_size=60))
    config = make_config({"mesh": {"strategy": "tp"}})
    with pytest.raises(UserError, match=r"vision\.layers\.mlp\.fc1\.bias has 60 in its 'mlp' dimension, which 8"):
        Program(step_config(config), odd, Preprocess(16), 5, 10, make_mesh(config.mesh))


def test_fsdp_needs_a_sixth_of_the_memory():
    shapes = {name: value.shape for name, value in flat_params(abstract_model(NAMED_SIZES["ViT-B/32"])).items()}

    def bytes_per_device(strategy):
        config = make_config({"mesh": {"strategy": strategy}})
        program = Program(step_config(config), NAMED_SIZES["ViT-B/32"], Preprocess(224), 15, 10, make_mesh(config.mesh))
        return sum(4 * np.prod(program.param_shardings[name].shard_shape(shape)) for name, shape in shapes.items())

    assert bytes_per_device("fsdp") <= bytes_per_device("dp") / 6


def test_the_state_is_donated():
    """No second copy of parameters and moments: the compiled step writes them where they were read."""
    program = averaging()
    arguments = arguments_of(program)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arguments[0]))
    compiled = program.train_step.lower(*arguments).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    compiled(*arguments)
    assert all(x.is_deleted() for x in arguments[0].params.values())


def test_an_update_that_is_not_finite_is_left_out():
    program = averaging()
    state, frozen, classes, batch = arguments_of(program)
    before = jax.device_get(state)
    poisoned = batch._replace(mask=batch.mask.at[0].set(jnp.nan))
    state, metrics, skipped = program.train_step(state, frozen, classes, poisoned)
    after = jax.device_get(state)
    assert int(skipped) == after.skipped == after.skipped_total == 1
    assert after.step == 1  # the data goes on
    for a, b in zip(jax.tree.leaves(before[1:4]), jax.tree.leaves(after[1:4]), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics, skipped = program.train_step(state, frozen, classes, batch)
    assert int(skipped) == 0
    assert int(state.skipped_total) == 1
    assert metrics.compute()["skipped_steps"] == 1
    assert not np.array_equal(state.params["logit_scale"], before.params["logit_scale"])


def test_a_moving_average_follows_the_weights():
    program = averaging()
    state, *rest = arguments_of(program)
    average = start()["visual_projection.kernel"]
    for step in range(3):
        state, _, _ = program.train_step(state, *rest)
        rate = 1 - min(0.5, (1 + step) / (10 + step))
        average = average + rate * (np.asarray(state.params["visual_projection.kernel"]) - average)
    np.testing.assert_allclose(state.ema["visual_projection.kernel"], average, rtol=1e-5, atol=1e-7)


def test_lower_layers_learn_more_slowly():
    scales = layer_scales({name: value.shape for name, value in start().items()}, 0.5)
    assert scales["vision.layers.mlp.fc1.kernel"].ravel().tolist() == [0.5, 1.0]
    assert scales["vision.layers.mlp.fc1.bias"].shape == (2, 1)
    for name in ("vision.patch_embedding.kernel", "vision.class_embedding", "vision.pre_norm.scale"):
        assert scales[name].ravel().tolist() == [0.25]
    assert scales["text.token_embedding"].ravel().tolist() == [0.25]
    for name in ("vision.post_norm.bias", "text.final_norm.scale", "visual_projection.kernel", "logit_scale"):
        assert scales[name].ravel().tolist() == [1.0]


def test_frozen_patterns_stay_bit_equal():
    patterns = ("text.*", "vision.layers.0.*", "logit_scale")
    program = make_program(method={"freeze": patterns}, optim={"warmup_fraction": 0.0})
    assert not any(name.startswith("text.") for name in program.trainable)
    assert "text_projection.kernel" in program.trainable
    state, frozen, classes, batch = arguments_of(program)
    state, _, _ = program.train_step(state, frozen, classes, batch)
    for name, value in state.params.items():
        old, new = start()[name], np.asarray(value)
        if name.startswith("vision.layers."):
            np.testing.assert_array_equal(new[0], old[0], err_msg=name)
            assert not np.array_equal(new[1], old[1]), name
        else:
            assert not np.array_equal(new, old), name
    assert set(frozen) == set(start()) - set(program.trainable)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"freeze": ("vision.layer.*",)}}, "'vision.layer.*'"),
        ({"method": {"freeze": ("*",)}}, "leaves nothing to train"),
        ({"train": {"accumulation_steps": 3}}, "multiple of 24"),
    ],
)
def test_mistakes_are_refused(sections, message):
    with pytest.raises(UserError) as error:
        make_program("dp", **sections)
    assert message in str(error.value)


def test_freeze_masks_reach_single_layers():
    masks = freeze_masks(
        {"vision.layers.mlp.fc1.bias": (3, 8), "text_projection.kernel": (4, 4)}, ["vision.layers.[01].*"]
    )
    assert masks["vision.layers.mlp.fc1.bias"].ravel().tolist() == [0, 0, 1]
    assert masks["text_projection.kernel"].ravel().tolist() == [1]


def test_a_manifest_of_clips_counts_their_frames(tmp_path):
    path = tmp_path / "manifest.parquet"
    flops = {}
    for clips in (False, True):
        write_split_manifest(make_manifest([], tmp_path, {"clips": True} if clips else {}), path)
        flops[clips] = make_program(data={"train": f"manifest:{path}", "video": {"num_frames": 4}}).flops_per_step(0)
    assert flops[True] == 4 * flops[False] > 0
