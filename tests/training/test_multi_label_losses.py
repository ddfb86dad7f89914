"""Losses of multi-label data: their formulas in NumPy, equal on every mesh, and the methods that take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax.batch import Batch
from clip_har_jax.config import make_config
from clip_har_jax.errors import UserError
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.models.params import init_params
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.sharding import batch_sharding, put_local_rows
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.trainer.initial_state import start_multi_label
from clip_har_jax.training.losses import LOSSES, asymmetric, binary_cross_entropy, is_right, make_class_loss
from clip_har_jax.training.methods import HEAD, ClassInputs
from clip_har_jax.training.program import make_program
from clip_har_jax.training.recipes import METHODS, MULTI_LABEL_METHODS, check_method
from clip_har_jax.training.steps import make_gradients

rng = np.random.default_rng(0)
LOGITS = rng.normal(0, 3, (6, 4)).astype(np.float32)
TARGET = (rng.random((6, 4)) < 0.4).astype(np.float32)
WEIGHTS = np.array([0.5, 1.0, 2.0, 1.5], np.float32)


def probabilities(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_is_its_formula(gamma: float, smoothing: float) -> None:
    p, y = probabilities(LOGITS), TARGET * (1 - smoothing) + smoothing / 2
    wanted = -(WEIGHTS * (y * (1 - p) ** gamma * np.log(p) + (1 - y) * p**gamma * np.log(1 - p))).sum(axis=1)
    found = binary_cross_entropy(
        jnp.asarray(LOGITS),
        jnp.asarray(TARGET),
        label_smoothing=smoothing,
        focal_gamma=gamma,
        class_weights=jnp.asarray(WEIGHTS),
    )
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


@pytest.mark.parametrize(("pos", "neg", "margin"), [(0.0, 4.0, 0.05), (1.0, 2.0, 0.2), (0.0, 0.0, 0.0)])
def test_asymmetric_loss_is_its_formula(pos: float, neg: float, margin: float) -> None:
    """Ridnik et al. 2021: L+ = (1 - p)^pos log p, L- = p_m^neg log(1 - p_m), p_m = max(p - m, 0)."""
    p = probabilities(LOGITS)
    shifted = np.maximum(p - margin, 0)
    wanted = -(TARGET * (1 - p) ** pos * np.log(p) + (1 - TARGET) * shifted**neg * np.log(1 - shifted)).sum(axis=1)
    found = asymmetric(jnp.asarray(LOGITS), jnp.asarray(TARGET), gamma_pos=pos, gamma_neg=neg, margin=margin)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_asymmetric_loss_without_its_parts_is_the_binary_cross_entropy() -> None:
    plain = asymmetric(jnp.asarray(LOGITS), jnp.asarray(TARGET), gamma_neg=0.0, margin=0.0)
    np.testing.assert_allclose(plain, binary_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGET)), rtol=1e-6)


@pytest.mark.parametrize("name", ["binary_cross_entropy", "asymmetric"])
def test_extreme_logits_have_finite_losses_and_slopes(name: str) -> None:
    config = make_config({"method": {"focal_gamma": 0.5, "asymmetric_gamma_neg": 0.5, "asymmetric_gamma_pos": 0.5}})
    loss = make_class_loss(name, config.method, None)
    logits = jnp.asarray([[-90.0, 90.0, -90.0, 90.0]])
    target = jnp.asarray([[0.0, 1.0, 1.0, 0.0]])
    values, slopes = jax.value_and_grad(lambda given: loss(given, target).sum())(logits)
    assert np.isfinite(values)
    assert np.isfinite(slopes).all()


def test_the_most_probable_label_counts_as_right_if_the_image_has_it() -> None:
    logits, label = jnp.asarray([[0.0, 2.0], [3.0, 1.0], [3.0, 1.0]]), jnp.asarray([[1, 1], [0, 1], [0, 0]], jnp.uint8)
    assert is_right(logits, label).tolist() == [True, False, False]
    assert is_right(logits, jnp.asarray([1, 0, 1], jnp.int32)).tolist() == [True, True, False]


def test_a_head_starts_with_the_differences_of_clip_and_the_shares_of_the_labels() -> None:
    kernel = rng.normal(5, 1, (8, 3)).astype(np.float32)
    found = start_multi_label({HEAD + "classes.kernel": kernel}, np.array([98, 9, 0]), 198)
    centred = found[HEAD + "classes.kernel"]
    np.testing.assert_allclose(np.diff(centred, axis=1), np.diff(kernel, axis=1), atol=1e-5)
    np.testing.assert_allclose(centred.sum(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(probabilities(found[HEAD + "classes.bias"]), [0.495, 0.05, 0.005], rtol=1e-5)


SIZE = CLIPConfig(
    TextConfig(vocab_size=101, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, context_length=8),
    VisionConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, image_size=16, patch_size=8),
    projection_dim=16,
)


def gradients_on(strategy: str, devices: int, loss: str, parts: int = 1) -> tuple[dict[str, np.ndarray], np.ndarray]:
    config = make_config(
        {
            "data": {"multi_label": True},
            "method": {"loss": loss, "class_balance": 0.9},
            "train": {"global_batch_size": 16, "accumulation_steps": parts},
            "eval": {"batch_size": 8},
            "mesh": {"strategy": strategy},
        }
    )
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    program = make_program(config, SIZE, Preprocess(16), 4, 10, mesh, (5, 1, 9, 3))
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    label = (draw.random((16, 4)) < 0.4).astype(np.uint8)
    mask = np.ones(16, np.float32)
    mask[[3, 9]] = 0
    batch = Batch(images, label, mask, np.arange(16, dtype=np.int32))
    head = {HEAD + "classes.kernel": draw.normal(0, 3, (16, 4)), HEAD + "classes.bias": draw.normal(0, 1, 4)}
    state, frozen = program.place({**init_params(SIZE, 0), **{k: v.astype(np.float32) for k, v in head.items()}})
    wanted = program.abstract_arguments(4)[3]
    assert (wanted.label.shape, wanted.label.dtype) == (label.shape, label.dtype)
    gradients = make_gradients(program.method, program.config, program.preprocess, program.shardings.params, mesh)
    classes = ClassInputs(None, None, np.zeros((4, 16), np.float32))
    placed = put_local_rows(batch, batch_sharding(mesh))
    grads, losses, _ = jax.jit(gradients)(state.params, frozen, classes, placed, jax.random.key(0))
    return jax.device_get((grads, losses))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "asymmetric"])
def test_eight_devices_give_the_gradients_of_one(loss: str) -> None:
    wanted, rows = gradients_on("dp", 1, loss)
    assert "head.classes.bias" in wanted
    largest = max(np.abs(value).max() for value in wanted.values())
    for strategy, parts in (("dp", 1), ("fsdp_tp", 2)):
        found, losses = gradients_on(strategy, 8, loss, parts)
        np.testing.assert_allclose(losses, rows, rtol=1e-5, atol=1e-5)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "zero_shot"}, "has no point from which on a label is present"),
        ({"name": "prompt"}, "has no point from which on a label is present"),
        ({"name": "linear_probe"}, "fitted by a softmax over the classes"),
        ({"name": "lp_ft"}, "fitted by a softmax over the classes"),
        ({"name": "flyp"}, "compares an image with one text"),
        ({"name": "adapter"}, "its head has no bias"),
        ({"name": "tip_adapter"}, "its cached images vote for one class each"),
        ({"head": "cosine"}, "takes method.head=linear"),
        ({"head": "mlp"}, "takes method.head=linear"),
        ({"loss": "cross_entropy"}, "is over classes of which one is right"),
        ({"loss": "sigmoid"}, "compares an image with one text"),
        ({"loss": "asymmetric", "focal_gamma": 2.0}, "has exponents of its own"),
        ({"wise_ft": (0.5,)}, "chooses by top-1 accuracy"),
        ({"towers": "text"}, "the head takes the text tower's place"),
    ],
)
def test_methods_that_need_one_label_are_refused(method: dict, said: str) -> None:
    with pytest.raises(UserError) as info:
        check_method(make_config({"method": method}).method, multi_label=True)
    assert said in str(info.value)
    assert "\n" not in str(info.value)


def test_every_method_takes_multi_label_data_or_says_why_not() -> None:
    for name in METHODS:
        config = make_config({"method": {"name": name}}).method
        if name in MULTI_LABEL_METHODS:
            assert check_method(config, multi_label=True)[1:] == ("linear", "binary_cross_entropy")
        else:
            with pytest.raises(UserError, match=r"takes method[.]name=full or lora or bitfit"):
                check_method(config, multi_label=True)


def test_losses_of_labels_need_multi_label_data() -> None:
    assert set(LOSSES) == {"cross_entropy", "binary_cross_entropy", "asymmetric"}
    for loss in ("binary_cross_entropy", "asymmetric"):
        with pytest.raises(UserError, match=r"set data[.]multi_label=True"):
            check_method(make_config({"method": {"loss": loss}}).method)
