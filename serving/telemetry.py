"""Prometheus metrics and a log of one JSON object per line; neither contains data of clients."""

import json
import logging
import os
import re
import sys
import time
import uuid
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.utils import ClientDisconnected

from serving.problems import MEDIA_TYPE, Problem

LATENCIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's variable: the folder of the workers' metrics

CLIENT_GAVE_UP = 499  # nginx's status for a client that disconnected or allowed less time than the service

log = logging.getLogger("har")


class Metrics:
    """The service's metrics; dashboards and alerts rely on their names."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"har_{name}", about, labels, registry=registry)

        def gauge(name: str, about: str, *labels: str, mode: Any = "livesum") -> Gauge:
            return Gauge(f"har_{name}", about, labels, registry=registry, multiprocess_mode=mode)

        def histogram(name: str, about: str, *labels: str, buckets: tuple[float, ...] = LATENCIES) -> Histogram:
            return Histogram(f"har_{name}", about, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests", "requests answered", "route", "method", "status")
        self.request_seconds = histogram("request_seconds", "from a request's first byte to its last", "route")
        self.refused = counter("refused", "requests refused to protect the service", "reason")
        self.queued = gauge("queue_images", "images admitted and not done")
        self.estimated_wait = gauge("estimated_wait_seconds", "of a request that comes now", mode="livemax")
        self.queue_wait = histogram("queue_wait_seconds", "from decoded to computing")
        self.batch_images = histogram("batch_images", "images of a batch", buckets=BATCH_SIZE_BUCKETS)
        self.model_seconds = histogram("model_seconds", "of a batch", "graph")
        self.decode_seconds = histogram("decode_seconds", "of an image, with its way to the decoder and back")
        self.decoder_restarts = counter("decoder_restarts", "decoding processes that died and were replaced")
        self.predictions = counter("predictions", "answers by predicted class", "model", "label")
        self.abstentions = counter("abstentions", "answers below the threshold", "model")
        self.model_info = gauge("model_info", "1 for the active version", "model", "version", "digest", mode="livemax")
        self.ready = gauge("ready", "1 when requests are answered", mode="livemin")
        self.loads = counter("model_loads", "loads by outcome", "model", "outcome")
        self.stream_sessions = gauge("stream_sessions", "open WebSockets")
        self.stream_frames = counter("stream_frames", "frames by what became of them", "outcome")
        self.frame_to_event = histogram("frame_to_event_seconds", "from a frame's arrival to its answer")

    def forget_model(self, *labels: str) -> None:
        """Remove the metrics of an inactive version; in files of several workers they can only become 0."""
        self.model_info.labels(*labels).set(0)
        if MULTIPROCESS not in os.environ:
            self.model_info.remove(*labels)

    def exposition(self) -> bytes:
        """Return the text for Prometheus, over all workers if there are several."""
        if MULTIPROCESS not in os.environ:
            return generate_latest(self.registry)
        merged = CollectorRegistry()
        multiprocess.MultiProcessCollector(merged)
        return generate_latest(merged)


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON; `extra={"fields": {...}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


# uvicorn logs an error for a WebSocket that was refused with an HTTP answer, and a traceback for a client's bad text.
NO_ERRORS = ("without completing handshake", "Invalid UTF-8 sequence received from client")


def configure_logging(level: str) -> None:
    """Write the service's and uvicorn's log records to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(lambda record: not any(text in record.getMessage() for text in NO_ERRORS))
    for name in ("har", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler] if name != "uvicorn.error" else [], name == "uvicorn.error"
        logger.setLevel(level if name == "har" else max(logging.WARNING, logging.getLevelName(level)))


def route_of(scope: Scope) -> str:
    """Return the route's template, so that metrics and logs don't contain a client's input."""
    return getattr(scope.get("route"), "path", None) or "other"


class Observe:
    """The outermost middleware: gives each request an id, counts and logs it, answers unexpected errors with 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, start = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnected:  # raised by uvicorn if a WebSocket's client disconnected before the answer
            status = CLIENT_GAVE_UP
        except Exception:
            log.exception("unforeseen error", extra={"fields": {"request_id": request_id, "route": route_of(scope)}})
            if status == 0 and scope["type"] == "http":
                problem = Problem("internal", "an error of the service; its log has the request id")
                await problem_response(problem, scope)(scope, receive, send_with_id)
        finally:
            self._count(scope, request_id, status, time.perf_counter() - start)

    def _count(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route, method = route_of(scope), scope.get("method", "WS")
        if status == 0 or (status == 504 and scope["state"].get("own_deadline")):
            status = CLIENT_GAVE_UP
        self._metrics.requests.labels(route, method, str(status)).inc()
        if scope["type"] == "http":
            self._metrics.request_seconds.labels(route).observe(seconds)
        fields = {
            "request_id": request_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "client": scope["state"].get("client"),
        }
        log.log(logging.DEBUG if route.startswith("/v2/health") else logging.INFO, "request", extra={"fields": fields})


def problem_response(problem: Problem, scope: Scope) -> JSONResponse:
    """Return the answer to a failed request; clients of KServe's protocol look for `error`."""
    body = problem.to_body(scope["state"]["request_id"]).model_dump()
    if scope["path"].startswith("/v2"):
        body["error"] = problem.detail
    return JSONResponse(body, problem.status, problem.headers, MEDIA_TYPE)
