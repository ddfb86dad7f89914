"""LoRA (Hu et al. 2021): low-rank updates of frozen linear layers, merged into them when the model is saved."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from clip_har_jax.errors import UserError
from clip_har_jax.models.params import Params
from clip_har_jax.models.two_towers import TwoTowers

A, B = ".lora_a", ".lora_b"  # ends of parameter names: [..., in, rank] and [..., rank, out]


class LoRALinear(nnx.Linear):
    """A linear layer plus `scale` times the product of two thin matrices.

    It replaces a layer and keeps the names of its parameters. The gradients of the thin matrices don't need that of the
    full kernel.
    """

    lora_a: nnx.Param
    lora_b: nnx.Param

    def __init__(self, layer: nnx.Linear, rank: int, scale: float):
        for name, value in vars(layer).items():
            if not name.startswith("_pytree__"):
                setattr(self, name, value)
        kernel = layer.kernel.get_value()
        *stack, in_dim, out_dim = kernel.shape
        axes = layer.kernel.get_metadata()["out_sharding"]
        self.lora_scale = scale
        for name, shape, sharding in (
            ("lora_a", (*stack, in_dim, rank), (*axes[:-1], None)),
            ("lora_b", (*stack, rank, out_dim), (*axes[:-2], None, axes[-1])),
        ):
            with nnx.use_eager_sharding(False):
                setattr(self, name, nnx.Param(jax.ShapeDtypeStruct(shape, kernel.dtype), out_sharding=sharding))

    def __call__(self, inputs: Float[Array, "*b i"], out_sharding: Any = None) -> Float[Array, "*b o"]:
        a, b = (matrix[...].astype(inputs.dtype) for matrix in (self.lora_a, self.lora_b))
        return super().__call__(inputs, out_sharding) + self.lora_scale * ((inputs @ a) @ b)


def add_lora(model: TwoTowers, targets: Sequence[str], towers: Sequence[str], rank: int, alpha: float) -> list[str]:
    """Insert low-rank updates into the linear layers of an abstract model.

    Args:
      model: from `abstract_model`; changed in place.
      targets: shell patterns of layer names, e.g. `*.attention.query`; the stacked layers of a tower share one name.
      towers: 'text', 'vision' or both; layers of other towers don't change.
      rank: of the updates.
      alpha: the updates are scaled by alpha / rank.

    Returns:
      The names of the changed layers.

    Raises:
      UserError: a target that matches no layer; a rank that isn't smaller than a layer's sizes.
    """
    layers = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear) and str(path[0]) in towers
    }
    chosen: list[str] = []
    for target in targets:
        hits = [name for name in layers if fnmatchcase(name, target)]
        if not hits:
            raise UserError(
                f"config.method.lora_targets: no linear layer of the tower ({', '.join(towers)}) is called {target!r}; "
                f"layers: {', '.join(sorted(layers))}"
            )
        chosen += [name for name in hits if name not in chosen]
    for name in chosen:
        size = min(layers[name].in_features, layers[name].out_features)
        if rank >= size:
            raise UserError(f"config.method.lora_rank is {rank}; {name} has only {size} dims, use a rank below that")
        *parents, last = name.split(".")
        owner: Any = model
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, LoRALinear(layers[name], rank, alpha / rank))
    return chosen


def init_lora(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return initial values of these shapes whose update is 0: random first matrices, second ones 0.

    Section 4.1 of the paper.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(A):
            params[name] = (rng.normal(size=shape) * shape[-2] ** -0.5).astype(np.float32)
        elif name.endswith(B):
            params[name] = np.zeros(shape, np.float32)
    return params


def merge_lora(params: Mapping[str, Any], scale: float) -> Params:
    """Return the parameters with the updates added to their kernels."""
    merged = {name: value for name, value in params.items() if not name.endswith((A, B))}
    for name, a in params.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            merged[f"{layer}.kernel"] = merged[f"{layer}.kernel"] + scale * (a @ params[layer + B])
    return merged
