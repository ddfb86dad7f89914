"""Video in, action events out: frames over a WebSocket as they come, or a whole video at once."""

import asyncio
import dataclasses
import io
import time
from contextlib import suppress
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, WebSocket, WebSocketDisconnect
from pydantic.json_schema import SkipJsonSchema

from clip_har_jax.errors import UserError
from clip_har_jax.inference.stream import Event, EventDetector, EventRules
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.video import BadVideo, iter_frames
from serving.api import ALWAYS, BODY, CLASSES_FIELD, COMPUTED
from serving.batcher import Lane
from serving.models import Classes, Model, Prompts
from serving.problems import Problem, responses
from serving.requests import (
    Threshold,
    WhichModel,
    deadline_of,
    free_classes,
    on_the_loop,
    read_uploads,
    while_wanted,
)
from serving.schemas import Event as EventBody
from serving.schemas import VideoEvents, to_scored
from serving.service import Service

router = APIRouter(prefix="/v1")
FLOOD = 10  # times the frame rate that is looked at: who sends more is cut off
BAD_FRAMES = 20  # one after the other: who sends more is cut off
POLICY_VIOLATION, TRY_AGAIN_LATER = 1008, 1013


@dataclasses.dataclass(frozen=True)
class AskedEvents:
    """How events are wanted; the defaults are those of the events' engine."""

    smoothing: Annotated[str, Query(pattern="^(exponential|attention|none)$")] = EventRules.smoothing
    memory_s: Annotated[float, Query(gt=0, le=60, allow_inf_nan=False)] = EventRules.memory_s
    start_score: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False)] = EventRules.start_score
    end_score: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False)] = EventRules.end_score
    min_duration_s: Annotated[float, Query(ge=0, le=600, allow_inf_nan=False)] = EventRules.min_duration_s
    threshold: Annotated[Threshold | SkipJsonSchema[None], Query()] = None
    top: Annotated[int, Query(ge=1, le=100)] = 5
    classes: Annotated[list[str], Query(description="as /v1/predict takes them")] = ()  # type: ignore[assignment]

    def rules(self, model: Model, free: bool) -> EventRules:
        """The engine's rules for a model.

        Raises:
          Problem: they contradict one another.
        """
        below = self.threshold if self.threshold is not None or free else model.abstain_below
        try:
            return EventRules(
                self.smoothing, self.memory_s, self.start_score, self.end_score, self.min_duration_s, below
            )
        except UserError as error:
            raise Problem("invalid_request", str(error)) from error


HowEvents = Annotated[AskedEvents, Depends(on_the_loop(AskedEvents))]


class Follower:
    """One stream of frames through a model, to events; a switch of the model ends what went on."""

    def __init__(self, service: Service, which: WhichModel, asked: AskedEvents, prompts: dict[str, Prompts] | None):
        self._service, self._which, self._asked, self._prompts = service, which, asked, prompts
        self.model: Model | None = None
        self._classes: Classes | None = None
        self.detector = EventDetector(())

    async def choose(self, deadline: float) -> tuple[Event, ...]:
        """Takes the model that is active now; gives the events that ended with another one."""
        model = self._service.registry.get(self._which.model, self._which.version)
        if model is self.model:
            return ()
        classes = model.classes
        if self._prompts is not None:
            if not model.accepts_classes:
                raise model.refusal()
            classes = await model.open_vocabulary(self._prompts, self._service.batcher, deadline)
        rules = self._asked.rules(model, self._prompts is not None)
        ended = self.detector.finish()
        self.model, self._classes = model, classes
        self.detector = EventDetector(classes.labels if classes else model.labels, rules)
        return ended

    @property
    def lane(self) -> Lane:
        """What most of a frame's time goes to."""
        assert self.model is not None, "choose comes first"
        return self.model.embed if self._classes is not None else self.model.classify

    async def measure(self, pixels: np.ndarray, deadline: float) -> tuple[np.ndarray, np.ndarray | None]:
        """A frame's logits, and its embedding where that is needed."""
        model, batcher, classes = self.model, self._service.batcher, self._classes
        assert model is not None, "choose comes first"
        attends = self.detector.rules.smoothing == "attention"
        embedding = await batcher.run(model.embed, pixels, deadline) if classes or attends else None
        if classes is not None and embedding is not None:
            return classes.logits(embedding), embedding
        return await batcher.run(model.classify, pixels, deadline), embedding


class Newest:
    """A slot for one frame: a newer one takes the place of what nobody has fetched yet."""

    def __init__(self) -> None:
        self._frame: tuple[int, float, bytes] | None = None
        self._filled = asyncio.Event()

    def put(self, number: int, arrived: float, data: bytes) -> bool:
        """Whether a frame was lost by it."""
        lost = self._frame is not None
        self._frame = (number, arrived, data)
        self._filled.set()
        return lost

    async def take(self) -> tuple[int, float, bytes]:
        """The newest frame, when there is one."""
        await self._filled.wait()
        self._filled.clear()
        frame, self._frame = self._frame, None
        assert frame is not None
        return frame


class Session:
    """One WebSocket: a task that reads frames as fast as they come, and one that looks at the newest."""

    def __init__(self, websocket: WebSocket, service: Service, follower: Follower, top: int):
        self._websocket, self._service, self._follower, self._top = websocket, service, follower, top
        self._newest, self._skipped, self._start = Newest(), 0, time.perf_counter()

    async def run(self) -> None:
        """Until the client leaves, breaks a rule, or has been here long enough."""
        tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._look())]
        try:
            async with asyncio.timeout(self._service.settings.max_session_s):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        except TimeoutError:
            await self._websocket.close(TRY_AGAIN_LATER, "the longest session is over; connect again")
        except _Close as close:
            await self._websocket.close(POLICY_VIOLATION, close.reason)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _skip(self, why: str) -> None:
        self._skipped += 1
        self._service.metrics.stream_frames.labels(why).inc()

    async def _read(self) -> None:
        number, second, in_second, next_s = 0, 0, 0, 0.0
        fps = self._service.settings.max_stream_fps
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if (data := message.get("bytes")) is None:
                raise _Close("frames are sent as binary messages")
            number, now = number + 1, time.perf_counter()
            in_second = in_second + 1 if int(now) == second else 1
            second = int(now)
            if in_second > FLOOD * fps:
                raise _Close(f"far over {fps:g} frames a second")
            if now < next_s:
                self._skip("over_rate")
                continue
            next_s = max(next_s + 1 / fps, now - 1 / fps)
            if self._newest.put(number, now, data):
                self._skip("newer_came")

    async def _look(self) -> None:
        bad = 0
        while bad < BAD_FRAMES:
            number, arrived, data = await self._newest.take()
            try:
                await self._one(number, arrived, data)
                bad = 0
            except Problem as problem:
                if problem.code in ("overloaded", "deadline"):
                    self._skip(problem.code)
                    continue
                bad += 1
                self._service.metrics.stream_frames.labels("bad").inc()
                await self._send(
                    "error", frame=number, **problem.to_body(self._request_id).model_dump(exclude={"type"})
                )
        raise _Close(f"{BAD_FRAMES} frames in a row couldn't be used")

    @property
    def _request_id(self) -> str:
        return self._websocket.state.request_id

    async def _one(self, number: int, arrived: float, data: bytes) -> None:
        service, follower = self._service, self._follower
        budget_s = service.settings.stream_budget_s
        deadline = asyncio.get_running_loop().time() + budget_s - (time.perf_counter() - arrived)
        for event in await follower.choose(deadline):
            await self._send_event("end", event)
        model = follower.model
        assert model is not None
        with model.use():
            async with service.batcher.admit(follower.lane):
                pixels = await service.decode(data, model)
                logits, embedding = await follower.measure(pixels, deadline)
        moment = follower.detector.update(arrived - self._start, logits, embedding)
        latency_s = time.perf_counter() - arrived
        service.metrics.frame_to_event.observe(latency_s)
        service.metrics.stream_frames.labels("answered").inc()
        top = to_scored(follower.detector.labels, moment.probs, self._top)
        await self._send(
            "frame",
            frame=number,
            time_s=round(moment.time_s, 4),
            label=moment.label,
            score=moment.score,
            top=[entry.model_dump() for entry in top],
            latency_ms=round(1000 * latency_s, 2),
            skipped=self._skipped,
            model=model.ref.model_dump(),
        )
        for event in moment.ended:
            await self._send_event("end", event)
        for event in moment.started:
            await self._send_event("start", event)

    async def _send_event(self, what: str, event: Event) -> None:
        await self._send("event", event=what, **vars(event))

    async def _send(self, type: str, **fields: Any) -> None:
        await self._websocket.send_json({"type": type, **fields})


class _Close(Exception):  # noqa: N818
    """The client broke a rule of the stream."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@router.websocket("/stream")
async def stream(websocket: WebSocket, which: WhichModel, asked: HowEvents) -> None:
    """JPEG, PNG or WebP frames in, each a binary message; what is seen, and events, out as JSON."""
    service: Service = websocket.app.state.service
    prompts = free_classes(list(asked.classes), None, service.settings)
    follower = Follower(service, which, asked, prompts)
    async with service.one_session(websocket.state.client):
        await follower.choose(deadline_of(service.settings))  # refused before it is accepted, with the reason
        await websocket.accept()
        with suppress(WebSocketDisconnect):
            await Session(websocket, service, follower, asked.top).run()


def read_frames(data: bytes, rate_hz: float, most: int, preprocess: Preprocess, max_megapixels: float) -> Any:
    """Times and pixels of a video's frames, and what is damaged; runs in a decoding process.

    Raises:
      BadVideo: not a video, or more frames than are taken.
    """
    times: list[float] = []
    images: list[np.ndarray] = []
    damage = None
    try:
        for frame in iter_frames(io.BytesIO(data), rate_hz, max_megapixels, num_threads=1):
            if len(times) == most:
                raise BadVideo(f"over {most} frames at {rate_hz:g} a second; send less, or ask for a lower rate_hz")
            times.append(frame.time_s)
            images.append(evaluation_transform(frame.image, preprocess))
    except BadVideo as error:
        if not times or len(times) == most:
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
    which: WhichModel,
    asked: HowEvents,
    rate_hz: Annotated[float, Query(gt=0, le=60, allow_inf_nan=False, description="frames looked at")] = 4.0,
) -> VideoEvents:
    """The actions in a video, from when to when."""
    service: Service = request.app.state.service
    settings = service.settings
    with service.begin(request, which):
        async with service.one_video():
            (upload,), field = await read_uploads(request, "video", 1)
            if not upload.data:
                raise Problem("empty_body", "no bytes came; send a video")
            deadline = asyncio.get_running_loop().time() + settings.video_timeout_s
            prompts = free_classes(list(asked.classes), field, settings)
            follower = Follower(service, which, asked, prompts)
            return await while_wanted(request, _events(service, follower, upload.data, rate_hz, deadline))


async def _events(service: Service, follower: Follower, data: bytes, rate_hz: float, deadline: float) -> VideoEvents:
    await follower.choose(deadline)
    model, settings = follower.model, service.settings
    assert model is not None
    try:
        arguments = (rate_hz, settings.max_video_frames, model.backend.preprocess, settings.max_megapixels)
        times, images, damage = await service.decoder.run(read_frames, data, *arguments)
    except BadVideo as error:
        raise Problem("bad_video", str(error)) from error
    events: list[Event] = []
    with model.use():
        for start in range(0, len(times), model.costs.best):
            chunk = slice(start, start + model.costs.best)
            await service.batcher.quiet(deadline)  # others wait for one image, this one for hundreds
            async with service.batcher.admit(follower.lane, len(times[chunk])):
                measured = await asyncio.gather(*(follower.measure(pixels, deadline) for pixels in images[chunk]))
            for time_s, (logits, embedding) in zip(times[chunk], measured, strict=True):
                events += follower.detector.update(time_s, logits, embedding).ended
    events += follower.detector.finish()
    found = [EventBody(**vars(event)) for event in events]
    return VideoEvents(events=found, duration_s=times[-1], frames=len(times), damage=damage, model=model.ref)
