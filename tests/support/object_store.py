"""A Google Cloud Storage of this machine, and its content by plain REST: not by the code that is tested."""

import contextlib
import json
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def store_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Give the process of a store with the empty bucket `bucket`, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, str(Path(__file__).with_name("gcs_server.py")), str(port)]
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(program, text=True, stdin=pipe, stdout=pipe, stderr=none) as server:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        try:
            yield server, f"http://127.0.0.1:{port}"
        finally:
            server.kill()  # one that was stopped ends by nothing else


class Bucket:
    """The objects of the store at an address."""

    def __init__(self, address: str):
        self.address = address

    def _call(self, path: str, data: bytes | None = None, **query: str) -> bytes:
        url = f"{self.address}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
            content: bytes = answer.read()
        return content

    def names(self, prefix: str) -> list[str]:
        return [item["name"] for item in json.loads(self._call("/storage/v1/b/bucket/o", prefix=prefix))["items"]]

    def read(self, name: str) -> bytes:
        return self._call(f"/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}", alt="media")

    def write(self, name: str, data: bytes) -> None:
        self._call("/upload/storage/v1/b/bucket/o", data, uploadType="media", name=name)
