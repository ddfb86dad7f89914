"""Shared parts of the HTML pages: templates and embedded pictures."""

import base64
import hashlib
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup
from PIL import Image

from clip_har_jax.text import phrase

THUMBNAIL_PX = 224
TEMPLATES = Path(__file__).parent / "templates"


@cache
def templates() -> jinja2.Environment:
    """Return the templates of the pages, with their shared style and script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    environment.globals |= {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),  # our own files
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment


def spoken(labels: Sequence[str]) -> tuple[str, ...]:
    """Return labels as phrases ("using_laptop": "using a laptop"); unchanged if two phrases would be equal."""
    phrases = tuple(phrase(label) for label in labels)
    return phrases if len(set(phrases)) == len(labels) else tuple(labels)


def thumbnail(image: UInt8[np.ndarray, "h w 3"], most_px: int = THUMBNAIL_PX) -> str:
    """Return a small JPEG of an image as a data URI; neither side is over `most_px`."""
    picture = Image.fromarray(image)
    picture.thumbnail((most_px, most_px))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return data_uri(buffer.getvalue(), "jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """Return an encoded image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
