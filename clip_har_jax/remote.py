"""Access to services (MLflow, W&B, the Hub, object stores): errors in one line, retries after races, bounded time."""

import logging
import os
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from clip_har_jax.errors import UserError

REACH_S = 5.0  # a service that doesn't answer the first request within this time is down
RACE_S = 10.0  # a call that loses a race is retried for this long
STORE_S = 15.0  # as REACH_S, for an object store, whose client looks for credentials first
OUTAGE_S = 60.0  # a store that doesn't answer for this long, while a call to it lasts, is given up
ASK_S = 10.0  # between two questions to it
CLOSE_S = 5.0  # for each call that ends the use of a store after an error
MAX_LENGTH = 200
LATER = (409, 412, 429, 500, 502, 503, 504)  # HTTP status: a race between writers, or a busy service
GCS = ("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")  # variable, default address
STORE_CLIENTS = frozenset("gcsfs s3fs fsspec aiohttp aiobotocore botocore google requests urllib3".split())
# tensorstore writes the arrays; it raises ValueError with an Abseil status in the message.
STORE_STATUS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|RESOURCE_EXHAUSTED)\b"
)

T = TypeVar("T")


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type, without secrets of URLs."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # a heading, such as MLflow prints over its failures
        lines[0] = f"{lines[-1]} ({lines[0][:-1]})"
    text = lines[0] if lines else type(error).__name__
    if cause := re.search(r"\(Caused by \w+\((.*)\)\)", text):  # of requests: after a URL that fills the line
        text = cause[1].rpartition("): ")[2].strip("'\"")
    text = re.sub(r"(^|: )\[Errno -?\d+\] ", r"\1", text)
    return without_secrets(text)[:MAX_LENGTH]


def without_secrets(text: str) -> str:
    """Return a text without the passwords, keys, tokens and signatures in its URLs and headers."""
    text = re.sub(r"(\w+://)[^/\s@]+@", r"\1", text)
    text = re.sub(r"(?i)\b([\w-]*(?:api[_-]?key|token|password|secret|signature)|sig)=[^&\s]+", r"\1=...", text)
    text = re.sub(r"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic)\s+)?[^\s'\",]+", r"\1...", text)
    return re.sub(r"(?i)\b(bearer)\s+[^\s'\",]{16,}", r"\1 ...", text)


def within(timeout_s: float, function: Callable[[], T]) -> T:
    """Call a function and wait for at most `timeout_s`; a call that hangs is left on its own thread.

    Raises:
      TimeoutError: it took longer.
    """
    outcome = _start(function)
    if not wait([outcome], timeout_s).done:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return outcome.result()


def _start(function: Callable[[], T]) -> Future[T]:
    """Call a function on a thread that the process doesn't wait for at its end, as it does for those of executors."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # raised again in the caller's thread
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome


@dataclass(frozen=True)
class RemoteService:
    """A service as its error messages describe it.

    Attributes:
      name: the service and its address, as "MLflow at http://127.0.0.1:5000".
      advice: what a person can do if it can't be used.
      is_race: whether another process caused an error; such a call is repeated.
      passes: whether the caller handles an error itself; it is then raised unchanged.
    """

    name: str
    advice: str
    is_race: Callable[[Exception], bool] = lambda _: False
    passes: Callable[[Exception], bool] = lambda _: False

    def call(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call a function of the service's client.

        Raises:
          UserError: the service refused or failed; one line that ends with the advice.
        """
        end = time.monotonic() + RACE_S
        while True:
            try:
                return function(*arguments, **named)
            except UserError:
                raise
            except Exception as error:
                if self.passes(error):
                    raise
                if not self.is_race(error) or time.monotonic() > end:
                    raise self.failed(error) from error
            time.sleep(random.uniform(0.05, 0.3))

    def failed(self, error: BaseException) -> UserError:
        """Return the error to show to a person."""
        return UserError(f"{without_secrets(self.name)}: {one_line(error)}; {self.advice}")

    def check_reachable(self, url: str, timeout_s: float = REACH_S) -> None:
        """Send a request to the service; any HTTP answer is accepted. URLs of other kinds are not checked.

        An untrusted certificate counts as an answer too: the service's own client may know its authority.

        Raises:
          UserError: no answer within the timeout.
        """
        if not url.startswith(("http://", "https://")):
            return

        def ask() -> None:
            request = urllib.request.Request(url, headers={"User-Agent": "clip_har_jax"})
            try:
                with urllib.request.urlopen(request, timeout=timeout_s):
                    pass
            except urllib.error.HTTPError as answer:  # it is there, whatever its answer
                answer.close()

        try:
            within(timeout_s, ask)
        except OSError as error:  # parent of URLError and TimeoutError
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                return
            raise self.failed(reason if isinstance(reason, BaseException) else error) from error


class Guarded:
    """A client that makes every call through `RemoteService.call`."""

    def __init__(self, client: Any, service: RemoteService):
        self._client, self._service = client, service

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            return self._service.call(value, *arguments, **named)

        return call


def hub(name: str, endpoint: str, advice: str) -> RemoteService:
    """Return the service for the Hugging Face Hub; `name` is the repository or flag that needs it."""

    def is_race(error: Exception) -> bool:
        return getattr(getattr(error, "response", None), "status_code", None) in LATER

    return RemoteService(f"{name}: the Hub at {endpoint}", advice, is_race)


CHECK_STORE = "check the network, the bucket's name and your rights there, then start again"


def store(address: str, advice: str = f"{CHECK_STORE}; what was saved stays whole") -> RemoteService:
    """Return the service for an object store; `address` as in gs://bucket/run."""
    return RemoteService(address, advice)


def check_store(address: str, probe: Callable[[], object], service: RemoteService | None = None) -> None:
    """Check that an object store answers, then call `probe`, both in bounded time.

    Args:
      address: in the store.
      probe: a function that uses it.
      service: of the error messages; None: `store`.

    Raises:
      UserError: the store can't be reached, or `probe` failed.
      ImportError: its client isn't installed.
      KeyError: no client for this kind of address.
    """
    service = service or store(address)
    check_answers(address, service)
    if address.startswith("gs://"):
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for each failed request
    try:
        within(STORE_S, probe)
    except (ImportError, KeyError):
        raise
    except Exception as error:
        raise service.failed(error) from error


def check_answers(address: str, service: RemoteService) -> None:
    """Check that an object store answers, if its address is known: other stores have one per region and network.

    Raises:
      UserError: no answer within `REACH_S`.
    """
    if address.startswith("gs://"):
        service.check_reachable(os.environ.get(*GCS))


def while_reachable(address: str, function: Callable[[], T]) -> T:
    """Call a function that uses an object store for a long time; give it up when the store doesn't answer.

    The clients of stores repeat a request for minutes, and wait for a silent store without bound.

    Raises:
      UserError: the store hasn't answered for `OUTAGE_S`.
    """
    outcome = _start(function)
    answered = time.monotonic()
    while not wait([outcome], ASK_S).done:
        try:
            check_answers(address, store(address))
            answered = time.monotonic()
        except UserError:
            if time.monotonic() - answered > OUTAGE_S:
                raise
    return outcome.result()


def leave(address: str | os.PathLike[str], error: object, function: Callable[[], object]) -> None:
    """Call a function that ends the use of a folder; after an error of a run in an object store, only for `CLOSE_S`.

    The error can be that the store doesn't answer, and there would be a long wait for each file.
    """
    if error is None or "://" not in os.fspath(address):
        function()
        return
    with suppress(Exception):  # the error that ends the run is reported
        within(CLOSE_S, function)


@contextmanager
def store_faults(address: str, service: RemoteService | None = None) -> Iterator[None]:
    """Turn the errors of an object store's client into one line; arguments as of `check_store`.

    Raises:
      UserError: such an error.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_of_store(error):
            raise
        raise (service or store(address)).failed(error) from error


def is_of_store(error: Exception) -> bool:
    """Return whether an exception comes from the client of an object store."""
    return type(error).__module__.partition(".")[0] in STORE_CLIENTS or STORE_STATUS.search(str(error)) is not None


def advise_login(variable: str, command: str) -> str:
    """Return the advice for a service that needs a login."""
    return f"check the network and the address, and log in: set {variable}, or run `{command}`"
