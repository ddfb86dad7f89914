"""The server process: signals, workers, and the drain at the end."""

import asyncio
import contextlib
import functools
import math
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess

import uvicorn
from prometheus_client.multiprocess import mark_process_dead

from clip_har_jax.errors import UserError
from clip_har_jax.processes import Lifeline, make_process
from serving.app import make_app
from serving.connections import Connections, HttpConnection, WebSocketConnection
from serving.settings import Settings
from serving.sockets import allow_open_files, listen
from serving.telemetry import MULTIPROCESS, configure_logging, log

LARGEST_FRAME_BYTES = 2_000_000  # of a WebSocket message
FRAMES_AHEAD = 4
METRICS_BYTES = 8_000_000  # of one worker: a megabyte per kind of metric, and more with labels
RESTART_S = 0.5  # before a dead worker is replaced, so that one that dies at once doesn't cause a busy loop


class Server(uvicorn.Server):
    """uvicorn's server, but a stopping signal exits with 0, and SIGHUP reloads the models."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        yield

    def _reload(self) -> None:
        self.config.loaded_app.state.service.reload()


def uvicorn_config(settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration for the application."""
    app = make_app(settings)
    connections = Connections(settings, app.state.service.metrics)
    return uvicorn.Config(
        app,
        http=functools.partial(HttpConnection, connections),  # type: ignore[arg-type]  # called as a class would be
        ws=functools.partial(WebSocketConnection, connections),  # type: ignore[arg-type]
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
        ws_max_size=LARGEST_FRAME_BYTES,
        ws_max_queue=FRAMES_AHEAD,
        lifespan="on",
    )


def serve(settings: Settings) -> int:
    """Serve until a signal stops it; return the exit code."""
    listener = listen(settings)
    configure_logging(settings.log_level)
    allow_open_files(settings.max_connections)
    host, port = listener.getsockname()[:2]
    log.info("listening", extra={"fields": {"address": f"http://{host}:{port}", "models": list(settings.all_models)}})
    if settings.workers > 1:
        return supervise(settings, listener)
    Server(uvicorn_config(settings)).run([listener])
    return 0


def supervise(settings: Settings, listener: socket.socket) -> int:
    """Run several serving processes on one socket: dead ones are replaced, signals are passed to all.

    Each worker writes its metrics to files, and any of them answers /metrics with the sum.

    Raises:
      UserError: no space for these files.
    """
    with _folder_for_metrics(settings.workers) as numbers:
        os.environ[MULTIPROCESS] = numbers  # before prometheus_client is imported in the workers
        stopping, lifeline = False, Lifeline()
        workers: list[BaseProcess] = []

        def start() -> None:
            worker = make_process(_work, settings, listener, lifeline, name="serving-worker", daemon=False)
            worker.start()
            workers.append(worker)

        def forward(number: int, frame: object) -> None:
            nonlocal stopping
            stopping = stopping or number != signal.SIGHUP
            if stopping:
                listener.close()  # else new connections would wait here during the drain and then be reset
            for worker in workers:
                if worker.pid is not None and worker.is_alive():
                    os.kill(worker.pid, number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, forward)
        for _ in range(settings.workers):
            start()
        while workers:
            connection.wait([worker.sentinel for worker in workers], timeout=1.0)
            for worker in [worker for worker in workers if not worker.is_alive()]:
                workers.remove(worker)
                mark_process_dead(worker.pid)
                if not stopping:
                    log.error("a worker died", extra={"fields": {"pid": worker.pid, "exit_code": worker.exitcode}})
                    time.sleep(RESTART_S)
                    if not stopping:  # a signal may have come during the sleep
                        start()
    return 0


def _folder_for_metrics(workers: int) -> tempfile.TemporaryDirectory[str]:
    """Return a folder with space for the workers' metrics; they use memory maps, so a full disk would kill them."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="har-metrics-")
        with tempfile.TemporaryFile(dir=folder.name) as room:
            room.write(bytes(workers * METRICS_BYTES))
            room.flush()
    except OSError as error:
        raise UserError(
            f"--workers={workers}: no room for the metrics of several workers among the temporary files "
            f"({error.strerror}); set TMPDIR to a folder that can be written"
        ) from error
    return folder


def _work(settings: Settings, listener: socket.socket, lifeline: Lifeline) -> None:
    """Serve in a separate process, which stops in order when its supervisor has ended."""
    configure_logging(settings.log_level)
    lifeline.on_break(lambda: os.kill(os.getpid(), signal.SIGTERM))
    Server(uvicorn_config(settings)).run([listener])
