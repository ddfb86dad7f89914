"""More than the service can take: floods, deadlines, clients that leave, many classes, one greedy client."""

import asyncio
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.service import Service
from tests.support.serving_setup import metric, running, wait_for


def slow_down(service: Service, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make a batch of any size take `seconds`, and the service know it."""
    model = service.models.get()
    run = model.classify.run

    def slowly(items: list[Any]) -> Any:
        time.sleep(seconds)
        return run(items)

    monkeypatch.setattr(model.classify, "run", slowly)
    monkeypatch.setattr(model.classify, "run_in_one_thread", None)
    monkeypatch.setattr(model.costs, "factor", seconds / (model.costs.of_batch(1) / model.costs.factor))
    monkeypatch.setattr(model.costs, "best", 2)


def test_overload_is_refused_at_once(folder: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times what it can take: the rest is refused, and what is taken is answered."""
    with running(folder, max_wait_s=0.5) as (client, service):
        slow_down(service, monkeypatch, 0.1)  # 20 images a second
        codes = Counter[int]()

        async def flood() -> None:
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(base_url=client.base_url, limits=limits, timeout=30) as many:

                async def one(i: int) -> None:
                    await asyncio.sleep(i / 80)
                    answer = await many.post("/v1/predict", content=good)
                    codes[answer.status_code] += 1
                    if answer.status_code != 200:
                        assert answer.json()["code"] == "overloaded" and int(answer.headers["retry-after"]) >= 1

                await asyncio.gather(*(one(i) for i in range(160)))

        asyncio.run(flood())
        assert set(codes) == {200, 503} and min(codes.values()) > 10, codes
        assert service.batcher.estimated_wait_s == 0 and metric(client, "har_queue_images") == 0


def test_a_deadline_ends_the_wait(folder: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder) as (client, service):
        slow_down(service, monkeypatch, 0.3)
        answer = client.post("/v1/predict", content=good, headers={"X-Timeout-Ms": "50"})
        assert answer.status_code == 504 and answer.json()["code"] == "deadline"


def test_a_client_that_leaves_costs_no_batch(folder: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder) as (client, service):
        slow_down(service, monkeypatch, 0.3)
        head = f"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(good)}\r\n\r\n".encode()
        for _ in range(5):  # the first is computed; the others wait in the queue when their clients leave
            with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
                connection.sendall(head + good)
                wait_for(lambda: metric(client, "har_queue_images") > 0)
                time.sleep(0.03)
        assert client.post("/v1/predict", content=good).status_code == 200
        assert metric(client, "har_queue_images") == 0
        metrics = client.get("/metrics").text
        assert 'status="499"' in metrics
        computed = re.search(r"^har_batch_images_sum (\S+)", metrics, re.MULTILINE)
        assert computed and float(computed[1]) < 6, "images whose clients had left were computed"


def test_many_classes_hold_nobody_up(folder: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of texts are embedded a few at a time, and others' images are looked at in between."""
    with running(folder, request_timeout_s=60) as (client, service):
        text, begun = service.models.get().text, threading.Event()
        run = text.run

        def slowly(texts: list[str]) -> Any:
            assert len(texts) <= 8
            begun.set()
            time.sleep(0.03)
            return run(texts)

        monkeypatch.setattr(text, "run", slowly)
        names = ",".join(f"class {i}" for i in range(60))
        with ThreadPoolExecutor(1) as pool:
            many = pool.submit(client.post, "/v1/predict", content=good, params={"classes": names})
            assert begun.wait(10)
            with httpx.Client(base_url=client.base_url) as other:
                for _ in range(3):
                    assert other.post("/v1/predict", content=good).status_code == 200
                    assert not many.done(), "it has 23 batches of texts, or more"
            assert len(many.result().raise_for_status().json()["top"]) == 5
        begun.clear()
        client.post("/v1/predict", content=good, params={"classes": names}).raise_for_status()
        assert not begun.is_set(), "they are remembered"


def test_a_slow_body_is_ended(folder: Path) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
    with (
        running(folder, body_timeout_s=0.3) as (client, _),
        socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10) as connection,
    ):
        connection.sendall(head + b"\xff\xd8")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_one_client_cannot_take_it_all(folder: Path, good: bytes) -> None:
    with running(folder, rate_limit_per_s=1, rate_burst=3) as (client, _):
        answers = [client.post("/v1/predict", content=good) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert answers[-1].json()["code"] == "too_many_requests" and answers[-1].headers["retry-after"] == "1"
        assert client.get("/v2/health/ready").status_code == 200
