"""The transformer stack of both towers: pre-norm blocks, stacked over layers, scanned and rematerialised.

Parameters carry logical axis names ('embed', 'heads', 'mlp', 'layers'); `parallel/sharding.py` maps them to a mesh.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's towers
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # LAION's
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # SigLIP's
}
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
MakeModule = Callable[[nnx.Rngs], nnx.Module]


@dataclass(frozen=True)
class TowerConfig:
    """The shape of one transformer stack, in Hugging Face's terms."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Runtime:
    """The settings of computation. Apart from rounding, the results don't depend on them."""

    compute_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    activations: NamedSharding | None = None  # of [batch, tokens, width]; None: chosen by the compiler

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def attention_implementation(self) -> Literal["xla", "cudnn"]:
        """'cudnn' is flash attention; it needs an NVIDIA GPU and a 16-bit type."""
        flash = jax.default_backend() == "gpu" and self.compute_dtype == "bfloat16"
        return "cudnn" if self.attention == "cudnn" or (self.attention == "auto" and flash) else "xla"


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(inputs: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    of_x = jax.lax.dot_general(grad, kernel, (((grad.ndim - 1,), (1,)), ((), ())))
    rows, of_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return of_x, jax.lax.dot_general(rows, of_rows, (((0,), (0,)), ((), ())))


_product.defvjp(_product_forward, _product_backward)


def last_dim_product(
    x: Float[Array, "*b i"],
    kernel: Float[Array, "i o"],
    dimension_numbers: object,
    precision: object = None,
    **_: object,
) -> Float[Array, "*b o"]:
    """Return x @ kernel, in the form that `nnx.Linear` calls, with a gradient of the kernel that needs no transpose.

    JAX's own rule computes that gradient as grad^T x and transposes the result. On CPUs the compiler then transposes
    `grad` first, and the product runs at 0.5 to 0.8 of the rate of x^T grad.
    """
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
    assert precision is None, precision
    return _product(x, kernel)


def linear(
    in_dim: int,
    out_dim: int,
    axes: tuple[str | None, str | None],
    rngs: nnx.Rngs,
    runtime: Runtime,
    *,
    std: float,
    use_bias: bool = True,
) -> nnx.Linear:
    """Return a dense layer with logical axis names `axes` for its kernel [in, out], drawn from N(0, std^2)."""
    return nnx.Linear(
        in_dim,
        out_dim,
        use_bias=use_bias,
        dtype=runtime.dtype,
        kernel_init=nnx.with_partitioning(nnx.initializers.normal(std), axes),
        bias_init=nnx.with_partitioning(nnx.initializers.zeros_init(), axes[1:]),
        # A remat policy that saves matrix products doesn't see those inside a custom gradient.
        dot_general=last_dim_product if runtime.remat == "none" else jax.lax.dot_general,
        rngs=rngs,
    )


def layer_norm(dim: int, eps: float, rngs: nnx.Rngs, runtime: Runtime) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        dim,
        epsilon=eps,
        dtype=runtime.dtype,
        use_fast_variance=False,  # E[x^2] - E[x]^2 is too inexact for parity with other implementations
        scale_init=nnx.with_partitioning(nnx.initializers.ones_init(), ("embed",)),
        bias_init=nnx.with_partitioning(nnx.initializers.zeros_init(), ("embed",)),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Multi-head self-attention with separate query, key and value projections."""

    def __init__(self, config: TowerConfig, runtime: Runtime, rngs: nnx.Rngs):
        dim, std = config.hidden_size, config.hidden_size**-0.5
        self.num_heads, self.runtime = config.num_heads, runtime
        self.query = linear(dim, dim, ("embed", "heads"), rngs, runtime, std=std)
        self.key = linear(dim, dim, ("embed", "heads"), rngs, runtime, std=std)
        self.value = linear(dim, dim, ("embed", "heads"), rngs, runtime, std=std)
        self.out = linear(dim, dim, ("heads", "embed"), rngs, runtime, std=std * (2 * config.num_layers) ** -0.5)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b 1 1 n"] | None,
        is_causal: bool,
        queries: Float[Array, "b q d"] | None = None,
    ) -> Float[Array, "b q d"]:
        """Return the attention output for `queries` (None: for all tokens) over the tokens `x`."""
        queries = x if queries is None else queries
        batch, length, dim = x.shape
        heads = (self.num_heads, dim // self.num_heads)
        attended = jax.nn.dot_product_attention(
            self.query(queries).reshape(batch, queries.shape[1], *heads),
            self.key(x).reshape(batch, length, *heads),
            self.value(x).reshape(batch, length, *heads),
            mask=mask,
            is_causal=is_causal,
            implementation=self.runtime.attention_implementation,
        )
        return self.out(attended.reshape(queries.shape))


class MLP(nnx.Module):
    def __init__(self, config: TowerConfig, runtime: Runtime, rngs: nnx.Rngs):
        dim, hidden = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = linear(dim, hidden, ("embed", "mlp"), rngs, runtime, std=(2 * dim) ** -0.5)
        self.fc2 = linear(hidden, dim, ("mlp", "embed"), rngs, runtime, std=(2 * dim * config.num_layers) ** -0.5)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nnx.Module):
    """One pre-norm layer: attention and MLP, each with a residual connection; in clip models also a part over time.

    Args:
      time: makes the module over the frames of a clip, placed before the attention; None: there is none.
    """

    def __init__(self, config: TowerConfig, runtime: Runtime, rngs: nnx.Rngs, time: MakeModule | None = None):
        self.time = None if time is None else time(rngs)
        self.norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs, runtime)
        self.attention = Attention(config, runtime, rngs)
        self.norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs, runtime)
        self.mlp = MLP(config, runtime, rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b 1 1 n"] | None,
        is_causal: bool,
        num_frames: int | None = None,
    ) -> Float[Array, "b n d"]:
        x = self._over_time(x, num_frames)
        x = x + self.attention(self.norm1(x), mask, is_causal)
        return x + self.mlp(self.norm2(x))

    def _over_time(self, x: Float[Array, "b n d"], num_frames: int | None) -> Float[Array, "b n d"]:
        return x if self.time is None or num_frames is None else x + self.time(x, num_frames)

    def first_token(self, x: Float[Array, "b n d"], num_frames: int | None = None) -> Float[Array, "b 1 d"]:
        """Return the first token of the output, without computing the others."""
        x = self._over_time(x, num_frames)
        normed = self.norm1(x)
        x = x[:, :1] + self.attention(normed, None, False, queries=normed[:, :1])
        return x + self.mlp(self.norm2(x))


def make_layers(config: TowerConfig, runtime: Runtime, rngs: nnx.Rngs, time: MakeModule | None = None) -> Block:
    """Return all blocks of a tower as one `Block` with a leading 'layers' dim, initialised like OpenAI's."""
    return stack_modules(lambda rngs: Block(config, runtime, rngs, time), config.num_layers, rngs)


def stack_modules(make: MakeModule, count: int, rngs: nnx.Rngs) -> Any:
    """Return `count` modules stacked into one with a leading 'layers' dim, each with its own random weights."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stack(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return stack(rngs)


def unstack(layers: Block) -> list[Block]:
    """Return a list of single blocks, for exporters: other runtimes are slow at scans and at slicing weights."""
    graphdef, stacked = nnx.split(layers)
    count = len(jax.tree.leaves(stacked)[0])
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(count)]


class DropPath(NamedTuple):
    """Stochastic depth (Huang et al. 2016), also called drop path: rows skip layers at random.

    The probability grows linearly from 0 at the first layer to `rate` at the last (as in DeiT, Touvron et al. 2021; in
    equation 4 of the paper it is 0 one layer lower). The residual of a kept row is divided by the probability to keep
    it, so evaluation needs no scaling (as in inverted dropout).
    """

    key: Any  # random key
    rate: float


def _drop_path(old: jax.Array, new: jax.Array, key: jax.Array, rate: jax.Array) -> jax.Array:
    kept = jax.random.bernoulli(key, 1 - rate, (old.shape[0], 1, 1))
    return jnp.where(kept, old + (new - old) / (1 - rate).astype(old.dtype), old)


def apply_layers(
    layers: Block | Sequence[Block],
    x: Float[Array, "b n d"],
    runtime: Runtime,
    *,
    mask: Bool[Array, "b 1 1 n"] | None = None,
    is_causal: bool = False,
    drop: DropPath | None = None,
    num_frames: int | None = None,
) -> Float[Array, "b n d"]:
    """Run the blocks one after the other.

    Stacked blocks run in a scan, which compiles one block instead of all. `runtime.remat` is the policy for the
    activations that its backward pass keeps.

    Args:
      layers: stacked, from `make_layers`, or a list, from `unstack`.
      x: tokens.
      runtime: how to compute.
      mask: tokens that may be attended to; None: all.
      is_causal: a token attends only to itself and earlier ones.
      drop: stochastic depth; None: off.
      num_frames: of each clip, whose frames are rows of `x`; None: images.
    """
    if isinstance(layers, Sequence):
        for layer in layers:
            x = layer(x, mask, is_causal, num_frames)
        return x
    graphdef, stacked = nnx.split(layers)

    count = len(jax.tree.leaves(stacked)[0])
    dropping = None
    if drop is not None:
        dropping = (jax.random.split(drop.key, count), drop.rate * jnp.arange(count) / max(count - 1, 1))

    def block(x: jax.Array, inputs: tuple[object, Any]) -> tuple[jax.Array, None]:
        params, dropping = inputs
        # Without this constraint the compiler may shard the width over the axis of the weights.
        x = x if runtime.activations is None else jax.lax.with_sharding_constraint(x, runtime.activations)
        new = nnx.merge(graphdef, params)(x, mask, is_causal, num_frames)
        return (new if dropping is None else _drop_path(x, new, *dropping)), None

    if runtime.remat != "none":
        block = jax.checkpoint(block, policy=REMAT_POLICIES[runtime.remat], prevent_cse=False)
    return jax.lax.scan(block, x, (stacked, dropping))[0]
