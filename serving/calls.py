"""A request for a model's answer, opened before its body is read: its service, model and deadline."""

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
    """Nobody waits for the answer any more."""


def service_of(request: Request) -> Service:
    """Return the service that a request came to."""
    return request.app.state.service


@dataclass(frozen=True)
class Call:
    """A request for a model's answer.

    Attributes:
      request: it.
      service: the running service.
      model: that answers.
      deadline: after which an answer is of no use, by the loop's clock.
    """

    request: Request
    service: Service
    model: ServedModel
    deadline: float

    async def read_uploads(self, most: int = 1) -> tuple[list[Upload], str | None]:
        """Return the images of the request, and its form's field `classes`; counts them for the client's rate.

        Raises:
          Problem: no image, too many, another field, or more than the client may send.
        """
        uploads, field = await read_uploads(self.request, "image", most)
        self.service.limiter.take(self.request.state.client, len(uploads) - 1)
        return uploads, field

    async def read_image(self) -> tuple[Upload, str | None]:
        """Return the one image of the request, and its form's field `classes`.

        Raises:
          Problem: as `read_uploads`.
        """
        (upload,), field = await self.read_uploads()
        return upload, field

    def free_classes(self, query: list[str], field: str | None) -> dict[str, Prompts] | None:
        """Return the request's classes in free text with their prompts; None: it has none.

        Raises:
          Problem: they can't be told apart, or are too many.
        """
        return free_classes(list(query), field, self.service.settings)

    async def answer(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, which is cancelled when the client leaves. The body must have been read.

        Raises:
          ClientGone: the client left.
        """
        return await until_disconnect(self.request, work)


def open_call(request: Request, choice: ModelChoice, timeout_ms: int = LONGEST_MS) -> Call:
    """Return the call of a request; what would be refused later anyhow is refused here, before the body is read.

    Raises:
      Problem: no such model, not ready, too many requests from this client, or overloaded.
    """
    service = service_of(request)
    # Where the client allows less time than the service, running out of it is no error of the service.
    request.state.own_deadline = timeout_ms / 1000 < service.settings.request_timeout_s
    deadline = deadline_after(service, timeout_ms)
    return Call(request, service, service.begin(request.state.client, choice), deadline)


def deadline_after(service: Service, timeout_ms: int = LONGEST_MS) -> float:
    """Return the end of the time that the service, or its client, allows for an answer, by the loop's clock."""
    return asyncio.get_running_loop().time() + min(timeout_ms / 1000, service.settings.request_timeout_s)


async def _query_call(request: Request, choice: ModelQuery, timeout_ms: Timeout = LONGEST_MS) -> Call:
    return open_call(request, choice, timeout_ms)


QueryCall = Annotated[Call, Depends(_query_call)]


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled when the client leaves. The body must have been read.

    Raises:
      ClientGone: the client left.
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
