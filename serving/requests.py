"""What comes in with a request: its images and free-text classes, however they were sent; and whether anyone waits."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Query, Request
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import UploadFile

from serving.classes import Prompts, check_labels, checked_prompts
from serving.problems import Problem
from serving.schemas import Label, Prompt
from serving.settings import Settings

T = TypeVar("T")
CLASSES: TypeAdapter[list[str] | dict[str, list[str]]] = TypeAdapter(list[Label] | dict[Label, list[Prompt]])


Threshold = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class ClientGone(Exception):  # noqa: N818
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Upload:
    """An image as it was sent."""

    data: bytes
    filename: str | None = None


@dataclass(frozen=True)
class Which:
    """The model that a request asks for."""

    model: Annotated[
        str | SkipJsonSchema[None], Query(max_length=64, description="a model's name; left out: the first")
    ] = None
    version: Annotated[str | SkipJsonSchema[None], Query(max_length=100, description="left out: the active one")] = None


@dataclass(frozen=True)
class Asked:
    """How an answer is wanted."""

    top: Annotated[int, Query(ge=1, le=100, description="how many classes to name")] = 5
    threshold: Annotated[Threshold | SkipJsonSchema[None], Query(description="abstain below this score")] = None
    classes: Annotated[
        list[str], Query(description="tell these apart instead, in any words; repeated, or divided by commas")
    ] = ()  # type: ignore[assignment]


LONGEST_MS = 600_000
Timeout = Annotated[
    int, Header(alias="X-Timeout-Ms", ge=1, le=LONGEST_MS, description="give up after so many milliseconds")
]


def deadline_of(settings: Settings, timeout_ms: int = LONGEST_MS) -> float:
    """When an answer is of no use any more, by the loop's clock."""
    return asyncio.get_running_loop().time() + min(timeout_ms / 1000, settings.request_timeout_s)


def is_form(request: Request) -> bool:
    """Return whether the body is a multipart form."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def read_uploads(request: Request, field: str, most: int) -> tuple[list[Upload], str | None]:
    """Return the files of a request, and its form's field `classes`.

    Raises:
      Problem: no file, an empty one, too many, or another field.
    """
    if not is_form(request):
        return [Upload(await request.body())], None
    async with request.form(max_files=most, max_fields=1, max_part_size=100_000) as form:
        uploads, classes = [], None
        for name, value in form.multi_items():
            if name == field and isinstance(value, UploadFile):
                uploads.append(Upload(await value.read(), value.filename or None))
            elif name == "classes" and isinstance(value, str):
                classes = value.strip() or None  # a field that was left empty in a page
            elif name == field:
                raise Problem("invalid_request", f"the form's part {field!r} isn't a file; send it with a filename")
            else:
                raise Problem(
                    "invalid_request", f"the form has a part {name[:50]!r}; {field!r} (a file) and 'classes' are taken"
                )
        if not uploads:
            raise Problem("invalid_request", f"the form has no file named {field!r}")
        return uploads, classes


def free_classes(query: list[str], field: str | None, settings: Settings) -> dict[str, Prompts] | None:
    """Classes in free text with their prompts; None: none were given.

    Raises:
      Problem: an empty name, a wrong form, too many, or two that mean the same.
    """
    given: list[str] | dict[str, list[str]]
    if field is not None:
        try:
            given = CLASSES.validate_json(field)
        except ValidationError as error:
            raise Problem(
                "invalid_request", 'classes: a JSON list of names, or {"NAME": ["PROMPT", ...]}, is needed'
            ) from error
    elif query:
        given = [name.strip() for item in query for name in item.split(",")]
    else:
        return None
    if len(given) > settings.max_classes:
        raise Problem("invalid_request", f"classes: {len(given)} are too many; at most {settings.max_classes}")
    if any(not name.strip() or len(name) > 200 for name in given):
        raise Problem("invalid_request", "classes: a name is empty or over 200 characters")
    if isinstance(given, list):
        if twice := [name for name in given if given.count(name) > 1]:
            raise Problem("invalid_request", f"classes: {twice[0]!r} is named twice")
        given = {name: [] for name in given}
    prompts = checked_prompts(given)
    check_labels(list(prompts))
    return prompts


async def while_wanted(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is ended when the client goes away. The body must have been read.

    Raises:
      ClientGone: it went.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def on_the_loop(make: Callable[..., T]) -> Callable[..., Coroutine[Any, Any, T]]:
    """`make` as a dependency that is called where it is: what isn't a coroutine FastAPI calls in a thread."""

    async def made(**given: Any) -> T:
        return make(**given)

    made.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]
    return made


WhichModel = Annotated[Which, Depends(on_the_loop(Which))]
HowAsked = Annotated[Asked, Depends(on_the_loop(Asked))]
