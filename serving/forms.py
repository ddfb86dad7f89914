"""The parts of a multipart form, held in memory: their size is limited, and a full disk can't fail a request."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving.problems import Problem

MAX_TEXTS = 8  # parts other than files
MAX_TEXT_BYTES = 100_000  # of each of them
EXTENDED_NAME = re.compile(r";\s*filename\*\s*=\s*\"?([\w.-]*)'[^']*'([^;\s\"]*)", re.IGNORECASE)  # RFC 5987
CUT_OFF = "the form was cut off: its last boundary is missing; send it again, whole"


@dataclass
class Part:
    """A part of a form; `filename` is None for text."""

    name: str
    filename: str | None
    data: bytearray = field(default_factory=bytearray)


async def read_parts(content_type: str, body: AsyncIterator[bytes], most_files: int, too_many: Problem) -> list[Part]:
    """Return the parts of a form.

    Args:
      content_type: the request's header, which holds the boundary.
      body: its bytes as they arrive.
      most_files: accepted number of files.
      too_many: the error for more files.

    Raises:
      Problem: not a form with its boundary, cut off, or too many or too large parts.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise Problem("malformed", "the Content-Type header of the form names no boundary")
    reader = _Reader(most_files, too_many)
    callbacks: Any = {name: getattr(reader, name) for name in dir(reader) if name.startswith("on_")}
    any_bytes = False
    try:
        parser = MultipartParser(boundary, callbacks)
        async for chunk in body:
            any_bytes = any_bytes or bool(chunk)
            parser.write(chunk)
    except FormParserError as error:
        if str(error).startswith("Maximum header"):
            raise Problem("malformed", "a part of the form has too many or too long headers") from error
        raise Problem(
            "malformed", "not a multipart form with the boundary that its Content-Type header names"
        ) from error
    if any_bytes and not reader.complete:
        raise Problem("invalid_request", CUT_OFF)
    return reader.parts


class _Reader:
    """Collect the parts that python_multipart finds; its callbacks are the methods `on_...`."""

    def __init__(self, most_files: int, too_many: Problem):
        self.parts: list[Part] = []
        self.complete = False
        self._files_left, self._texts_left, self._too_many = most_files, MAX_TEXTS, too_many
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""

    def on_part_begin(self) -> None:
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"name" not in options:
            raise Problem("malformed", "a part of the form has no name in its Content-Disposition header")
        part = Part(_text(options[b"name"]), _filename(self._disposition, options))
        if part.filename is None:
            self._texts_left -= 1
            if self._texts_left < 0:
                raise Problem("invalid_request", f"the form has over {MAX_TEXTS} parts that aren't files")
        else:
            self._files_left -= 1
            if self._files_left < 0:
                raise self._too_many
        self.parts.append(part)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        part.data += data[start:end]
        if part.filename is None and len(part.data) > MAX_TEXT_BYTES:
            raise Problem(
                "invalid_request", f"the form's part {part.name[:50]!r} has over {MAX_TEXT_BYTES} bytes of text"
            )

    def on_end(self) -> None:
        self.complete = True


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _filename(disposition: bytes, options: dict[bytes, bytes]) -> str | None:
    """Return the name of a file, also from the extended form `filename*=UTF-8''...` alone."""
    if b"filename" in options:
        return _text(options[b"filename"])
    extended = EXTENDED_NAME.search(disposition.decode("latin-1"))
    if extended is None:
        return None
    charset = "latin-1" if extended[1].lower() == "iso-8859-1" else "utf-8"
    return unquote(extended[2], charset, "replace")
