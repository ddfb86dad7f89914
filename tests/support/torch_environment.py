"""An environment of torch and transformers, beside the project's own.

Its Python is that of CLIP_HAR_JAX_TORCH_PYTHON, else one of an environment made once under the user's cache folder.
"""

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0", "pillow==13.0.0")


def find_python() -> str:
    """Return the Python of the environment; make the environment if it isn't there."""
    if given := os.environ.get("CLIP_HAR_JAX_TORCH_PYTHON"):
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "clip_har_jax" / f"torch-py{sys.version_info.major}.{sys.version_info.minor}"
    python, complete = folder / "bin" / "python", folder / "complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # several processes of tests ask for it at once
        if not complete.is_file() or complete.read_text() != "\n".join(REQUIREMENTS):
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS]
            subprocess.run(install, check=True)
            complete.write_text("\n".join(REQUIREMENTS))
    return str(python)


def torch_side(python: str, *arguments: str) -> None:
    """Run torch_side.py with the environment's Python."""
    command = [python, str(Path(__file__).with_name("torch_side.py")), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
