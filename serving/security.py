"""Access control, closed by default: keys and scopes, hosts and origins, limits on bodies and rates, headers."""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clip_har_jax.errors import UserError
from serving.problems import Problem
from serving.settings import Settings
from serving.telemetry import Metrics, problem_response

KeyScope = Literal["use", "metrics", "admin"]
SCOPES: tuple[KeyScope, ...] = ("use", "metrics", "admin")

# Open paths, and paths that need less than an admin's key. All other paths need an admin's key.
PUBLIC = frozenset({"/v2/health/live", "/v2/health/ready"})
NEEDS: tuple[tuple[str, str, KeyScope], ...] = (  # method, path or its prefix (ends in a slash), scope
    ("POST", "/v1/predict", "use"),
    ("POST", "/v1/predict/batch", "use"),
    ("POST", "/v1/embed", "use"),
    ("POST", "/v1/explain", "use"),
    ("POST", "/v1/videos", "use"),
    ("POST", "/v1/stream", "use"),
    ("WS", "/v1/stream", "use"),
    ("GET", "/v1/models", "use"),
    ("GET", "/v2", "use"),
    ("GET", "/v2/", "use"),
    ("POST", "/v2/models/", "use"),
    ("GET", "/metrics", "metrics"),
)
CLIENTS = 10_000  # number of clients whose rates are stored

CLOSED = "default-src 'none'; frame-ancestors 'none'"
DOCS = (  # Swagger's page starts with an inline script
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Key:
    """A stored API key: its SHA-256. Keys are random with 256 bits, so a slow hash would add nothing."""

    name: str
    scopes: frozenset[str]
    sha256: str


def new_key(name: str, scopes: Sequence[str] = ("use",)) -> tuple[str, str]:
    """Return a new key for its user, and its line for the settings."""
    key = f"har_{secrets.token_urlsafe(32)}"
    return key, f"{name}:{'+'.join(scopes)}:{hashlib.sha256(key.encode()).hexdigest()}"


def parse_keys(text: str) -> tuple[Key, ...]:
    """Return the keys of HAR_API_KEYS.

    Raises:
      UserError: a part that isn't NAME:SCOPES:SHA256; the message doesn't show the hash.
    """
    keys = []
    for number, part in enumerate(text.split(), 1):
        name, _, rest = part.partition(":")
        scopes, _, digest = rest.partition(":")
        given = frozenset(scopes.split("+"))
        if not name or not given <= set(SCOPES) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise UserError(f"HAR_API_KEYS: key {number} must be NAME:SCOPES:SHA256, as --new_key=NAME prints it")
        keys.append(Key(name, given, digest))
    return tuple(keys)


class Limiter:
    """A token bucket per client."""

    def __init__(self, rate_per_s: float, burst: int):
        self._rate, self._burst = rate_per_s, float(burst)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> tokens, time

    def take(self, client: str, count: int = 1) -> None:
        """Take `count` images from a client's allowance.

        Raises:
          Problem: the rate limit is exceeded.
        """
        if not self._rate:
            return
        now = time.monotonic()
        tokens, since = self._buckets.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        allowed = tokens >= min(count, self._burst)
        self._buckets[client] = (tokens - count if allowed else tokens, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = (min(count, self._burst) - tokens) / self._rate
            raise Problem("too_many_requests", f"more than {self._rate:g} images a second", retry_after_s=wait)


def needed_scope(method: str, path: str) -> KeyScope | None:
    """Return the scope that a key needs for a path; None: no key.

    OPTIONS needs the lowest scope of any method of the path.
    """
    if path in PUBLIC and method in ("GET", "HEAD", "OPTIONS"):
        return None
    if method == "OPTIONS":
        needed = {needed_scope(verb, path) for verb in ("GET", "POST")}
        return next(scope for scope in SCOPES if scope in needed)
    method = "GET" if method == "HEAD" else method
    for verb, known, scope in NEEDS:
        if method == verb and (path == known or (known.endswith("/") and path.startswith(known))):
            return scope
    return "admin"


class Gate:
    """Middleware before all routes: checks host, origin, key and scope, limits the body, adds headers."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = parse_keys(settings.api_keys.get_secret_value())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        policy = DOCS if scope["path"] == "/docs" else CLOSED

        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = policy
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self._check(scope)
            if scope["type"] == "http":
                receive = self._bounded(scope, receive)
            await self._app(scope, receive, send_with_headers)
        except Problem as problem:
            if problem.status in (401, 403, 413):
                self._metrics.refused.labels(problem.code).inc()
            response = problem_response(problem, scope)
            if scope["type"] == "websocket":
                await receive()  # the client's websocket.connect
            await response(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        websocket = scope["type"] == "websocket"
        # HTTP/1.0 has no Host, as in health checks. Web pages, against which this protects, always send one.
        host, hosts = headers.get("host"), self._settings.hosts
        if host is not None and hosts and host_name(host) not in map(host_name, hosts):
            raise Problem("host_not_allowed", "the Host header names no host of this service; see HAR_ALLOWED_HOSTS")
        # A browser asks before it sends JSON to another site, but not before it opens a WebSocket or posts a form.
        origin = headers.get("origin")
        if origin is not None and origin not in self._settings.allowed_origins and not _same(origin, headers):
            raise Problem("forbidden", "web pages of this origin may not call; see HAR_ALLOWED_ORIGINS")
        needed = needed_scope("WS" if websocket else scope["method"], scope["path"])
        scope["state"]["client"] = network_of(scope["client"][0] if scope.get("client") else "local")
        if needed is None or not self._keys:
            return _check_encoding(headers)
        key = self._find(headers.get("authorization", ""))
        if key is None:
            raise Problem(
                "unauthorized", "send a key as Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"}
            )
        scope["state"]["client"] = key.name
        if needed not in key.scopes and "admin" not in key.scopes:
            raise Problem("forbidden", f"this key may not do that; the scope {needed} is needed")
        _check_encoding(headers)

    def _find(self, authorization: str) -> Key | None:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(given.strip().encode()).hexdigest()
        found = None
        for key in self._keys:  # compare all keys, so that the time doesn't reveal which one matched
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that ends bodies that are too large or too slow."""
        settings = self._settings
        video = scope["path"] in ("/v1/stream", "/v1/videos")
        limit = settings.max_video_bytes if video else settings.max_body_bytes
        timeout_s = settings.video_timeout_s if video else settings.body_timeout_s
        length = Headers(scope=scope).get("content-length", "0")
        too_large = Problem("body_too_large", f"over {limit / 1e6:g} MB; send less", headers={"Connection": "close"})
        if length.isdecimal() and int(length) > limit:
            raise too_large
        deadline = asyncio.get_running_loop().time() + timeout_s
        received, complete = 0, False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:  # the next message is the client's disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise Problem(
                    "body_timeout", f"the body took over {timeout_s:g} s", headers={"Connection": "close"}
                ) from error
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise too_large
            return message

        return bounded


def _check_encoding(headers: Headers) -> None:
    """Refuse compressed bodies: a small one can expand to gigabytes."""
    encoding = ", ".join(headers.getlist("content-encoding")).strip()
    if set(encoding.lower().replace(" ", "").split(",")) - {"", "identity"}:
        raise Problem(
            "unsupported_media_type",
            f"content encoding {encoding[:50]!r} isn't supported; send the body without Content-Encoding",
            headers={"Accept-Encoding": "identity"},
        )


def network_of(address: str) -> str:
    """Return the network that counts as one client: an IPv4 address, or the /64 network of an IPv6 customer."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{IPv6Address(int(parsed) >> 64 << 64)}/64"


def host_name(host: str) -> str:
    """Return the name in a Host header for comparison: no port or trailing dot, in lower case (RFC 9110, 4.2.3)."""
    name = host if host.endswith("]") else host.rsplit(":", 1)[0]
    return name.lower().removesuffix(".")


def _same(origin: str, headers: Headers) -> bool:
    """Return whether the origin of a page is this service, as for its /docs."""
    host = headers.get("host", "")
    page = origin.partition("://")[2]
    return host_name(page) == host_name(host) and page.rpartition(":")[2] == host.rpartition(":")[2]
