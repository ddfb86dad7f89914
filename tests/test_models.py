"""What every shipped config computes: one training step of it by shapes, and FLOPs by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_har_jax.batch import Batch
from clip_har_jax.config import load_config
from clip_har_jax.models.clip import CLIPConfig, TextConfig, VisionConfig, forward_flops
from clip_har_jax.models.factory import NAMED_SIZES
from clip_har_jax.models.layers import Runtime
from clip_har_jax.models.params import abstract_model, axis_names, flat_params
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.sharding import param_shardings
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.methods import Classes, make_method
from clip_har_jax.training.optim import is_decayed, make_optimizer, make_schedule
from clip_har_jax.training.state import TrainState, state_shardings
from clip_har_jax.training.steps import make_train_step

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
HUB_SIZES = {
    "openai/clip-vit-base-patch32": "ViT-B/32",
    "openai/clip-vit-base-patch16": "ViT-B/16",
    "openai/clip-vit-large-patch14": "ViT-L/14",
    "openai/clip-vit-large-patch14-336": "ViT-L/14@336",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_training_step_of_each_config(path):
    config = load_config(path)
    size = NAMED_SIZES[HUB_SIZES.get(config.model.name, config.model.name)]
    model = abstract_model(size, Runtime(config.model.compute_dtype, config.model.remat, config.model.attention))
    mesh = make_mesh(config.mesh)
    params = flat_params(model)
    shapes = {name: value.shape for name, value in params.items()}
    shardings = param_shardings(shapes, axis_names(model), mesh)
    optimizer = make_optimizer(config.optim, 100, params)
    method = make_method(config.method, 15)
    preprocess = Preprocess(size.vision.image_size)
    step = make_train_step(
        nnx.graphdef(model),
        method,
        optimizer,
        make_schedule(config.optim, 100),
        preprocess,
        config.method.label_smoothing,
        state_shardings(optimizer, params, shardings, mesh),
        mesh,
    )

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    batch_size, side = config.train.global_batch_size, size.vision.image_size
    state = TrainState(spec((), jnp.int32), params, jax.eval_shape(optimizer.init, params), spec((2,), jnp.uint32))
    classes = Classes(spec((15, size.text.context_length), jnp.int32), spec((15,), jnp.int32), None)
    batch = Batch(
        spec((batch_size, side, side, 3), jnp.uint8),
        spec((batch_size,), jnp.int32),
        spec((batch_size,), jnp.float32),
        spec((batch_size,), jnp.int32),
    )
    after, metrics = jax.eval_shape(step, state, {}, classes, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "top1", "grad_norm", "learning_rate"} <= set(vars(metrics))


def test_forward_flops_by_hand():
    tower = VisionConfig(hidden_size=4, intermediate_size=8, num_layers=2, num_heads=2, image_size=4, patch_size=2)
    patches = 2 * 4 * 12 * 4
    layer = 2 * 5 * (4 * 16 + 2 * 4 * 8) + 4 * 25 * 4
    assert forward_flops(tower, 3) == patches + 2 * layer + 2 * 4 * 3
    text = TextConfig(hidden_size=4, intermediate_size=8, num_layers=1, num_heads=2, context_length=5)
    assert forward_flops(text, 3) == layer + 2 * 4 * 3


def test_named_sizes_have_the_published_number_of_parameters():
    """Within 0.1 M of open_clip's model profile (ViT-B-32 151.28 M, ViT-B-16 149.62 M, ViT-L-14 427.62 M)."""
    published = {"ViT-B/32": 151.28, "ViT-B/16": 149.62, "ViT-L/14": 427.62}
    for name, millions in published.items():
        count = sum(np.prod(value.shape) for value in flat_params(abstract_model(NAMED_SIZES[name])).values())
        assert abs(count / 1e6 - millions) < 0.1


def test_weight_decay_acts_on_matrices_only():
    names = set(flat_params(abstract_model(CLIPConfig())))
    decayed = {name for name in names if is_decayed(name)}
    assert all(name.endswith(".kernel") for name in decayed)
    assert len(decayed) == 2 * 6 + 3  # per tower: 4 of attention, 2 of the MLP; patches and two projections
    assert not any("norm" in name or "bias" in name or "position" in name for name in decayed)
