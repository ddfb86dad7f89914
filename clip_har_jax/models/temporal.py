"""The parts that a clip model adds to CLIP's image tower, so that the order of the frames counts.

| kind | addition | source |
|---|---|---|
| `mean` | nothing: a clip is the mean of its frames | |
| `head` | a transformer over the frames' embeddings | Luo et al. 2021 (CLIP4Clip, sequential type) |
| `st_adapter` | a depth-wise space-time convolution before each block, the tower frozen | Pan et al. 2022 |
| `divided` | attention over time before each block's attention over space | Bertasius et al. 2021 |

The tower treats frames as batch rows. Each addition sees the difference between a frame and the mean of its clip, has
no bias on that path, and starts at 0. So a photograph (a clip of one frame) and a clip without motion always get
exactly the image model's output, and an untrained model averages the frames.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from clip_har_jax.models.layers import Runtime, TowerConfig, layer_norm, linear

KINDS = ("mean", "head", "st_adapter", "divided")
IN_BLOCKS = ("st_adapter", "divided")  # kinds that add a module to each block of the image tower
BLOCK, HEAD = "vision.layers.time.", "time_head."  # prefixes of the parameters' names
ST_ADAPTER_REDUCTION = 4  # width of the tower divided by that of the bottleneck; Pan et al. use 2 (384 of 768)
HEAD_LAYERS = 2
LONG, SHORT = 0.25, 4.0  # initial fall of a head's scores per frame: in its own direction, and in the other one
LONGEST_FRAMES = 100.0  # longest wavelength divided by 2 pi: clips have tens of frames, texts thousands of words


def is_temporal(name: str) -> bool:
    """Return whether a parameter of this dotted name belongs to a temporal part."""
    return name.startswith((BLOCK, HEAD))


def split_temporal(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of the model of images and those of the temporal parts, by dotted name."""
    images = {name: value for name, value in params.items() if not is_temporal(name)}
    return images, {name: value for name, value in params.items() if is_temporal(name)}


def difference(frames: Float[Array, "b t *d"]) -> Float[Array, "b t *d"]:
    """Return the difference between each frame and the mean of its clip."""
    return frames - frames.mean(axis=1, keepdims=True)


def frame_positions(length: int, dim: int) -> Float[Array, "t d"]:
    """Return sinusoids of amplitude 1 (Vaswani et al. 2017, section 3.5), for clips of any length."""
    return _waves(jnp.arange(length, dtype=jnp.float32)[:, None], dim, LONGEST_FRAMES)


def positions_like(frames: Float[Array, "b t d"], longest: float = LONGEST_FRAMES) -> Float[Array, "b t d"]:
    """Return the positions of `frame_positions` for clips whose length may be symbolic, as in an export.

    Args:
      frames: only the shape is used.
      longest: the longest wavelength over 2 pi, in frames.
    """
    # A cumulative sum: the ONNX exporter doesn't support arange of a symbolic length.
    numbers = jnp.cumsum(jnp.ones((*frames.shape[:2], 1)), axis=1) - 1
    return _waves(numbers, frames.shape[2], longest)


def _waves(numbers: Float[Array, "*b 1"], dim: int, longest: float) -> Float[Array, "*b d"]:
    waves = -(-dim // 2)
    lengths = longest ** (np.arange(waves, dtype=np.float32) / waves)  # over 2 pi
    lengths = lengths.reshape((1,) * (numbers.ndim - 1) + (waves,))
    return jnp.concatenate([jnp.sin(numbers / lengths), jnp.cos(numbers / lengths[..., : dim - waves])], axis=-1)


class TimeAttention(nnx.Module):
    """Multi-head attention over time, separately for each position in the image (divided space-time attention).

    Scores fall with the distance of two frames, by a learned slope for each head and direction (after ALiBi, Press et
    al. 2022). At the start half of the heads look back and half look ahead, so that the order of the frames counts from
    the first step. Without the slopes, training has to find an order first, which takes hundreds of steps.

    Args:
      config: the sizes of the tower.
      runtime: the settings of computation.
      rngs: source of the random initial weights.
    """

    def __init__(self, config: TowerConfig, runtime: Runtime, rngs: nnx.Rngs):
        dim, std = config.hidden_size, config.hidden_size**-0.5
        self.num_heads = config.num_heads
        self.norm = layer_norm(dim, config.layer_norm_eps, rngs, runtime)
        self.query = linear(dim, dim, ("embed", "heads"), rngs, runtime, std=std)
        self.key = linear(dim, dim, ("embed", "heads"), rngs, runtime, std=std)
        self.value = linear(dim, dim, ("embed", "heads"), rngs, runtime, std=std, use_bias=False)
        self.out = linear(dim, dim, ("heads", "embed"), rngs, runtime, std=0.0, use_bias=False)
        slopes = jnp.asarray([[LONG, SHORT], [SHORT, LONG]], jnp.float32)  # back and ahead; even heads and odd heads
        self.slopes = nnx.Param(jnp.resize(slopes, (self.num_heads, 2)), out_sharding=(None, None))

    def distance_scores(self, num_frames: int) -> Float[Array, "h t t"]:
        """Return the part of each head's scores that depends on the distance of the frames."""
        ahead = (jnp.arange(num_frames)[None] - jnp.arange(num_frames)[:, None]).astype(jnp.float32)[None]
        back, forth = (self.slopes[...][:, i, None, None] for i in (0, 1))
        return back * jnp.minimum(ahead, 0.0) - forth * jnp.maximum(ahead, 0.0)

    def __call__(self, x: Float[Array, "f n d"], num_frames: int) -> Float[Array, "f n d"]:
        """Return the addition to the tokens [clips * frames, tokens, dim]."""
        _, tokens, dim = x.shape
        heads = (self.num_heads, dim // self.num_heads)

        def by_place(y: jax.Array) -> jax.Array:  # [clips * tokens, heads, frames, dim of a head]
            return (
                y.reshape(-1, num_frames, tokens, *heads)
                .transpose(0, 2, 3, 1, 4)
                .reshape(-1, heads[0], num_frames, heads[1])
            )

        normed = self.norm(x).reshape(-1, num_frames, tokens, dim)
        timed = normed + frame_positions(num_frames, dim).astype(normed.dtype)[None, :, None]
        query, key = by_place(self.query(timed)), by_place(self.key(timed))
        value = by_place(self.value(difference(normed)))
        scores = jnp.matmul(query, key.swapaxes(2, 3)) * heads[1] ** -0.5
        scores = scores.astype(jnp.float32) + self.distance_scores(num_frames)[None]
        found = jnp.matmul(jax.nn.softmax(scores).astype(value.dtype), value)
        found = found.reshape(-1, tokens, heads[0], num_frames, heads[1]).transpose(0, 3, 1, 2, 4)
        return self.out(found.reshape(x.shape))


class SpaceTimeAdapter(nnx.Module):
    """A bottleneck with a depth-wise convolution over 3 frames and 3 x 3 patches; over 3 frames for the class token."""

    def __init__(self, config: TowerConfig, runtime: Runtime, rngs: nnx.Rngs):
        dim = config.hidden_size
        hidden = max(1, dim // ST_ADAPTER_REDUCTION)
        self.down = linear(dim, hidden, ("embed", "mlp"), rngs, runtime, std=dim**-0.5, use_bias=False)
        taps = nnx.initializers.normal(27**-0.5)(rngs.params(), (3, 3, 3, hidden))
        self.taps = nnx.Param(taps, out_sharding=(None, None, None, "mlp"))
        self.up = linear(hidden, dim, ("mlp", "embed"), rngs, runtime, std=0.0, use_bias=False)

    def __call__(self, x: Float[Array, "f n d"], num_frames: int) -> Float[Array, "f n d"]:
        """Return the addition to the tokens [clips * frames, tokens, dim], class token first if there is one."""
        _, tokens, dim = x.shape
        side = math.isqrt(tokens)
        first = tokens - side * side  # class tokens: 1 or 0
        hidden = self.down(difference(x.reshape(-1, num_frames, tokens, dim)))
        width = hidden.shape[-1]
        taps = jnp.asarray(self.taps[...], hidden.dtype)  # exporters make constants of the weights
        patches = hidden[:, :, first:].reshape(-1, num_frames, side, side, width)
        seen = depthwise_conv(patches, taps, (1, 2, 3)).reshape(-1, num_frames, side * side, width)
        token = depthwise_conv(hidden[:, :, :first], taps[:, 1, 1], (1,))
        return self.up(jnp.concatenate([token, seen], axis=2)).reshape(x.shape)


def depthwise_conv(x: jax.Array, taps: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """Convolve each channel of `x` [..., c] along `dims` with 3 taps per dim; 0 outside.

    A sum of shifted copies, which compilers fuse; grouped convolutions of one channel are slow on CPUs.
    """
    padded = jnp.pad(x, [(1, 1) if i in dims else (0, 0) for i in range(x.ndim)])
    total = jnp.zeros_like(x)
    for offsets in np.ndindex(*(3,) * len(dims)):
        part = padded
        for dim, offset in zip(dims, offsets, strict=True):
            part = jax.lax.slice_in_dim(part, offset, offset + x.shape[dim], axis=dim)
        total = total + part * jnp.broadcast_to(taps[offsets], x.shape)
    return total


class FrameTransformer(nnx.Module):
    """A small transformer over the embeddings of a clip's frames, without biases and norms.

    Args:
      dim: of the embeddings.
      rngs: source of the random initial weights.
    """

    def __init__(self, dim: int, rngs: nnx.Rngs):
        float32 = Runtime()  # as small as a head: float32 whatever the tower's type
        std = dim**-0.5

        def layer(axes: tuple[str | None, str | None], in_dim: int, out_dim: int, std: float) -> nnx.Linear:
            return linear(in_dim, out_dim, axes, rngs, float32, std=std, use_bias=False)

        self.layers = nnx.List(
            nnx.Dict(
                query=layer(("embed", "heads"), dim, dim, std),
                key=layer(("embed", "heads"), dim, dim, std),
                value=layer(("embed", "heads"), dim, dim, std),
                fc1=layer(("embed", "mlp"), dim, 4 * dim, std),
                fc2=layer(("mlp", "embed"), 4 * dim, dim, std / 2),
            )
            for _ in range(HEAD_LAYERS)
        )
        self.out = layer(("heads", "embed"), dim, dim, 0.0)

    def __call__(self, frames: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the addition to the frames' L2-normalised embeddings."""
        dim = frames.shape[-1]
        x = difference(frames) * dim**0.5  # elements of about 1, like the positions
        positions = positions_like(frames)
        for layer in self.layers:
            timed = x + positions
            scores = jnp.matmul(layer.query(timed), layer.key(timed).swapaxes(1, 2)) * dim**-0.5
            x = x + jnp.matmul(jax.nn.softmax(scores), layer.value(x))
            x = x + layer.fc2(jax.nn.gelu(layer.fc1(x), approximate=False))
        return self.out(x) * dim**-0.5


def make_block_part(kind: str, config: TowerConfig, runtime: Runtime) -> Callable[[nnx.Rngs], nnx.Module] | None:
    """Return the function that makes the module of a kind in each block; None if there is none."""
    modules = {"st_adapter": SpaceTimeAdapter, "divided": TimeAttention}
    return (lambda rngs: modules[kind](config, runtime, rngs)) if kind in modules else None
