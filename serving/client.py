"""A Python client of the service: typed answers, and retries of requests that were refused temporarily.

    from serving.client import Client

    with Client("http://127.0.0.1:8000") as client:
        answer = client.predict("photo.jpg")
        print(answer.label, answer.score)

It needs only httpx and pydantic.
"""

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from serving.problems import ProblemBody
from serving.schemas import (
    BatchPrediction,
    Embedding,
    Explanation,
    Models,
    ModelStatus,
    PredictionBody,
    VideoAnswer,
    VideoEvents,
)

Source = str | Path | bytes
ClassNames = Sequence[str] | Mapping[str, Sequence[str]]  # names, or names with the texts that describe them
M = TypeVar("M", bound=BaseModel)
RETRIED = frozenset({429, 503})
LONGEST_WAIT_S = 10.0
VIDEO_TIMEOUT_S = 600.0


class ServiceError(Exception):
    """The service refused a request; `problem.code` is the reason."""

    def __init__(self, problem: ProblemBody):
        super().__init__(f"{problem.status} {problem.code}: {problem.detail} (request {problem.request_id})")
        self.problem = problem


class Client:
    """A client of one service. Thread-safe.

    Args:
      address: such as http://127.0.0.1:8000.
      key: an API key, if the service needs one.
      retries: number of retries after a temporary refusal (429, 503) or a failed connection, after the time that the
        service asks for or a random wait that doubles.
      timeout_s: of each attempt.
      connect_timeout_s: part of it, for the connection.
    """

    def __init__(
        self,
        address: str,
        key: str | None = None,
        retries: int = 3,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 5.0,
    ):
        self.address = address.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        times = httpx.Timeout(timeout_s, connect=connect_timeout_s)
        # Ignore proxies and password files of the environment: connect to the given address only.
        self._http = httpx.Client(base_url=self.address, headers=headers, timeout=times, trust_env=False)
        self._retries = retries

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ready(self) -> bool:
        """Return whether the service answers requests."""
        try:
            return self._http.get("/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def predict(
        self,
        image: Source,
        top: int = 5,
        threshold: float | None = None,
        classes: ClassNames | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> PredictionBody:
        """Return the prediction for an image, by the active model or another one."""
        query = {"top": top, "threshold": threshold, "model": model, "version": version}
        return self._post("/v1/predict", PredictionBody, [("image", image)], classes, **query)

    def predict_batch(
        self, images: Sequence[Source], top: int = 5, threshold: float | None = None, classes: ClassNames | None = None
    ) -> BatchPrediction:
        """Return a prediction for each image; unreadable ones have an error."""
        files = [("image", image) for image in images]
        return self._post("/v1/predict/batch", BatchPrediction, files, classes, top=top, threshold=threshold)

    def embed(self, image: Source) -> Embedding:
        """Return the image's embedding."""
        return self._post("/v1/embed", Embedding, [("image", image)])

    def explain(self, image: Source, label: str | None = None, classes: ClassNames | None = None) -> Explanation:
        """Return a heat map of a class."""
        return self._post("/v1/explain", Explanation, [("image", image)], classes, label=label)

    def explain_picture(self, image: Source, label: str | None = None) -> bytes:
        """Return the image as a PNG with the heat map of a class."""
        content = {"files": [("image", _file(image))], "headers": {"Accept": "image/png"}}
        return self.send("POST", "/v1/explain", params={"label": label} if label else {}, **content).content

    def events(self, video: Source, classes: ClassNames | None = None, **rules: Any) -> VideoEvents:
        """Return the actions in a video; `rules` are query parameters of POST /v1/stream."""
        return self._post("/v1/stream", VideoEvents, [("video", video)], classes, **rules)

    def video(self, video: Source, classes: ClassNames | None = None, **rules: Any) -> VideoAnswer:
        """Return the prediction of a video as one clip, and its segments; `rules` as in the query of /v1/videos."""
        return self._post("/v1/videos", VideoAnswer, [("video", video)], classes, **rules)

    def models(self) -> Models:
        """Return the models and their versions."""
        return Models.model_validate(self.send("GET", "/v1/models").json())

    def load(self, name: str, folder: str | None = None, activate: bool = True) -> ModelStatus:
        """Load a version, by default from the model's own folder."""
        answer = self.send("POST", f"/v1/models/{name}/load", json={"folder": folder, "activate": activate})
        return ModelStatus.model_validate(answer.json())

    def change_classes(
        self, name: str, add: Mapping[str, Sequence[str]], remove: Sequence[str] = (), reset: bool = False
    ) -> ModelStatus:
        """Add and remove classes by text; `reset`: start from the model's own classes."""
        body = {"add": {label: list(texts) for label, texts in add.items()}, "remove": list(remove), "reset": reset}
        return ModelStatus.model_validate(self.send("POST", f"/v1/models/{name}/classes", json=body).json())

    def _post(
        self, path: str, kind: type[M], files: list[tuple[str, Source]], classes: ClassNames | None = None, **query: Any
    ) -> M:
        opened = [(field, _file(source)) for field, source in files]
        data = {"classes": json.dumps(classes)} if classes else None
        params = {name: value for name, value in query.items() if value is not None}
        content: dict[str, Any] = {"timeout": VIDEO_TIMEOUT_S} if path in ("/v1/stream", "/v1/videos") else {}
        return kind.model_validate(self.send("POST", path, files=opened, data=data, params=params, **content).json())

    def send(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Send a request, with retries where they make sense; `content` as for httpx.

        Raises:
          ServiceError: the service refused the request.
          httpx.TransportError: no answer.
        """
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            try:
                answer = self._http.request(method, path, **content)
            except httpx.ConnectError:
                if last:
                    raise
                time.sleep(_backoff(attempt))
                continue
            if answer.is_success:
                return answer
            if last or answer.status_code not in RETRIED:
                break
            wait = answer.headers.get("Retry-After", "")
            time.sleep(min(float(wait), LONGEST_WAIT_S) if wait.isdecimal() else _backoff(attempt))
        raise ServiceError(_problem(answer))


def _file(source: Source) -> tuple[str, bytes]:
    if isinstance(source, bytes):
        return "upload", source
    return Path(source).name, Path(source).read_bytes()


def _backoff(attempt: int) -> float:
    return min(0.2 * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1)


def _problem(answer: httpx.Response) -> ProblemBody:
    try:
        return ProblemBody.model_validate(answer.json())
    except ValueError:  # from a proxy in between
        detail = answer.text[:200] or answer.reason_phrase
        return ProblemBody(
            title=answer.reason_phrase, status=answer.status_code, detail=detail, code="unknown", request_id=""
        )
