"""Predictions of uploaded clips: their frames are decoded in a separate process, then run through the clip graph."""

import io
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from clip_har_jax.inference.backends import ClassScores, clip_sampling
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.video.clips import read_views
from clip_har_jax.video.decoding import BadVideo, TooSlow
from clip_har_jax.video.sampling import FrameSampling
from serving.classes import TextClasses
from serving.models import ServedModel
from serving.problems import Problem
from serving.service import Service


class ClipAnswer(NamedTuple):
    """The scores of a clip, and its unreadable part."""

    scores: ClassScores
    damage: str | None


def decode_clip(data: bytes, sampling: FrameSampling, preprocess: Preprocess, max_megapixels: float) -> Any:
    """Return a clip's views, uint8 [v, t, h, w, 3], and its damage; called in a decoding process.

    Raises:
      BadVideo: not a video, no frame in it, or less than half of it readable.
    """
    each = partial(evaluation_transform, preprocess=preprocess)
    views = read_views(io.BytesIO(data), sampling, range(sampling.num_views), None, each, max_megapixels)
    return np.stack([np.stack(view.frames) for view in views]), views[0].damage


async def in_decoder(service: Service, deadline: float, function: Any, *arguments: Any) -> Any:
    """Return the result of `function`, called on a video in a decoding process.

    Raises:
      Problem: the video can't be read, or not in time.
    """
    try:
        return await service.video_decoder.run(deadline, function, *arguments)
    except TooSlow as error:
        raise Problem("deadline", str(error)) from error
    except BadVideo as error:
        raise Problem("bad_video", str(error)) from error


async def answer_clip(
    service: Service, model: ServedModel, classes: TextClasses | None, data: bytes, deadline: float
) -> ClipAnswer:
    """Return the prediction of a clip, its frames sampled as in training; the caller holds the place of a video.

    Raises:
      Problem: the model takes only images, the clip can't be read, or it takes too long.
    """
    clips, sampling = model.need_clips(), clip_sampling(model.actions)
    limits = sampling, model.backend.preprocess, service.settings.max_megapixels
    views, damage = await in_decoder(service, deadline, decode_clip, data, *limits)
    async with service.batcher.admit(clips.whole, len(views)):
        logits = [await model.clip_logits(classes, frames, service.batcher, deadline) for frames in views]
    return ClipAnswer(model.score(classes, np.stack(logits)), damage)
