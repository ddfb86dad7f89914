"""The service under load, on this machine: beside no server at all, beside LitServe, and beyond what it can take.

    python -m benchmarks.serving --model=EXPORT [--images=DIR] [--litserve_python=...] [--parts=throughput,latency,...]

throughput: 32 clients, each with its next request as the last one is answered. The ceiling is what the same decoding
  processes and ONNX Runtime at its best batch reach together when no server is between; LitServe (pip install litserve)
  gets the same model, images and largest batch. Beside the rate stands the processors' time for an image, of the
  server's processes alone: on a machine that others use as well it says more.
latency: one request after the other, then requests at half the throughput, evenly spaced and at random times (Poisson;
  at half load even a queue that takes one after the other, each in the same time, has a p99 of 4.3 times that time).
overload: requests at four times the throughput; goodput is what is answered, the rest should be refused quickly.
memory: resident memory of the service's processes over 20,000 requests (--model of the demo, say).
stream: WebSockets that send 30 frames a second each.

The clients run on the same cores as the service. Without --images, pictures of the embedded action set are sent.
"""

import asyncio
import base64
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax import cli
from clip_har_jax.cores import usable_cores
from clip_har_jax.errors import UserError

CLIENTS = 32
ROUNDS = 3
MEMORY_REQUESTS = 20_000
SESSIONS = (1, 4, 16)
FRAMES_PER_S = 30


@dataclass
class Load:
    """What came back: seconds by status, and how long it all took."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    wall_s: float = 0.0

    def add(self, status: int, seconds: float) -> None:
        self.seconds.setdefault(status, []).append(seconds)

    @property
    def rate(self) -> float:
        """Answers of status 200 a second."""
        return len(self.seconds.get(200, ())) / self.wall_s

    def percentile(self, share: float, status: int = 200) -> float:
        return float(np.percentile(self.seconds[status], share))


class Connection:
    """One kept-alive HTTP connection; as little work as can be, since the cores are the service's too."""

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
    """Each client asks again as soon as it is answered."""
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
    """Requests at random times (Poisson) or evenly spaced, whatever has been answered."""
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
    """A server with all its processes: its process id, and how long it took to be ready."""
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


def ours(model: str, port: int, **settings: str) -> Any:
    command = [sys.executable, "-m", "serving", f"--model={model}", f"--port={port}"]
    environment = {"HAR_RATE_LIMIT_PER_S": "0", "HAR_LOG_LEVEL": "ERROR"} | settings
    return server(command, port, "/v2/health/ready", **environment)


def read_images(folder: str | None) -> list[bytes]:
    """JPEG files of a folder, or pictures of the embedded set."""
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


def measure_ceiling(model: str, images: list[bytes], seconds: float, processes: int) -> dict[str, Any]:
    """Decoding processes feeding ONNX Runtime, nothing between: images a second, and the best batch."""
    code = "from benchmarks.serving import ceiling; import sys; ceiling(sys.argv[1:])"
    with tempfile.TemporaryDirectory() as scratch:
        for i, image in enumerate(images):
            (Path(scratch) / f"{i:05d}.jpg").write_bytes(image)
        arguments = [model, scratch, str(seconds), str(processes)]
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True)
    return json.loads(done.stdout.splitlines()[-1])


def ceiling(arguments: list[str]) -> None:
    """The child process of `measure_ceiling`."""
    import multiprocessing
    from collections import deque
    from concurrent.futures import ProcessPoolExecutor

    from serving.batcher import Costs
    from serving.images import _decode
    from serving.models import open_exported

    model, folder, seconds, processes = arguments[0], Path(arguments[1]), float(arguments[2]), int(arguments[3])
    images = [path.read_bytes() for path in sorted(folder.iterdir())]
    backend = open_exported(Path(model), usable_cores())
    side = backend.preprocess.image_size_px
    best = Costs.measure(backend.logits, np.zeros((side, side, 3), np.uint8)).best
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        ahead: deque[Any] = deque()
        number, done, start, before = 0, 0, 0.0, 0.0
        while not start or time.perf_counter() - start < seconds:
            while len(ahead) < CLIENTS:
                ahead.append(pool.submit(_decode, images[number % len(images)], backend.preprocess, 25.0))
                number += 1
            backend.logits(np.stack([ahead.popleft().result() for _ in range(best)]))
            done += best if start else 0
            if not start and number > 2 * CLIENTS:
                start, before = time.perf_counter(), cpu_s(os.getsid(0))
        rate, cpu = done / (time.perf_counter() - start), (cpu_s(os.getsid(0)) - before) / done
        print(json.dumps({"images_per_s": rate, "cpu_s": cpu, "best_batch": best}))


def throughput(arguments: Any, images: list[bytes], port: int) -> dict[str, Any]:
    """The three sides take turns, so that what else the machine does slows all."""
    raw = [make_request("/v1/predict", image, "image/jpeg") for image in images]
    as_json = [
        make_request("/predict", json.dumps({"image": base64.b64encode(image).decode()}).encode(), "application/json")
        for image in images
    ]
    rates: dict[str, list[tuple[float, float]]] = {"ceiling": [], "ours": []}
    result: dict[str, Any] = {}
    lit = _has_litserve(arguments.litserve_python)
    for _ in range(ROUNDS):
        found = measure_ceiling(arguments.model, images, arguments.seconds, arguments.decode_processes)
        result["best_batch"] = found["best_batch"]
        rates["ceiling"].append((found["images_per_s"], found["cpu_s"]))
        with ours(arguments.model, port, HAR_DECODE_PROCESSES=str(arguments.decode_processes)) as (pid, ready_s):
            result["ready_s"] = round(ready_s, 2)
            rates["ours"].append(measured(port, raw, pid, arguments.seconds))
        if lit:
            script = str(Path(__file__).with_name("litserve_server.py"))
            command = [arguments.litserve_python, script, arguments.model, str(port + 1), str(found["best_batch"])]
            with server(command, port + 1, "/health") as (pid, _):
                rates.setdefault("litserve", []).append(measured(port + 1, as_json, pid, arguments.seconds))
    for name, values in rates.items():
        rate, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        each = ", ".join(f"{value:.1f}" for value, _ in values)
        print(f"throughput   {name:10}{rate:10.1f} images/s {1000 * cpu:9.2f} ms CPU an image   ({each})", flush=True)
        result[name] = {"images_per_s": round(rate, 2), "cpu_ms": round(1000 * cpu, 3)}
    for name in set(rates) - {"ours"}:
        result[f"of_{name}"] = round(result["ours"]["images_per_s"] / result[name]["images_per_s"], 3)
        result[f"cpu_of_{name}"] = round(result[name]["cpu_ms"] / result["ours"]["cpu_ms"], 3)
    return result


def _has_litserve(python: str) -> bool:
    found = subprocess.run([python, "-c", "import litserve"], capture_output=True).returncode == 0
    if not found:
        print(f"{python} has no litserve to compare with; pip install litserve")
    return found


def latency(arguments: Any, images: list[bytes], port: int) -> dict[str, Any]:
    """Alone, at half load, and at four times the load."""
    raw = [make_request("/v1/predict", image, "image/jpeg") for image in images]
    with ours(arguments.model, port, HAR_DECODE_PROCESSES=str(arguments.decode_processes)):
        single = asyncio.run(closed_loop(port, raw, 1, arguments.seconds))
        peak = asyncio.run(closed_loop(port, raw, CLIENTS, arguments.seconds)).rate
        half = asyncio.run(open_loop(port, raw, peak / 2, 2 * arguments.seconds, evenly=True))
        poisson = asyncio.run(open_loop(port, raw, peak / 2, 2 * arguments.seconds))
        over = asyncio.run(open_loop(port, raw, 4 * peak, arguments.seconds))
    result: dict[str, Any] = {
        "single_p50_ms": 1000 * single.percentile(50),
        "peak_images_per_s": peak,
        "half_load_p50_ms": 1000 * half.percentile(50),
        "half_load_p99_ms": 1000 * half.percentile(99),
        "half_load_poisson_p99_ms": 1000 * poisson.percentile(99),
        "half_load_refused": sum(len(values) for status, values in half.seconds.items() if status != 200),
        "overload_goodput_of_peak": over.rate / peak,
        "overload_answered": len(over.seconds.get(200, ())),
        "overload_refused": len(over.seconds.get(503, ())),
        "overload_other": {str(s): len(v) for s, v in over.seconds.items() if s not in (200, 503)},
        "refusal_p50_ms": 1000 * over.percentile(50, 503),
        "refusal_p99_ms": 1000 * over.percentile(99, 503),
        "overload_answer_p99_ms": 1000 * over.percentile(99),
    }
    result["half_load_p99_of_single"] = result["half_load_p99_ms"] / result["single_p50_ms"]
    result["half_load_poisson_p99_of_single"] = result["half_load_poisson_p99_ms"] / result["single_p50_ms"]
    for name, value in result.items():
        print(
            f"latency      {name:33}{value:10.3f}"
            if isinstance(value, float)
            else f"latency      {name:33}{value!s:>10}"
        )
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}


def memory(arguments: Any, images: list[bytes], port: int) -> dict[str, Any]:
    """Resident memory as requests go by; the first tenth warms what grows once."""
    raw = [make_request("/v1/predict", image, "image/jpeg") for image in images]
    taken: list[tuple[int, float]] = []
    with ours(arguments.model, port) as (pid, _):

        async def go() -> Load:
            load, left = Load(), iter(range(MEMORY_REQUESTS))

            async def client() -> None:
                connection = Connection(port)
                for i in left:
                    begin = time.perf_counter()
                    load.add(await connection.ask(raw[i % len(raw)]), time.perf_counter() - begin)
                    if i % (MEMORY_REQUESTS // 10) == 0:
                        taken.append((i, resident_mb(pid)))
                connection.close()

            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            return load

        start = time.perf_counter()
        load = asyncio.run(go())
        load.wall_s = time.perf_counter() - start
        taken.append((MEMORY_REQUESTS, resident_mb(pid)))
    for count, mb in taken:
        print(f"memory       {count:8} requests {mb:10.1f} MB")
    growth = taken[-1][1] / taken[1][1] - 1
    print(f"memory       growth from request {taken[1][0]} on: {growth:.2%}; {load.rate:.0f} requests/s")
    return {
        "growth": round(growth, 4),
        "rate": round(load.rate, 1),
        "statuses": {str(s): len(v) for s, v in load.seconds.items()},
    }


def cpu_s(session: int) -> float:
    """Processor time so far of all processes of a session."""
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


def measured(port: int, requests: list[bytes], session: int, seconds: float) -> tuple[float, float]:
    """Answers a second of a server under CLIENTS clients, and its processor time for each."""
    asyncio.run(closed_loop(port, requests, CLIENTS, 1.0))
    before = cpu_s(session)
    load = asyncio.run(closed_loop(port, requests, CLIENTS, seconds, warm_s=0.0))
    answered = len(load.seconds.get(200, ()))
    return load.rate, (cpu_s(session) - before) / answered if answered else float("nan")


def resident_mb(pid: int) -> float:
    """Of a process and its children."""
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


def stream(arguments: Any, images: list[bytes], port: int) -> dict[str, Any]:
    """Frames answered a second, and from a frame's sending to its answer."""
    import websockets

    result: dict[str, Any] = {}
    with ours(arguments.model, port, HAR_MAX_SESSIONS_PER_CLIENT="16", HAR_MAX_STREAM_FPS="60"):

        async def session(latencies: list[float], skipped: list[int]) -> None:
            address = f"ws://127.0.0.1:{port}/v1/stream?top=1"
            sent: dict[int, float] = {}
            async with websockets.connect(address, compression=None) as socket:

                async def send() -> None:
                    start = time.perf_counter()
                    for number in range(1, int(arguments.seconds * FRAMES_PER_S) + 1):
                        await asyncio.sleep(max(0.0, start + number / FRAMES_PER_S - time.perf_counter()))
                        sent[number] = time.perf_counter()
                        await socket.send(images[number % len(images)])
                    await asyncio.sleep(1)
                    await socket.close()

                sending = asyncio.ensure_future(send())
                last = 0
                async for text in socket:
                    message = json.loads(text)
                    if message["type"] == "frame":
                        latencies.append(time.perf_counter() - sent[message["frame"]])
                        last = message["skipped"]
                await sending
                skipped.append(last)

        async def go(count: int) -> tuple[list[float], int]:
            latencies: list[float] = []
            skipped: list[int] = []
            await asyncio.gather(*(session(latencies, skipped) for _ in range(count)))
            return latencies, sum(skipped)

        for count in SESSIONS:
            latencies, skipped = asyncio.run(go(count))
            latencies = latencies or [float("nan")]
            p50, p99 = (1000 * float(np.percentile(latencies, share)) for share in (50, 99))
            rate = len(latencies) / arguments.seconds
            print(
                f"stream       {count:3} sessions {rate:8.1f} frames/s   p50 {p50:7.1f} ms   p99 {p99:7.1f} ms   "
                f"{skipped} left out"
            )
            result[str(count)] = {"frames_per_s": round(rate, 1), "p50_ms": round(p50, 1), "p99_ms": round(p99, 1)}
    return result


PARTS = {"throughput": throughput, "latency": latency, "memory": memory, "stream": stream}


def main() -> None:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="an exported folder, e.g. --model=runs/demo/export")
    add("--images", metavar="DIR", help="JPEG files to send, e.g. --images=photos")
    add(
        "--litserve_python", default=sys.executable, metavar="PATH", help="Python that has litserve, numpy, onnxruntime"
    )
    add("--parts", default="throughput,latency,stream", metavar="NAMES", help="e.g. --parts=memory")
    add("--seconds", type=float, default=8.0, metavar="S", help="of each measurement, e.g. --seconds=20")
    add("--decode_processes", type=int, default=2, metavar="N", help="on every side, e.g. --decode_processes=2")
    add("--port", type=int, default=8790, metavar="N", help="this and the next one must be free, e.g. --port=8790")
    arguments = parser.parse_args()
    images = read_images(arguments.images)
    result: dict[str, Any] = {"benchmark": "serving", "ratio": None, "load": os.getloadavg()[0], **vars(arguments)}
    for name in arguments.parts.split(","):
        result[name] = PARTS[name](arguments, images, arguments.port)
    if "throughput" in result:
        result["ratio"] = result["throughput"]["of_ceiling"]
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
