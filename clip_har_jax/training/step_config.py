"""StepConfig: the settings of a run that its program depends on."""

from dataclasses import dataclass

from clip_har_jax.config import MethodConfig, OptimConfig, RunConfig
from clip_har_jax.data.pair_sources import has_pairs
from clip_har_jax.data.sources import has_clips


@dataclass(frozen=True)
class StepConfig:
    """The settings of a run that its steps depend on; runs in which they are equal, such as seeds, share a program.

    Attributes:
      batch_size: rows of a training batch, over all devices.
      of_pairs: the batches are image-text pairs.
      num_frames: frames of a clip in training; None: images.
      multi_label: an image has any number of labels.
    """

    method: MethodConfig
    optim: OptimConfig
    compute_dtype: str
    remat: str
    attention: str
    batch_size: int
    accumulation_steps: int
    eval_batch_size: int
    of_pairs: bool
    num_frames: int | None
    multi_label: bool


def step_config(config: RunConfig) -> StepConfig:
    """Return the settings of a run that its steps depend on.

    Raises:
      UserError: a manifest or a table that can't be read.
    """
    of_pairs = has_pairs(config.data.train)
    with_frames = not of_pairs and has_clips(config.data.train)
    return StepConfig(
        config.method,
        config.optim,
        config.model.compute_dtype,
        config.model.remat,
        config.model.attention,
        config.train.global_batch_size,
        config.train.accumulation_steps,
        config.eval.batch_size,
        of_pairs,
        config.data.video.num_frames if with_frames else None,
        config.data.multi_label,
    )
