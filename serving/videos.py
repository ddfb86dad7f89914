"""Events of an uploaded video."""

import asyncio
import io
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request

from clip_har_jax.inference.stream import Event
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.video.clips import iter_frames
from clip_har_jax.video.decoding import BadVideo, TooSlow
from serving.api import ALWAYS, BODY, CLASSES_FIELD, COMPUTED
from serving.calls import service_of, until_disconnect
from serving.follow import EventQuery, Follower
from serving.problems import Problem, responses
from serving.requests import ModelQuery, free_classes, read_uploads
from serving.schemas import EventBody, VideoEvents
from serving.service import Service

router = APIRouter(prefix="/v1")


def read_frames(
    data: bytes, rate_hz: float, most: int, preprocess: Preprocess, max_megapixels: float, time_limit_s: float
) -> Any:
    """Return the times and pixels of a video's frames, and its damage; called in a decoding process.

    Raises:
      BadVideo: not a video, or too many frames.
      TooSlow: reading takes longer than the time limit.
    """
    times: list[float] = []
    images: list[np.ndarray] = []
    damage = None
    try:
        for frame in iter_frames(io.BytesIO(data), rate_hz, max_megapixels, 1, time_limit_s):
            if len(times) == most:
                raise BadVideo(f"over {most} frames at {rate_hz:g} a second; send less, or ask for a lower rate_hz")
            times.append(frame.time_s)
            images.append(evaluation_transform(frame.image, preprocess))
    except BadVideo as error:
        if not times or len(times) == most or isinstance(error, TooSlow):
            raise
        damage = str(error)
    return times, images, damage


VIDEO = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "video": {"type": "string", "format": "binary", "description": "MP4, WebM, AVI, MKV, MOV ..."},
                        "classes": CLASSES_FIELD,
                    },
                    "required": ["video"],
                    "additionalProperties": False,
                }
            },
            "video/mp4": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
VIDEO_ERRORS = responses(*ALWAYS, *BODY, *COMPUTED, "classes_not_supported", "bad_video")


@router.post("/stream", responses=VIDEO_ERRORS, openapi_extra=VIDEO)
async def video(
    request: Request,
    choice: ModelQuery,
    options: EventQuery,
    rate_hz: Annotated[float, Query(gt=0, le=60, allow_inf_nan=False, description="frames looked at")] = 4.0,
) -> VideoEvents:
    """Return the actions in a video with their start and end."""
    service = service_of(request)
    settings = service.settings
    service.begin(request.state.client, choice)
    async with service.one_video():
        (upload,), field = await read_uploads(request, "video")
        if not upload.data:
            raise Problem("empty_body", "no bytes came; send a video")
        deadline = asyncio.get_running_loop().time() + settings.video_timeout_s
        prompts = free_classes(list(options.classes), field, settings)
        follower = Follower(service, choice, options, prompts)
        return await until_disconnect(request, _events(service, follower, upload.data, rate_hz, deadline))


async def _events(service: Service, follower: Follower, data: bytes, rate_hz: float, deadline: float) -> VideoEvents:
    await follower.choose(deadline)
    model, settings = follower.model, service.settings
    assert model is not None
    try:
        arguments = (rate_hz, settings.max_video_frames, model.backend.preprocess, settings.max_megapixels)
        limits = *arguments, settings.video_timeout_s
        times, images, damage = await service.video_decoder.run(deadline, read_frames, data, *limits)
    except TooSlow as error:
        raise Problem("deadline", str(error)) from error
    except BadVideo as error:
        raise Problem("bad_video", str(error)) from error
    events: list[Event] = []
    for start in range(0, len(times), model.costs.best):
        chunk = slice(start, start + model.costs.best)
        await service.batcher.quiet(deadline)  # others wait for one image, this request for hundreds
        async with service.batcher.admit(follower.lane, len(times[chunk])):
            measured = await asyncio.gather(*(follower.measure(pixels, deadline) for pixels in images[chunk]))
        for time_s, (logits, embedding) in zip(times[chunk], measured, strict=True):
            events += follower.detector.update(time_s, logits, embedding).ended
    events += follower.detector.finish()
    found = [EventBody(**vars(event)) for event in events]
    return VideoEvents(events=found, duration_s=times[-1], frames=len(times), damage=damage, model=model.ref)
