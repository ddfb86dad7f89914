"""A tiny exported folder, and a service on a free port of this process, so that tests can reach inside it."""

import io
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from clip_har_jax import bundle
from serving.server import Server, uvicorn_config
from serving.service import Service
from serving.settings import Settings
from serving.sockets import listen
from tests.support.model_folders import write_images, write_model

LABELS = ("cycling", "drinking", "running", "sleeping")


def write_export(root: Path, temperature: float = 2.0, labels: tuple[str, ...] = LABELS) -> Path:
    """Return an exported folder of a random model, in ONNX, and `root`/photos."""
    from export.run import ExportOptions, export_model

    write_model(root / "model", labels, temperature)
    photos = root / "photos"
    if not photos.exists():
        write_images(photos, labels, per_class=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax2onnx warns of what it uses itself
        parity = export_model(
            str(root / "model"), ("onnx",), root / "export", ExportOptions(f"folder:{photos}", num_examples=4)
        )
    assert parity["onnx"]["passed"], parity
    return root / "export"


def reseal(folder: Path) -> str:
    """Seal a folder that was changed on purpose."""
    (folder / bundle.MANIFEST).unlink(missing_ok=True)
    return bundle.seal(folder)


@contextmanager
def running(folder: Path | None = None, wait: bool = True, **settings: Any) -> Iterator[tuple[httpx.Client, Service]]:
    """Run a service; give a client of it, and the service."""
    settings = {"port": 0, "decode_processes": 1, "rate_limit_per_s": 0, "log_level": "ERROR", **settings}
    made = Settings(model=folder, **settings)
    listener = listen(made)
    server = Server(uvicorn_config(made))
    service: Service = server.config.app.state.service  # type: ignore[union-attr]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
            wait_for(lambda: server.started and (service.ready or not wait))
            yield client, service
    finally:
        server.should_exit = True
        thread.join(40)
        assert not thread.is_alive(), "the service doesn't end"


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Wait until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def metric(client: httpx.Client, name: str) -> float:
    """Return the sum of a metric over its labels."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}[ {{]", line))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
