"""The memory of an export of a model over 2 GB: ViT-H/14's layers with random weights, 28 px (5 tokens an image).

    python -m benchmarks.export_memory [--format=onnx_fp16] [--layers=32]

Writes the model, exports it with its proof on 8 images, and samples the resident memory of the export and its child
processes. Needs 10 GB of disk in the temporary folder. Prints the peaks as a JSON line.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from clip_har_jax import bundle, cli

LABELS = ("riding", "sitting", "eating")
SAMPLE_S = 0.25


def write_model(folder: Path, num_layers: int) -> float:
    """Write a sealed model folder; return its parameters in millions."""
    from clip_har_jax.models.clip import CLIPConfig
    from clip_har_jax.models.configuration import TextConfig, VisionConfig
    from clip_har_jax.models.params import abstract_model, flat_params
    from clip_har_jax.models.pretrained import write_params
    from clip_har_jax.preprocess import Preprocess
    from clip_har_jax.text import Tokenizer, make_prompts

    folder.mkdir()
    tokenizer = Tokenizer.train(LABELS, 600)
    special = {
        name: getattr(tokenizer, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    text = TextConfig(hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2, context_length=24, **special)
    vision = VisionConfig(
        hidden_size=1280, intermediate_size=5120, num_layers=num_layers, num_heads=16, image_size=28, patch_size=14
    )
    config, rng = CLIPConfig(text, vision, projection_dim=1024), np.random.default_rng(0)
    params = {
        name: np.ones(value.shape, np.float32)
        if name.endswith("scale")
        else rng.standard_normal(value.shape, np.float32) * np.float32(0.02)
        for name, value in flat_params(abstract_model(config)).items()
    }
    write_params(folder, config, params)
    tokenizer.save(folder)
    Preprocess(vision.image_size).save(folder)
    bundle.write_actions(folder, bundle.Actions(LABELS, make_prompts(LABELS), 1.0))
    bundle.seal(folder)
    return sum(value.size for value in params.values()) / 1e6


def run_and_sample(command: list[str]) -> dict[str, float]:
    """Run a command; return the peak memory of all its processes together and of the largest, and the time."""
    start, peak, largest = time.perf_counter(), 0, 0
    process = psutil.Popen(command)
    while process.poll() is None:
        sizes = []
        try:
            for one in (process, *process.children(recursive=True)):
                sizes.append(one.memory_info().rss)
        except psutil.NoSuchProcess:  # ended meanwhile
            pass
        peak, largest = max(peak, sum(sizes)), max(largest, *sizes, 0)
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = time.perf_counter() - start
    return {"peak_gb": peak / 1e9, "largest_process_gb": largest / 1e9, "seconds": seconds}


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--format", default="onnx_fp16", help="the format to export, e.g. --format=onnx")
    parser.add_argument("--layers", type=int, default=32, help="layers of the image tower, e.g. --layers=4")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        model, output = Path(root) / "model", Path(root) / "export"
        millions = write_model(model, arguments.layers)
        flags = [f"--model={model}", f"--formats={arguments.format}", f"--output={output}", "--num_examples=8"]
        measured = run_and_sample([sys.executable, "-m", "export", *flags])
        parity = json.loads((output / "parity.json").read_text(encoding="utf-8"))[arguments.format]
    result = {"benchmark": "export_memory", **vars(arguments), "parameters_m": round(millions, 1)}
    result |= {"passed": parity["passed"]} | {key: round(value, 2) for key, value in measured.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
