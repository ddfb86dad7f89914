"""The training step on image-text pairs: the gradients of the whole similarity matrix, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax.batch import PairBatch
from clip_har_jax.config import make_config
from clip_har_jax.errors import UserError
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.models.two_towers import normalize_images
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.sharding import batch_sharding, put_local_rows
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.losses import masked_mean
from clip_har_jax.training.methods import ClassInputs
from clip_har_jax.training.program import Program
from clip_har_jax.training.step_config import step_config
from clip_har_jax.training.steps import make_pair_gradients
from tests.support.dense_contrastive import dense_contrastive_loss
from tests.support.model_folders import random_params

SIZE = CLIPConfig(
    TextConfig(vocab_size=101, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, context_length=8),
    VisionConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, image_size=16, patch_size=8),
    projection_dim=16,
)
ROWS = 16
NO_CLASSES = ClassInputs(None, None, None)


def make_program(devices: int = 8, **sections):
    method = {"loss": "softmax", **sections.pop("method", {})}
    values = {"data": {"train": "webdataset:a.tar"}, "train": {"global_batch_size": ROWS}, "eval": {"batch_size": 8}}
    config = make_config({**values, "method": method, **sections})
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    return Program(step_config(config), SIZE, Preprocess(16), num_classes=3, num_steps=10, mesh=mesh)


@functools.cache
def host_batch() -> PairBatch:
    rng = np.random.default_rng(1)
    mask = np.ones(ROWS, np.float32)
    mask[[3, 9]] = 0
    images = rng.integers(0, 256, (ROWS, 16, 16, 3), dtype=np.uint8)
    ids = rng.integers(1, 100, (ROWS, 8)).astype(np.int32)
    return PairBatch(images, ids, mask, np.arange(ROWS, dtype=np.int32))


def dense(program, params, batch, loss):
    """Return the loss of each row by the whole matrix; the logits' bias of the sigmoid is given, as by the step."""
    model = program.method.model(params)
    image = model.encode_image(normalize_images(batch.image, program.preprocess.mean, program.preprocess.std))
    text, scale = model.encode_text(batch.input_ids), jnp.exp(params["logit_scale"])
    bias = program.method._pair_bias(params, image, text, batch.mask)
    return dense_contrastive_loss(image, text, scale, batch.mask, kind=loss, logit_bias=bias)


@pytest.mark.parametrize(("loss", "strategy"), [("softmax", "fsdp_tp"), ("sigmoid", "dp")])
def test_gradients_are_those_of_the_whole_matrix(loss: str, strategy: str) -> None:
    program = make_program(method={"loss": loss}, mesh={"strategy": strategy})
    alone = make_program(devices=1, method={"loss": loss})
    host = random_params(SIZE)
    state, frozen = program.place(host)
    batch = put_local_rows(host_batch(), batch_sharding(program.mesh))
    gradients = jax.jit(make_pair_gradients(program.method, program.preprocess))
    grads, losses, _ = jax.device_get(gradients(state.params, frozen, NO_CLASSES, batch, jax.random.key(0)))

    def mean(params):
        rows = dense(alone, params, jax.tree.map(jnp.asarray, host_batch()), loss)
        return masked_mean(rows, jnp.asarray(host_batch().mask)), rows

    (_, expected_losses), expected = jax.device_get(jax.jit(jax.value_and_grad(mean, has_aux=True))(host))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=1e-4)
    assert (losses[[3, 9]] == 0).all()
    largest = max(np.abs(value).max() for value in expected.values())
    assert largest > 1e-3
    for name, value in grads.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-4 * largest, err_msg=name)


def test_a_step_updates_both_towers_and_reports_no_accuracy() -> None:
    program = make_program(optim={"warmup_fraction": 0.0})
    state, frozen = program.place(random_params(SIZE))
    before = jax.device_get(state.params)
    batch = put_local_rows(host_batch(), batch_sharding(program.mesh))
    state, metrics, skipped = program.train_step(state, frozen, NO_CLASSES, batch)
    after = jax.device_get(state.params)
    changed = {name.split(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert {"vision", "visual_projection", "text", "text_projection"} <= changed
    assert int(skipped) == 0
    assert "top1" not in metrics.compute() and np.isfinite(metrics.compute()["loss"])


def test_the_step_s_arguments_can_be_planned() -> None:
    program = make_program()
    state, frozen, classes, batch = program.abstract_arguments(num_prompts=3)
    assert isinstance(batch, PairBatch) and batch.input_ids.shape == (ROWS, 8)
    program.train_step.trace(state, frozen, classes, batch)
    assert program.flops_per_step(3) == program.flops_per_step(9)  # of the captions, not of the classes


@pytest.mark.parametrize(
    "method", [{"name": "full", "loss": ""}, {"name": "flyp", "loss": ""}, {"name": "lp_ft", "loss": ""}]
)
def test_losses_that_need_classes_are_refused(method: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"they train with softmax or sigmoid, not '\w+'; add --config\.method\.loss"):
        make_program(method=method)
