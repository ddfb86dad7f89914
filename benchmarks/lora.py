"""LoRA compared with full fine-tuning: optimiser memory and step time of ViT-B/16, rank 16, alternating.

    python -m benchmarks.lora [--batch_size=4] [--rounds=5] [--towers=both]

The weights are random; neither figure depends on them. Step times are also given as CPU seconds of this process, which
other load disturbs less. The ratios are LoRA's figures divided by those of full fine-tuning.
"""

import json
import os
import statistics
import time
from typing import Any

import numpy as np

from clip_har_jax import cli
from clip_har_jax.batch import Batch
from clip_har_jax.config import make_config

NUM_CLASSES, NUM_PROMPTS = 15, 15


def make_side(method: str, arguments: Any) -> tuple[Any, list[Any], dict[str, int]]:
    """Return the compiled step of a method, its arguments, and its bytes."""
    import jax

    from clip_har_jax.models.families import NAMED_SIZES
    from clip_har_jax.models.params import init_params
    from clip_har_jax.parallel.mesh import make_mesh
    from clip_har_jax.parallel.sharding import batch_sharding, bytes_per_device, put_local_rows
    from clip_har_jax.preprocess import Preprocess
    from clip_har_jax.training.methods import ClassInputs
    from clip_har_jax.training.program import Program
    from clip_har_jax.training.step_config import step_config

    config = make_config(
        {
            "method": {"name": method, "lora_rank": arguments.rank, "towers": arguments.towers},
            "train": {"global_batch_size": arguments.batch_size},
            "eval": {"batch_size": arguments.batch_size},
        }
    )
    clip = NAMED_SIZES["ViT-B/16"]
    program = Program(
        step_config(config), clip, Preprocess(224), NUM_CLASSES, 1000, make_mesh(config.mesh, jax.devices()[:1])
    )
    params = {name: np.asarray(value) for name, value in init_params(clip, 0).items()}
    state, frozen = program.place(params | program.method.init_extra(params, program.shapes, None, None, 0))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 49406, (NUM_PROMPTS, 77)).astype(np.int32)
    ids[:, -1] = 49407
    prompts = program.place_prompts(ids, list(range(NUM_PROMPTS)))
    classes = ClassInputs(*prompts, None)
    if not program.trains_text:
        classes = ClassInputs(None, None, program.class_step(state.params | frozen, classes))
    rows = arguments.batch_size
    images = rng.integers(0, 256, (rows, 224, 224, 3), dtype=np.uint8)
    label = np.arange(rows, dtype=np.int32) % NUM_CLASSES
    batch = put_local_rows(Batch(images, label, np.ones(rows, np.float32), label), batch_sharding(program.mesh))
    sizes = {
        "optimizer_bytes": bytes_per_device(state.opt_state),
        "trainable_parameters": sum(value.size for value in state.params.values()),
    }
    return program.train_step, [state, frozen, classes, batch], sizes


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=4, help="images in a step, e.g. --batch_size=4")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, e.g. --rounds=5")
    parser.add_argument("--rank", type=int, default=16, help="of the updates, e.g. --rank=16")
    parser.add_argument("--towers", default="both", help="image, text or both, e.g. --towers=both")
    arguments = parser.parse_args()
    import jax

    sides = {name: make_side(name, arguments) for name in ("full", "lora")}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for round_number in range(arguments.rounds + 1):  # the first one compiles
        for name, (step, inputs, _) in sides.items():
            begin, cpu_begin = time.perf_counter(), time.process_time()
            inputs[0], *_ = jax.block_until_ready(step(*inputs))
            if round_number:
                times[name].append((time.perf_counter() - begin, time.process_time() - cpu_begin))
    result: dict[str, Any] = {"benchmark": "lora", "load": os.getloadavg()[0], **vars(arguments)}
    print(f"{'':6}{'trainable':>14}{'optimiser MiB':>16}{'median s':>10}{'CPU s':>10}")
    for name, (_, _, sizes) in sides.items():
        step_s, cpu_s = (statistics.median(column) for column in zip(*times[name], strict=True))
        result[name] = {**sizes, "step_s": step_s, "step_cpu_s": cpu_s}
        row = f"{sizes['trainable_parameters']:14,}{sizes['optimizer_bytes'] / 2**20:16.1f}{step_s:10.2f}{cpu_s:10.2f}"
        print(f"{name:6}{row}")
    for key, title in (("optimizer_bytes", "memory_ratio"), ("step_s", "ratio"), ("step_cpu_s", "cpu_ratio")):
        result[title] = round(result["lora"][key] / result["full"][key], 4)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
