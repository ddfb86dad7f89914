"""A request for a model's answer, opened before its body is read: service, model and deadline."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request

from serving.classes import Prompts
from serving.models import ServedModel
from serving.requests import ModelChoice, ModelQuery, Upload, free_classes, read_uploads
from serving.service import Service

T = TypeVar("T")
LONGEST_MS = 600_000
Timeout = Annotated[
    int, Header(alias="X-Timeout-Ms", ge=1, le=LONGEST_MS, description="give up after so many milliseconds")
]


class ClientGone(Exception):  # noqa: N818
    """The client no longer waits for the answer."""


def service_of(request: Request) -> Service:
    """Return the service of a request."""
    return request.app.state.service


@dataclass(frozen=True)
class Call:
    """A request for a model's answer.

    Attributes:
      request: the HTTP request.
      service: the running service.
      model: the model for the answer.
      deadline: of the answer, by the loop's clock.
    """

    request: Request
    service: Service
    model: ServedModel
    deadline: float

    async def read_uploads(self, most: int = 1, also: str | None = None) -> tuple[list[Upload], str | None]:
        """Return the images of the request and its form field `classes`; count them for the client's rate limit.

        Raises:
          Problem: no image, too many images, an unknown field, or the rate limit is exceeded.
        """
        uploads, field = await read_uploads(self.request, "image", most, also)
        self.service.limiter.take(self.request.state.client, len(uploads) - 1)
        return uploads, field

    async def read_image(self, also: str | None = None) -> tuple[Upload, str | None]:
        """Return the only image of the request, and its form field `classes`; `also` is another name of its field.

        Raises:
          Problem: as `read_uploads`.
        """
        (upload,), field = await self.read_uploads(also=also)
        return upload, field

    def free_classes(self, query: list[str], field: str | None) -> dict[str, Prompts] | None:
        """Return the request's classes in free text with their prompts; None: there are none.

        Raises:
          Problem: they can't be told apart, or there are too many.
        """
        return free_classes(list(query), field, self.service.settings)

    async def answer(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, which is cancelled if the client disconnects. The body must have been read.

        Raises:
          ClientGone: the client disconnected.
        """
        return await until_disconnect(self.request, work)


def open_call(request: Request, choice: ModelChoice, timeout_ms: int = LONGEST_MS) -> Call:
    """Return the call of a request; check everything that can refuse it before the body is read.

    Raises:
      Problem: no such model, not ready, too many requests from this client, or overloaded.
    """
    service = service_of(request)
    # If the client allows less time than the service, a timeout isn't an error of the service.
    request.state.own_deadline = timeout_ms / 1000 < service.settings.request_timeout_s
    deadline = deadline_after(service, timeout_ms)
    return Call(request, service, service.begin(request.state.client, choice), deadline)


def deadline_after(service: Service, timeout_ms: int = LONGEST_MS) -> float:
    """Return the deadline that the service or its client sets for an answer, by the loop's clock."""
    return asyncio.get_running_loop().time() + min(timeout_ms / 1000, service.settings.request_timeout_s)


async def _query_call(request: Request, choice: ModelQuery, timeout_ms: Timeout = LONGEST_MS) -> Call:
    return open_call(request, choice, timeout_ms)


QueryCall = Annotated[Call, Depends(_query_call)]


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled if the client disconnects. The body must have been read.

    Raises:
      ClientGone: the client disconnected.
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
