"""The app's client of the service: every failure becomes a sentence that says what to do."""

import os
import weakref
from typing import Any

import httpx

from serving.client import Client, ServiceError
from serving.problems import ProblemBody

CONNECT_S, TIMEOUT_S = 3.0, 30.0
SENTENCES = {
    "bad_image": "This picture can't be read: {detail}. Try another one.",
    "unsupported_media_type": "This kind of file can't be read: {detail}.",
    "body_too_large": "This file is too large for the service: {detail}.",
    "body_timeout": "The file took too long to arrive. Try again, or with a smaller one.",
    "empty_body": "The file is empty. Choose another one.",
    "unauthorized": "The service needs a key. Put it into HAR_KEY and start the app again.",
    "forbidden": "The key in HAR_KEY isn't allowed to do this. Ask whoever runs the service.",
    "classes_not_supported": "This model knows only the actions it was trained on and can't take new ones.",
    "too_many_requests": "The service gets too many requests at the moment. Wait a few seconds and try again.",
    "overloaded": "The service is busy. Wait a few seconds and try again.",
    "not_ready": "The service is still loading its model. Wait a few seconds and try again.",
    "deadline": "The service took too long to answer. Try again, or with a smaller file.",
    "unknown": "What answers at {address} isn't the service (status {status}). Check HAR_URL.",
}


class Trouble(Exception):  # noqa: N818
    """A failure, described to a person in a complete sentence."""


class AppClient(Client):
    """The service for one visit; its connections are closed at the end of the visit.

    Args:
      address: of the service.
      key: its API key, if it needs one.
    """

    def __init__(self, address: str, key: str | None = None):
        super().__init__(address, key, retries=1, timeout_s=TIMEOUT_S, connect_timeout_s=CONNECT_S)
        weakref.finalize(self, self._http.close)

    def send(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Send a request.

        Raises:
          Trouble: the service refused or doesn't answer.
        """
        try:
            return super().send(method, path, **content)
        except ServiceError as error:
            raise Trouble(self._sentence(error.problem)) from error
        except httpx.TimeoutException as error:
            raise Trouble(SENTENCES["deadline"]) from error
        except httpx.HTTPError as error:
            raise Trouble(
                f"The service at {self.address} doesn't answer. Start it with "
                "`python -m serving --model=runs/demo/export`, then try again."
            ) from error

    def _sentence(self, problem: ProblemBody) -> str:
        known = SENTENCES.get(problem.code, "The service can't do this: {detail}.")
        return known.format(detail=problem.detail.rstrip("."), address=self.address, status=problem.status)


def configured() -> tuple[str | None, str | None]:
    """Return address and key of the service from the environment."""
    return os.environ.get("HAR_URL") or None, os.environ.get("HAR_KEY") or None
