"""Our training step compared with that of transformers' torch model: both towers, float32, CPU.

    python -m benchmarks.train_step [--torch_python=.venv-torch/bin/python] [--family=clip] [--rounds=10]

The family clip is ViT-B/32 with texts of 77 tokens and the contrastive loss of Radford et al. 2021; siglip is SigLIP
B/16 at 224 px with texts of 64 tokens and the sigmoid loss of Zhai et al. 2023. Both sides start with the same weights
and use the same images and texts, and AdamW. Each is a separate process; they alternate, step by step, so that other
load slows both. Alternating isn't enough on a busy machine: torch's threads wait for each other in a busy loop, so a
core taken from one of them costs torch far more than us (a load of 5 on 2 cores gave a ratio of 0.50, one core gave
1.43). Check that "load" is near 0, or measure with --cores=1. torch isn't a requirement of this project:

    python -m venv .venv-torch && .venv-torch/bin/pip install torch transformers
"""

import functools
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

from clip_har_jax import cli

SIDE_FLAG = "--side"  # starts this file as a child process
WARM_UPS = 3
Step = dict[str, float]  # loss, seconds, cpu_seconds
# glibc can keep freed memory, in huge pages: temporaries of a step are hundreds of MB, allocated anew otherwise.
ALLOCATOR = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_threshold": 8 * 2**30, "trim_threshold": 32 * 2**30}.items()
)
LEARNING_RATE, WEIGHT_DECAY = 1e-5, 1e-2


SIZES = {"clip": "ViT-B/32", "siglip": "siglip-base-patch16-224"}  # family -> named size


def make_inputs(family: str, batch_size: int) -> dict[str, np.ndarray]:
    """Return random images and texts of full length, with Hugging Face's names."""
    rng = np.random.default_rng(0)
    if family == "clip":
        ids = rng.integers(0, 49406, (batch_size, 77))
        ids[:, 0], ids[:, -1] = 49406, 49407
    else:
        ids = rng.integers(0, 32000, (batch_size, 64))
    return {"input_ids": ids, "pixel_values": rng.standard_normal((batch_size, 3, 224, 224), np.float32)}


class Side:
    """A child process that runs one step for each line it is sent."""

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def step(self) -> Step:
        return self.ask("step")

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with exit code {self._process.wait()}")
        return json.loads(line)


def ours(folder: str, inputs_file: str) -> None:
    """Run our child process."""
    import jax
    import jax.numpy as jnp
    import optax

    from clip_har_jax.models.params import Params, make_model
    from clip_har_jax.models.pretrained import read_config, read_params

    config = read_config(Path(folder))
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def loss_fn(params: Params, inputs: dict[str, jax.Array]) -> jax.Array:
        logits = make_model(config, params)(**inputs).logits_per_image
        if config.family == "siglip":  # the text of another image is a negative; the sum is over the texts
            signs = 2 * jnp.eye(len(logits)) - 1
            return -jax.nn.log_sigmoid(signs * logits).sum(axis=-1).mean()
        labels = jnp.arange(len(logits))
        losses = (optax.softmax_cross_entropy_with_integer_labels(side, labels).mean() for side in (logits, logits.T))
        return sum(losses) / 2

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(
        params: Params, opt_state: optax.OptState, inputs: dict[str, jax.Array]
    ) -> tuple[Params, optax.OptState, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    with np.load(inputs_file) as arrays:
        inputs = {name: jnp.asarray(arrays[name]) for name in arrays.files}
    params = jax.tree.map(jnp.array, read_params(Path(folder), config))
    opt_state = optimizer.init(params)
    start = time.perf_counter()
    step = train_step.lower(params, opt_state, inputs).compile()
    compile_s = time.perf_counter() - start
    print(json.dumps({"versions": {"jax": jax.__version__}, "compile_s": compile_s}), flush=True)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        params, opt_state, loss = step(params, opt_state, inputs)
        jax.block_until_ready(params)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        print(json.dumps({"loss": float(loss), "seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)


def write_start(folder: Path, family: str, batch_size: int) -> Path:
    """Write random weights in the Hugging Face layout, and the inputs of both sides; return the inputs' file."""
    from clip_har_jax.models.families import NAMED_SIZES
    from clip_har_jax.models.params import init_params
    from clip_har_jax.models.pretrained import write_params

    config = NAMED_SIZES[SIZES[family]]
    write_params(folder, config, init_params(config, seed=0))
    np.savez(folder / "inputs.npz", allow_pickle=False, **make_inputs(family, batch_size))
    return folder / "inputs.npz"


def has_torch(python: str) -> bool:
    found = "import importlib.util as util; assert util.find_spec('torch') and util.find_spec('transformers')"
    try:
        return subprocess.run([python, "-c", found], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def measure(
    torch_python: str, family: str, batch_size: int, rounds: int
) -> dict[str, tuple[dict[str, Any], list[Step]]]:
    """Return the description of each side, with the loss of its first step, and its timed steps."""
    with tempfile.TemporaryDirectory() as folder:
        inputs_file = str(write_start(Path(folder), family, batch_size))
        sides = {"ours": Side([sys.executable, "-m", "benchmarks.train_step", SIDE_FLAG, folder, inputs_file])}
        if has_torch(torch_python):
            script = str(Path(__file__).with_name("torch_train_step.py"))
            rates = [str(LEARNING_RATE), str(WEIGHT_DECAY)]
            sides["torch"] = Side([torch_python, script, folder, inputs_file, *rates])
        steps: dict[str, list[Step]] = {name: [] for name in sides}
        for _ in range(WARM_UPS + rounds):
            for name, side in sides.items():
                steps[name].append(side.step())
        for side in sides.values():
            side.close()
    first_losses = {name: {"first_loss": timed[0]["loss"]} for name, timed in steps.items()}
    return {name: (side.about | first_losses[name], steps[name][WARM_UPS:]) for name, side in sides.items()}


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--torch_python", default=sys.executable, help="Python that has torch and transformers")
    parser.add_argument("--family", choices=tuple(SIZES), default="clip", help="of models, e.g. --family=siglip")
    parser.add_argument("--batch_size", type=int, default=8, help="images, and as many texts, e.g. --batch_size=16")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each side, e.g. --rounds=20")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="cores for each side, e.g. --cores=1")
    parser.add_argument(
        "--huge_pages", action="store_true", help="keep freed memory, in huge pages (glibc), e.g. --huge_pages"
    )
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments.huge_pages:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.cores :])  # the sides inherit it
    load = os.getloadavg()[0]
    measured = measure(arguments.torch_python, arguments.family, arguments.batch_size, arguments.rounds)
    result: dict[str, Any] = {
        "benchmark": "train_step",
        "ratio": None,
        "cpu_ratio": None,
        "load": load,
        **vars(arguments),
    }
    print(f"{'':6}{'median s':>10}{'least s':>10}{'most s':>10}{'CPU s':>10}{'first loss':>12}")
    for name, (about, steps) in measured.items():
        seconds, cpu_s = ([step[key] for step in steps] for key in ("seconds", "cpu_seconds"))
        result[name] = about | {"step_s": statistics.median(seconds), "step_cpu_s": statistics.median(cpu_s)}
        row = (statistics.median(seconds), min(seconds), max(seconds), statistics.median(cpu_s))
        print(f"{name:6}{''.join(f'{value:10.3f}' for value in row)}{about['first_loss']:12.5f}")
    if "torch" in result:
        result["ratio"] = round(result["ours"]["step_s"] / result["torch"]["step_s"], 3)
        result["cpu_ratio"] = round(result["ours"]["step_cpu_s"] / result["torch"]["step_cpu_s"], 3)
    else:
        print(f"{arguments.torch_python} has no torch and transformers to compare with; see --help for how to add them")
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == [SIDE_FLAG]:
        ours(*sys.argv[2:])
    else:
        cli.run(main)
