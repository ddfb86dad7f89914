"""MLflow: at MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME if set, else in mlflow.db of the current folder.

`mlflow ui`, started in the same folder, shows that database.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

# A server that stops answering is detected within a minute instead of ten; one that is down, by `check_reachable`.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
if not sys.stderr.isatty():
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from filelock import FileLock, Timeout
from mlflow import MlflowClient, get_registry_uri, get_tracking_uri
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from clip_har_jax import remote
from clip_har_jax.files import atomic
from clip_har_jax.mlops.tracking import FAILED, FINISHED, STOPPED, Handle, Metrics, RunInfo

logging.getLogger("mlflow").setLevel(logging.WARNING)  # hides messages on the set-up of its database
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each retry; the failure itself is raised
EXPERIMENT = "clip_har_jax"
BATCH = 100  # parameters in one request, MLflow's limit
LOCK_S = 60.0
LONGEST = 6000  # characters of a parameter's value
STATUS = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}


def is_race(error: Exception) -> bool:
    """Return whether another process caused the error, so that the same call can succeed later."""
    text = str(error).lower()
    return any(part in text for part in ("database is locked", "unique constraint", "duplicate key", "deadlock"))


def _is_answer(error: Exception) -> bool:
    """Return whether an error is the answer to a question: something exists already, or doesn't exist."""
    return getattr(error, "error_code", "") in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")


def _service(uri: str) -> remote.RemoteService:
    advice = "check MLFLOW_TRACKING_URI, and that the server or the file can be reached"
    return remote.RemoteService(f"MLflow at {uri}", advice, is_race, _is_answer)


def open_client() -> Any:
    """Return a client of the store at MLFLOW_TRACKING_URI that makes its calls through `remote`.

    Raises:
      UserError: the store can't be reached, or isn't an MLflow store.
    """
    uri = get_tracking_uri()
    service = _service(uri)
    service.check_reachable(f"{uri.rstrip('/')}/health")
    for store in {uri, get_registry_uri()}:
        service.call(_create_store, store)
    client = service.call(MlflowClient)
    return remote.Guarded(client, service)


def _database(uri: str) -> Path | None:
    """Return the file of a SQLite store; None: the store is a server or isn't a file."""
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url

    name = make_url(uri).database
    return Path(name).absolute() if name and name != ":memory:" else None


@contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Keep other processes of this project from writing to the same SQLite store; servers need no lock here.

    Raises:
      UserError: another process holds the lock for too long.
    """
    database = _database(uri)
    if database is None:
        yield
        return
    try:
        with FileLock(database.with_name(f".{database.name}.lock"), timeout=LOCK_S):
            yield
    except Timeout as error:
        raise _service(uri).failed(TimeoutError(f"another process has used it for over {LOCK_S:g} s")) from error


def _create_store(uri: str) -> None:
    """Create a SQLite store that isn't there: aside, then renamed, since MLflow's set-up must neither meet a second
    process nor be killed halfway.
    """
    database = _database(uri)
    if database is None or database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with store_lock(uri):
        if database.exists():
            return
        with atomic(database) as partial:
            store = SqlAlchemyStore(f"sqlite:///{partial}", "./mlruns")
            store.engine.dispose()


def find_experiment(client: Any) -> str:
    """Return the id of the experiment; create it if it doesn't exist."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    if (found := client.get_experiment_by_name(name)) is not None:
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:  # another run created it
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return found.experiment_id


class Mlflow:
    """One MLflow run, new or continued."""

    def __init__(self, info: RunInfo, handle: Handle | None):
        self.client = open_client()
        self.run_id = self._continue(handle) or self._begin(info)
        self.handle: Handle = {"run_id": self.run_id, "tracking_uri": self.client.tracking_uri}

    def _continue(self, handle: Handle | None) -> str | None:
        if handle is None or handle["tracking_uri"] != self.client.tracking_uri:
            return None
        try:
            self.client.update_run(handle["run_id"], status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None  # deleted by someone
        return handle["run_id"]

    def _begin(self, info: RunInfo) -> str:
        run = self.client.create_run(find_experiment(self.client), run_name=info.name, tags=info.tags)
        params = iter([Param(key, str(value)[:LONGEST]) for key, value in info.params.items()])
        while batch := list(islice(params, BATCH)):
            self.client.log_batch(run.info.run_id, params=batch)
        return run.info.run_id

    def write(self, records: Sequence[tuple[int, Metrics]]) -> None:
        self.log(metric for step, metrics in records for metric in _entities(step, metrics))

    def log(self, metrics: Iterable[Metric]) -> None:
        """Log any number of metrics."""
        rest = iter(metrics)
        while batch := list(islice(rest, 1000)):
            self.client.log_batch(self.run_id, metrics=batch)

    def tag(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_folder(self, name: str, folder: Path) -> None:
        self.client.log_artifacts(self.run_id, str(folder), name)

    def close(self, status: str) -> None:
        self.client.set_terminated(self.run_id, STATUS[status])


def _entities(step: int, metrics: Metrics) -> list[Metric]:
    now_ms = int(time.time() * 1000)
    return [Metric(name, value, now_ms, step) for name, value in metrics.items() if value is not None]


def open_tracker(info: RunInfo, handle: Handle | None) -> Mlflow:
    """Continue the run of `handle` if the server still has it, else start one."""
    return Mlflow(info, handle)


def sync(
    info: RunInfo, handle: Handle | None, lines: Iterable[dict[str, Any]], folders: Mapping[str, Path]
) -> tuple[str, Handle]:
    """Upload the metrics and folders of a run that MLflow lacks; return a summary in words, and the handle.

    Args:
      lines: of metrics.jsonl.
      folders: by their names in MLflow.
    """
    tracker = Mlflow(info, handle)
    known: dict[str, set[int]] = {}
    missing = []
    for line in lines:
        step = line["step"]
        for metric in _entities(step, {key: value for key, value in line.items() if key != "step"}):
            if metric.key not in known:
                history = tracker.client.get_metric_history(tracker.run_id, metric.key)
                known[metric.key] = {entry.step for entry in history}
            if step not in known[metric.key]:
                missing.append(metric)
    tracker.log(missing)
    tracker.tag(info.tags)
    listed = {entry.path for entry in tracker.client.list_artifacts(tracker.run_id)}
    new = [name for name in folders if name not in listed]
    for name in new:
        tracker.log_folder(name, folders[name])
    tracker.close(FINISHED if "model" in folders else STOPPED)
    return f"{len(missing)} values and {len(new)} folders handed in to run {tracker.run_id}", tracker.handle
