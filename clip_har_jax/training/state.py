"""TrainState: everything that a step changes, placed on the mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from clip_har_jax.models.params import Params
from clip_har_jax.parallel.sharding import put_global, replicated


class TrainState(NamedTuple):
    """The state that a step takes and returns and a checkpoint holds; or shapes or shardings in its place."""

    step: Any  # int32 scalar: number of updates
    params: Params  # trainable parameters by dotted path, float32
    ema: Params  # their average, by `optim.ema_decay` or by the optimiser; empty if there is none
    opt_state: Any
    key: Any  # raw uint32[2] random key, as in checkpoints; each step folds its number into it
    skipped: Any  # int32 scalar: consecutive updates, up to this step, skipped because they weren't finite
    skipped_total: Any  # int32 scalar: skipped updates since the run began

    @property
    def weights(self) -> Params:
        """The trainable parameters to evaluate and save: their average if there is one."""
        return self.ema or self.params


def opt_state_shardings(
    optimizer: optax.GradientTransformation, params: Params, shardings: Mapping[str, NamedSharding], mesh: Mesh
) -> Any:
    """Return the optimiser's state sharded as its parameters (ZeRO).

    Moments are found by the names of their parameters. On every device are counters, and the row and column means that
    Adafactor keeps in place of a matrix.
    """
    whole = replicated(mesh)

    def one(path: tuple[Any, ...], kept: jax.ShapeDtypeStruct) -> NamedSharding:
        name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)
        return shardings[name] if name in params and kept.shape == params[name].shape else whole

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(optimizer.init, params))


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: Params,
    shardings: Mapping[str, NamedSharding],
    mesh: Mesh,
    with_average: bool,
) -> TrainState:
    """Return a `TrainState` of shardings."""
    whole, by_name = replicated(mesh), dict(shardings)
    opt_state = opt_state_shardings(optimizer, params, shardings, mesh)
    return TrainState(whole, by_name, by_name if with_average else {}, opt_state, whole, whole, whole)


def make_state(params: Params, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState) -> TrainState:
    """Return the state before the first step; every process passes the same parameters.

    Args:
      params: host arrays, or arrays on the mesh, which the state takes over: the first step donates them.
    """
    params = put_global(params, shardings.params)
    # Copies: a step that donates the state must not receive one buffer twice.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings.ema)
    ema = copy(params) if shardings.ema else {}
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    zero, key = np.zeros((), np.int32), jax.device_get(jax.random.PRNGKey(seed))
    step, key, skipped, total = put_global((zero, key, zero, zero), (shardings.step,) * 4)
    return TrainState(step, params, ema, opt_state, key, skipped, total)


def abstract_state(state: TrainState) -> TrainState:
    """Return the shapes, types and shardings of a state, which may be abstract itself."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
