"""The service as the app sees it: every failure is a sentence that says what to do."""

import json
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

TIMEOUT_S = httpx.Timeout(30.0, connect=3.0)
VIDEO_TIMEOUT_S = 600.0
SENTENCES = {
    "bad_image": "This picture can't be read: {detail}. Try another one, as JPEG, PNG or WebP.",
    "unsupported_media_type": "This kind of file can't be read. Pictures must be JPEG, PNG or WebP.",
    "body_too_large": "This file is too large for the service. Make it smaller and try again.",
    "body_timeout": "The file took too long to arrive. Try again, or with a smaller one.",
    "empty_body": "The file is empty. Choose another one.",
    "unauthorized": "The service needs a key. Put it into HAR_KEY and start the app again.",
    "forbidden": "The key in HAR_KEY isn't allowed to do this. Ask whoever runs the service.",
    "classes_not_supported": "This model knows only the actions it was trained on and can't take new ones.",
    "too_many_requests": "The service gets too many requests at the moment. Wait a few seconds and try again.",
    "overloaded": "The service is busy. Wait a few seconds and try again.",
    "not_ready": "The service is still loading its model. Wait a few seconds and try again.",
    "shutting_down": "The service is stopping. Start it again, then try once more.",
    "deadline": "The service took too long to answer. Try again, or with a smaller file.",
}


class Trouble(Exception):  # noqa: N818
    """What a person reads when something can't be done; the message is a whole sentence."""


class Service:
    """A running service.

    Args:
      url: its address.
      key: its API key, if it needs one.
    """

    def __init__(self, url: str, key: str | None = None):
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        weakref.finalize(self, self._client.close)  # with the visit that it was made for

    def predict(
        self, image: bytes, classes: Mapping[str, Sequence[str]] | None = None, top: int = 5, **which: str
    ) -> dict[str, Any]:
        """Return the actions in a picture; `classes`: tell these apart instead, each with how it is said, or
        nothing.
        """
        fields = {"classes": json.dumps(classes)} if classes else {}
        return self._send("/v1/predict", files={"image": image}, data=fields, params={"top": top, **which}).json()

    def explain(self, image: bytes, label: str, **which: str) -> bytes:
        """Return the picture with what speaks for a label marked in it, as PNG."""
        params, headers = {"label": label, **which}, {"Accept": "image/png"}
        return self._send("/v1/explain", files={"image": image}, params=params, headers=headers).content

    def predict_batch(self, images: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        """Return the actions in each of several pictures, given as (name, content)."""
        files = [("image", (f"{i}", content)) for i, (_, content) in enumerate(images)]
        return self._send("/v1/predict/batch", files=files, params={"top": 5}).json()["predictions"]

    def events(self, video: bytes) -> dict[str, Any]:
        """What is done when in a video."""
        return self._send("/v1/stream", files={"video": video}, timeout=VIDEO_TIMEOUT_S).json()

    def models(self) -> list[dict[str, Any]]:
        """Return the models that the service holds, with their versions."""
        return self._send("/v1/models", method="GET").json()["models"]

    def save_classes(self, name: str, add: Mapping[str, Sequence[str]], remove: Sequence[str]) -> dict[str, Any]:
        """Change a model's actions; gives the model with its new version."""
        body = {"add": {label: list(texts) for label, texts in add.items()}, "remove": list(remove)}
        return self._send(f"/v1/models/{name}/classes", json=body).json()

    def reload(self, name: str) -> dict[str, Any]:
        """Read a model's folder again: its own actions are back."""
        return self._send(f"/v1/models/{name}/load", json={"activate": True}).json()

    def _send(self, path: str, method: str = "POST", **options: Any) -> httpx.Response:
        try:
            answer = self._client.request(method, path, **options)
        except httpx.TimeoutException as error:
            raise Trouble(SENTENCES["deadline"]) from error
        except httpx.HTTPError as error:
            raise Trouble(
                f"The service at {self.url} doesn't answer. Start it with "
                "`python -m serving --model=runs/demo/export`, then try again."
            ) from error
        if answer.is_success:
            return answer
        raise Trouble(_sentence(answer))


def _sentence(answer: httpx.Response) -> str:
    try:
        problem = answer.json()
        code, detail = problem["code"], str(problem["detail"]).rstrip(".")
    except (ValueError, KeyError, TypeError):
        return f"What answers at {answer.url.host} isn't the service (status {answer.status_code}). Check HAR_URL."
    known = SENTENCES.get(code)
    return known.format(detail=detail) if known else f"The service can't do this: {detail}."


def configured() -> tuple[str | None, str | None]:
    """Address and key of the service, as the environment gives them."""
    return os.environ.get("HAR_URL") or None, os.environ.get("HAR_KEY") or None
