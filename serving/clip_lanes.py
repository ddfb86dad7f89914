"""The lanes of clips: for whole clips, and for the frames and the head separately."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_har_jax.inference.exported import ExportedBackend
from clip_har_jax.inference.sliding_windows import Windows, choose_windows
from serving.batcher import Costs, Lane

HEADS_AT_ONCE = 8


@dataclass(frozen=True)
class ClipLanes:
    """The lanes of clips. Each returns logits, or with `embeds` embeddings, which are compared with free-text classes.

    Attributes:
      windows: the windows of a long video, as in training.
      whole, whole_embeds: take a clip's frames [t, h, w, 3].
      frame: takes one frame and returns its features; None: a single frame has no features.
      head, head_embeds: take the features [t, d] of a clip's frames.
    """

    windows: Windows
    whole: Lane
    whole_embeds: Lane
    frame: Lane | None = None
    head: Lane | None = None
    head_embeds: Lane | None = None


def make_clip_lanes(
    backend: ExportedBackend, costs: Costs, finite: Callable[[Callable[[Any], np.ndarray]], Callable[[Any], np.ndarray]]
) -> ClipLanes | None:
    """Return the lanes of an export; None: an export of an earlier version, which takes only images.

    Args:
      backend: runs the export.
      costs: costs of batches of images; until a clip has run, it is assumed to cost as much as its frames.
      finite: wraps a function with a check that its output is finite.
    """
    if not backend.takes_clips:
        return None
    windows = choose_windows(backend)
    of_clips = Costs({count: costs.of_queue(count * windows.num_frames) for count in (1, 2)})
    whole = Lane("clip_classifier", by_shape(backend.logits), of_clips)
    whole_embeds = Lane("clip_classifier", by_shape(finite(backend.embed)), of_clips)
    if not backend.takes_frames:
        return ClipLanes(windows, whole, whole_embeds)
    width = backend.graphs.signatures["clip_head"]["inputs"]["frame_embeds"][1][2]
    example = np.full((windows.num_frames, width), width**-0.5, np.float32)
    of_heads = Costs.of_two(lambda count: backend.frame_logits(np.stack([example] * count)), HEADS_AT_ONCE)
    return ClipLanes(
        windows,
        whole,
        whole_embeds,
        Lane("frame_encoder", by_shape(finite(backend.embed_frames)), costs),
        Lane("clip_head", by_shape(backend.frame_logits), of_heads),
        Lane("clip_head", by_shape(finite(backend.pool_frames)), of_heads),
    )


def by_shape(run: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """Return a function of items that runs items of the same shape together: clips may differ in length."""

    def run_items(items: list[np.ndarray]) -> list[np.ndarray]:
        results: dict[int, np.ndarray] = {}
        for shape in {item.shape for item in items}:
            numbers = [i for i, item in enumerate(items) if item.shape == shape]
            results |= dict(zip(numbers, run(np.stack([items[i] for i in numbers])), strict=True))
        return [results[i] for i in range(len(items))]

    return run_items
