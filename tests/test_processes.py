"""Workers start from whatever a person types Python into: no main script needs a guard, and none runs twice."""

import errno
import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import nbformat
import pytest
from nbclient import NotebookClient

from clip_har_jax.errors import UserError
from clip_har_jax.processes import SHM, SharedMemory
from tests.support.model_folders import write_model
from tests.support.serving_setup import wait_for, write_export

ROOT = Path(__file__).parents[1]

# Starts workers of each kind at its top level, from a class and a function of the main module.
PROGRAM = """\
import os
from itertools import islice
import numpy as np
from clip_har_jax.config import DataConfig
from clip_har_jax.data.examples import Example, Source
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.pipeline import train_batches
from clip_har_jax.data.workers import map_in_workers
from clip_har_jax.preprocess import Preprocess

class Drawn(Source):
    labels, label_ids, fingerprint = ("run", "sit"), np.arange(8, dtype=np.int32) % 2, "0" * 64
    def __len__(self): return 8
    def __getitem__(self, i): return Example(np.full((9, 9, 3), i, np.uint8), i % 2, str(i))

def process_of(shared, i): return os.getpid(), shared + i

source = Drawn()
options = {"seed": 0, "global_batch_size": 4, "bad_inputs": BadInputs(source, 0)}
batches = train_batches(source, DataConfig(num_workers=2), Preprocess(8), **options)
total = sum(int(batch.mask.sum()) for batch in islice(batches, 4))
batches.close()
found = list(map_in_workers(process_of, 10, 6, 2, "adding", 0))
processes, values = zip(*found)
print("the main module runs", total, list(values), os.getpid() in processes, flush=True)
"""
EXPECTED = "the main module runs 16 [10, 11, 12, 13, 14, 15] False"


def run(*arguments: str, given: str | None = None) -> str:
    """Return the output of a Python process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], input=given, capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "plain_script.py"
    path.write_text(PROGRAM)
    return str(path)


@pytest.mark.parametrize("full", [(), (SHM,), (SHM, tempfile.gettempdir())])
def test_shared_memory_goes_where_there_is_room(monkeypatch: pytest.MonkeyPatch, full: tuple[str, ...]) -> None:
    reserve = os.posix_fallocate

    def reserve_where_there_is_room(fd: int, offset: int, length: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", reserve_where_there_is_room)
    if len(full) == 2:
        with pytest.raises(UserError, match=r"^/dev/shm and .*: no room for 3 MiB .*--shm-size=1g"):
            SharedMemory(3 << 20)
        return
    memory = SharedMemory(3 << 20)
    folder = tempfile.gettempdir() if full else SHM
    assert os.readlink(f"/proc/self/fd/{memory.fd}").startswith(folder)
    assert os.fstat(memory.fd).st_blocks * 512 >= 3 << 20  # no page lacks room when it is written
    memory.buffer[-1] = 7
    assert SharedMemory(3 << 20, os.dup(memory.fd)).buffer[-1] == 7


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_shared_memory_that_cannot_be_made_ends_in_its_own_error() -> None:
    with pytest.raises((UserError, ValueError)):
        SharedMemory(-1)
    SharedMemory.__new__(SharedMemory).__del__()


def test_a_script_without_a_guard(script: str) -> None:
    assert run(script).splitlines() == [EXPECTED]


@pytest.mark.slow
def test_python_c() -> None:
    assert run("-c", PROGRAM).splitlines() == [EXPECTED]


@pytest.mark.slow
def test_a_program_on_standard_input() -> None:
    assert run("-", given=PROGRAM).splitlines() == [EXPECTED]


@pytest.mark.slow
def test_a_debugger(script: str) -> None:
    assert run("-m", "pdb", "-c", "continue", script, given="quit\n").count(EXPECTED) == 1


@pytest.mark.slow
def test_a_module(script: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(script).parent)))}
    command = [sys.executable, "-m", Path(script).stem]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.stdout.splitlines() == [EXPECTED], done.stderr


@pytest.mark.slow
def test_pytest(tmp_path: Path) -> None:
    lines = "".join(f"    {line}\n" for line in PROGRAM.splitlines())
    path = tmp_path / "test_plain.py"
    path.write_text(f"def test_it():\n{lines}")
    shown = run("-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(path))
    assert shown.count(EXPECTED) == 1


def test_an_interactive_session() -> None:
    """The lines are typed into a terminal, as a person would."""
    controller, terminal = pty.openpty()
    session = subprocess.Popen(
        [sys.executable, "-i"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(terminal)
    shown = b""
    try:
        for line in PROGRAM.replace("str(i))\n", "str(i))\n\n").replace("+ i\n", "+ i\n\n").splitlines():
            os.write(controller, line.encode() + b"\n")
            time.sleep(0.01)  # a terminal's buffer holds 4 KB
        os.write(controller, b"quit()\n")
        while chunk := _read(controller):
            shown += chunk
    finally:
        session.wait(timeout=240)
        os.close(controller)
    assert shown.decode().count(EXPECTED) == 1, shown.decode()
    assert b"Traceback" not in shown, shown.decode()


def _read(controller: int) -> bytes:
    try:
        return os.read(controller, 4096)
    except OSError:  # the session has closed its end
        return b""


@pytest.mark.slow
def test_a_notebook() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PROGRAM)])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute(env=environment)
    printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs if output.output_type == "stream")
    assert EXPECTED in printed.splitlines()


@pytest.mark.slow
def test_a_service_of_several_workers_from_a_script(tmp_path: Path) -> None:
    folder = write_export(tmp_path)
    script = tmp_path / "serve.py"
    script.write_text(
        "from serving.server import serve\nfrom serving.settings import Settings\n"
        "print('the main module runs', flush=True)\n"
        f"raise SystemExit(serve(Settings(model={str(folder)!r}, port=0, workers=2, decode_processes=1)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    service = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    lines: list[str] = []
    try:
        assert service.stdout is not None
        while not (found := re.search(r"http://127.0.0.1:\d+", "".join(lines))):
            lines.append(service.stdout.readline())
        with httpx.Client(base_url=found[0], timeout=60) as client:
            wait_for(lambda: _is_ready(client), 120)
            picture = next((tmp_path / "photos").rglob("*.*")).read_bytes()
            assert client.post("/v1/predict", content=picture).status_code == 200
    finally:
        service.terminate()
        lines += service.communicate(timeout=60)[0].splitlines()
    assert service.returncode == 0, lines
    assert sum("the main module runs" in line for line in lines) == 1, lines
    assert not any("Traceback" in line for line in lines), lines


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_an_export_from_a_script(tmp_path: Path) -> None:
    """The export measures each format in a process of its own, and draws its own images."""
    model = write_model(tmp_path / "model", ("run", "sit"))
    script = tmp_path / "plain_export.py"
    script.write_text(
        "from export.run import ExportOptions, export_model\nprint('the main module runs', flush=True)\n"
        f"model, output = {str(model)!r}, {str(tmp_path / 'export')!r}\n"
        "parity = export_model(model, ('onnx',), output, options=ExportOptions(num_examples=2))\n"
        "print(parity['onnx']['passed'])\n"
    )
    assert run(str(script)).splitlines() == ["the main module runs", "True"]
