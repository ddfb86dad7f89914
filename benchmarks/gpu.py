"""All measurements on one NVIDIA GPU within a time budget: parity, training compared with torch, a trace.

    bash benchmarks/gpu.sh [--output=runs/gpu] [--budget_s=480] [--models=ViT-B/16] [--torch_python=python]

Each part is a separate process that ends at its share of the budget, so there is always a result. First the parity
tests on the GPU; then for each model our training step and that of transformers' CLIPModel (torch.compile, SDPA,
bfloat16) in turns, on batches that stay on the GPU; last our step with data from JPEGs, and a trace of it. Both sides
train both towers with 45 prompts of full length. "ratio" is our images/s divided by torch's for ViT-B/16.

--tiny runs the same on any device with very small models; its figures mean nothing. Without a GPU nothing else is run,
and no result is reported. Exits 1 if a part failed; torch's part is skipped if torch isn't installed. The file is over
300 lines because all parts share one time budget and one result, and nothing else uses them.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu_train_step import BATCH_SIZES, NUM_PROMPTS, TINY, write_photographs
from benchmarks.train_step import has_torch
from clip_har_jax import cli
from clip_har_jax.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]
PARITY = ("tests/models/test_parity.py", "-k", "outputs or gradient or bfloat16")
PARITY_SHARE = 0.2  # of the budget; the rest is divided equally among the models
ROUNDS = 5
FLASH = re.compile(r"flash|fmha|sdpa", re.IGNORECASE)  # in the names of cuDNN's and torch's kernels
COLUMNS = {
    "batch_size": "batch",
    "images_per_s": "images/s",
    "torch_images_per_s": "torch's",
    "ratio": "ratio",
    "mfu": "MFU",
    "fed_images_per_s": "fed with JPEGs",
    "data_wait_fraction": "waiting for data",
    "peak_memory_gb": "memory, GB",
    "compile_s": "compiling, s",
    "flash_attention": "flash attention",
}


class Child:
    """A process that answers each line it is sent with a JSON line; killed with its own children at a deadline."""

    def __init__(self, command: list[str], log: Path, deadline: float, environment: dict[str, str]):
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=os.environ | environment,
                start_new_session=True,
            )
        self._timer = threading.Timer(max(0.0, deadline - time.monotonic()), self.kill)
        self._timer.start()

    def ask(self, line: str) -> dict[str, Any]:
        """Send a request and return its answer; an empty line waits for the first message of the process.

        Raises:
          RuntimeError: the process ended, by itself or at its deadline; with the end of its output.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            if line:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            said = self._log.read_text(errors="replace").strip().splitlines()
            why = f"exit code {self._process.wait()}" if self._timer.is_alive() else "its time was over"
            raise RuntimeError(f"{why}: {' / '.join(said[-3:])}"[-600:])
        return json.loads(answer)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self._timer.cancel()
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


@contextmanager
def children(start: Callable[[str], Child], names: list[str]) -> Iterator[dict[str, Child]]:
    """Start a process for each name, and stop all of them at the end."""
    started: dict[str, Child] = {}
    try:
        for name in names:
            started[name] = start(name)
        yield started
    finally:
        for child in started.values():
            child.close()


def run_parity(output: Path, limit_s: float) -> dict[str, Any]:
    """Run the parity tests on the device that JAX finds, with float32 products in full precision."""
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    # Without the tests' own set-up, which would use simulated CPU devices.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        *PARITY,
    ]
    log = output / "parity.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=limit_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"passed": None, "summary": f"not done in {limit_s:.0f} s"}
    lines = log.read_text().strip().splitlines() or ["no output"]
    return {"passed": code == 0, "summary": lines[-1]}


def measure_model(name: str, batch_size: int, arguments: Any, data: Path, deadline: float) -> dict[str, Any]:
    """Return a model's figures; those that couldn't be measured are null, with the reason in `errors`."""
    values: dict[str, Any] = dict.fromkeys(COLUMNS) | {"batch_size": batch_size, "errors": {}}
    names = ["ours", "torch"] if arguments.has_torch else ["ours"]
    if not arguments.has_torch:
        values["errors"]["torch"] = f"{arguments.torch_python} has no torch and transformers"
    log = arguments.output / f"{name.replace('/', '-')}.log"

    def start(side: str) -> Child:
        if side == "torch":
            script = str(ROOT / "benchmarks" / "torch_gpu_train_step.py")
            command = [arguments.torch_python, script, name, str(batch_size), str(NUM_PROMPTS)]
        else:
            command = [sys.executable, "-m", "benchmarks.gpu_train_step", "--side", name, str(batch_size), str(data)]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false"}
        return Child(command, log, deadline, environment)

    with children(start, names) as sides:
        rates: dict[str, list[float]] = {}
        for side, child in sides.items():
            try:
                values[side] = child.ask("")
                rates[side] = []
            except RuntimeError as error:
                values["errors"][side] = str(error)
        for _ in range(arguments.rounds):
            for side in list(rates):
                try:
                    seconds = sides[side].ask(f"resident {arguments.steps}")["seconds"]
                    rates[side].append(arguments.steps * batch_size / seconds)
                except RuntimeError as error:
                    values["errors"][side] = str(error)
                    del rates[side]
        if rates.get("ours"):
            _add_ours(values, sides["ours"], rates["ours"], arguments.steps)
    if rates.get("torch"):
        values["torch_images_per_s"] = statistics.median(rates["torch"])
    if rates.get("torch") and rates.get("ours"):
        # One round of each, since a GPU's clock changes over time.
        pairs = zip(rates["ours"], rates["torch"], strict=True)
        values["ratio"] = statistics.median(ours / torch for ours, torch in pairs)
    return values


def _add_ours(values: dict[str, Any], child: Child, rates: list[float], steps: int) -> None:
    """Add the figures that only our side has."""
    about = values["ours"]
    values["compile_s"], values["images_per_s"] = about["compile_s"], statistics.median(rates)
    if about["peak_flops"]:
        flops_per_image = about["flops_per_step"] / values["batch_size"]
        values["mfu"] = values["images_per_s"] * flops_per_image / about["peak_flops"]
    try:
        fed = child.ask(f"fed {steps}")
        values["fed_images_per_s"] = steps * values["batch_size"] / fed["seconds"]
        values["data_wait_fraction"] = fed["waited_s"] / fed["seconds"]
        if fed["peak_memory_bytes"] is not None:
            values["peak_memory_gb"] = fed["peak_memory_bytes"] / 1e9
        kernels = child.ask("trace")["kernels"]
        values["attention_kernels"] = [kernel for kernel in kernels if FLASH.search(kernel)]
        values["flash_attention"] = bool(values["attention_kernels"]) if about["platform"] == "gpu" else None
    except RuntimeError as error:
        values["errors"]["ours"] = str(error)


def largest_fit(name: str, arguments: Any, data: Path, deadline: float) -> dict[str, Any]:
    """Measure a model with the largest batch that fits on both sides: half of `BATCH_SIZES`, or less."""
    batch_size = 4 if name == TINY else BATCH_SIZES[name] // 2  # both sides are on the GPU at once
    while True:
        values = measure_model(name, batch_size, arguments, data, deadline)
        out_of_memory = any(
            word in str(values["errors"]) for word in ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")
        )
        if not out_of_memory or batch_size < 16 or time.monotonic() > deadline:
            return values
        batch_size //= 2


def to_table(models: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    rows = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, values in models.items():
        cells = [_cell(values[key]) for key in COLUMNS]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.0f}" if isinstance(value, float) and value >= 100 else f"{value:.3g}" if value else str(value)


def find_device() -> dict[str, Any]:
    """Return the platform and kind of JAX's first device, found by a process that then gives it back."""
    found = "import jax, json; d = jax.devices()[0]; print(json.dumps([d.platform, d.device_kind, jax.__version__]))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise UserError(f"JAX finds no device: {done.stderr.strip().splitlines()[-1]}")
    return dict(zip(("platform", "device", "jax"), json.loads(done.stdout.splitlines()[-1]), strict=True))


def main() -> int:
    begin = time.monotonic()
    parser = cli.make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="gpu.json, gpu.md, logs; as --output=gpu")
    parser.add_argument("--budget_s", type=float, default=480.0, help="seconds in total, e.g. --budget_s=300")
    parser.add_argument("--models", default=",".join(BATCH_SIZES), help="named sizes, e.g. --models=ViT-B/16")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a round, e.g. --steps=10")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each side, e.g. --rounds=3")
    parser.add_argument("--torch_python", default=sys.executable, help="Python that has torch and transformers")
    parser.add_argument("--tiny", action="store_true", help="test run on any device, with very small models")
    arguments = parser.parse_args()
    models = [TINY] if arguments.tiny else arguments.models.split(",")
    for name in models:
        if name not in (TINY, *BATCH_SIZES):
            raise UserError(f"--models={name}: {nearest(name, list(BATCH_SIZES))}")
    arguments.output = arguments.output.resolve()
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.has_torch = has_torch(arguments.torch_python)
    result: dict[str, Any] = {"benchmark": "gpu", "ratio": None, "tiny": arguments.tiny, **find_device(), "models": {}}
    if result["platform"] != "gpu" and not arguments.tiny:
        print(f"no GPU here ({result['device']}): nothing measured; --tiny proves the way without one")
        print(json.dumps(result))
        return 0
    result["parity"] = run_parity(arguments.output, PARITY_SHARE * arguments.budget_s)
    print(f"parity: {result['parity']['summary']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), count=16 if arguments.tiny else 2048)
        for i, name in enumerate(models):
            left_s = begin + 0.97 * arguments.budget_s - time.monotonic()
            deadline = time.monotonic() + left_s / (len(models) - i)
            result["models"][name] = largest_fit(name, arguments, Path(folder), deadline)
            for side, error in result["models"][name]["errors"].items():
                print(f"{name}, {side}: {error}", flush=True)
            _write(arguments.output, result)  # in case that the next model crashes the machine
    result["ratio"] = result["models"].get("ViT-B/16", {}).get("ratio")
    result["seconds"] = time.monotonic() - begin
    _write(arguments.output, result)
    print(to_table(result["models"]))
    print(json.dumps(result))
    expected = set() if arguments.has_torch else {"torch"}
    whole = result["parity"]["passed"] and all(
        set(values["errors"]) <= expected for values in result["models"].values()
    )
    return 0 if whole else 1


def _write(output: Path, result: dict[str, Any]) -> None:
    (output / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    (output / "gpu.md").write_text(to_table(result["models"]) + "\n")


if __name__ == "__main__":
    cli.run(main)
