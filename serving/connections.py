"""Limits on connections before a request is parsed: bytes of headers, times, and the number of connections.

uvicorn's protocol classes limit none of these. The subclasses here add the limits and change nothing else. A connection
either answers a request, whose time the application limits, or waits for its client, with a timer. When too many are
open, a new one replaces the one that has waited longest, so idle connections can't lock others out.
"""

import asyncio
import sys
from collections import Counter
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from serving.problems import MEDIA_TYPE, Problem
from serving.request_heads import head_problem, too_large, without_upgrade
from serving.security import network_of
from serving.settings import Settings
from serving.sockets import bound_unread
from serving.telemetry import Metrics

MAX_PIPELINED = 32  # requests sent before earlier answers are complete
MAX_FRAGMENTS = 1000  # per WebSocket message
BODY_HEADERS = (b"content-length", b"transfer-encoding", b"upgrade")  # more than headers follows


class Connections:
    """The open connections of this process, and those that wait for their client, longest first.

    Args:
      settings: the limits.
      metrics: counts refusals.
    """

    def __init__(self, settings: Settings, metrics: Metrics):
        self.settings, self._metrics = settings, metrics
        self._addresses: dict[asyncio.Transport, str] = {}
        self._counts: Counter[str] = Counter()
        self._new: dict[asyncio.Transport, None] = {}  # waiting before their first request
        self._used: dict[asyncio.Transport, None] = {}  # waiting after an answer

    def enter(self, transport: asyncio.Transport, address: str) -> Problem | None:
        """Count a new connection, if necessary in place of a waiting one; return the reason of a refusal, or None."""
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
        """Close the connection that has waited longest, of one network or of all; first those without any request."""
        for transport in (*self._new, *self._used):
            if network is None or self._addresses[transport] == network:
                self._metrics.refused.labels("connection_replaced").inc()
                self.leave(transport)
                transport.abort()
                return True
        return False

    def wait(self, transport: asyncio.Transport, used: bool) -> None:
        """Record that a connection waits for its client from now on; `used`: it has had an answer before."""
        self.work(transport)
        if transport in self._addresses:
            (self._used if used else self._new)[transport] = None

    def work(self, transport: asyncio.Transport) -> None:
        """Record that a connection's request is being answered."""
        self._new.pop(transport, None)
        self._used.pop(transport, None)

    def leave(self, transport: asyncio.Transport) -> None:
        """Remove a connection; no effect if it was removed before."""
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
    """An HTTP connection within the limits. A refusal is its last answer."""

    def __init__(self, connections: Connections, **given: Any):
        super().__init__(**given)
        self._all = connections
        self._limits = connections.settings
        self._part: str | None = "head"  # part of an arriving request; None: between requests
        self._state = ""
        self._unparsed_bytes = 0  # in the parser's buffer since its last callback
        self._arrived = False  # whether any data has arrived
        self._had_body = False
        self._plain_head, self._upgrade_at = b"", 0  # a request that is parsed again, and the position behind its head
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
        while data:
            super().data_received(data)
            head, self._plain_head = self._plain_head, b""
            data = head + data[self._upgrade_at :] if head and not self.transport.is_closing() else b""
        if self._unparsed_bytes > self._limits.max_header_bytes and not self.transport.is_closing():
            self._refuse(too_large(self._limits.max_header_bytes))

    def _unsupported_upgrade_warning(self) -> None:
        """Record where the parser stopped: it drops the body of a request with an Upgrade header; called by uvicorn."""
        error = sys.exception()
        self._upgrade_at = error.args[0] if isinstance(error, httptools.HttpParserUpgrade) else 0

    # What the parser finds

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part = "head"
        self._follow()

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = 0
        version = self.parser.get_http_version()
        self._refusal = head_problem(self.url, version, self.headers, self._limits.max_header_bytes)
        if self._refusal is None and len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = Problem("too_many_requests", f"over {MAX_PIPELINED} requests sent ahead of their answers")
        if self._refusal is not None:
            raise ValueError(self._refusal.detail)  # stops the parser: further data is ignored
        if self.parser.should_upgrade() and not self._should_upgrade() and self._get_upgrade() is not None:
            self._plain_head = without_upgrade(self.parser.get_method(), self.url, version, self.headers)
            return
        self._part = "body"
        if not self._had_body and any(name in BODY_HEADERS for name, _ in self.headers):
            self._had_body = True
            bound_unread(self.transport, bounded=False)
        super().on_headers_complete()
        self._follow()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._plain_head:
            return
        self._unparsed_bytes = 0
        self._part = None
        super().on_message_complete()
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # the answer was the last one of this connection
            self._end()
        self._follow()

    def handle_websocket_upgrade(self) -> None:
        self._set_timer(None)
        self._all.work(self.transport)
        super().handle_websocket_upgrade()

    # Time

    def _follow(self) -> None:
        """Start the timer for the awaited part; none runs while a request is being answered."""
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
        # A body is awaited here only if its request was answered without it.
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
        """Answer a request that can't be parsed; called by uvicorn."""
        error = sys.exception()  # the parser's error, handled by uvicorn
        told = isinstance(error, httptools.HttpParserError) and not isinstance(error, httptools.HttpParserCallbackError)
        reason = f" ({error})" if told else ""
        self._refuse(self._refusal or Problem("malformed", f"not a valid HTTP request{reason}"))

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, unless an answer has begun, and close the connection."""
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
        """Close the connection, and abort it if the client doesn't read the remaining data."""
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
    """A WebSocket within the limits. The application limits its idle time."""

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
        if len(self.frames) >= MAX_FRAGMENTS:  # empty fragments aren't limited by size anywhere else
            self.conn.fail(1009, f"over {MAX_FRAGMENTS} fragments in a message")
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()  # a client that doesn't read the answers to its pings may not send more
        self._write_timer = self.loop.call_later(self._all.settings.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()
        if self._write_timer is not None:
            self._write_timer.cancel()
