"""TrainState: all that a step changes, placed on the mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from clip_har_jax.models.params import Params
from clip_har_jax.parallel.sharding import put_global, replicated


class TrainState(NamedTuple):
    """What a step takes and gives back, and a checkpoint holds; or, in the same places, their shapes or shardings."""

    step: Any  # int32 scalar: updates made
    params: Params  # trainable parameters by dotted path, float32
    ema: Params  # their moving average; empty where none is kept
    opt_state: Any
    key: Any  # raw uint32 random key; a step folds its number into it
    skipped: Any  # int32 scalar: updates left out because they weren't finite, since the last that wasn't
    skipped_total: Any  # int32 scalar: since the run began


def opt_state_shardings(
    optimizer: optax.GradientTransformation, params: Params, shardings: Mapping[str, NamedSharding], mesh: Mesh
) -> Any:
    """Return the optimiser's state sharded as its parameters (ZeRO); its counters on every device."""
    shapes = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        dict(shardings),
        transform_non_params=lambda _: replicated(mesh),
    )


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: Params,
    shardings: Mapping[str, NamedSharding],
    mesh: Mesh,
    with_ema: bool,
) -> TrainState:
    """Return a `TrainState` of shardings."""
    whole, by_name = replicated(mesh), dict(shardings)
    opt_state = opt_state_shardings(optimizer, params, shardings, mesh)
    return TrainState(whole, by_name, by_name if with_ema else {}, opt_state, whole, whole, whole)


def make_state(params: Params, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState) -> TrainState:
    """Return the state before the first step, from host parameters; every process gives the same."""
    zero = np.zeros((), np.int32)
    ema = put_global(params, shardings.ema) if shardings.ema else {}
    params = put_global(params, shardings.params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    key = np.asarray(jax.random.PRNGKey(seed))
    step, key, skipped, total = put_global((zero, key, zero, zero), (shardings.step,) * 4)
    return TrainState(step, params, ema, opt_state, key, skipped, total)


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, types and shardings: what a checkpoint is restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
