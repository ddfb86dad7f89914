"""The actions in an uploaded video: events, or a prediction as a clip with segments."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request

from clip_har_jax.inference.sliding_windows import FoundSegments, FrameRing, Window
from clip_har_jax.inference.stream import Event
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.video.clips import iter_frames
from clip_har_jax.video.decoding import BadVideo, TooSlow
from clip_har_jax.video.segments import find_segments
from serving.api import ALWAYS, BODY, CLASSES_FIELD, COMPUTED, choose_classes, make_answer
from serving.batcher import Lane
from serving.calls import Call, service_of, until_disconnect
from serving.classes import Prompts
from serving.clips import answer_clip, in_decoder
from serving.follow import EventOptions, EventQuery, Follower, WindowPath
from serving.models import ServedModel
from serving.problems import Problem, responses
from serving.requests import AnswerOptions, ModelQuery, free_classes, read_uploads
from serving.schemas import EventBody, SegmentBody, VideoAnswer, VideoEvents
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
    rate_hz: Annotated[float, Query(gt=0, le=60, allow_inf_nan=False, description="analysed frames per second")] = 4.0,
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
        # A delay is for streams: here all is known before the answer.
        follower = Follower(service, choice, replace(options, max_delay_s=None), prompts)
        return await until_disconnect(request, _events(service, follower, upload.data, rate_hz, deadline))


async def _events(service: Service, follower: Follower, data: bytes, rate_hz: float, deadline: float) -> VideoEvents:
    await follower.choose(deadline)
    model, path = follower.model, follower.path
    assert model is not None and path is not None
    if isinstance(path, WindowPath):
        seen = await look_through(service, model, path, data, deadline)
        events = [EventBody(**segment._asdict()) for segment in seen.segments]
        return VideoEvents(
            events=events, duration_s=seen.duration_s, frames=seen.frames, damage=seen.damage, model=model.ref
        )
    times, images, damage = await _decode(service, model, data, rate_hz, deadline)
    ended: list[Event] = []
    async for chunk in chunks(service, model, path.lane, len(times), deadline):
        measured = await asyncio.gather(*(path.measure(pixels, deadline) for pixels in images[chunk]))
        for time_s, (logits, embedding) in zip(times[chunk], measured, strict=True):
            ended += path.detector.update(time_s, logits, embedding).ended
    ended += path.detector.finish()
    found = [EventBody(**vars(event)) for event in ended]
    return VideoEvents(events=found, duration_s=times[-1], frames=len(times), damage=damage, model=model.ref)


async def _decode(service: Service, model: ServedModel, data: bytes, rate_hz: float, deadline: float) -> Any:
    """Return the times and pixels of a video's frames, and its damage."""
    settings = service.settings
    arguments = (rate_hz, settings.max_video_frames, model.backend.preprocess, settings.max_megapixels)
    return await in_decoder(service, deadline, read_frames, data, *arguments, settings.video_timeout_s)


async def chunks(service: Service, model: ServedModel, lane: Lane, count: int, deadline: float) -> AsyncIterator[slice]:
    """Yield slices of `count` items, each when its lane has room, so that other requests wait only for one image."""
    for start in range(0, count, model.costs.best):
        await service.batcher.quiet(deadline)
        async with service.batcher.admit(lane, min(model.costs.best, count - start)):
            yield slice(start, start + model.costs.best)


async def look_through(
    service: Service, model: ServedModel, path: WindowPath, data: bytes, deadline: float
) -> FoundSegments:
    """Return the segments of a video: each frame is encoded once, and each window predicted once."""
    times, images, damage = await _decode(service, model, data, path.rate_hz, deadline)
    ring: FrameRing[np.ndarray] = FrameRing(path.windows)
    scored: list[tuple[float, np.ndarray]] = []

    async def score(due: list[Window[np.ndarray]]) -> None:
        async with service.batcher.admit(path.window_lane, len(due)):
            probs = await asyncio.gather(*(path.window_probs(window.features, deadline) for window in due))
        scored.extend(zip((window.time_s for window in due), probs, strict=True))

    async for chunk in chunks(service, model, path.lane, len(times), deadline):
        features = await asyncio.gather(*(path.features(pixels, deadline) for pixels in images[chunk]))
        pushed = (ring.push(time_s, row) for time_s, row in zip(times[chunk], features, strict=True))
        await score([window for window in pushed if window is not None])
    await score([window] if (window := ring.rest()) else [])
    duration_s = times[-1] + 1 / path.rate_hz
    middles, probs = zip(*scored, strict=True)
    segments = find_segments(np.asarray(middles), np.stack(probs), path.labels, path.rules, duration_s)
    return FoundSegments(segments, len(times), duration_s, damage)


@router.post("/videos", responses=VIDEO_ERRORS, openapi_extra=VIDEO)
async def answer_video(request: Request, choice: ModelQuery, options: EventQuery) -> VideoAnswer:
    """Return the most probable actions in a video as one clip, and the actions with their times, by sliding windows."""
    service = service_of(request)
    model = service.begin(request.state.client, choice)
    model.need_one_label()
    model.need_clips()
    async with service.one_video():
        (upload,), field = await read_uploads(request, "video")
        if not upload.data:
            raise Problem("empty_body", "no bytes came; send a video")
        deadline = asyncio.get_running_loop().time() + service.settings.video_timeout_s
        prompts = free_classes(list(options.classes), field, service.settings)
        call = Call(request, service, model, deadline)
        return await until_disconnect(request, _answer(call, options, prompts, upload.data))


async def _answer(call: Call, options: EventOptions, prompts: dict[str, Prompts] | None, data: bytes) -> VideoAnswer:
    service, model, deadline = call.service, call.model, call.deadline
    classes = await choose_classes(call, prompts)
    options = replace(options, max_delay_s=None)  # of streams
    path = WindowPath(model, classes, options, prompts is not None, service.batcher)
    scores, damage = await answer_clip(service, model, classes, data, deadline)
    seen = await look_through(service, model, path, data, deadline)
    answer = make_answer(call, classes, scores, AnswerOptions(options.top, options.threshold))
    return VideoAnswer(
        **dict(answer),
        segments=[SegmentBody(**segment._asdict()) for segment in seen.segments],
        duration_s=seen.duration_s,
        frames=seen.frames,
        damage=damage or seen.damage,
        model=model.ref,
    )
