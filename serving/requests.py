"""The files and free-text classes of a request, from a form, the query or the raw body."""

import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.json_schema import SkipJsonSchema

from serving.classes import Prompts, check_labels, checked_prompts
from serving.forms import read_parts
from serving.problems import Problem
from serving.schemas import Label, Prompt
from serving.settings import Settings

T = TypeVar("T")
CLASSES: TypeAdapter[list[str] | dict[str, list[str]]] = TypeAdapter(list[Label] | dict[Label, list[Prompt]])


Threshold = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class Upload:
    """An uploaded image."""

    data: bytes
    filename: str | None = None


@dataclass(frozen=True)
class ModelChoice:
    """The model that a request asks for."""

    model: Annotated[
        str | SkipJsonSchema[None], Query(max_length=64, description="a model's name; left out: the first")
    ] = None
    version: Annotated[str | SkipJsonSchema[None], Query(max_length=100, description="left out: the active one")] = None


@dataclass(frozen=True)
class AnswerOptions:
    """Options of an answer."""

    top: Annotated[int, Query(ge=1, le=100, description="how many classes to name")] = 5
    threshold: Annotated[Threshold | SkipJsonSchema[None], Query(description="abstain below this score")] = None
    classes: Annotated[
        list[str], Query(description="recognise these classes instead, in free words; repeated, or separated by commas")
    ] = ()  # type: ignore[assignment]


def is_form(request: Request) -> bool:
    """Return whether the body is a multipart form."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def read_uploads(
    request: Request, field: str, most: int = 1, also: str | None = None
) -> tuple[list[Upload], str | None]:
    """Return the files of a request, and its form field `classes`.

    Args:
      request: whose body is read.
      field: of its form that holds a file.
      most: how many files are taken.
      also: another name of that field.

    Raises:
      Problem: no file, too many files, or an unknown field.
      ClientDisconnect: the client disconnected before the end of the body.
    """
    if not is_form(request):
        return [Upload(await request.body())], None
    content_type = request.headers["content-type"]
    uploads, classes = [], None
    for part in await read_parts(content_type, request.stream(), most, _too_many(field, most)):
        name = field if part.name == also else part.name
        if name == field and part.filename is not None:
            uploads.append(Upload(bytes(part.data), part.filename or None))
        elif name == field:
            raise Problem("invalid_request", f"the form's part {part.name!r} isn't a file; send it with a filename")
        elif part.name != "classes" or part.filename is not None:
            raise Problem(
                "invalid_request",
                f"the form has a part {part.name[:50]!r}; {field!r} (a file) and 'classes' are taken",
            )
        elif classes is not None:
            raise Problem("invalid_request", "the form has the field 'classes' twice; send one JSON list")
        else:
            classes = bytes(part.data).decode("utf-8", "replace").strip()
    if not uploads:
        raise Problem("invalid_request", f"the form has no file named {field!r}")
    return uploads, classes or None  # an empty field of a web page


def _too_many(field: str, most: int) -> Problem:
    if most > 1:
        detail = f"over {most} images (HAR_MAX_BATCH_IMAGES) in one batch; send them in several"
    elif field == "image":
        detail = "one image is taken here; send several to /v1/predict/batch"
    else:
        detail = f"one {field} is taken in a request"
    return Problem("too_many_images", detail)


def free_classes(query: list[str], field: str | None, settings: Settings) -> dict[str, Prompts] | None:
    """Return classes in free text with their prompts; None: there are none.

    Raises:
      Problem: an empty name, a wrong form, too many, or two with the same meaning.
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


def async_dependency(make: Callable[..., T]) -> Callable[..., Coroutine[Any, Any, T]]:
    """Return `make` as a coroutine function: FastAPI calls other dependencies in a thread, which is slower."""

    async def made(**given: Any) -> T:
        return make(**given)

    made.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]
    return made


ModelQuery = Annotated[ModelChoice, Depends(async_dependency(ModelChoice))]
AnswerQuery = Annotated[AnswerOptions, Depends(async_dependency(AnswerOptions))]
