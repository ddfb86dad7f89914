"""All exported formats compared with torch: size, load time, latency, throughput, on the same images and cores.

    python -m benchmarks.export --export=runs/b32/export [--model=runs/b32/model --torch_python=.venv-torch/bin/python]

The image encoder of each format runs in a separate process, as do torch eager and the ONNX that torch exports from the
same weights. They alternate, run by run, so that other load slows all of them equally. A process sleeps while it waits,
since the spinning threads of a waiting runtime would slow the next one. `ratio` is the latency of our ONNX divided by
torch's at batch 1. torch isn't a requirement of this project:

    python -m venv .venv-torch && .venv-torch/bin/pip install torch transformers onnx onnxruntime onnxscript numpy
"""

import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_step import Side, has_torch
from clip_har_jax import cli

SIDE_FLAG = "--side"  # starts this file as a child process
WARM_UPS = 2
SETTLE_S = 0.05  # until the last runtime's threads have stopped spinning
GRAPH = "image_encoder"


def make_images(batch_size: int, size_px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch_size, size_px, size_px, 3), dtype=np.uint8)


def ours(folder: str, name: str) -> None:
    """Run our child process: open a format, then run a batch of the size on each line of standard input."""
    start = time.perf_counter()
    from clip_har_jax.inference.runtimes import Graphs

    graphs = Graphs(Path(folder), name)
    size_px = graphs.signatures[GRAPH]["inputs"]["image"][1][1]
    graphs.run(GRAPH, make_images(1, size_px))
    print(json.dumps({"load_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        images = make_images(int(line), size_px)
        start = time.perf_counter()
        graphs.run(GRAPH, images)
        seconds = time.perf_counter() - start
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb}), flush=True)


def graph_mb(folder: Path) -> float:
    """Return the size of the image encoder's files if a format separates them, else of all files."""
    own = list(folder.glob(f"{GRAPH}.*"))
    shared = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".data")]
    files = own + shared if own else [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files) / 1e6


def start_sides(export: Path, model: str | None, torch_python: str) -> tuple[dict[str, Side], dict[str, float]]:
    """Return the processes by name, and the MB of each one's files."""
    from clip_har_jax.inference.runtimes import formats_in

    sides, sizes = {}, {}
    for name in formats_in(export):
        if name == "torchscript":
            if not has_torch(torch_python):
                continue
            script = [torch_python, str(Path(__file__).with_name("torch_export.py")), "torchscript", str(export / name)]
        else:
            script = [sys.executable, "-m", "benchmarks.export", SIDE_FLAG, str(export), name]
        sides[name], sizes[name] = Side(script), graph_mb(export / name)
    if model and has_torch(torch_python):
        script = [torch_python, str(Path(__file__).with_name("torch_export.py"))]
        for name in ("torch_eager", "torch_onnx"):
            sides[name] = Side([*script, name, model])
            sizes[name] = sides[name].about["mb"]
    return sides, sizes


def measure(sides: dict[str, Side], batch_sizes: list[int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Return the seconds of each run, by side and batch size; larger batches get fewer rounds."""
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in batch_sizes} for name in sides}
    for size in batch_sizes:
        for turn in range(WARM_UPS + max(5, rounds // size)):
            for name, side in sides.items():
                time.sleep(SETTLE_S)
                seconds = side.ask(str(size))["seconds"]
                if turn >= WARM_UPS:
                    times[name][size].append(seconds)
    return times


def summarise(about: dict[str, Any], size_mb: float, times: dict[int, list[float]]) -> dict[str, Any]:
    best = max(times, key=lambda size: size / statistics.median(times[size]))
    return {
        "size_mb": round(size_mb, 1),
        "load_s": round(about["load_s"], 2),
        "p50_ms": {size: round(1e3 * statistics.median(runs), 2) for size, runs in times.items()},
        "p99_ms": {size: round(1e3 * float(np.quantile(runs, 0.99)), 2) for size, runs in times.items()},
        "best_batch": best,
        "images_per_s": round(best / statistics.median(times[best]), 1),
    }


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot latency at batch 1 and throughput at the best batch, one bar per format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(results)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.45 * len(names) + 1.2), layout="constrained")
    colours = ["#8c8c8c" if name.startswith("torch_") else "#2b6cb0" for name in names]
    values = [
        ([results[name]["p50_ms"][1] for name in names], "latency at batch 1, ms (less is better)"),
        ([results[name]["images_per_s"] for name in names], "images/s at the best batch (more is better)"),
    ]
    for axis, (numbers, title) in zip(axes, values, strict=True):
        bars = axis.barh(names, numbers, color=colours)
        axis.bar_label(bars, [f"{number:.3g}" for number in numbers], padding=3)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--export", required=True, metavar="DIR", help="an exported folder, e.g. --export=runs/b32/export")
    add("--model", metavar="DIR", help="the model folder it came from, for torch's side, e.g. --model=runs/b32/model")
    add("--torch_python", default=sys.executable, metavar="FILE", help="Python that has torch, e.g. .venv/bin/python")
    add("--batch_sizes", default="1,8", metavar="N,N", help="e.g. --batch_sizes=1,8,32")
    add("--rounds", type=int, default=30, metavar="N", help="timed runs at batch 1, e.g. --rounds=50")
    add("--plot", metavar="FILE", help="also write a plot, e.g. --plot=docs/export.svg")
    arguments = parser.parse_args()
    batch_sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    load = os.getloadavg()[0]
    sides, sizes = start_sides(Path(arguments.export), arguments.model, arguments.torch_python)
    times = measure(sides, batch_sizes, arguments.rounds)
    for side in sides.values():
        side.close()
    results = {name: summarise(side.about, sizes[name], times[name]) for name, side in sides.items()}
    columns = [f"{what} b{size}" for size in batch_sizes for what in ("p50 ms", "p99 ms")]
    print(f"{'':14}{'MB':>8}{'load s':>8}{''.join(f'{name:>11}' for name in columns)}{'images/s':>10}{'at':>5}")
    for name, row in results.items():
        numbers = [row[key][size] for size in batch_sizes for key in ("p50_ms", "p99_ms")]
        cells = "".join(f"{number:11.1f}" for number in numbers)
        print(
            f"{name:14}{row['size_mb']:8.1f}{row['load_s']:8.2f}{cells}{row['images_per_s']:10.1f}{row['best_batch']:5}"
        )
    if arguments.plot:
        plot(results, Path(arguments.plot))
    ratios = {
        f"{name}/{other}": {
            size: round(results[name]["p50_ms"][size] / results[other]["p50_ms"][size], 3) for size in batch_sizes
        }
        for name, other in (("onnx", "torch_onnx"), ("onnx_int8", "onnx"))
        if {name, other} <= results.keys()
    }
    ratio = ratios.get("onnx/torch_onnx", {}).get(batch_sizes[0])
    print(json.dumps({"benchmark": "export", "ratio": ratio, "ratios": ratios, "load": load, "formats": results}))


if __name__ == "__main__":
    if sys.argv[1:2] == [SIDE_FLAG]:
        ours(*sys.argv[2:])
    else:
        cli.run(main)
