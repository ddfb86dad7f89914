"""FLOPs per clip, parameters and memory of each temporal model of a CLIP, for the table in docs/video.md.

    python -m benchmarks.temporal_models [--model=ViT-B/32] [--num_frames=8] [--batch_size=4] [--method=full]

Nothing is run and no weights are made. Memory is that of one training step on one device, as XLA plans it for this
machine.
"""

import dataclasses
import math
from typing import Any

import jax

from clip_har_jax import cli
from clip_har_jax.config import make_config
from clip_har_jax.models.families import NAMED_SIZES
from clip_har_jax.models.flops import clip_flops
from clip_har_jax.models.temporal import KINDS, is_temporal
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.planning.cost import step_memory
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.program import Program
from clip_har_jax.training.step_config import step_config

NUM_CLASSES = 15


def make_program(kind: str, arguments: Any) -> Program:
    """Return the training program on one device."""
    config = make_config(
        {
            "data": {"train": "motion", "video": {"num_frames": arguments.num_frames}},
            "train": {"global_batch_size": arguments.batch_size},
            "eval": {"batch_size": arguments.batch_size},
            "method": {"name": arguments.method},
        }
    )
    clip = dataclasses.replace(NAMED_SIZES[arguments.model], temporal=kind)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return Program(step_config(config), clip, Preprocess(clip.vision.image_size), NUM_CLASSES, 1000, mesh)


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", default="ViT-B/32", choices=list(NAMED_SIZES))
    parser.add_argument("--num_frames", type=int, default=8, help="of a clip")
    parser.add_argument("--batch_size", type=int, default=4, help="clips in a training step")
    parser.add_argument("--method", default="full", help="training method; decides what else is trainable")
    arguments = parser.parse_args()
    size = f"{arguments.num_frames} frames, {arguments.method}, steps of {arguments.batch_size} clips"
    print(f"{arguments.model}, clips of {size}\n")
    print("| `model.temporal` | GFLOPs a clip | parameters added | trainable | memory of a step, MiB |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        program = make_program(kind, arguments)
        flops = clip_flops(program.sizes, arguments.num_frames)
        added = sum(math.prod(shape) for name, shape in program.shapes.items() if is_temporal(name))
        trainable = sum(math.prod(shape) for shape in program.trainable.values())
        memory = step_memory(program, NUM_CLASSES)
        size = "-" if memory is None else f"{memory.total_bytes / 2**20:,.0f}"
        print(f"| `{kind}` | {flops / 1e9:.1f} | {added / 1e6:.2f} M | {trainable / 1e6:.1f} M | {size} |", flush=True)


if __name__ == "__main__":
    cli.run(main)
