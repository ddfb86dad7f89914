"""Optimisers and schedules by name, clipping by global norm, layer-wise learning rates and freezing."""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import numpy as np
import optax
from optax import contrib

from clip_har_jax.config import OptimConfig
from clip_har_jax.errors import UserError
from clip_har_jax.models.params import Params

Shapes = Mapping[str, tuple[int, ...]]
Decayed = Mapping[str, bool]  # by parameter, whether weight decay applies
Part: TypeAlias = optax.GradientTransformation
# Of the update of a matrix, so that one learning rate suits Muon and AdamW (Liu et al. 2025, section 2.2).
MUON_RMS = 0.2
_STACKED = re.compile(r"(vision|text)\.layers\.(.+)")


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear from 0 to the peak, then as `config.schedule` says."""
    warmup = min(round(config.warmup_fraction * num_steps), num_steps - 1)
    peak, after = config.learning_rate, num_steps - warmup
    decay = max(1, round(config.decay_fraction * after))
    schedule = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, after),
        "constant": lambda: optax.constant_schedule(peak),
        # Warm-up, stable, decay (Hu et al. 2024, MiniCPM)
        "wsd": lambda: optax.linear_schedule(peak, 0.0, decay, transition_begin=after - decay),
    }[config.schedule]()
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


def is_decayed(name: str) -> bool:
    """Return whether weight decay applies: to matrices, by name, since stacked biases have two dims too."""
    return name.endswith((".kernel", ".lora_a", ".lora_b"))


def is_layer_matrix(name: str) -> bool:
    """Return whether a parameter is the kernel of a dense layer inside a transformer, which Muon is made for."""
    return ".layers." in name and name.endswith(".kernel")


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
    """Return the optimiser of the parameters with these dotted names and shapes.

    Args:
      schedule: the learning rate by step.
      masks: from `freeze_masks`; parameters of mask 0 are neither updated nor part of the gradient's norm.

    Raises:
      UserError: settings that contradict one another.
    """
    if config.name in AVERAGES and (config.schedule != "constant" or config.ema_decay):
        raise UserError(
            f"config.optim.name={config.name} averages the weights in place of a decaying rate; set "
            "optim.schedule=constant and optim.ema_decay=0"
        )
    decays = layer_scales(shapes, config.layer_decay)
    scale = _multiply({name: np.asarray(decays[name] * masks[name]) for name in shapes})
    decayed = {name: is_decayed(name) for name in shapes}
    return optax.chain(
        _multiply({name: masks[name] for name in shapes}),
        optax.clip_by_global_norm(config.clip_norm),
        *OPTIMIZERS[config.name](config, schedule, decayed, scale),
    )


def evaluated_weights(config: OptimConfig) -> Callable[[optax.OptState, Params], Params] | None:
    """Return the function from an optimiser's state and parameters to the weights to evaluate; None: the parameters."""
    average = AVERAGES.get(config.name)
    return None if average is None else lambda state, params: average(state[-1], params)


def _adamw(
    config: OptimConfig, schedule: optax.Schedule, decayed: Decayed, scale: Part, b1: float | None = None
) -> list[Part]:
    """Return AdamW; `b1` replaces that of the config."""
    adamw = optax.adamw(
        schedule,
        b1=config.b1 if b1 is None else b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=dict(decayed),
    )
    return [adamw, scale]


def _lion(config: OptimConfig, schedule: optax.Schedule, decayed: Decayed, scale: Part) -> list[Part]:
    lion = optax.lion(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=dict(decayed))
    return [lion, scale]


def _muon(config: OptimConfig, schedule: optax.Schedule, decayed: Decayed, scale: Part) -> list[Part]:
    # Muon is for the matrices of layers, each by itself where layers are stacked, and Adam for the rest.
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    muon = contrib.muon(
        1.0,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        muon_weight_dimension_numbers={name: matrix if is_layer_matrix(name) else None for name in decayed},
        consistent_rms=MUON_RMS,
    )
    return [muon, *_decay_and_rate(config, schedule, decayed), scale]


def _adafactor(config: OptimConfig, schedule: optax.Schedule, decayed: Decayed, scale: Part) -> list[Part]:
    adafactor = optax.adafactor(None, multiply_by_parameter_scale=False, momentum=config.b1)
    return [adafactor, *_decay_and_rate(config, schedule, decayed), scale]


def _schedule_free_adamw(config: OptimConfig, schedule: optax.Schedule, decayed: Decayed, scale: Part) -> list[Part]:
    # The average takes the place of Adam's first moment.
    base = optax.chain(*_adamw(config, schedule, decayed, scale, b1=0.0))
    return [contrib.schedule_free(base, schedule, b1=config.b1)]


def _decay_and_rate(config: OptimConfig, schedule: optax.Schedule, decayed: Decayed) -> list[Part]:
    """Return weight decay that the learning rate multiplies, and that rate, for updates that point downhill."""
    return [optax.add_decayed_weights(-config.weight_decay, dict(decayed)), optax.scale_by_schedule(schedule)]


# By the values of `optim.name`; each returns what is chained after clipping.
OPTIMIZERS: dict[str, Callable[[OptimConfig, optax.Schedule, Decayed, Part], list[Part]]] = {
    # Loshchilov and Hutter 2019
    "adamw": _adamw,
    # Chen et al. 2023
    "lion": _lion,
    # Jordan et al. 2024; Liu et al. 2025
    "muon": _muon,
    # Shazeer and Stern 2018, with momentum, as Zhai et al. 2022 train vision transformers
    "adafactor": _adafactor,
    # Defazio et al. 2024
    "schedule_free_adamw": _schedule_free_adamw,
}
# Optimisers that evaluate an average of the weights.
AVERAGES = {"schedule_free_adamw": contrib.schedule_free_eval_params}


def _multiply(scales: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    """Return a transformation that multiplies the update of each parameter by a constant."""
    needed = {name: scale for name, scale in scales.items() if not np.all(scale == 1)}
    return optax.stateless(
        lambda updates, _: {
            name: update * needed[name] if name in needed else update for name, update in updates.items()
        }
    )
