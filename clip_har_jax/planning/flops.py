"""Floating-point operations of a program's matrix products, counted in its jaxpr.

XLA's `cost_analysis` counts the body of a scan once. Here it counts as often as it runs, and so does what
rematerialisation computes again.
"""

import math
from typing import Any


def matmul_flops(jaxpr: Any) -> int:
    """Operations over all devices in one run: 2 for each multiply-add of the matrix products; nothing else counts.

    Of a conditional the dearest branch counts; the body of a loop whose length isn't fixed counts once.

    Args:
      jaxpr: a `ClosedJaxpr` or `Jaxpr`, such as `jax.make_jaxpr(f)(x)` or `jax.jit(f).trace(x).jaxpr` gives.
    """
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[dim] for dim in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "cond":
            total += max(matmul_flops(branch) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":  # its body is written for one of the devices
                axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
                times = math.prod(params["mesh"].shape[axis] for axis in axes)
            total += times * sum(matmul_flops(inner) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """Return the jaxprs among an equation's parameters."""
    return [value for value in params.values() if hasattr(getattr(value, "jaxpr", value), "eqns")]
