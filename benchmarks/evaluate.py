"""The evaluation of photographs compared with a plain loop of transformers and torch: ViT-B/32, float32, CPU.

    python -m benchmarks.evaluate [--torch_python=.venv-torch/bin/python] [--images=256] [--rounds=5]

Both sides have the same random weights and read the same JPEG files of 640x480 px: decoding, resizing, the image tower,
similarity to the classes. Each is a separate process; they alternate, pass by pass, after one warm-up pass. Ours also
computes all metrics. "ratio" is our images per second divided by torch's, for the median passes. torch isn't a
requirement of this project:

    python -m venv .venv-torch && .venv-torch/bin/pip install torch transformers pillow
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.train_step import SIDE_FLAG, Side, has_torch
from clip_har_jax import cli

BATCH_SIZE = 32
LABELS = tuple(f"action {i}" for i in range(15))


def ours(folder: str, photos: str) -> None:
    """Run our side: one pass for each line on standard input."""
    import jax

    from clip_har_jax.config import DataConfig
    from clip_har_jax.data.sources import make_source
    from clip_har_jax.inference.jax_backend import JaxBackend
    from clip_har_jax.pipelines.classed import ClassedSource
    from clip_har_jax.pipelines.evaluate import run_backend

    source = make_source(f"folder:{photos}", "test")
    backend = JaxBackend(folder, (), source.labels, BATCH_SIZE)
    log = Path(folder) / "bad_inputs.jsonl"
    print(json.dumps({"versions": {"jax": jax.__version__}}), flush=True)
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        run_backend(backend, ClassedSource(source, backend.labels, photos), DataConfig(), log)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)


def write_inputs(root: Path, count: int) -> tuple[Path, Path]:
    """Write a ViT-B/32 with random weights, and photographs in one folder per class."""
    from clip_har_jax.models.families import NAMED_SIZES
    from clip_har_jax.models.params import init_params
    from clip_har_jax.models.pretrained import write_params
    from clip_har_jax.preprocess import Preprocess
    from clip_har_jax.text import Tokenizer

    tokenizer = Tokenizer.train(LABELS, 600)
    config = NAMED_SIZES["ViT-B/32"]
    special = {
        name: getattr(tokenizer, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **special))
    model, photos = root / "model", root / "photos"
    write_params(model, config, init_params(config, seed=0))
    tokenizer.save(model)
    Preprocess(config.vision.image_size).save(model)
    rng = np.random.default_rng(0)
    for i in range(count):
        path = photos / LABELS[i % len(LABELS)] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        blocks.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
    return model, photos


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--torch_python", default=sys.executable, help="Python that has torch and transformers")
    parser.add_argument("--images", type=int, default=256, help="photographs in a pass, e.g. --images=512")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of each side, e.g. --rounds=10")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as root:
        model, photos = map(str, write_inputs(Path(root), arguments.images))
        sides = {"ours": Side([sys.executable, "-m", "benchmarks.evaluate", SIDE_FLAG, model, photos])}
        if has_torch(arguments.torch_python):
            script = str(Path(__file__).with_name("torch_evaluate.py"))
            sides["torch"] = Side([arguments.torch_python, script, model, photos, str(BATCH_SIZE)])
        passes: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(1 + arguments.rounds):
            for name, side in sides.items():
                passes[name].append(side.step())
        for side in sides.values():
            side.close()
    result: dict[str, Any] = {
        "benchmark": "evaluate",
        "ratio": None,
        "cpu_ratio": None,
        "load": load,
        **vars(arguments),
    }
    print(f"{'':6}{'images/s':>10}{'median s':>10}{'CPU s':>10}")
    for name, timed in passes.items():
        seconds, cpu_s = (statistics.median(one[key] for one in timed[1:]) for key in ("seconds", "cpu_seconds"))
        result[name] = sides[name].about | {"pass_s": seconds, "pass_cpu_s": cpu_s}
        print(f"{name:6}{arguments.images / seconds:10.1f}{seconds:10.3f}{cpu_s:10.3f}")
    if "torch" in result:
        result["ratio"] = round(result["torch"]["pass_s"] / result["ours"]["pass_s"], 3)
        result["cpu_ratio"] = round(result["torch"]["pass_cpu_s"] / result["ours"]["pass_cpu_s"], 3)
    else:
        print(f"{arguments.torch_python} has no torch and transformers to compare with; see --help for how to add them")
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == [SIDE_FLAG]:
        ours(*sys.argv[2:])
    else:
        main()
