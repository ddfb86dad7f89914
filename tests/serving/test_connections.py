"""Connections are bounded before a request is parsed, over real sockets: bytes, times, how many; clients that leave."""

import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as open_websocket

from serving.service import Service
from serving.settings import Settings
from tests.support.serving_setup import running, wait_for

LIMITS: dict[str, Any] = {
    "header_timeout_s": 0.5,
    "keep_alive_s": 5.0,
    "body_timeout_s": 1.0,
    "stream_idle_s": 0.5,
    "max_connections": 60,
    "max_connections_per_address": 40,
}
PREDICT = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def served(served_folder: Path) -> Iterator[tuple[httpx.Client, Service]]:
    with running(served_folder, **LIMITS) as both:
        yield both


@pytest.fixture(scope="module")
def photo(served_folder: Path) -> bytes:
    return sorted((served_folder.parent / "photos").rglob("*.png"))[0].read_bytes()


@pytest.fixture
def port(served: tuple[httpx.Client, Service]) -> int:
    assert served[0].base_url.port is not None
    return served[0].base_url.port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read_to_end(connection: socket.socket) -> bytes:
    """Return what comes until the service closes the connection."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def is_closed(connection: socket.socket) -> bool:
    """Send two bytes, and return whether the service has closed the connection."""
    try:
        connection.sendall(b"\r\n")
    except OSError:
        return True
    return False


def status_of(answer: bytes) -> int:
    return int(answer[9:12])


def requests_by_status(client: httpx.Client, route: str = "") -> dict[str, float]:
    """Return the service's count of requests by status, of one route or of all."""
    counts: dict[str, float] = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("har_requests_total") and (not route or f'route="{route}"' in line):
            status = re.search(r'status="(\d+)"', line)
            assert status is not None
            counts[status[1]] = counts.get(status[1], 0) + float(line.rsplit(" ", 1)[1])
    return counts


@pytest.mark.parametrize(
    "head",
    [
        LIVE + b"X: " + b"a" * 70_000,  # no end in sight
        LIVE + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        LIVE + b"".join(b"X-%d: 1\r\n" % i for i in range(8000)) + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ],
)
def test_a_head_has_at_most_its_bytes(port: int, head: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(head)
        answer = read_to_end(connection)
    assert status_of(answer) == 431
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "headers_too_large"


def test_little_of_an_endless_head_is_taken(port: int) -> None:
    """Neither the service nor the kernels' buffers on the way take megabytes of it."""
    sent = 0
    with connect(port) as connection:
        try:
            connection.sendall(LIVE + b"X: ")
            while sent < 20_000_000:
                sent += connection.send(b"a" * 100_000)
        except OSError:
            pass
    assert sent < 2_000_000


def test_a_head_just_below_the_limit_is_read(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(LIVE + b"X: " + b"a" * 65_000 + b"\r\nConnection: close\r\n\r\n")
        assert status_of(read_to_end(connection)) == 200


@pytest.mark.parametrize("after", [b"Z: " + b"a" * 70_000, b"Z: 1\r\n" * 20_000])
def test_trailers_count_as_headers(port: int, after: bytes) -> None:
    """They come behind a chunked body, and are kept as headers are."""
    with connect(port) as connection:
        connection.sendall(PREDICT + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")
        time.sleep(0.1)
        connection.sendall(after)
        assert status_of(read_to_end(connection)) in (415, 431)


def test_requests_ahead_of_their_answers_are_few(port: int) -> None:
    with connect(port) as connection:
        connection.sendall((LIVE + b"\r\n") * 1000)
        assert 1 <= read_to_end(connection).count(b"HTTP/1.1 ") <= 40


@pytest.mark.parametrize("sent", [b"", b"GET ", LIVE, b"\r\n", LIVE + b"\r\n" + LIVE])
def test_what_never_ends_is_closed(port: int, sent: bytes) -> None:
    """A silent connection, half a head, blank lines, and half a second head on a connection that was used."""
    with connect(port) as connection:
        connection.sendall(sent)
        answer = read_to_end(connection)  # the socket's own limit fails the test where it isn't closed
    assert answer == b"" or b" 408 " in answer or b" 200 " in answer


def test_a_kept_connection_ends_also_while_it_dribbles(port: int) -> None:
    """Neither blank lines nor the rest of a body that nobody reads keep a connection open."""
    for first in (LIVE + b"\r\n", PREDICT.replace(b"predict", b"nowhere") + b"Content-Length: 1000000\r\n\r\n"):
        with connect(port) as connection:
            connection.sendall(first)
            assert connection.recv(65536)  # the answer
            wait_for(lambda connection=connection: is_closed(connection))


def test_a_silent_websocket_is_closed(port: int) -> None:
    with (
        open_websocket(f"ws://127.0.0.1:{port}/v1/stream", proxy=None) as stream,
        pytest.raises(ConnectionClosed, match=r"no frame came for 0\.5 s"),
    ):
        stream.recv(timeout=20)


def test_idle_connections_make_room(served: tuple[httpx.Client, Service], photo: bytes) -> None:
    """Far more of them than are allowed, from one address; the next client is served at once."""
    client, _ = served
    port = client.base_url.port
    assert port is not None
    kept = connect(port)
    kept.sendall(LIVE + b"\r\n")
    assert status_of(kept.recv(65536)) == 200
    idle = [connect(port) for _ in range(150)]
    try:
        kept.sendall(LIVE + b"\r\n")  # a connection that was used is closed only after those that weren't
        assert status_of(kept.recv(65536)) == 200
        for connection in idle[::2]:
            connection.sendall(LIVE)
        with httpx.Client(base_url=client.base_url) as other:
            assert other.post("/v1/predict", content=photo).status_code == 200
        assert read_to_end(idle[1]) == b""
        assert 'har_refused_total{reason="connection_replaced"}' in client.get("/metrics").text
    finally:
        for connection in (kept, *idle):
            connection.close()


def test_where_all_connections_work_a_further_one_is_refused(served_folder: Path) -> None:
    head = PREDICT + b"Content-Type: image/jpeg\r\nContent-Length: 100\r\n\r\n"
    with running(served_folder, max_connections_per_address=3) as (client, _):
        port = client.base_url.port
        assert port is not None
        client.close()  # its connection is one of this address
        busy = [connect(port) for _ in range(3)]
        try:
            for connection in busy:
                connection.sendall(head)
            time.sleep(0.3)
            with connect(port) as further:
                answer = read_to_end(further)
            assert status_of(answer) == 429 and b"Retry-After: 1" in answer
        finally:
            for connection in busy:
                connection.close()


LEAVING = {
    "a raw body": (b"Content-Type: image/jpeg\r\nContent-Length: 5000\r\n\r\n", b"abc"),
    "a form": (b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 5000\r\n\r\n", b"--b\r\n"),
    "JSON": (b"Content-Type: application/json\r\nContent-Length: 5000\r\n\r\n", b'{"a'),
    "a wrong chunk": (b"Content-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n", b"ZZ\r\n"),
}
ROUTES = (
    *("/v1/predict", "/v1/predict/batch", "/v1/embed", "/v1/explain", "/v1/stream"),
    *("/v1/models/har/load", "/v1/models/har/activate", "/v1/models/har/classes"),
    *("/v2/models/har/infer", "/v2/models/har/versions/x/infer"),
)


@pytest.mark.parametrize("name", LEAVING)
def test_a_client_that_leaves_is_no_error_of_the_service(
    served: tuple[httpx.Client, Service], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    client, _ = served
    before = requests_by_status(client)
    head, part = LEAVING[name]
    for route in ROUTES:
        with connect(client.base_url.port or 0) as connection:
            connection.sendall(PREDICT.replace(b"/v1/predict", route.encode()) + head + part)
            time.sleep(0.05)

    def gone() -> float:
        after = requests_by_status(client)
        return sum(after.get(status, 0) - before.get(status, 0) for status in ("400", "404", "499"))

    wait_for(lambda: gone() >= len(ROUTES))
    new = {status for status, count in requests_by_status(client).items() if count > before.get(status, 0)}
    assert not [status for status in new if status.startswith("5")]
    assert not [record for record in caplog.records if record.exc_info]


def test_a_websocket_that_leaves_is_no_error_of_the_service(
    served: tuple[httpx.Client, Service], caplog: pytest.LogCaptureFixture
) -> None:
    """Reset before its handshake is answered, after it, and in the middle of a frame."""
    client, _ = served
    before = sum(requests_by_status(client, "/v1/stream").values())
    head = b"GET /v1/stream?classes=a,b HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    head += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    for i in range(12):
        connection = connect(client.base_url.port or 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
        connection.sendall(head)
        if i % 2:
            connection.recv(1)
            connection.sendall((b"\x82\xfe\xff", b"\xff" * 10, b"\x81\x85abcd12345")[i % 3])
        connection.close()
    wait_for(lambda: sum(requests_by_status(client, "/v1/stream").values()) >= before + 12)
    assert not [record.getMessage() for record in caplog.records if record.exc_info]
    assert not [status for status in requests_by_status(client, "/v1/stream") if status.startswith("5")]


def test_a_deadline_of_the_clients_own_is_no_error_of_the_service(
    served: tuple[httpx.Client, Service], photo: bytes
) -> None:
    client, _ = served
    before = requests_by_status(client, "/v1/predict")
    late = client.post("/v1/predict", params={"classes": "a,b"}, content=photo, headers={"X-Timeout-Ms": "1"})
    assert late.status_code == 504
    after = requests_by_status(client, "/v1/predict")
    assert after.get("504", 0) == before.get("504", 0) and after["499"] == before.get("499", 0) + 1


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /v2/health/live HTTP/1.1\r\nHost: LOCALHOST.\r\n\r\n", 200),
        (b"GET /v2/health/live HTTP/1.1\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", 400),
        (b"no HTTP at all\r\n\r\n", 400),
        (b"GET /v2/health/live HTTP/1.1\r\n\r\n", 400),
        (b"GET /v2/health/live HTTP/1.0\r\n\r\n", 200),  # as load balancers ask
        (b"GET /v2/health/live HTTP/2.0\r\nHost: 127.0.0.1\r\n\r\n", 400),
        (LIVE + b"Origin: http://127.0.0.1\r\nOrigin: http://evil.example\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 204),
        (b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
        (PREDICT + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400),
        (PREDICT + b"Content-Encoding: identity\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\na", 415),
    ],
)
def test_hosts_and_codings(port: int, head: bytes, status: int) -> None:
    with connect(port) as connection:
        connection.sendall(head)
        assert status_of(connection.recv(65536)) == status


@pytest.mark.parametrize("chunked", [False, True])
def test_a_wish_for_http_2_is_ignored_and_the_body_is_read(port: int, photo: bytes, chunked: bool) -> None:
    """Java's client asks for it with each request. In parts, and with a further request behind it."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(photo)
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(photo), photo) if chunked else photo
    sent = (PREDICT + upgrade + length + b"\r\n\r\n" + body) * 2 + LIVE + upgrade + b"Connection: close\r\n\r\n"
    with connect(port) as connection:
        for part in (sent[:50], sent[50:400], sent[400:]):
            connection.sendall(part)
            time.sleep(0.05)
        answer = read_to_end(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == 3, answer
    assert answer.count(b'"label"') >= 2


def test_what_a_parser_refuses_is_named(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(PREDICT + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!")
        answer = read_to_end(connection)
    assert b"not a valid HTTP request (Duplicate Content-Length)" in answer


def test_every_limit_is_a_setting() -> None:
    assert set(LIMITS) <= set(Settings.model_fields)
