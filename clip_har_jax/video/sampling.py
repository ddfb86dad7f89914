"""Which frames of a clip a model sees, as times.

Times, not frame numbers, say what is taken, so that clips of any frame rate, and of a varying one, are sampled alike.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

SAMPLING_METHODS = ("uniform", "dense", "tsn")


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a clip a model sees.

    Attributes:
      num_frames: of a view.
      method: uniform: the middles of equal parts of the clip. tsn: the same, but while training a random time of each
        part (Wang et al. 2016). dense: `rate_hz` frames a second from a random start, when not training from starts
        spread evenly.
      rate_hz: of dense sampling.
      num_views: how often a clip is sampled, each time at other times, when not training; what the model says of them
        is averaged.
    """

    num_frames: int = 8
    method: str = "uniform"
    rate_hz: float = 4.0
    num_views: int = 1


def sample_times(
    duration_s: float, sampling: FrameSampling, view: int = 0, rng: np.random.Generator | None = None
) -> Float64[np.ndarray, " n"]:
    """Return the times of a view's frames, 0 to `duration_s`; those past the end of a short clip stand for its last
    frame.

    Args:
      duration_s: of the clip.
      sampling: what is sampled.
      view: 0 to num_views - 1; what it is doesn't matter while training.
      rng: while training: a source of randomness; None: the times are the same each time.
    """
    count, views = sampling.num_frames, sampling.num_views
    if sampling.method == "dense":
        free_s = max(duration_s - count / sampling.rate_hz, 0.0)  # where a view can start
        start_s = free_s * (rng.random() if rng is not None else (view + 0.5) / views)
        return start_s + (np.arange(count) + 0.5) / sampling.rate_hz
    within = np.full(count, (view + 0.5) / views)
    if sampling.method == "tsn" and rng is not None:
        within = rng.random(count)
    return (np.arange(count) + within) / count * duration_s
