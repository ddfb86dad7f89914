"""The process: listening, signals, the drain at the end."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from clip_har_jax.errors import UserError
from serving.app import make_app
from serving.settings import Settings
from serving.telemetry import configure_logging, log

LARGEST_FRAME_BYTES = 2_000_000  # of a WebSocket message
FRAMES_AHEAD = 4


class Server(uvicorn.Server):
    """uvicorn's server, but ended by a signal it exits 0, and SIGHUP reloads the models."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # nobody else can take signals
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        yield

    def _reload(self) -> None:
        self.config.loaded_app.state.service.reload()


def make_config(settings: Settings) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        make_app(settings),
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
        ws_max_size=LARGEST_FRAME_BYTES,
        ws_max_queue=FRAMES_AHEAD,
        lifespan="on",
    )


def listen(settings: Settings) -> socket.socket:
    """A bound socket.

    Raises:
      UserError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise UserError(f"{settings.host}:{settings.port}: can't listen there ({error.strerror})") from error
    listener.set_inheritable(True)
    return listener


def serve(settings: Settings) -> int:
    """Serves until a signal says otherwise; gives the exit code."""
    listener = listen(settings)
    configure_logging(settings.log_level)
    host, port = listener.getsockname()[:2]
    log.info("listening", extra={"fields": {"address": f"http://{host}:{port}", "models": list(settings.all_models)}})
    Server(make_config(settings)).run([listener])
    return 0
