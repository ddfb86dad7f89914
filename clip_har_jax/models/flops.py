"""Floating-point operations (FLOPs) of matrix products, in the two ways that the field counts them.

Model FLOPs follow from the sizes of the model and leave out what rematerialisation computes again (Chowdhery et al.
2022, appendix B); the MFU is defined by them. The FLOPs of a program are counted in its jaxpr and include
rematerialisation; the time of a step follows from them. XLA's `cost_analysis` counts the body of a scan only once.
Everywhere a multiply-add counts as 2, and only matrix products count.
"""

import math
from typing import Any

from clip_har_jax.models.configuration import TextConfig, TwoTowerConfig, VisionConfig
from clip_har_jax.models.temporal import HEAD_LAYERS, ST_ADAPTER_REDUCTION


def forward_flops(tower: VisionConfig | TextConfig, projection_dim: int) -> int:
    """Return the model FLOPs of the forward pass of one image or text."""
    dim = tower.hidden_size
    if isinstance(tower, VisionConfig):
        tokens = tower.num_tokens
        embedding = 2 * tower.num_patches * 3 * tower.patch_size**2 * dim
    else:
        tokens, embedding = tower.context_length, 0
    linear_layers = 2 * tokens * (4 * dim * dim + 2 * dim * tower.intermediate_size)
    attention = 2 * 2 * tokens * tokens * dim
    last = 2 * dim * projection_dim
    if isinstance(tower, VisionConfig) and tower.pooling == "attention":  # one query, in place of a projection
        last = 2 * 2 * (tokens + 1) * dim * dim + 2 * 2 * tokens * dim + 2 * 2 * dim * tower.intermediate_size
    return embedding + tower.num_layers * (linear_layers + attention) + last


def temporal_flops(sizes: TwoTowerConfig, num_frames: int) -> int:
    """Return the model FLOPs that a temporal model adds to the forward pass of one clip.

    The depth-wise convolution of `st_adapter` isn't a matrix product; its sums are under 2% of the adapter's for a
    tower of 768 dims.
    """
    vision, dim = sizes.vision, sizes.vision.hidden_size
    tokens = num_frames * vision.num_tokens
    if sizes.temporal == "divided":
        return vision.num_layers * tokens * (2 * 4 * dim * dim + 2 * 2 * num_frames * dim)
    if sizes.temporal == "st_adapter":
        return vision.num_layers * tokens * 2 * 2 * dim * max(1, dim // ST_ADAPTER_REDUCTION)
    if sizes.temporal == "head":
        width = sizes.projection_dim
        layer = 2 * num_frames * (3 + 8) * width * width + 2 * 2 * num_frames * num_frames * width
        return HEAD_LAYERS * layer + 2 * num_frames * width * width
    return 0


def clip_flops(sizes: TwoTowerConfig, num_frames: int) -> int:
    """Return the model FLOPs of the forward pass of one clip."""
    return num_frames * forward_flops(sizes.vision, sizes.projection_dim) + temporal_flops(sizes, num_frames)


def step_flops(
    sizes: TwoTowerConfig,
    num_images: int,
    num_prompts: int,
    *,
    image_passes: int,
    text_passes: int,
    num_frames: int | None = None,
    temporal_passes: int = 0,
) -> int:
    """Return the model FLOPs of one training step over all devices.

    A backward pass takes twice the forward pass where the kernels of a tower are trained (3 passes in all), and as much
    as the forward pass where only its other parameters are (2): then there are no products for gradients of kernels.

    Args:
      sizes: of the model.
      num_images: of the global batch; or its clips.
      num_prompts: texts that the step encodes.
      image_passes: of the image tower: 1 (forward alone), 2 or 3.
      text_passes: of the text tower; 0: no texts are encoded in the step.
      num_frames: of each clip; None: images.
      temporal_passes: of what a temporal model adds.
    """
    image = (num_frames or 1) * forward_flops(sizes.vision, sizes.projection_dim) * image_passes
    if num_frames is not None:
        image += temporal_flops(sizes, num_frames) * temporal_passes
    return num_images * image + num_prompts * forward_flops(sizes.text, sizes.projection_dim) * text_passes


def matmul_flops(jaxpr: Any) -> int:
    """Return the FLOPs of one run of a program over all devices, rematerialisation included.

    Of a conditional the most expensive branch counts; the body of a loop of unknown length counts once.

    Args:
      jaxpr: a `ClosedJaxpr` or `Jaxpr`, from `jax.make_jaxpr(f)(x)` or `jax.jit(f).trace(x).jaxpr`.
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
            if name == "shard_map":  # its body is the program of one device
                axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
                times = math.prod(params["mesh"].shape[axis] for axis in axes)
            total += times * sum(matmul_flops(inner) for inner in _inner_jaxprs(params))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """Return the jaxprs among the parameters of an equation."""
    return [value for value in params.values() if hasattr(getattr(value, "jaxpr", value), "eqns")]
