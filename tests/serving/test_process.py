"""The process: signals, workers that die, an nginx in front."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.serving_setup import LABELS, reseal, running, wait_for


def test_sigterm_loses_nothing_in_flight(folder: Path, good: bytes) -> None:
    """A real process; requests without a pause; each that was accepted is answered."""
    command = [sys.executable, "-m", "serving", f"--model={folder}", "--port=0"]
    environment = os.environ | {"HAR_RATE_LIMIT_PER_S": "0", "HAR_LOG_LEVEL": "INFO"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        address = json.loads(process.stderr.readline())["address"]
        codes, broken = Counter[int](), Counter[str]()

        def ask() -> None:
            with httpx.Client(base_url=address) as mine:
                while True:
                    try:
                        codes[mine.post("/v1/predict", content=good).status_code] += 1
                    except httpx.ConnectError:
                        return  # it has stopped listening
                    except httpx.TransportError as error:
                        broken[type(error).__name__] += 1
                        return

        with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=20)) as client:
            wait_for(lambda: client.get("/v2/health/ready").status_code == 200)
        with ThreadPoolExecutor(9) as pool:
            logged = pool.submit(process.stderr.read)
            asking = [pool.submit(ask) for _ in range(8)]
            wait_for(lambda: codes[200] > 50)
            process.send_signal(signal.SIGTERM)
            assert process.wait(25) == 0
            for future in asking:
                future.result()
        # A connection that idles as the drain begins is closed, which a client may notice only as it sends anew: what
        # the service took up is what counts.
        assert set(codes) == {200} and set(broken) <= {"RemoteProtocolError", "ReadError", "WriteError"}, (
            codes,
            broken,
        )
        lines = [json.loads(line) for line in logged.result().splitlines()]
        answered = Counter(line["status"] for line in lines if line.get("route") == "/v1/predict")
        assert answered == codes


def test_sighup_reads_the_folder_again(folder: Path, tmp_path: Path, good: bytes) -> None:
    shutil.copytree(folder, tmp_path / "model")
    command = [sys.executable, "-m", "serving", f"--model={tmp_path / 'model'}", "--port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = json.loads(process.stderr.readline())["address"]
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=20)) as client:
            wait_for(lambda: client.get("/v2/health/ready").status_code == 200)
            (tmp_path / "model" / "note.txt").write_text("another digest")
            version = reseal(tmp_path / "model")[:12]
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: client.post("/v1/predict", content=good).json()["model"]["version"] == version)
        process.send_signal(signal.SIGTERM)
        assert process.wait(25) == 0


@pytest.mark.slow
def test_several_workers_share_the_work_and_are_replaced(folder: Path, tmp_path: Path, good: bytes) -> None:
    shutil.copytree(folder, tmp_path / "model")
    command = [sys.executable, "-m", "serving", f"--model={tmp_path / 'model'}", "--port=0", "--workers=2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = json.loads(process.stderr.readline())["address"]
        threading.Thread(target=process.stderr.read, daemon=True).start()

        def ask(method: str, path: str, **content: Any) -> httpx.Response:
            """By a new connection, which either worker may take."""
            with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=20)) as client:
                return client.request(method, path, **content)

        def workers() -> list[int]:
            """Return those of the process's children that are no helpers."""
            listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in listed}
            return [pid for pid, line in lines.items() if b"serving-worker" in line]

        wait_for(lambda: all(ask("GET", "/v2/health/ready").status_code == 200 for _ in range(8)))
        assert ask("POST", "/v1/models/har/load", json={}).json()["code"] == "conflict"
        first = workers()
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        wait_for(lambda: len(workers()) == 2 and first[0] not in workers())
        wait_for(lambda: all(ask("GET", "/v2/health/ready").status_code == 200 for _ in range(8)))
        (tmp_path / "model" / "note.txt").write_text("another digest")
        version = reseal(tmp_path / "model")[:12]
        process.send_signal(signal.SIGHUP)

        def served() -> set[str]:
            return {ask("POST", "/v1/predict", content=good).json()["model"]["version"] for _ in range(8)}

        wait_for(lambda: served() == {version})
        for _ in range(3):
            ask("POST", "/v1/predict", content=good).raise_for_status()
        # Either worker answers with the sum over all, the killed one too.
        scrapes = [ask("GET", "/metrics").text for _ in range(6)]
        name = re.escape('har_requests_total{method="POST",route="/v1/predict",status="200"} ')
        counted = [float(found[1]) for text in scrapes if (found := re.search(name + r"(\S+)", text))]
        assert len(counted) == 6 and len(set(counted)) == 1 and counted[0] >= 11
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_nginx_in_front_keeps_slow_clients_away(folder: Path, tmp_path: Path, good: bytes) -> None:
    """Headers that never end, and bodies that never come, don't reach the service; what does is answered."""
    (tmp_path / "tmp").mkdir()
    with running(folder) as (client, _), socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        front = probe.getsockname()[1]
        probe.close()
        text = (Path(__file__).parents[2] / "serving" / "nginx" / "har.conf").read_text()
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{client.base_url.port}").replace(":8080", f":{front}")
        (tmp_path / "har.conf").write_text(text)
        command = ["nginx", "-p", f"{tmp_path}/", "-c", str(tmp_path / "har.conf")]
        assert subprocess.run([*command, "-t"], capture_output=True).returncode == 0
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as nginx:
            try:
                address, retrying = f"http://127.0.0.1:{front}", httpx.HTTPTransport(retries=10)
                with httpx.Client(base_url=address, transport=retrying) as outside:
                    assert outside.post("/v1/predict", content=good).json()["label"] in LABELS
                    assert outside.get("/metrics").status_code == 404
                    assert outside.post("/v1/predict", content=bytes(11_000_000)).status_code == 413
                head = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                before = client.get("/metrics").text.count('route="/v1/predict"')
                with (
                    socket.create_connection(("127.0.0.1", front), timeout=20) as silent,
                    socket.create_connection(("127.0.0.1", front), timeout=20) as stalled,
                ):
                    silent.sendall(head)
                    stalled.sendall(head + b"Content-Length: 1000\r\n\r\nabc")
                    for connection in (silent, stalled):
                        assert connection.recv(100)[:12] in (b"", b"HTTP/1.1 408")
                assert client.get("/metrics").text.count('route="/v1/predict"') == before
            finally:
                nginx.terminate()
