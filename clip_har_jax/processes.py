"""Worker processes that don't run the main script again, so that it needs no `__main__` guard.

`multiprocessing` starts a worker by running the main script again. A script without a guard then fails, and a notebook
or `python -c` has no script. loky (the engine of joblib) doesn't touch the main script and sends its definitions by
value. No process is forked: a fork of a process with threads can hang.
"""

import mmap
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any

import cloudpickle
from loky import ProcessPoolExecutor
from loky.backend import get_context

from clip_har_jax.errors import UserError

SHM = "/dev/shm"
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Lifeline:
    """Let child processes detect that their parent process has ended, for any reason.

    Only the parent holds the writing end of a pipe. When the parent ends, the children read end of file.
    """

    def __init__(self) -> None:
        self._reader, self._writer = get_context("loky").Pipe(duplex=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_lifeline, (self._reader,)

    def on_break(self, action: Callable[[], None]) -> None:
        """Call `action` on a separate thread when the parent process has ended."""

        def watch() -> None:
            try:
                self._reader.recv_bytes()
            except (EOFError, OSError):
                action()

        threading.Thread(target=watch, daemon=True, name="lifeline").start()

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


def _receive_lifeline(reader: Connection) -> Lifeline:
    lifeline = Lifeline.__new__(Lifeline)
    lifeline._reader = reader
    return lifeline


def follow_parent(lifeline: Lifeline) -> None:
    """In a worker: ignore signals to the process group, which the parent handles, and end when the parent ends."""
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    lifeline.on_break(lambda: os._exit(1))


class SharedMemory:
    """Memory shared by a process and the workers it starts; it has no name and is freed with the last process.

    It lies in /dev/shm, or in a file of the temporary folder if that is too small, as in many containers.

    Attributes:
      fd: the descriptor of the file.
      buffer: the bytes.

    Raises:
      UserError: neither has enough space.
    """

    fd = -1

    def __init__(self, num_bytes: int, fd: int | None = None):
        self.fd, self.num_bytes = _reserve(num_bytes) if fd is None else fd, num_bytes
        self.buffer = mmap.mmap(self.fd, num_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.num_bytes, DupFd(self.fd))

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)  # the mapping stays valid as long as an array uses it


def _reserve(num_bytes: int) -> int:
    """Return the descriptor of an unnamed file with its space reserved: a missing page would kill a worker."""
    folders = (*([SHM] if os.path.isdir(SHM) else []), tempfile.gettempdir())
    for folder in folders:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
                else:  # macOS
                    os.truncate(file.fileno(), num_bytes)
                return os.dup(file.fileno())
        except OSError:
            continue
    raise UserError(
        f"{' and '.join(folders)}: no room for {num_bytes >> 20} MiB that worker processes share; give more "
        "(docker run --shm-size=1g), or set config.data.num_workers=0"
    )


def _attach(num_bytes: int, duplicate: Any) -> SharedMemory:
    return SharedMemory(num_bytes, duplicate.detach())


def make_pool(num_workers: int, initializer: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """Return a pool of processes, each of which first calls `initializer(*arguments)`."""
    return ProcessPoolExecutor(num_workers, context=get_context("loky"), initializer=initializer, initargs=arguments)


def make_process(target: Callable[..., None], *arguments: Any, name: str, daemon: bool = True) -> BaseProcess:
    """Return a process, not yet started, that will call `target(*arguments)`; a daemon can't start other processes."""
    return get_context("loky").Process(target=target, args=arguments, daemon=daemon, name=name)


def make_pipe() -> tuple[Connection, Connection]:
    """Return the two ends of a pipe; either can be passed to a new process."""
    return get_context("loky").Pipe()


def serialize(value: Any) -> bytes:
    """Return a value as bytes for `pickle.loads` in a worker; classes of the main script are sent by value."""
    return cloudpickle.dumps(value)
