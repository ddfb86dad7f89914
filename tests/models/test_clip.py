"""What every shipped config computes: one training step of it by shapes, and FLOPs by hand."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_har_jax.config import load_config
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.models.families import NAMED_SIZES
from clip_har_jax.models.flops import forward_flops
from clip_har_jax.models.layers import DropPath, Runtime, TowerConfig, apply_layers, make_layers, unstack
from clip_har_jax.models.params import abstract_model, flat_params
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.optim import is_decayed
from clip_har_jax.training.program import Program
from clip_har_jax.training.step_config import step_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.py"))
HUB_SIZES = {
    "openai/clip-vit-base-patch32": "ViT-B/32",
    "openai/clip-vit-base-patch16": "ViT-B/16",
    "openai/clip-vit-large-patch14": "ViT-L/14",
    "openai/clip-vit-large-patch14-336": "ViT-L/14@336",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "ViT-B/32",
    "google/siglip2-base-patch16-224": "siglip2-base-patch16-224",
    "google/siglip2-so400m-patch14-384": "siglip2-so400m-patch14-384",
}
TRAINED_SIZES = {"runs/start/model": "mini", "runs/motion/model": "mini"}  # folders that an earlier config trains


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_training_step_of_each_config(path):
    config = load_config(path)
    size = NAMED_SIZES[(HUB_SIZES | TRAINED_SIZES).get(config.model.name, config.model.name)]
    preprocess = Preprocess(size.vision.image_size)
    program = Program(step_config(config), size, preprocess, num_classes=15, num_steps=100, mesh=make_mesh(config.mesh))
    arguments = program.abstract_arguments(num_prompts=15)
    after, metrics, skipped = jax.eval_shape(program.train_step, *arguments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), arguments[0])
    assert {"loss", "grad_norm", "learning_rate"} <= set(vars(metrics))
    assert ("top1" in vars(metrics)) != program.config.of_pairs  # a caption is of no class
    assert skipped.shape == ()


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


def test_rows_pass_by_layers_at_the_rate_of_the_formula():
    """x + keep / (1 - p) * f(x), p growing from 0 at the first layer to the last one's rate; in evaluation x + f(x)."""
    tower, runtime, rate, rows = TowerConfig(8, 16, num_layers=3, num_heads=2), Runtime(), 0.4, 2000
    with nnx.use_eager_sharding(False):
        layers = make_layers(tower, runtime, nnx.Rngs(0))
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 2, 8)), (rows, 2, 8))
    found = jax.jit(lambda x: apply_layers(layers, x, runtime, drop=DropPath(jax.random.key(2), rate)))(x)
    first, *rest = unstack(layers)
    call = nnx.jit(lambda layer, x: layer(x, None, False))
    ways: dict[tuple[int, ...], Any] = {(): call(first, x[:1])}  # by which layers after the first were kept
    for layer, rate_of in zip(rest, (rate / 2, rate), strict=True):
        ways = {
            (*kept, keeps): before + keeps * (call(layer, before) - before) / (1 - rate_of)
            for kept, before in ways.items()
            for keeps in (0, 1)
        }
    assert len(ways) == 4
    shares = {kept: float(np.isclose(found, value, atol=1e-5).all((1, 2)).mean()) for kept, value in ways.items()}
    assert sum(shares.values()) == pytest.approx(1)
    for kept, share in shares.items():
        second, third = kept
        wanted = abs(second - rate / 2) * abs(third - rate)
        assert share == pytest.approx(wanted, abs=4 * np.sqrt(wanted / rows))
    plain = call(rest[1], call(rest[0], call(first, x[:1])))
    np.testing.assert_allclose(jax.jit(lambda x: apply_layers(layers, x, runtime))(x[:1]), plain, atol=1e-5)


def test_weight_decay_acts_on_matrices_only():
    names = set(flat_params(abstract_model(CLIPConfig())))
    decayed = {name for name in names if is_decayed(name)}
    assert all(name.endswith(".kernel") for name in decayed)
    assert len(decayed) == 2 * 6 + 3  # per tower: 4 of attention, 2 of the MLP; patches and two projections
    assert not any("norm" in name or "bias" in name or "position" in name for name in decayed)
    assert all(is_decayed(f"vision.layers.attention.query.lora_{factor}") for factor in "ab")  # they are matrices too
