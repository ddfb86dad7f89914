"""Limits on connections that hold before a request is parsed: header bytes, times, and how many are open.

uvicorn's protocol classes bound none of these. The subclasses here add the bounds and change nothing else. A connection
is either answering a request, whose time the application bounds, or waiting for its client; then one timer runs. Where
too many are open, a new one takes the place of the one that has waited longest, so that idle connections lock nobody
out.
"""

import asyncio
from collections import Counter
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from serving.problems import MEDIA_TYPE, Problem
from serving.security import network_of
from serving.settings import Settings
from serving.sockets import bound_unread
from serving.telemetry import Metrics

MAX_PIPELINED = 32  # requests sent ahead of the answers
MAX_FRAGMENTS = 1000  # of one WebSocket message
BODY_HEADERS = (b"content-length", b"transfer-encoding", b"upgrade")  # more than a head follows them


class Connections:
    """The open connections of this process, and those of them that wait for their client, longest first.

    Args:
      settings: the limits.
      metrics: where refusals are counted.
    """

    def __init__(self, settings: Settings, metrics: Metrics):
        self.settings, self._metrics = settings, metrics
        self._addresses: dict[asyncio.Transport, str] = {}
        self._counts: Counter[str] = Counter()
        self._new: dict[asyncio.Transport, None] = {}  # that wait, before their first request
        self._used: dict[asyncio.Transport, None] = {}  # that wait, after an answer

    def enter(self, transport: asyncio.Transport, address: str) -> Problem | None:
        """Count a new connection, if need be in place of one that waits; return why it is refused, or None."""
        settings, network = self.settings, network_of(address)
        problem = None
        if self._counts[network] >= settings.max_connections_per_address and not self._drop_one(network):
            problem = Problem("too_many_requests", "too many connections from this address", retry_after_s=1)
        elif len(self._addresses) >= settings.max_connections and not self._drop_one():
            problem = Problem("overloaded", "too many connections", retry_after_s=1)
        self._addresses[transport] = network
        self._counts[network] += 1
        return problem

    def _drop_one(self, network: str | None = None) -> bool:
        """Close the connection that has waited longest, of one network or of all; first those without a request."""
        for transport in (*self._new, *self._used):
            if network is None or self._addresses[transport] == network:
                self._metrics.refused.labels("connection_replaced").inc()
                self.leave(transport)
                transport.abort()
                return True
        return False

    def wait(self, transport: asyncio.Transport, used: bool) -> None:
        """Note that a connection waits for its client from this moment on; `used`: one that had an answer before."""
        self.work(transport)
        if transport in self._addresses:
            (self._used if used else self._new)[transport] = None

    def work(self, transport: asyncio.Transport) -> None:
        """Note that a connection's request is being answered."""
        self._new.pop(transport, None)
        self._used.pop(transport, None)

    def leave(self, transport: asyncio.Transport) -> None:
        """Forget a connection; harmless when it was forgotten before."""
        self.work(transport)
        network = self._addresses.pop(transport, None)
        if network is not None:
            self._counts[network] -= 1
            if not self._counts[network]:
                del self._counts[network]

    def count_refusal(self, problem: Problem) -> None:
        """Count a request that was refused before the application saw it."""
        self._metrics.refused.labels(problem.code).inc()
        self._metrics.requests.labels("other", "other", str(problem.status)).inc()


class HttpConnection(HttpToolsProtocol):
    """An HTTP connection within the limits. A refusal is an answer of its own, and the connection's last."""

    def __init__(self, connections: Connections, **given: Any):
        super().__init__(**given)
        self._all = connections
        self._limits = connections.settings
        self._part: str | None = "head"  # of a request that is arriving; None: between requests
        self._state = ""
        self._unparsed_bytes = 0  # since the parser last handed anything on: it keeps them in memory
        self._arrived = False  # whether anything ever came
        self._had_body = False
        self._refusal: Problem | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        bound_unread(transport, bounded=True)
        if problem := self._all.enter(transport, self.client[0] if self.client else "local"):
            self._refuse(problem)
        else:
            self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.leave(self.transport)
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._arrived = True
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > self._limits.max_header_bytes and not self.transport.is_closing():
            self._refuse(self._headers_too_large())

    def _headers_too_large(self) -> Problem:
        return Problem("headers_too_large", f"over {self._limits.max_header_bytes} bytes of headers; send fewer")

    # What the parser finds

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part = "head"
        self._follow()

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_header_bytes:
            self._refusal = self._headers_too_large()
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = Problem("too_many_requests", f"over {MAX_PIPELINED} requests sent ahead of their answers")
        elif sum(name == b"host" for name, _ in self.headers) > 1:
            self._refusal = Problem("malformed", "several Host headers")
        elif coding := self._other_coding():
            self._refusal = Problem("malformed", f"transfer coding {coding} isn't supported; send chunked, or a length")
        if self._refusal is not None:
            raise ValueError(self._refusal.detail)  # ends the parsing: the data that follows is not looked at
        self._part = "body"
        if not self._had_body and any(name in BODY_HEADERS for name, _ in self.headers):
            self._had_body = True
            bound_unread(self.transport, bounded=False)
        super().on_headers_complete()
        self._follow()

    def _other_coding(self) -> str | None:
        codings = b",".join(value for name, value in self.headers if name == b"transfer-encoding")
        return repr(codings.decode("latin-1"))[:50] if codings.strip().lower() not in (b"", b"chunked") else None

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed_bytes = 0
        self._part = None
        super().on_message_complete()
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # the answer was the connection's last
            self._end()
        self._follow()

    def handle_websocket_upgrade(self) -> None:
        self._set_timer(None)
        self._all.work(self.transport)
        super().handle_websocket_upgrade()

    # Time

    def _follow(self) -> None:
        """Start the timer of what the connection waits for; none runs while a request is being answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        state = "answering" if answering else self._part or "between"
        if state == self._state or self.transport.is_closing():
            return
        self._state = state
        if answering:
            self._all.work(self.transport)
            self._set_timer(None)
            return
        self._all.wait(self.transport, used=self.cycle is not None)
        limits = self._limits
        # A body is waited for here only where its request was answered without it.
        seconds = {"head": limits.header_timeout_s, "body": limits.body_timeout_s, "between": limits.keep_alive_s}
        self._set_timer(seconds[state])

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        if self._state == "head" and self._arrived:
            limit_s = self._limits.header_timeout_s
            self._refuse(Problem("header_timeout", f"the headers took over {limit_s:g} s"))
        else:
            self._end()

    # The end

    def send_400_response(self, msg: str) -> None:
        """Answer a request that can't be parsed; uvicorn calls this."""
        self._refuse(self._refusal or Problem("malformed", "not a valid HTTP request"))

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, unless an answer has begun, and close."""
        if self.transport.is_closing():
            return
        self._all.count_refusal(problem)
        answering = self.cycle is not None and not self.cycle.response_complete
        if not (answering and self.cycle.response_started):
            body = problem.to_body("").model_dump_json().encode()
            phrase = HTTPStatus(problem.status).phrase
            headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), "Connection": "close"}
            headers |= problem.headers
            lines = [f"HTTP/1.1 {problem.status} {phrase}", *(f"{name}: {value}" for name, value in headers.items())]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._end()

    def _end(self) -> None:
        """Close, and break the connection off where the client doesn't even take what is left to send."""
        self._all.work(self.transport)
        self.transport.close()
        self._set_timer(None)
        self._timer = self.loop.call_later(self._limits.send_timeout_s, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()


class WebSocketConnection(WebSocketsSansIOProtocol):
    """A WebSocket within the limits. The application bounds how long it may be idle."""

    def __init__(self, connections: Connections, **given: Any):
        super().__init__(**given)
        self._all = connections
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.leave(self.transport)
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MAX_FRAGMENTS:  # empty ones add up to no size that is bounded elsewhere
            self.transport.abort()
            return
        super().handle_cont(event)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()  # each ping is answered: who doesn't read the answers may ask no more
        self._write_timer = self.loop.call_later(self._all.settings.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()
        if self._write_timer is not None:
            self._write_timer.cancel()
