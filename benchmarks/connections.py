"""The latency of a normal client while 1,000 idle or slow connections are open, on this machine.

    python -m benchmarks.connections --model=EXPORT [--connections=1000] [--rounds=3]

One client sends one request after the other: alone, with connections that send nothing, and with connections that send
one byte of their headers every 5 s. Connections that the service closes are opened again, as an attacker would do. The
ratio is the larger p99 divided by the one alone, as medians over the rounds.
"""

import asyncio
import json
import os
import random
import statistics
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.load import closed_loop, make_request, read_images
from benchmarks.serving import ours
from clip_har_jax import cli

SLOW_S = 5.0  # between two bytes


async def _hold(port: int, slow: bool) -> None:
    """Keep one connection open without sending a complete request."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if slow:
                writer.write(b"GET / HTTP/1.1\r\nX: ")
                while not reader.at_eof():
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(SLOW_S)
            else:
                await reader.read()
            writer.close()
        except OSError:
            pass
        await asyncio.sleep(random.uniform(0.5, 1.5))


async def _beside(port: int, requests: list[bytes], seconds: float, count: int, slow: bool) -> float:
    """Return the client's p99 in seconds with `count` such connections."""
    held = [asyncio.ensure_future(_hold(port, slow)) for _ in range(count)]
    await asyncio.sleep(3.0 if count else 0.0)
    load = await closed_loop(port, requests, 1, seconds)
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    return load.percentile(99)


def main() -> None:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="an exported folder, e.g. --model=runs/demo/export")
    add("--connections", type=int, default=1000, metavar="N", help="open connections, e.g. --connections=1000")
    add("--rounds", type=int, default=3, metavar="N", help="of all three, in turns, e.g. --rounds=3")
    add("--seconds", type=float, default=8.0, metavar="S", help="of each measurement, e.g. --seconds=20")
    add("--port", type=int, default=8795, metavar="N", help="a free port, e.g. --port=8795")
    arguments = parser.parse_args()
    requests = [make_request("/v1/predict", image, "image/jpeg") for image in read_images(None)]
    ways: dict[str, Callable[[], Awaitable[float]]] = {
        name: lambda count=count, slow=slow: _beside(arguments.port, requests, arguments.seconds, count, slow)  # type: ignore[misc]
        for name, count, slow in (
            ("alone", 0, False),
            ("idle", arguments.connections, False),
            ("slow", arguments.connections, True),
        )
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with ours(arguments.model, arguments.port):
        for _ in range(arguments.rounds):
            for name, run in ways.items():
                taken[name].append(1000 * asyncio.run(run()))  # type: ignore[arg-type]
                print(f"connections  {name:6} p99 {taken[name][-1]:8.1f} ms", flush=True)
    p99 = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    result: dict[str, Any] = {
        "benchmark": "connections",
        "ratio": round(max(p99["idle"], p99["slow"]) / p99["alone"], 3),
    }
    print(json.dumps(result | {"load": os.getloadavg()[0], "p99_ms": p99, "rounds_ms": taken, **vars(arguments)}))


if __name__ == "__main__":
    cli.run(main)
