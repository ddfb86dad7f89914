"""The app's own service, started with the demo's model if none is configured."""

import atexit
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from app.client import Trouble

ROOT = Path(__file__).resolve().parents[1]
START_S = 60.0
COMMANDS = """python scripts/train.py --config=configs/demo.py --workdir=runs/demo
python -m export --model=runs/demo/model --formats=onnx,onnx_int8 --output=runs/demo/export"""


class NoModel(Trouble):
    """There is no model for a service."""


def start(origin: str | None = None) -> str:
    """Start the service on loopback, wait until it is ready, and return its address.

    Args:
      origin: of the app's own page, which may then send pictures from the camera.

    Raises:
      NoModel: no exported model was found.
      Trouble: the service doesn't start.
    """
    export = Path(os.environ.get("APP_MODEL") or ROOT / "runs" / "demo" / "export").resolve()
    if not (export / "signature.json").is_file():
        raise NoModel(f"There is no model at {export} yet. Make one with these two commands, which take a few minutes:")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = {"har-small": str(export / "onnx_int8")} if (export / "onnx_int8").is_dir() else {}
    settings = {"HAR_MODELS": others, "HAR_ALLOWED_ORIGINS": [origin] if origin else []}
    process = subprocess.Popen(
        [sys.executable, "-m", "serving", f"--model={export}", f"--port={port}"],
        cwd=ROOT,
        env={
            **os.environ,
            "HAR_HOST": "127.0.0.1",  # only for this machine: it has no key, whatever the environment says
            "HAR_API_KEYS": "",
            **{name: json.dumps(value) for name, value in settings.items()},
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(process.terminate)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if is_ready(url):
            return url
        time.sleep(0.2)
    process.terminate()
    command = shlex.join(["python", "-m", "serving", f"--model={export}"])
    raise Trouble(f"The service didn't start on {export}. See why with `{command}`, then try again.")


def is_ready(url: str) -> bool:
    """Return whether a service answers at this address."""
    try:
        return httpx.get(f"{url}/v2/health/ready", timeout=1.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False
