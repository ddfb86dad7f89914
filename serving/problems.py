"""Errors by RFC 9457: one JSON form for all, with a `code` for programs."""

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field

MEDIA_TYPE = "application/problem+json"

# code -> status
CODES = {
    "invalid_request": 422,
    "empty_body": 422,
    "bad_image": 422,
    "bad_video": 422,
    "classes_not_supported": 422,
    "malformed": 400,
    "too_many_images": 400,
    "host_not_allowed": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "unknown_model": 404,
    "method_not_allowed": 405,
    "header_timeout": 408,
    "body_timeout": 408,
    "conflict": 409,
    "load_failed": 409,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "too_many_requests": 429,
    "headers_too_large": 431,
    "internal": 500,
    "bad_model_output": 500,
    "not_ready": 503,
    "overloaded": 503,
    "deadline": 504,
}


class ProblemBody(BaseModel):
    """The body of every error (RFC 9457)."""

    type: str = "about:blank"
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["not an image (JPEG, PNG, WEBP); convert it"])
    code: str = Field(examples=["bad_image"], description=f"one of {', '.join(CODES)}")
    request_id: str = Field(examples=["5f0c7e8a9b1d4c3e"])


class Problem(Exception):  # noqa: N818  RFC 9457's word
    """Ends a request with an error for its client.

    Args:
      code: one of `CODES`.
      detail: one sentence: what is wrong, and what to do.
      retry_after_s: time after which to try again.
    """

    def __init__(
        self, code: str, detail: str, retry_after_s: float | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(detail)
        self.code, self.detail, self.status = code, detail, CODES[code]
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))

    def to_body(self, request_id: str) -> ProblemBody:
        """Return the body of the answer."""
        title = HTTPStatus(self.status).phrase
        return ProblemBody(title=title, status=self.status, detail=self.detail, code=self.code, request_id=request_id)


def responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a route's errors."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(CODES[code], []).append(code)
    schema = {"schema": {"$ref": "#/components/schemas/ProblemBody"}}
    return {
        status: {"description": ", ".join(names), "content": {MEDIA_TYPE: schema}}
        for status, names in sorted(by_status.items())
    }
