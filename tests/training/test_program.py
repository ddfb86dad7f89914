"""Programs: runs whose steps are equal share one, and only these; few are kept."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from clip_har_jax.config import make_config
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.losses import masked_mean
from clip_har_jax.training.program import NUM_KEPT, Program, make_program

SIZE = CLIPConfig(
    TextConfig(vocab_size=101, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, context_length=8),
    VisionConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, image_size=16, patch_size=8),
    projection_dim=16,
)


def program_of(sections: dict[str, Any], num_steps: int = 10, counts: tuple[int, ...] = (4, 2)) -> Program:
    config = make_config(sections)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return make_program(config, SIZE, Preprocess(16), 2, num_steps, mesh, counts)


def test_runs_that_differ_in_seed_or_data_share_a_program() -> None:
    first = program_of({})
    others: list[dict[str, Any]] = [
        {"seed": 3},
        {"data": {"train": "synthetic?split=val", "shots": 4}, "text": {"descriptions": {"running": ("fast",)}}},
        {"train": {"log_every_steps": 3}, "checkpoint": {"every_steps": 7}, "trackers": ("tensorboard",)},
    ]
    assert all(program_of(sections) is first for sections in others)
    assert program_of({}, counts=(1, 9)) is first  # no loss balances the classes


@pytest.mark.parametrize(
    ("sections", "others"),
    [
        ({"optim": {"learning_rate": 1e-3}}, {}),
        ({"method": {"label_smoothing": 0.1}}, {}),
        ({"model": {"compute_dtype": "bfloat16"}}, {}),
        ({"train": {"accumulation_steps": 2}}, {}),
        ({"data": {"train": "motion"}}, {}),
        ({"data": {"multi_label": True}}, {}),
        ({}, {"num_steps": 11}),
        ({"method": {"class_balance": 0.9}}, {"counts": (1, 9)}),
    ],
)
def test_other_steps_are_another_program(sections: dict[str, Any], others: dict[str, Any]) -> None:
    first = program_of(sections if others else {})
    assert program_of(sections, **others) is not first


def test_the_oldest_program_goes() -> None:
    first = program_of({})
    for number in range(NUM_KEPT):
        program_of({}, num_steps=20 + number)
    assert program_of({}) is not first


def test_tests_check_shapes() -> None:
    with pytest.raises(TypeCheckError):
        masked_mean(jnp.zeros(3), jnp.ones(4))
