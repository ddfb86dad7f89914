"""Contrastive losses over the global batch, of which no device ever holds the similarity matrix.

Each is made of row losses: what the anchors of one side lose against all columns, the rows of the other side. A row's
loss comes from a few sums over the columns, and so does its gradient once these are known, so both passes visit the
columns in chunks: `gather` brings all of them to every device, `ring` passes the devices' shares round. The backward
pass computes logits again rather than keep them (as Dao et al. 2022 do for attention), and the gradients of the columns
go home the way the columns came.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clip_har_jax.parallel.sharding import BATCH_AXES, num_row_shards

Kind = Literal["softmax", "sigmoid"]
Communication = Literal["ring", "gather"]
Embeddings = Float[Array, "b d"]
Scalar = Float[Array, ""]

EXCLUDED = -1e30  # the logit of a column that doesn't count: nothing after exp(), and unlike -inf it can be subtracted


def contrastive_loss(
    image: Embeddings,
    text: Embeddings,
    logit_scale: Scalar,
    mask: Float[Array, " b"],
    *,
    mesh: Mesh,
    kind: Kind = "softmax",
    label: Int[Array, " b"] | None = None,
    logit_bias: Scalar | float = 0.0,
    communication: Communication = "ring",
    chunk_size: int = 512,
) -> Float[Array, " b"]:
    """Each pair's contrastive loss in nats; their `masked_mean` is the batch's.

    softmax: cross-entropy over the global batch, the mean of image -> text and text -> image, with targets uniform over
      an anchor's positives. Without labels only a pair's own image and text are positives of one another: CLIP's loss
      (Radford et al. 2021, figure 3). With labels all images and texts of one action are: UniCL's (Yang et al. 2022),
      which takes the mean over positives outside the logarithm as L_out of Khosla et al. 2020 (eq. 2).
    sigmoid: binary cross-entropy of each image with each text, summed over texts: SigLIP's (Zhai et al. 2023, section
      3.2). Positives are as above.

    Args:
      image: the images' embeddings, normalised, rows sharded over `BATCH_AXES`; all arithmetic on them is float32.
      text: the texts' embeddings, in the images' order.
      logit_scale: what the cosines are multiplied with: the exponential of CLIP's parameter of this name.
      mask: 0 for pairs that count nowhere, neither as anchors nor as negatives; their losses are 0.
      mesh: with the axes data, fsdp and tensor.
      kind: which loss.
      label: the pairs' actions.
      logit_bias: added to the logits; softmax doesn't change by it.
      communication: 'gather' holds all embeddings of one side at once, 'ring' no more than a device's share.
      chunk_size: columns that a device compares with all its rows at once.
    """
    row_losses = functools.partial(_row_losses, _Sweep(mesh, kind, communication, chunk_size))
    return _pair_losses(row_losses, image, text, logit_scale, mask, kind, label, logit_bias)


def dense_contrastive_loss(
    image: Embeddings,
    text: Embeddings,
    logit_scale: Scalar,
    mask: Float[Array, " b"],
    *,
    kind: Kind = "softmax",
    label: Int[Array, " b"] | None = None,
    logit_bias: Scalar | float = 0.0,
) -> Float[Array, " b"]:
    """`contrastive_loss` by way of the whole similarity matrix: the plain form that it must equal."""

    def row_losses(inputs: _Inputs) -> jax.Array:
        block = inputs.against(_Rows(inputs.columns, inputs.label, inputs.mask))
        if kind == "sigmoid":
            return jnp.sum(optax.sigmoid_binary_cross_entropy(block.logits, block.positive), axis=1, where=block.valid)
        targets = block.positive / jnp.maximum(jnp.sum(block.positive, axis=1, keepdims=True), 1)
        return optax.softmax_cross_entropy(jnp.where(block.valid, block.logits, EXCLUDED), targets)

    return _pair_losses(row_losses, image, text, logit_scale, mask, kind, label, logit_bias)


class _Rows(NamedTuple):
    """Rows of one side."""

    embedding: Float[Array, "... b d"]
    label: Int[Array, "... b"]
    mask: Float[Array, "... b"]

    def in_chunks(self, size: int) -> "_Rows":
        """As few chunks [k c ...] of at most `size` rows as can be, filled up with rows that don't count."""
        count = -(-len(self.mask) // size)
        missing = -len(self.mask) % count

        def one(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]).reshape(count, -1, *x.shape[1:])

        return jax.tree.map(one, self)


class _Block(NamedTuple):
    """Anchors against some columns."""

    similarity: Float[Array, "r c"]
    logits: Float[Array, "r c"]
    positive: Bool[Array, "r c"]
    valid: Bool[Array, "1 c"]


class _Inputs(NamedTuple):
    """Of a row loss: the rows of both sides, which have labels and mask in common, and what makes logits of them."""

    anchors: Embeddings
    columns: Embeddings
    label: Int[Array, " b"]
    mask: Float[Array, " b"]
    scale: Scalar
    bias: Scalar

    def against(self, columns: _Rows) -> _Block:
        similarity = self.anchors @ columns.embedding.T
        valid = columns.mask[None, :] > 0
        positive = (self.label[:, None] == columns.label[None, :]) & valid
        return _Block(similarity, self.scale * similarity + self.bias, positive, valid)


def _pair_losses(
    row_losses: Callable[[_Inputs], jax.Array],
    image: Embeddings,
    text: Embeddings,
    logit_scale: Scalar,
    mask: Float[Array, " b"],
    kind: Kind,
    label: Int[Array, " b"] | None,
    logit_bias: Scalar | float,
) -> Float[Array, " b"]:
    """From the row losses of both directions; the sigmoid's sum is the same in either."""
    # In float32, so that the directions' gradients add up in it; 0 where masked, since 0 * NaN is NaN.
    image, text = (jnp.where(mask[:, None] > 0, side.astype(jnp.float32), 0) for side in (image, text))
    label = jnp.arange(len(mask)) if label is None else label
    scale, bias = jnp.asarray(logit_scale, jnp.float32), jnp.asarray(logit_bias, jnp.float32)
    losses = row_losses(_Inputs(image, text, label, mask, scale, bias))
    if kind == "softmax":
        losses = (losses + row_losses(_Inputs(text, image, label, mask, scale, bias))) / 2
    return losses * mask


class _SoftmaxSums(NamedTuple):
    """What rows' cross-entropies need: sums [r] over the columns so far."""

    log_normalizer: jax.Array
    positive_logits: jax.Array
    num_positives: jax.Array

    @classmethod
    def start(cls, zeros: jax.Array) -> "_SoftmaxSums":
        return cls(zeros + EXCLUDED, zeros, zeros)

    def add(self, block: _Block) -> "_SoftmaxSums":
        """With the columns of one more block."""
        log_normalizer = jax.nn.logsumexp(jnp.where(block.valid, block.logits, EXCLUDED), axis=1)
        return self._replace(
            log_normalizer=jnp.logaddexp(self.log_normalizer, log_normalizer),
            positive_logits=self.positive_logits + jnp.sum(block.logits, axis=1, where=block.positive),
            num_positives=self.num_positives + jnp.sum(block.positive, axis=1),
        )

    def losses(self) -> jax.Array:
        """Return the rows' losses [r], once all columns are in."""
        return self.log_normalizer - self.positive_logits / jnp.maximum(self.num_positives, 1)

    def slopes(self, block: _Block) -> jax.Array:
        """Return the derivatives [r c] of `losses` with respect to a block's logits."""
        probabilities = jnp.exp(jnp.where(block.valid, block.logits, EXCLUDED) - self.log_normalizer[:, None])
        return probabilities - block.positive / jnp.maximum(self.num_positives, 1)[:, None]


class _SigmoidSums(NamedTuple):
    """What rows' sums of binary cross-entropies need; the methods are `_SoftmaxSums`'s."""

    total: jax.Array

    @classmethod
    def start(cls, zeros: jax.Array) -> "_SigmoidSums":
        return cls(zeros)

    def add(self, block: _Block) -> "_SigmoidSums":
        losses = jax.nn.softplus(jnp.where(block.positive, -block.logits, block.logits))
        return self._replace(total=self.total + jnp.sum(losses, axis=1, where=block.valid))

    def losses(self) -> jax.Array:
        return self.total

    def slopes(self, block: _Block) -> jax.Array:
        return jnp.where(block.valid, jax.nn.sigmoid(block.logits) - block.positive, 0)


SUMS: dict[Kind, type[_SoftmaxSums] | type[_SigmoidSums]] = {"softmax": _SoftmaxSums, "sigmoid": _SigmoidSums}


@dataclass(frozen=True)
class _Sweep:
    """One pass of every device's anchors over all columns."""

    mesh: Mesh
    kind: Kind
    communication: Communication
    chunk_size: int

    def __call__(self, visit: Callable[[Any, _Rows], tuple[Any, Any]], state: Any, columns: _Rows, sums: Any) -> Any:
        """Run `visit(state, chunk) -> (state, what to add to the chunk's sums)` over the chunks of all devices.

        Args:
          visit: a scan's body.
          state: the device's first state.
          columns: the device's own, in chunks [k c ...].
          sums: zeros [k c ...] for these chunks, or an empty tuple.

        Returns:
          The device's last state, and the sums of its own columns over the visits of all devices.
        """
        # They begin alike on all devices; a scan wants the type that they have after its first step.
        state, sums = jax.lax.pcast((state, sums), BATCH_AXES, to="varying")
        if self.communication == "gather":
            state, additions = jax.lax.scan(visit, state, jax.lax.all_gather(columns, BATCH_AXES, tiled=True))
            return state, jax.lax.psum_scatter(additions, BATCH_AXES, tiled=True)
        size = num_row_shards(self.mesh)
        ring = [(device, (device + 1) % size) for device in range(size)]

        def stop(carry: Any, _: None) -> tuple[Any, None]:
            state, columns, sums = carry
            state, additions = jax.lax.scan(visit, state, columns)
            sums = jax.tree.map(jnp.add, sums, additions)
            return (state, *jax.lax.ppermute((columns, sums), BATCH_AXES, ring)), None

        (state, _, sums), _ = jax.lax.scan(stop, (state, columns, sums), length=size)
        return state, sums


ROWS: Any = P(BATCH_AXES)
WHOLE: Any = P()
SPECS = _Inputs(*[ROWS] * 4, *[WHOLE] * 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_losses(sweep: _Sweep, inputs: _Inputs) -> Float[Array, " b"]:
    return _forward(sweep, inputs)[0]


def _forward(sweep: _Sweep, inputs: _Inputs) -> tuple[jax.Array, Any]:
    def on_device(inputs: _Inputs) -> Any:
        start = SUMS[sweep.kind].start(jnp.zeros(inputs.mask.shape))
        chunks = _Rows(inputs.columns, inputs.label, inputs.mask).in_chunks(sweep.chunk_size)
        return sweep(lambda sums, chunk: (sums.add(inputs.against(chunk)), ()), start, chunks, ())[0]

    sums = jax.shard_map(on_device, mesh=sweep.mesh, in_specs=(SPECS,), out_specs=ROWS)(inputs)
    return sums.losses(), (inputs, sums)


def _backward(sweep: _Sweep, saved: Any, cotangent: jax.Array) -> tuple[_Inputs]:
    def on_device(inputs: _Inputs, sums: Any, cotangent: jax.Array) -> tuple[Any, ...]:
        anchors, columns, label, mask, scale, _ = inputs

        def visit(grads: Any, chunk: _Rows) -> tuple[Any, jax.Array]:
            block = inputs.against(chunk)
            slopes = cotangent[:, None] * sums.slopes(block)
            additions = (slopes @ chunk.embedding, jnp.sum(slopes * block.similarity), jnp.sum(slopes))
            return jax.tree.map(jnp.add, grads, additions), slopes.T @ anchors

        chunks = _Rows(columns, label, mask).in_chunks(sweep.chunk_size)
        zeros = (jnp.zeros(anchors.shape), jnp.zeros(()), jnp.zeros(()))
        (of_anchors, *of_scalars), of_chunks = sweep(visit, zeros, chunks, jnp.zeros(chunks.embedding.shape))
        of_columns = of_chunks.reshape(-1, columns.shape[1])[: len(columns)]
        return scale * of_anchors, scale * of_columns, None, None, *jax.lax.psum(of_scalars, BATCH_AXES)

    inputs, sums = saved
    out_specs = (ROWS, ROWS, None, None, WHOLE, WHOLE)
    over_mesh = jax.shard_map(on_device, mesh=sweep.mesh, in_specs=(SPECS, ROWS, ROWS), out_specs=out_specs)
    return (_Inputs(*over_mesh(inputs, sums, cotangent)),)


_row_losses.defvjp(_forward, _backward)
