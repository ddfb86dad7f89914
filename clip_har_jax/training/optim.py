"""AdamW with warm-up and cosine decay, clipping by global norm, and a weight-decay mask."""

from collections.abc import Iterable

import optax

from clip_har_jax.config import OptimConfig


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak, then cosine to 0 at the last step."""
    warmup = min(round(config.warmup_fraction * num_steps), num_steps - 1)
    return (
        optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, num_steps)
        if warmup
        else (optax.cosine_decay_schedule(config.learning_rate, num_steps))
    )


def is_decayed(name: str) -> bool:
    """Whether weight decay acts on a parameter: matrices only. By name, since stacked biases have two dims too."""
    return name.endswith(".kernel")


def make_optimizer(config: OptimConfig, num_steps: int, names: Iterable[str]) -> optax.GradientTransformation:
    """The optimiser of the parameters with these dotted names (Loshchilov and Hutter 2019)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask={name: is_decayed(name) for name in names},
        ),
    )
