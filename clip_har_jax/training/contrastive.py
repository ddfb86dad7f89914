"""Contrastive losses over the global batch; no device ever holds the similarity matrix.

The rows of a batch are sharded over the devices. One side's rows are the anchors, the other side's are the columns. A
row's loss needs only a few sums over all columns, and so does its gradient, once these sums are known. Both passes
therefore visit the columns in chunks, and the devices pass their shares of the columns round a ring. The backward pass
computes the logits again instead of keeping them, as FlashAttention does (Dao et al. 2022); the gradients of the
columns travel round the ring with them.

`benchmarks/contrastive_memory.py` measures the memory against that of the whole matrix.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clip_har_jax.parallel.sharding import BATCH_AXES, num_row_shards

Kind = Literal["softmax", "sigmoid"]
Embeddings = Float[Array, "b d"]
Scalar = Float[Array, ""]

CHUNK_SIZE = 512  # columns that a device compares with all its rows at once
EXCLUDED = -1e30  # the logit of a masked column: exp() makes it 0, and a difference of two isn't NaN as with -inf


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
) -> Float[Array, " b"]:
    """Return the contrastive loss of each pair, in nats; their `masked_mean` is the loss of the batch.

    softmax: cross-entropy over the global batch, the mean of both directions (image to text, text to image). The target
      is uniform over an anchor's positives. Without labels, the only positive is the other half of the pair: the loss
      of CLIP (Radford et al. 2021, figure 3). With labels, all pairs of the same class are positives: the loss of UniCL
      (Yang et al. 2022), with the mean over positives outside the logarithm, as in L_out of Khosla et al. 2020 (eq. 2).
    sigmoid: binary cross-entropy of each image with each text, summed over the texts: the loss of SigLIP (Zhai et al.
      2023, section 3.2). Positives as above.

    Args:
      image: L2-normalised image embeddings, rows sharded over `BATCH_AXES`. All arithmetic is float32.
      text: L2-normalised text embeddings, in the same order.
      logit_scale: factor of the cosines, exp() of CLIP's parameter of this name.
      mask: 0 for padding. Such pairs are neither anchors nor negatives, and their losses are 0.
      mesh: with the axes data, fsdp and tensor.
      kind: the loss.
      label: class of each pair.
      logit_bias: added to the logits; it doesn't change the softmax loss.
    """
    # In float32, so that the gradients of both directions are summed in it; 0 where masked, since 0 * NaN is NaN.
    image, text = (jnp.where(mask[:, None] > 0, side.astype(jnp.float32), 0) for side in (image, text))
    label = jnp.arange(len(mask)) if label is None else label
    scale, bias = jnp.asarray(logit_scale, jnp.float32), jnp.asarray(logit_bias, jnp.float32)
    ring = _Ring(mesh, kind, CHUNK_SIZE)
    losses = _row_losses(ring, _Inputs(image, text, label, mask, scale, bias))
    if kind == "softmax":  # the sums of the sigmoid loss are the same in both directions
        losses = (losses + _row_losses(ring, _Inputs(text, image, label, mask, scale, bias))) / 2
    return losses * mask


def even_bias(image: Embeddings, text: Embeddings, scale: Scalar, mask: Float[Array, " b"]) -> Scalar:
    """Return the bias of the sigmoid loss at which an average pair matches with probability 1 / rows.

    SigLIP learns the bias (Zhai et al. 2023, section 3.2). CLIP has none, and fine-tuning is too short to learn one.
    """
    count = jnp.maximum(jnp.sum(mask), 2.0)
    mean_image, mean_text = (jnp.sum(side * mask[:, None], axis=0) / count for side in (image, text))
    return jax.lax.stop_gradient(-scale * mean_image @ mean_text - jnp.log(count - 1))


class _Rows(NamedTuple):
    """Rows of one side of the pairs."""

    embedding: Float[Array, "... b d"]
    label: Int[Array, "... b"]
    mask: Float[Array, "... b"]

    def in_chunks(self, size: int) -> "_Rows":
        """Return the rows as the fewest chunks [k, c, ...] of at most `size` rows, padded with rows of mask 0."""
        count = -(-len(self.mask) // size)
        missing = -len(self.mask) % count

        def one(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]).reshape(count, -1, *x.shape[1:])

        return jax.tree.map(one, self)


class _Block(NamedTuple):
    """The comparison of all anchors of a device with one chunk of columns."""

    similarity: Float[Array, "r c"]
    logits: Float[Array, "r c"]
    positive: Bool[Array, "r c"]
    valid: Bool[Array, "1 c"]


class _Inputs(NamedTuple):
    """The inputs of the row losses in one direction; anchors and columns share labels and mask."""

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


class _SoftmaxSums(NamedTuple):
    """Running sums [r] over the columns, from which the rows' cross-entropies follow."""

    log_normalizer: jax.Array
    positive_logits: jax.Array
    num_positives: jax.Array

    @classmethod
    def start(cls, zeros: jax.Array) -> "_SoftmaxSums":
        return cls(zeros + EXCLUDED, zeros, zeros)

    def add(self, block: _Block) -> "_SoftmaxSums":
        """Return the sums with one more block of columns."""
        log_normalizer = jax.nn.logsumexp(jnp.where(block.valid, block.logits, EXCLUDED), axis=1)
        return self._replace(
            log_normalizer=jnp.logaddexp(self.log_normalizer, log_normalizer),
            positive_logits=self.positive_logits + jnp.sum(block.logits, axis=1, where=block.positive),
            num_positives=self.num_positives + jnp.sum(block.positive, axis=1),
        )

    def losses(self) -> jax.Array:
        """Return the rows' losses [r]; the sums must be over all columns."""
        return self.log_normalizer - self.positive_logits / jnp.maximum(self.num_positives, 1)

    def logit_gradients(self, block: _Block) -> jax.Array:
        """Return the derivatives [r, c] of `losses` with respect to a block's logits."""
        probabilities = jnp.exp(jnp.where(block.valid, block.logits, EXCLUDED) - self.log_normalizer[:, None])
        return probabilities - block.positive / jnp.maximum(self.num_positives, 1)[:, None]


class _SigmoidSums(NamedTuple):
    """Running sums [r] of the rows' binary cross-entropies; the same methods as `_SoftmaxSums`."""

    total: jax.Array

    @classmethod
    def start(cls, zeros: jax.Array) -> "_SigmoidSums":
        return cls(zeros)

    def add(self, block: _Block) -> "_SigmoidSums":
        losses = jax.nn.softplus(jnp.where(block.positive, -block.logits, block.logits))
        return self._replace(total=self.total + jnp.sum(losses, axis=1, where=block.valid))

    def losses(self) -> jax.Array:
        return self.total

    def logit_gradients(self, block: _Block) -> jax.Array:
        return jnp.where(block.valid, jax.nn.sigmoid(block.logits) - block.positive, 0)


SUMS: dict[Kind, type[_SoftmaxSums] | type[_SigmoidSums]] = {"softmax": _SoftmaxSums, "sigmoid": _SigmoidSums}


@dataclass(frozen=True)
class _Ring:
    """The devices of a mesh in a ring, round which the chunks of columns are passed."""

    mesh: Mesh
    kind: Kind
    chunk_size: int

    def scan(self, visit: Callable[[Any, _Rows], tuple[Any, Any]], state: Any, columns: _Rows, sums: Any) -> Any:
        """Run `visit` on this device over the chunks of all devices; called inside `shard_map`.

        Args:
          visit: a scan's body, `visit(state, chunk) -> (state, addition to the chunk's sums)`.
          state: the first state of this device.
          columns: the chunks [k, c, ...] of this device.
          sums: zeros [k, c, ...], one for each of these columns, or an empty tuple.

        Returns:
          The last state of this device, and the sums of its own columns over the visits of all devices.
        """
        # Equal on all devices at first; a scan needs the type of the carry to be that after the first step.
        state, sums = jax.lax.pcast((state, sums), BATCH_AXES, to="varying")
        size = num_row_shards(self.mesh)
        neighbours = [(device, (device + 1) % size) for device in range(size)]

        def visit_and_pass_on(carry: Any, _: None) -> tuple[Any, None]:
            state, columns, sums = carry
            state, additions = jax.lax.scan(visit, state, columns)
            sums = jax.tree.map(jnp.add, sums, additions)
            return (state, *jax.lax.ppermute((columns, sums), BATCH_AXES, neighbours)), None

        (state, _, sums), _ = jax.lax.scan(visit_and_pass_on, (state, columns, sums), length=size)
        return state, sums


ROWS: Any = P(BATCH_AXES)
WHOLE: Any = P()
SPECS = _Inputs(*[ROWS] * 4, *[WHOLE] * 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_losses(ring: _Ring, inputs: _Inputs) -> Float[Array, " b"]:
    return _forward(ring, inputs)[0]


def _forward(ring: _Ring, inputs: _Inputs) -> tuple[jax.Array, Any]:
    def on_device(inputs: _Inputs) -> Any:
        start = SUMS[ring.kind].start(jnp.zeros(inputs.mask.shape))
        chunks = _Rows(inputs.columns, inputs.label, inputs.mask).in_chunks(ring.chunk_size)
        return ring.scan(lambda sums, chunk: (sums.add(inputs.against(chunk)), ()), start, chunks, ())[0]

    sums = jax.shard_map(on_device, mesh=ring.mesh, in_specs=(SPECS,), out_specs=ROWS)(inputs)
    return sums.losses(), (inputs, sums)


def _backward(ring: _Ring, saved: Any, cotangent: jax.Array) -> tuple[_Inputs]:
    def on_device(inputs: _Inputs, sums: Any, cotangent: jax.Array) -> tuple[Any, ...]:
        anchors, columns, label, mask, scale, _ = inputs

        def visit(grads: Any, chunk: _Rows) -> tuple[Any, jax.Array]:
            block = inputs.against(chunk)
            gradients = cotangent[:, None] * sums.logit_gradients(block)
            additions = (gradients @ chunk.embedding, jnp.sum(gradients * block.similarity), jnp.sum(gradients))
            return jax.tree.map(jnp.add, grads, additions), gradients.T @ anchors

        chunks = _Rows(columns, label, mask).in_chunks(ring.chunk_size)
        zeros = (jnp.zeros(anchors.shape), jnp.zeros(()), jnp.zeros(()))
        (of_anchors, *of_scalars), of_chunks = ring.scan(visit, zeros, chunks, jnp.zeros(chunks.embedding.shape))
        of_columns = of_chunks.reshape(-1, columns.shape[1])[: len(columns)]
        return scale * of_anchors, scale * of_columns, None, None, *jax.lax.psum(of_scalars, BATCH_AXES)

    inputs, sums = saved
    out_specs = (ROWS, ROWS, None, None, WHOLE, WHOLE)
    over_mesh = jax.shard_map(on_device, mesh=ring.mesh, in_specs=(SPECS, ROWS, ROWS), out_specs=out_specs)
    return (_Inputs(*over_mesh(inputs, sums, cotangent)),)


_row_losses.defvjp(_forward, _backward)
