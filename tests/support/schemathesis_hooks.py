"""Real images and videos for schemathesis: of random bytes a service for images can only say that they are none."""

import base64
import io
import tempfile
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image

from clip_har_jax.image_formats import readable_formats, sniff
from serving.calls import LONGEST_MS
from tests.support.videos import write_video

with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
    write_video(file.name, seconds=0.5)
    VIDEO = file.read()


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """Small images of all kinds that are taken."""
    size = draw(st.integers(2, 64)), draw(st.integers(2, 64))
    mode = draw(st.sampled_from(["RGB", "L", "RGBA", "P", "1"]))
    kind = draw(st.sampled_from(sorted({one.name for one in readable_formats()} - {"MPO", "HEIF"})))
    image = Image.new(mode, size, draw(st.integers(0, 1)))
    buffer = io.BytesIO()
    (image.convert("RGB") if kind in ("JPEG", "AVIF", "BMP") else image).save(buffer, kind)
    return buffer.getvalue()


schemathesis.openapi.format("binary", images())
schemathesis.openapi.format("byte", images().map(lambda data: base64.b64encode(data).decode()))
for one in readable_formats():
    if one.media_type != "image/jpeg" or one.name == "JPEG":
        schemathesis.openapi.media_type(one.media_type, images())
schemathesis.openapi.media_type("video/mp4", st.just(VIDEO))


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """What a form's field holds beyond being text, OpenAPI can't say."""
    if isinstance(body, dict) and isinstance(body.get("classes"), str):
        body["classes"] = '["riding a bike", "sleeping"]'
    return body


@schemathesis.hook
def map_query(context: Any, query: Any) -> Any:
    """Names of classes that don't mean the same, rules that don't contradict one another."""
    classes, end_score = (query or {}).get("classes"), (query or {}).get("end_score")
    if isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes):
        query["classes"] = ["juggling", "climbing"]
    if isinstance(end_score, float | int) and 0 <= end_score <= 1:
        query["end_score"] = 0
    for name, seconds in (("window_s", 1.0), ("hop_s", 0.5), ("max_delay_s", 2.0)):  # which fit together
        if isinstance((query or {}).get(name), float | int) and 0.05 <= query[name] <= 600:
            query[name] = seconds
    return query


@schemathesis.hook
def before_call(context: Any, case: schemathesis.Case, kwargs: Any) -> None:
    """Return a video where an image was made, since both are binary; and time to answer.

    A deadline of a millisecond passes, as it should, and would count as an error of the server's.
    """
    timeout = str(case.headers["X-Timeout-Ms"]) if case.headers and "X-Timeout-Ms" in case.headers else ""
    if timeout.isdecimal() and 1 <= int(timeout) <= LONGEST_MS:
        case.headers["X-Timeout-Ms"] = "10000"
    if case.path == "/v1/stream" and isinstance(case.body, dict):
        made: Any = case.body.get("video")
        data = getattr(made, "data", made)
        if isinstance(data, bytes) and sniff(data):
            case.body["video"] = type(made)(VIDEO)
