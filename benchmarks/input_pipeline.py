"""Training images per second: this project's input compared with torch's DataLoader and tf.data, on the same files.

    python -m benchmarks.input_pipeline [--data=folder:photos] [--torch_python=.venv-peers/bin/python] [--workers=2]

Each side reads JPEGs, takes a random resized crop of 224 px, flips half of them and makes shuffled batches. torch runs
the transforms that torchvision applies to PIL images (bicubic, to float, normalise) in as many worker processes as we
do; tf.data runs its own decode_and_crop_jpeg, bicubic resize and normalisation in as many threads. Ours ends with
uint8, since the training step normalises; the row "ours, float" adds normalisation on the host's CPU, for an equal
comparison. "1 core" binds all its processes to one core, where a thread is cheaper than a worker process; the row
"ours, threads" has no worker processes. All keep their workers between rounds, and batches that were read before a
round don't count. The sides alternate, so that other load slows all of them equally. On a busy machine, compare images
per second of processor time, which includes a side's worker processes. Memory is of all its processes. torch and
TensorFlow aren't requirements of this project:

    python -m venv .venv-peers && .venv-peers/bin/pip install torch pillow tensorflow-cpu
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.train_step import Side
from clip_har_jax import cli
from clip_har_jax.errors import UserError

SIDE_FLAG = "--side"  # starts this file as a child process
SIZE_PX, SCALE_MIN, BATCH_SIZE = 224, 0.6, 64
WAITING = 12  # batches; more than our side reads ahead
DRAWN = 640  # number of generated images if no data is given


def ours(files: str, workers: str, threads: str, cores: str, cache: str) -> None:
    """Run our child process: read batches for each line of standard input and answer with the seconds."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    from clip_har_jax.config import AugmentConfig, DataConfig
    from clip_har_jax.data.bad_inputs import BadInputs
    from clip_har_jax.data.pipeline import train_batches
    from clip_har_jax.data.sources import make_source
    from clip_har_jax.preprocess import Preprocess

    source = make_source(cache or f"csv:{files}", "train")
    config = DataConfig(
        num_threads=int(threads), num_workers=int(workers), augment=AugmentConfig(crop_scale_min=SCALE_MIN)
    )
    finish = _make_float()
    print(json.dumps({"versions": {}}), flush=True)
    options: dict[str, Any] = {"seed": 0, "global_batch_size": BATCH_SIZE, "bad_inputs": BadInputs(source, 0.5)}
    with train_batches(source, config, Preprocess(SIZE_PX), **options) as batches:
        for line in sys.stdin:
            request = json.loads(line)
            for _ in range(WAITING):  # read while the other sides had their turn
                next(batches)
            begin = time.perf_counter()
            for _ in range(request["batches"]):
                batch = next(batches)
                if request["float"]:
                    finish(batch.image)
            print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


def _make_float() -> Callable[[Any], Any]:
    """Return the training step's normalisation, compiled at its first use."""
    compiled: list[Any] = []

    def finish(images: Any) -> Any:
        if not compiled:
            import jax
            import jax.numpy as jnp

            from clip_har_jax.preprocess import CLIP_MEAN, CLIP_STD

            mean, std = jnp.asarray(CLIP_MEAN), jnp.asarray(CLIP_STD)
            compiled.append(jax.jit(lambda x: (x.astype(jnp.float32) / 255 - mean) / std))
        return compiled[0](images).block_until_ready()

    return finish


def write_files(data: str, folder: Path) -> tuple[Path, int]:
    """Return a CSV of the files of --data, or of generated ones, and their number."""
    from clip_har_jax.data import synthetic
    from clip_har_jax.data.sources import FileSource, make_source

    rows = []
    if data:
        source = make_source(data, "train")
        if not isinstance(source, FileSource):
            raise UserError(f"--data={data}: the other sides read files; name a folder, csv or manifest")
        rows = [(os.path.abspath(p), source.labels[i]) for p, i in zip(source.paths, source.label_ids, strict=True)]
    else:
        from PIL import Image

        for i in range(DRAWN):
            path = folder / f"{i}.jpg"
            Image.fromarray(synthetic.draw("train", i, 256)).save(path, quality=90)
            rows.append((str(path), synthetic.LABELS[synthetic.label_of("train", i)]))
    import csv

    with (folder / "files.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filename", "label"), *rows])
    return folder / "files.csv", len(rows)


def _can_import(python: str, name: str) -> bool:
    try:
        return subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--data", default="", help="files to read, e.g. --data=folder:photos; empty: generated ones")
    parser.add_argument("--torch_python", default=sys.executable, help="Python that has torch, Pillow and TensorFlow")
    parser.add_argument("--workers", type=int, default=2, help="processes; for tf.data threads, e.g. --workers=2")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side, e.g. --rounds=5")
    parser.add_argument("--epochs", type=int, default=3, help="epochs in a round, e.g. --epochs=3")
    parser.add_argument("--cache", default="", help="cached images, e.g. --cache='manifest:FILE?cache=256'")
    arguments = parser.parse_args()
    result = measure(arguments)
    columns = ("images_per_s", "least", "most", "images_per_cpu_s", "memory_mb")
    print(f"{'':18}{''.join(f'{name:>18}' for name in columns)}")
    for name, row in result["sides"].items():
        print(f"{name:18}{''.join(f'{row[column]:18.0f}' for column in columns)}")
    print(json.dumps(result))


def measure(arguments: Any) -> dict[str, Any]:
    """Return the images per second of each side, and the ratios."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        files, count = write_files(arguments.data, Path(folder))
        batches = max(1, arguments.epochs * count // BATCH_SIZE)
        sides = _make_sides(arguments, str(files))
        rates: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        memory: dict[str, float] = dict.fromkeys(sides, 0.0)
        for _ in range(1 + arguments.rounds):
            for name, (side, options) in sides.items():
                begin = processes_use(side.pid)
                answer = side.ask(json.dumps({"batches": batches, "float": False} | options))
                end = processes_use(side.pid)
                rates[name].append(batches * BATCH_SIZE / answer["seconds"])
                cpu[name].append(batches * BATCH_SIZE / (end[0] - begin[0]))
                memory[name] = max(memory[name], end[1])
        for side in {id(side): side for side, _ in sides.values()}.values():
            side.close()
    rows = {
        name: {
            "images_per_s": statistics.median(timed[1:]),
            "images_per_cpu_s": statistics.median(cpu[name][1:]),
            "least": min(timed[1:]),
            "most": max(timed[1:]),
            "memory_mb": memory[name],
        }
        for name, timed in rates.items()
    }
    speed = {name: row["images_per_s"] for name, row in rows.items()}
    per_cpu = {name: row["images_per_cpu_s"] for name, row in rows.items()}
    peers = [name for name in ("torch", "tf.data") if name in speed]
    ratios = {f"ratio_to_{name}": round(speed["ours"] / speed[name], 3) for name in peers}
    ratios |= {f"cpu_ratio_to_{name}": round(per_cpu["ours"] / per_cpu[name], 3) for name in peers}
    return {
        "benchmark": "input_pipeline",
        "ratio": ratios.get("ratio_to_torch"),
        **ratios,
        "cores_ratio": round(speed["ours"] / speed["ours, 1 core"], 3),
        "cores_ratio_to_a_thread": round(speed["ours"] / speed["1 core, a thread"], 3),
        "images": count,
        "load": os.getloadavg()[0],
        **vars(arguments),
        "sides": rows,
    }


def processes_use(pid: int) -> tuple[float, float]:
    """Return processor seconds and MB of a process and its children; shared pages count once."""
    import psutil

    seconds, memory = 0.0, 0.0
    parent = psutil.Process(pid)
    for process in (parent, *parent.children(recursive=True)):
        times = process.cpu_times()
        seconds += times.user + times.system
        memory += process.memory_full_info().pss / 2**20
    return seconds, memory


def _make_sides(arguments: Any, files: str) -> dict[str, tuple[Side, dict[str, Any]]]:
    """Return name -> (process, further fields of its requests)."""
    cores = min(arguments.workers, len(os.sched_getaffinity(0)))

    def our_side(workers: int, threads: int, cores: int, cache: str = "") -> Side:
        command = [sys.executable, "-m", "benchmarks.input_pipeline", SIDE_FLAG, files]
        return Side([*command, str(workers), str(threads), str(cores), cache])

    sides: dict[str, tuple[Side, dict[str, Any]]] = {
        "ours": (our_side(arguments.workers, 1, cores), {}),
        "ours, 1 core": (our_side(1, 1, 1), {}),
        "1 core, a thread": (our_side(0, 1, 1), {}),
        "ours, threads": (our_side(0, arguments.workers, cores), {}),
        "ours, float": (our_side(arguments.workers, 1, cores), {"float": True}),
    }
    if arguments.cache:
        sides["ours, cached"] = (our_side(arguments.workers, 1, cores, arguments.cache), {})
    for name, module in (("torch", "torch"), ("tf.data", "tensorflow")):
        if _can_import(arguments.torch_python, module):
            script = str(Path(__file__).with_name(f"{module}_input_pipeline.py"))
            settings = [files, str(arguments.workers), str(SIZE_PX), str(SCALE_MIN), str(BATCH_SIZE)]
            sides[name] = (Side([arguments.torch_python, script, *settings]), {})
        else:
            print(f"{arguments.torch_python} has no {module} to compare with; see --help for how to add it")
    return sides


if __name__ == "__main__":
    if sys.argv[1:2] == [SIDE_FLAG]:
        ours(*sys.argv[2:])
    else:
        cli.run(main)
