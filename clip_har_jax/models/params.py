"""The parameters of a model as a flat dict, {"vision.layers.mlp.fc1.kernel": array}, and back.

Training, checkpoints, sharding and weight files all use these dotted paths as names.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import NamedSharding
from jaxtyping import Array, UInt32

from clip_har_jax.models.configuration import TwoTowerConfig
from clip_har_jax.models.families import family_of
from clip_har_jax.models.layers import Runtime, stack_modules
from clip_har_jax.models.temporal import BLOCK, HEAD, FrameTransformer, make_block_part
from clip_har_jax.models.two_towers import TwoTowers

Params = dict[str, Any]  # dotted path -> array

# XLA's options for a program that runs once: optimising it takes three times as long as compiling it without.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def abstract_model(config: TwoTowerConfig, runtime: Runtime = Runtime()) -> TwoTowers:
    """Return the model with shapes and axis names in place of weights. Each call returns a model of its own."""
    return nnx.clone(_abstract_model(config, runtime))


@cache
def _abstract_model(config: TwoTowerConfig, runtime: Runtime) -> TwoTowers:
    # Tracing the initialization takes a quarter of a second, and a run needs the model several times.
    return nnx.eval_shape(lambda: family_of(config).model(config, runtime, rngs=nnx.Rngs(0)))


def flat_params(model: nnx.Module) -> Params:
    """Return a module's parameters by dotted path."""
    return {
        ".".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def axis_names(model: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """Return the logical axis names of each parameter, by dotted path."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): value.get_metadata().get("out_sharding") or () for path, value in state}


def unflatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict that `nnx.merge` takes.

    Its order is that of sorted keys, so layer numbers become ints: as strings, "10" would come before "2".
    """
    return traverse_util.unflatten_dict({_path(name): value for name, value in params.items()})


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def make_model(config: TwoTowerConfig, params: Mapping[str, Any], runtime: Runtime = Runtime()) -> TwoTowers:
    """Return a model that computes with `params`."""
    return nnx.merge(nnx.graphdef(abstract_model(config, runtime)), unflatten(params))


def init_params(config: TwoTowerConfig, seed: int, shardings: Mapping[str, NamedSharding] | None = None) -> Params:
    """Return random weights.

    Args:
      shardings: of the parameters to make, by dotted path. Each device computes only its shards, so no device ever
        holds a whole copy of a sharded parameter. None: all parameters, on one device.
    """
    key = jax.random.key_data(jax.random.key(seed))
    if shardings is None:
        return _make_params(config, key)
    return init_program(config, shardings)(np.asarray(key))  # a host array: the same on every process of a mesh


def init_program(config: TwoTowerConfig, shardings: Mapping[str, NamedSharding]) -> Any:
    """Return the jitted function from raw key data, uint32[2], to random weights with these shardings."""

    def make(key: UInt32[Array, "2"]) -> Params:
        params = _make_params(config, key)
        return {name: params[name] for name in shardings}

    options = QUICK_COMPILE if jax.default_backend() == "cpu" else None
    return jax.jit(make, out_shardings=dict(shardings), compiler_options=options)


def _make_params(config: TwoTowerConfig, key: Any) -> Params:
    return flat_params(family_of(config).model(config, rngs=nnx.Rngs(jax.random.wrap_key_data(key))))


def init_temporal(config: TwoTowerConfig, seed: int) -> Params:
    """Return initial weights of the temporal parts of a model; with them, its predictions don't change."""
    rngs = nnx.Rngs(seed)
    params: Params = {}
    with nnx.use_eager_sharding(False):
        if (make := make_block_part(config.temporal, config.vision, Runtime())) is not None:
            stacked = stack_modules(make, config.vision.num_layers, rngs)
            params |= {BLOCK + name: value for name, value in flat_params(stacked).items()}
        if config.temporal == "head":
            head = FrameTransformer(config.projection_dim, rngs)
            params |= {HEAD + name: value for name, value in flat_params(head).items()}
    return params


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the umask; the library alone would make it private (0600)."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)
