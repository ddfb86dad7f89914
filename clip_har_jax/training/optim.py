"""AdamW with warm-up and cosine decay, clipping by global norm, layer-wise learning rates and freezing."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import optax

from clip_har_jax.config import OptimConfig
from clip_har_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
_STACKED = re.compile(r"(vision|text)\.layers\.(.+)")


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear from 0 to the peak, then cosine to 0 at the last step."""
    warmup = min(round(config.warmup_fraction * num_steps), num_steps - 1)
    return (
        optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, num_steps)
        if warmup
        else (optax.cosine_decay_schedule(config.learning_rate, num_steps))
    )


def is_decayed(name: str) -> bool:
    """Return whether weight decay applies: to matrices, by name, since stacked biases have two dims too."""
    return name.endswith((".kernel", ".lora_a", ".lora_b"))


def layer_scales(shapes: Shapes, decay: float) -> dict[str, np.ndarray]:
    """Return the factor of each parameter's learning rate: lower layers change less (Clark et al. 2020, ELECTRA).

    It is `decay` to the power of the number of layers above the parameter in its tower, and 1 above the last layer. For
    stacked layers it has the shape [layers, 1, ...].
    """
    depth = {match[1]: shapes[name][0] for name in shapes if (match := _STACKED.fullmatch(name))}
    scales = {}
    for name, shape in shapes.items():
        tower, _, part = name.partition(".")
        layers = depth.get(tower, 0)
        exponent = np.zeros(1)
        if part.startswith("layers."):
            exponent = np.arange(layers, 0.0, -1) - 1
        elif part.endswith("_embedding") or part.startswith(("patch_embedding", "pre_norm")):
            exponent = np.full(1, layers)
        scales[name] = _to_rank(decay**exponent, len(shape))
    return scales


def freeze_masks(shapes: Shapes, patterns: Sequence[str]) -> dict[str, np.ndarray]:
    """Return 0 for parameters that a pattern freezes, else 1; for stacked layers of shape [layers, 1, ...].

    Args:
      shapes: by dotted name.
      patterns: shell patterns of dotted names with layer numbers: `text.*`, `vision.layers.[0-5].*`.

    Raises:
      UserError: a pattern that matches no parameter.
    """
    unused = set(patterns)
    masks = {}
    for name, shape in shapes.items():
        stacked = _STACKED.fullmatch(name)
        names = [f"{stacked[1]}.layers.{i}.{stacked[2]}" for i in range(shape[0])] if stacked else [name]
        hits = [[pattern for pattern in patterns if fnmatchcase(each, pattern)] for each in names]
        unused -= {pattern for hit in hits for pattern in hit}
        masks[name] = _to_rank(np.asarray([0.0 if hit else 1.0 for hit in hits]), len(shape))
    if unused:
        raise UserError(
            f"config.method.freeze: no parameter is called {min(unused)!r}; names are e.g. text.token_embedding, "
            "vision.layers.0.mlp.fc1.kernel, vision.layers.*, logit_scale"
        )
    return masks


def _to_rank(values: np.ndarray, rank: int) -> np.ndarray:
    return values.astype(np.float32).reshape((-1, *[1] * (rank - 1)) if rank else ())


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, shapes: Shapes, masks: Mapping[str, np.ndarray]
) -> optax.GradientTransformation:
    """Return the optimiser of the parameters with these dotted names and shapes (Loshchilov and Hutter 2019).

    Args:
      schedule: the learning rate by step.
      masks: from `freeze_masks`; parameters of mask 0 are neither updated nor part of the gradient's norm.
    """
    decays = layer_scales(shapes, config.layer_decay)
    return optax.chain(
        _multiply({name: masks[name] for name in shapes}),
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask={name: is_decayed(name) for name in shapes},
        ),
        _multiply({name: np.asarray(decays[name] * masks[name]) for name in shapes}),
    )


def _multiply(scales: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    """Return a transformation that multiplies the update of each parameter by a constant."""
    needed = {name: scale for name, scale in scales.items() if not np.all(scale == 1)}
    return optax.stateless(
        lambda updates, _: {
            name: update * needed[name] if name in needed else update for name, update in updates.items()
        }
    )
