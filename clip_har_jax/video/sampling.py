"""The frames of a clip that a model sees, as times.

Times instead of frame numbers, so that clips of any frame rate, also a varying one, are sampled alike.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

SAMPLING_METHODS = ("uniform", "dense", "tsn")


@dataclass(frozen=True)
class FrameSampling:
    """The frames of a clip that a model sees.

    Attributes:
      num_frames: per view.
      method: uniform: the middles of equal parts of the clip. tsn: the same in evaluation; in training a random time in
        each part (Wang et al. 2016). dense: `rate_hz` frames per second, from a random start in training, from evenly
        spaced starts in evaluation.
      rate_hz: of dense sampling.
      num_views: in evaluation, how often a clip is sampled, each time at other times; the results are averaged.
    """

    num_frames: int = 8
    method: str = "uniform"
    rate_hz: float = 4.0
    num_views: int = 1


def sample_times(
    duration_s: float, sampling: FrameSampling, view: int = 0, rng: np.random.Generator | None = None
) -> Float64[np.ndarray, " n"]:
    """Return the times of a view's frames, from 0 to `duration_s`; times after the end stand for the last frame.

    Args:
      duration_s: of the clip.
      sampling: the number of frames and the method.
      view: 0 to num_views - 1; without effect in training.
      rng: in training: the source of randomness; None: fixed times.
    """
    count, views = sampling.num_frames, sampling.num_views
    if sampling.method == "dense":
        free_s = max(duration_s - count / sampling.rate_hz, 0.0)  # range of possible starts
        start_s = free_s * (rng.random() if rng is not None else (view + 0.5) / views)
        return start_s + (np.arange(count) + 0.5) / sampling.rate_hz
    within = np.full(count, (view + 0.5) / views)
    if sampling.method == "tsn" and rng is not None:
        within = rng.random(count)
    return (np.arange(count) + within) / count * duration_s
