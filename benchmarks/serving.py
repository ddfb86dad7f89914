"""The service under load on this machine: compared with no server, with LitServe, and under overload.

    python -m benchmarks.serving --model=EXPORT [--images=DIR] [--litserve_python=...] [--parts=throughput,latency,...]

throughput: 32 clients, each sends its next request when the last is answered. The ceiling is the rate of the same
  decoding processes and ONNX Runtime at its best batch without a server between them. LitServe (pip install litserve)
  gets the same model, images, threads and largest batch. The sides alternate; ratios are medians over the rounds,
  computed within each round. The table also shows processor time per image, of the server's processes only, and the
  share of the machine that other processes used: rounds with a large share say little.
latency: one request after the other, then requests at half the throughput, evenly spaced and at random times (Poisson;
at half load even an ideal queue with one server and constant times has a p99 of 4.3 times the service time).
overload: requests at four times the throughput; goodput is the answered part, the rest should be refused quickly.
memory: resident memory of the service's processes over 20,000 requests (e.g. with the demo's --model).
stream: WebSockets that send 30 frames per second each.

The clients run on the same cores as the service. Without --images, pictures of the embedded action set are sent. The
file is over 300 lines because its parts share the service that they start and the clients that load it.
"""

import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import (
    CLIENTS,
    Connection,
    Load,
    LoadMeter,
    Measured,
    closed_loop,
    make_request,
    measure,
    open_loop,
    read_images,
    resident_mb,
    server,
)
from clip_har_jax import cli
from clip_har_jax.cores import usable_cores

QUIET = 0.05  # share of the machine's time; rounds in which others used more aren't counted
MEMORY_REQUESTS = 20_000
SESSIONS = (1, 4, 16)
FRAMES_PER_S = 30


def ours(model: str, port: int, **settings: str) -> Any:
    command = [sys.executable, "-m", "serving", f"--model={model}", f"--port={port}"]
    many = {"HAR_MAX_CONNECTIONS": "20000", "HAR_MAX_CONNECTIONS_PER_ADDRESS": "20000"}  # all clients have one address
    environment = {"HAR_RATE_LIMIT_PER_S": "0", "HAR_LOG_LEVEL": "ERROR"} | many | settings
    return server(command, port, "/v2/health/ready", **environment)


def measure_ceiling(model: str, images: list[bytes], seconds: float, processes: int) -> dict[str, Any]:
    """Return the images per second of decoding processes that feed ONNX Runtime directly, and the best batch."""
    code = "from benchmarks.serving import ceiling; import sys; ceiling(sys.argv[1:])"
    with tempfile.TemporaryDirectory() as scratch:
        for i, image in enumerate(images):
            (Path(scratch) / f"{i:05d}.jpg").write_bytes(image)
        arguments = [model, scratch, str(seconds), str(processes)]
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise RuntimeError(f"the ceiling's process failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ceiling(arguments: list[str]) -> None:
    """Run the child process of `measure_ceiling`."""
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
        number, done, start, meter = 0, 0, 0.0, None
        while meter is None or time.perf_counter() - start < seconds:
            while len(ahead) < CLIENTS:
                ahead.append(pool.submit(_decode, images[number % len(images)], backend.preprocess, 25.0))
                number += 1
            backend.logits(np.stack([ahead.popleft().result() for _ in range(best)]))
            done += best if meter is not None else 0
            if meter is None and number > 2 * CLIENTS:
                start, meter = time.perf_counter(), LoadMeter(os.getsid(0))
        print(json.dumps({"best_batch": best, "measured": meter.read(done)}))


def throughput(arguments: Any, images: list[bytes], port: int) -> dict[str, Any]:
    """Measure the three sides in turns, so that other load slows all of them equally."""
    raw = [make_request("/v1/predict", image, "image/jpeg") for image in images]
    as_json = [
        make_request("/predict", json.dumps({"image": base64.b64encode(image).decode()}).encode(), "application/json")
        for image in images
    ]
    rounds: list[dict[str, Measured]] = []
    result: dict[str, Any] = {}
    lit = _has_litserve(arguments.litserve_python)
    for _ in range(arguments.rounds):
        found = measure_ceiling(arguments.model, images, arguments.seconds, arguments.decode_processes)
        best = result["best_batch"] = found["best_batch"]
        sides = {"ceiling": Measured(*found["measured"])}
        with ours(arguments.model, port, HAR_DECODE_PROCESSES=str(arguments.decode_processes)) as (pid, ready_s):
            result["ready_s"] = round(ready_s, 2)
            sides["ours"] = measure(port, raw, pid, arguments.seconds)
        if lit:
            script = str(Path(__file__).with_name("litserve_server.py"))
            command = [arguments.litserve_python, script, arguments.model, str(port + 1), str(best)]
            with server(command, port + 1, "/health") as (pid, _):
                sides["litserve"] = measure(port + 1, as_json, pid, arguments.seconds)
        rounds.append(sides)
        each = "   ".join(f"{name} {side.rate:.1f} (others {side.others:.0%})" for name, side in sides.items())
        print(f"throughput   round {len(rounds)}, best batch {best}: {each} images/s", flush=True)
    return result | _summary(rounds)


def _summary(rounds: list[dict[str, Measured]]) -> dict[str, Any]:
    """Return medians of each side, and ours relative to the others within a round; of quiet rounds if there are any."""
    quiet = [sides for sides in rounds if max(side.others for side in sides.values()) <= QUIET]
    print(f"throughput   {len(quiet)} of {len(rounds)} rounds were quiet (others at most {QUIET:.0%} of the machine)")
    result: dict[str, Any] = {"rounds": len(rounds), "quiet_rounds": len(quiet)}
    rounds = quiet or rounds
    for name in rounds[0]:
        columns = zip(*(sides[name] for sides in rounds), strict=True)
        rate, cpu, others = (statistics.median(column) for column in columns)
        print(f"throughput   {name:10}{rate:10.1f} images/s {1000 * cpu:9.2f} ms CPU an image   others {others:.0%}")
        result[name] = {"images_per_s": round(rate, 2), "cpu_ms": round(1000 * cpu, 3), "others": round(others, 3)}
        if name != "ours":
            ratios = sorted(round(sides["ours"].rate / sides[name].rate, 3) for sides in rounds)
            result[f"of_{name}"] = round(statistics.median(ratios), 3)
            result[f"rounds_of_{name}"] = ratios
            print(f"throughput   ours of {name}: {statistics.median(ratios):.3f} (rounds {ratios[0]} to {ratios[-1]})")
    return result


def _has_litserve(python: str) -> bool:
    found = subprocess.run([python, "-c", "import litserve"], capture_output=True).returncode == 0
    if not found:
        print(f"{python} has no litserve to compare with; pip install litserve")
    return found


def latency(arguments: Any, images: list[bytes], port: int) -> dict[str, Any]:
    """Measure latency alone, at half load, and at four times the load."""
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
    """Measure resident memory over many requests; the first tenth is a warm-up."""
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


def stream(arguments: Any, images: list[bytes], port: int) -> dict[str, Any]:
    """Measure the frames answered per second, and the time from sending a frame to its answer."""
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
    add("--rounds", type=int, default=3, metavar="N", help="of all sides, in turns, e.g. --rounds=6")
    add("--seconds", type=float, default=8.0, metavar="S", help="of each measurement, e.g. --seconds=20")
    add("--decode_processes", type=int, default=2, metavar="N", help="on every side, e.g. --decode_processes=2")
    add("--port", type=int, default=8790, metavar="N", help="free, as the next one, e.g. --port=8790")
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
