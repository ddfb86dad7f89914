"""Action events from frames sent over a WebSocket; only the newest frame is analysed."""

import asyncio
import time
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from serving.calls import deadline_after
from serving.follow import EventQuery, Follower, Seen
from serving.models import ServedModel
from serving.problems import Problem
from serving.requests import ModelQuery, free_classes
from serving.schemas import to_scored
from serving.service import Service

router = APIRouter(prefix="/v1")
FLOOD = 10  # times the analysed frame rate: a client that sends more is disconnected
EARLY = 0.25  # share of the time between two frames of a window: a frame may come early by this much
BAD_FRAMES = 20  # in a row: then the client is disconnected
POLICY_VIOLATION, TRY_AGAIN_LATER = 1008, 1013


class Newest:
    """A slot for one frame: a newer frame replaces one that hasn't been taken."""

    def __init__(self) -> None:
        self._frame: tuple[int, float, bytes] | None = None
        self._filled = asyncio.Event()

    def put(self, number: int, arrived: float, data: bytes) -> bool:
        """Store a frame; return whether it replaced another one."""
        lost = self._frame is not None
        self._frame = (number, arrived, data)
        self._filled.set()
        return lost

    async def take(self) -> tuple[int, float, bytes]:
        """Wait for the newest frame and return it."""
        await self._filled.wait()
        self._filled.clear()
        frame, self._frame = self._frame, None
        assert frame is not None
        return frame


class Session:
    """One WebSocket: a task that receives frames, and one that analyses the newest."""

    def __init__(self, websocket: WebSocket, service: Service, follower: Follower, top: int):
        self._websocket, self._service, self._follower, self._top = websocket, service, follower, top
        self._newest, self._skipped, self._start, self._next_s = Newest(), 0, time.perf_counter(), 0.0

    async def run(self) -> None:
        """Serve until the client disconnects, breaks a rule, or reaches the time limit of a session."""
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
        number, second, in_second = 0, 0, 0
        fps, idle_s = self._service.settings.max_stream_fps, self._service.settings.stream_idle_s
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    message = await self._websocket.receive()
            except TimeoutError:
                raise _Close(f"no frame came for {idle_s:g} s") from None
            if message["type"] == "websocket.disconnect":
                return
            if (data := message.get("bytes")) is None:
                raise _Close("frames are sent as binary messages")
            number, now = number + 1, time.perf_counter()
            in_second = in_second + 1 if int(now) == second else 1
            second = int(now)
            if in_second > FLOOD * fps:
                raise _Close(f"far over {fps:g} frames a second")
            if not self._is_due(now, fps):
                continue
            if self._newest.put(number, now, data):
                self._skip("newer_came")

    def _is_due(self, now: float, fps: float) -> bool:
        """Return whether a frame that comes now is analysed."""
        path = self._follower.path
        rate_hz = fps if path is None or path.rate_hz is None else min(fps, path.rate_hz)
        if rate_hz < fps and now < self._next_s - EARLY / rate_hz:  # between the frames of windows: nothing is lost
            self._service.metrics.stream_frames.labels("between").inc()
            return False
        if rate_hz == fps and now < self._next_s:
            self._skip("over_rate")
            return False
        self._next_s = max(self._next_s + 1 / rate_hz, now - 1 / rate_hz)
        return True

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
        await self._send_events(await follower.choose(deadline))
        model, path = follower.model, follower.path
        assert model is not None and path is not None
        async with service.batcher.admit(path.lane):
            pixels = await service.decode(data, model, deadline)
            seen, events = await path.look(pixels, arrived - self._start, deadline)
        if seen is not None:
            await self._send_frame(number, seen, time.perf_counter() - arrived, model)
        await self._send_events(events)

    async def _send_frame(self, number: int, seen: Seen, latency_s: float, model: ServedModel) -> None:
        metrics = self._service.metrics
        metrics.frame_to_event.observe(latency_s)
        metrics.stream_frames.labels("answered").inc()
        top = to_scored(seen.labels, seen.probs, self._top)
        await self._send(
            "frame",
            frame=number,
            time_s=round(seen.time_s, 4),
            label=seen.label,
            score=seen.score,
            top=[entry.model_dump() for entry in top],
            latency_ms=round(1000 * latency_s, 2),
            skipped=self._skipped,
            model=model.ref.model_dump(),
        )

    async def _send_events(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            await self._send("event", **event)

    async def _send(self, type: str, **fields: Any) -> None:
        await self._websocket.send_json({"type": type, **fields})


class _Close(Exception):  # noqa: N818
    """The client broke a rule of the stream."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@router.websocket("/stream")
async def stream(websocket: WebSocket, choice: ModelQuery, options: EventQuery) -> None:
    """Receive image frames as binary messages; send predictions and events as JSON."""
    service: Service = websocket.app.state.service
    prompts = free_classes(list(options.classes), None, service.settings)
    follower = Follower(service, choice, options, prompts)
    async with service.one_session(websocket.state.client):
        await follower.choose(deadline_after(service))  # refused before the WebSocket is accepted, with the reason
        with suppress(WebSocketDisconnect):
            await websocket.accept()
            await Session(websocket, service, follower, options.top).run()
