"""Batch and PairBatch: the contract between data, steps and metrics."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """A batch of labelled images; fields are numpy arrays on the host, `jax.Array` on the mesh.

    A row with mask 0 (padding of the last batch, or an image that could not be read) counts nowhere.
    """

    image: Any  # uint8 [b, height, width, 3]; of clips [b, frames, ...], of several views of clips [b, views, ...]
    label: Any  # int32 [b]; of multi-label data uint8 [b, classes], 1 for each label of the image
    mask: Any  # float32 [b]: 1 counts, 0 does not
    index: Any  # int32 [b]: position in the source, -1 for padding


class PairBatch(NamedTuple):
    """A batch of image-text pairs; fields, and rows of mask 0, as in `Batch`."""

    image: Any  # uint8 [b, height, width, 3]
    input_ids: Any  # int32 [b, tokens]
    mask: Any  # float32 [b]: 1 counts, 0 does not
    index: Any  # int32 [b]: row in the global batch; in an evaluation the pair's number, -1 for padding
