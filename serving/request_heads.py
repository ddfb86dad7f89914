"""Checks of a request's target and headers by HTTP/1.1, and removal of an Upgrade header."""

from collections.abc import Sequence

from serving.problems import Problem

ONCE = (
    b"authorization",
    b"content-type",
    b"host",
    b"origin",
)  # programs differ in which of several they read
VERSIONS = ("1.0", "1.1")
Headers = Sequence[tuple[bytes, bytes]]


def head_problem(url: bytes, version: str, headers: Headers, max_bytes: int) -> Problem | None:
    """Return the reason to refuse a request by its head; None: accepted.

    Args:
      url: the target as sent.
      version: as "1.1".
      headers: with names in lower case.
      max_bytes: for target and headers together.
    """
    if len(url) + sum(len(name) + len(value) + 4 for name, value in headers) > max_bytes:
        return too_large(max_bytes)
    if version not in VERSIONS:
        return Problem("malformed", f"HTTP/{version} isn't spoken here; send HTTP/1.1")
    names = [name for name, _ in headers]
    if repeated := [name for name in ONCE if names.count(name) > 1]:
        return Problem("malformed", f"several {repeated[0].decode().title()} headers; send one")
    if version == "1.1" and b"host" not in names:
        return Problem("malformed", "no Host header; HTTP/1.1 needs one")
    codings = b",".join(value for name, value in headers if name == b"transfer-encoding").strip()
    if codings.lower() not in (b"", b"chunked"):
        coding = repr(codings.decode("latin-1"))[:50]
        return Problem("malformed", f"transfer coding {coding} isn't supported; send chunked, or a length")
    return None


def too_large(max_bytes: int) -> Problem:
    """Return the problem for a head over the limit."""
    return Problem("headers_too_large", f"over {max_bytes} bytes of headers; send fewer")


def without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """Return a head without its Upgrade header, which a server may ignore (RFC 9110, 7.8)."""
    kept = b"".join(b"%s: %s\r\n" % header for header in headers if header[0] != b"upgrade")
    return b"%s %s HTTP/%s\r\n%s\r\n" % (method, url, version.encode(), kept)
