"""Load on a server of this machine, and its cost: light clients, closed and open loops, processor time."""

import asyncio
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_har_jax.errors import UserError

CLIENTS = 32


@dataclass
class Load:
    """The answers under load: seconds by status, and the wall time."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    wall_s: float = 0.0

    def add(self, status: int, seconds: float) -> None:
        self.seconds.setdefault(status, []).append(seconds)

    @property
    def rate(self) -> float:
        """Answers with status 200 per second."""
        return len(self.seconds.get(200, ())) / self.wall_s

    def percentile(self, share: float, status: int = 200) -> float:
        """Return a percentile in seconds; NaN without answers of this status."""
        return float(np.percentile(self.seconds[status], share)) if self.seconds.get(status) else float("nan")


class Connection:
    """One kept-alive HTTP connection with little work, since it shares the cores with the service."""

    def __init__(self, port: int):
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> int:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        _, _, rest = head.lower().partition(b"content-length: ")
        await reader.readexactly(int(rest.split(b"\r\n", 1)[0]))
        return int(head[9:12])

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def make_request(path: str, body: bytes, kind: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def closed_loop(port: int, requests: list[bytes], clients: int, seconds: float, warm_s: float = 2.0) -> Load:
    """Run clients that send their next request as soon as the last is answered."""
    load, start = Load(), time.perf_counter()

    async def client(number: int) -> None:
        connection, i = Connection(port), number
        while (now := time.perf_counter()) < start + warm_s + seconds:
            status = await connection.ask(requests[i % len(requests)])
            i += clients
            if start + warm_s <= now:
                load.add(status, time.perf_counter() - now)
        connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    load.wall_s = time.perf_counter() - start - warm_s
    return load


async def open_loop(port: int, requests: list[bytes], rate: float, seconds: float, evenly: bool = False) -> Load:
    """Send requests at random times (Poisson) or evenly spaced, independent of the answers."""
    load = Load()
    idle: list[Connection] = []
    tasks: list[asyncio.Task[None]] = []
    rng, start = random.Random(0), time.perf_counter()

    async def one(request: bytes) -> None:
        connection = idle.pop() if idle else Connection(port)
        begin = time.perf_counter()
        load.add(await connection.ask(request), time.perf_counter() - begin)
        idle.append(connection)

    due = start
    while due < start + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(requests[len(tasks) % len(requests)])))
        due += 1 / rate if evenly else rng.expovariate(rate)
    await asyncio.gather(*tasks)
    load.wall_s = time.perf_counter() - start
    for connection in idle:
        connection.close()
    return load


@contextmanager
def server(command: list[str], port: int, ready: str, **environment: str) -> Iterator[tuple[int, float]]:
    """Run a server with all its processes; yield its process id and the time until it was ready."""
    if _is_ready(port, ready):
        raise UserError(f"--port={port}: another server answers there")
    start = time.perf_counter()
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **quiet)  # type: ignore[call-overload]
    try:
        while not _is_ready(port, ready):
            if process.poll() is not None:
                raise RuntimeError(f"{command[:3]} ended with exit code {process.returncode}")
            time.sleep(0.1)
        yield process.pid, time.perf_counter() - start
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            with suppress(ProcessLookupError):  # LitServe's workers outlive it
                os.killpg(process.pid, signal.SIGKILL)


def _is_ready(port: int, path: str) -> bool:
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def read_images(folder: str | None) -> list[bytes]:
    """Return the JPEG files of a folder, or pictures of the embedded set."""
    if folder is not None:
        return [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))[:500]]
    import io

    from PIL import Image

    from clip_har_jax.data.synthetic import draw

    images = []
    for i in range(100):
        buffer = io.BytesIO()
        Image.fromarray(draw("test", i)).resize((275, 183)).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    return images


def cpu_s(session: int) -> float:
    """Return the processor time so far of all processes of a session."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session:  # proc(5): field 6; 14 and 15 are the time in user mode and in the kernel
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Return the processor time so far of the whole machine, including time stolen by a hypervisor."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


class Measured(NamedTuple):
    """A server under load: answers per second, processor time per answer, and the share of other processes."""

    rate: float
    cpu_s: float
    others: float


class LoadMeter:
    """Measure processor time from now on, of a session's processes and of unrelated ones."""

    def __init__(self, session: int):
        self._session, self._start = session, time.perf_counter()
        self._cpu, self._busy, self._own = cpu_s(session), busy_s(), time.process_time()

    def read(self, answered: int) -> Measured:
        wall, cpu = time.perf_counter() - self._start, cpu_s(self._session) - self._cpu
        own = 0.0 if os.getsid(0) == self._session else time.process_time() - self._own
        others = (busy_s() - self._busy - cpu - own) / (wall * (os.cpu_count() or 1))
        return Measured(answered / wall, cpu / max(answered, 1), max(0.0, others))


def measure(port: int, requests: list[bytes], session: int, seconds: float) -> Measured:
    """Return the measurement of a server under CLIENTS clients."""
    asyncio.run(closed_loop(port, requests, CLIENTS, 1.0))
    meter = LoadMeter(session)
    load = asyncio.run(closed_loop(port, requests, CLIENTS, seconds, warm_s=0.0))
    return meter.read(len(load.seconds.get(200, ())))


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process and its children, in MB."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                status = (entry / "status").read_text()
            except OSError:
                continue
            if int(entry.name) == pid or re.search(rf"^PPid:\s+{pid}$", status, re.M):
                total += int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1000  # type: ignore[union-attr]
    return total
