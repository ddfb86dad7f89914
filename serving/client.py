"""A client of the service, in Python: typed answers, and tries again what is worth it.

    from serving.client import Client

    with Client("http://127.0.0.1:8000") as client:
        answer = client.predict("photo.jpg")
        print(answer.label, answer.score)

It needs httpx and pydantic alone.
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
from serving.schemas import BatchPrediction, Embedding, Explanation, Models, ModelStatus, Prediction, VideoEvents

Source = str | Path | bytes
Classes = Sequence[str] | Mapping[str, Sequence[str]]  # names, or names with the texts that describe them
M = TypeVar("M", bound=BaseModel)
RETRIED = frozenset({429, 503})
LONGEST_WAIT_S = 10.0


class ServiceError(Exception):
    """The service refused; `problem.code` says why."""

    def __init__(self, problem: ProblemBody):
        super().__init__(f"{problem.status} {problem.code}: {problem.detail} (request {problem.request_id})")
        self.problem = problem


class Client:
    """One service; safe to share between threads.

    Args:
      address: as http://127.0.0.1:8000.
      key: an API key, where the service asks for one.
      retries: how often what was refused for now (429, 503) or not connected is tried again, after what the service
        says or a random wait that doubles.
      timeout_s: for each try.
    """

    def __init__(self, address: str, key: str | None = None, retries: int = 3, timeout_s: float = 30.0):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=address, headers=headers, timeout=timeout_s)
        self._retries = retries

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def ready(self) -> bool:
        """Return whether the service answers requests."""
        try:
            return self._http.get("/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def predict(
        self, image: Source, top: int = 5, threshold: float | None = None, classes: Classes | None = None
    ) -> Prediction:
        """What the image shows."""
        return self._post("/v1/predict", Prediction, [("image", image)], classes, top=top, threshold=threshold)

    def predict_batch(
        self, images: Sequence[Source], top: int = 5, threshold: float | None = None, classes: Classes | None = None
    ) -> BatchPrediction:
        """What each image shows; one that can't be read has an error."""
        files = [("image", image) for image in images]
        return self._post("/v1/predict/batch", BatchPrediction, files, classes, top=top, threshold=threshold)

    def embed(self, image: Source) -> Embedding:
        """Return the image's embedding."""
        return self._post("/v1/embed", Embedding, [("image", image)])

    def explain(self, image: Source, label: str | None = None, classes: Classes | None = None) -> Explanation:
        """Where the model sees a class."""
        return self._post("/v1/explain", Explanation, [("image", image)], classes, label=label)

    def events(self, video: Source, classes: Classes | None = None, **rules: Any) -> VideoEvents:
        """Return the actions in a video; `rules` as POST /v1/stream has them in its query."""
        return self._post("/v1/stream", VideoEvents, [("video", video)], classes, **rules)

    def models(self) -> Models:
        """Return the models and their versions."""
        return Models.model_validate(self._send("GET", "/v1/models").json())

    def load(self, name: str, folder: str | None = None, activate: bool = True) -> ModelStatus:
        """Load a version, by default of the model's own folder."""
        answer = self._send("POST", f"/v1/models/{name}/load", json={"folder": folder, "activate": activate})
        return ModelStatus.model_validate(answer.json())

    def _post(
        self, path: str, kind: type[M], files: list[tuple[str, Source]], classes: Classes | None = None, **query: Any
    ) -> M:
        opened = [(field, _file(source)) for field, source in files]
        data = {"classes": json.dumps(classes)} if classes else None
        params = {name: value for name, value in query.items() if value is not None}
        return kind.model_validate(self._send("POST", path, files=opened, data=data, params=params).json())

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
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
    except ValueError:  # of a proxy in between
        detail = answer.text[:200] or answer.reason_phrase
        return ProblemBody(
            title=answer.reason_phrase, status=answer.status_code, detail=detail, code="unknown", request_id=""
        )
